"""Mirostat 1 and 2 (Basu et al. 2021): hold the surprise of the tokens near tau."""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.native.sampling.candidates import (
    draw,
    has,
    keep,
    n_sorted,
    open_all,
    scaled,
    sort_to,
    token,
    total_weight,
)
from edgeinfer.kernels.cpu.native.sampling.chain import inverse_temperature
from edgeinfer.kernels.cpu.native.sampling.numbers import LN2, LOG2_E, exp, log, uniforms
from edgeinfer.kernels.cpu.native.sampling.table import param

jit = njit(error_model="numpy")


@jit
def mirostat(c, row, logits, n_vocab):
    """A token, and mu for the next one."""
    inverse, mu = inverse_temperature(param(row, "temperature")), param(row, "mu")
    open_all(c, logits, n_vocab)
    if param(row, "mirostat") == 1:
        n = sort_to(c, _zipf_k(c, inverse, mu, n_vocab))
    else:
        n, log_total = 1, log(total_weight(c, inverse))
        while has(c, n) and (log_total - scaled(c, n, inverse)) * LOG2_E <= mu:
            n += 1
    keep(c, n)
    share, _ = uniforms(param(row, "seed"), param(row, "index"))
    total = total_weight(c, inverse)
    i = draw(c, inverse, share * total)
    surprise = (log(total) - scaled(c, i, inverse)) * LOG2_E
    return token(c, i), mu - param(row, "mirostat_eta") * (surprise - param(row, "mirostat_tau"))


@jit
def _zipf_k(c, inverse, mu, n_vocab):
    """How many candidates mirostat 1 keeps, from Zipf's exponent of the first 100."""
    products, squares = 0.0, 0.0
    for i in range(min(99, n_sorted(c) - 1)):
        t = log((float(i) + 2.0) / (float(i) + 1.0))
        products += t * (scaled(c, i, inverse) - scaled(c, i + 1, inverse))
        squares += t * t
    if not products > 0.0:
        return n_vocab
    s = products / squares
    epsilon = s - 1.0
    above = epsilon * exp(mu * LN2)
    below = 1.0 - exp(-epsilon * log(float(n_vocab)))
    if below == 0.0 or not 0.0 < above / below < 1e300:
        return n_vocab
    k = exp(log(above / below) / s)
    return n_vocab if k >= float(n_vocab) else max(1, int(k))
