"""exp, log and sums in float64, rounded as kernels round them: samplers must agree bit for bit.

Sums of a vocabulary go by chunks: see `sampler`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
LN2, LOG2_E = 0.6931471805599453, 1.4426950408889634
_ROUND = 6755399441055744.0  # 1.5 * 2**52: adding it rounds to an integer
_FACTORIALS = tuple(1.0 / math.factorial(k) for k in range(9, 1, -1))
_ODD = tuple(1.0 / k for k in range(19, 1, -2))
_SUM_CHUNK = 4096


def exp(x: Floats) -> Floats:
    """e**x to 1e-11; 0 below -700, and no larger than at 700."""
    inside = np.minimum(np.maximum(x, -708.0), 700.0)
    t = inside * LOG2_E + _ROUND
    n = t - _ROUND
    r = (inside - n * _LN2_HIGH) - n * _LN2_LOW
    p = np.full_like(r, _FACTORIALS[0])
    for c in (*_FACTORIALS[1:], 1.0, 1.0):
        p = p * r + c
    power = (t.view(np.uint64) << np.uint64(52)) + np.uint64(1023 << 52)
    result: Floats = np.where(x < -700.0, 0.0, p * power.view(np.float64))
    return result


def exp1(x: float) -> float:
    return float(exp(np.array([x]))[0])


def log(x: float) -> float:
    """Natural logarithm of a positive float."""
    bits = int(np.float64(x).view(np.int64))
    e = float((bits >> 52) - 1023)
    m = float(np.int64(bits & ((1 << 52) - 1) | 1023 << 52).view(np.float64))
    if m > 1.4142135623730951:
        m, e = m * 0.5, e + 1.0
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = _ODD[0]
    for c in (*_ODD[1:], 1.0):
        p = p * z + c
    return e * _LN2_HIGH + (2.0 * s * p + e * _LN2_LOW)


def sum_vocabulary(x: Floats) -> float:
    """Of a value for each token, in chunks (see above)."""
    padded = np.zeros((-(-len(x) // _SUM_CHUNK), _SUM_CHUNK))
    padded.reshape(-1)[: len(x)] = x
    lanes = np.cumsum(padded.reshape(len(padded), -1, 8), axis=1)[:, -1]
    for width in (4, 2, 1):
        lanes = lanes[:, :width] + lanes[:, width:]
    return add_up(lanes[:, 0])


def add_up(x: Floats) -> float:
    """From left to right."""
    return float(np.cumsum(x)[-1])
