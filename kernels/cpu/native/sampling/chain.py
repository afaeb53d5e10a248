"""The chain that picks a token: top_n_sigma, top_k, typical_p, top_p, min_p, XTC, temperature."""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.native.sampling.candidates import (
    draw,
    drop,
    entropy,
    first_token,
    has,
    keep,
    keep_two,
    largest,
    logit,
    n_sorted,
    open_all,
    open_first,
    scaled,
    sort_all,
    token,
    total_weight,
)
from edgeinfer.kernels.cpu.native.sampling.numbers import INF, exp, log, uniforms
from edgeinfer.kernels.cpu.native.sampling.table import param
from edgeinfer.kernels.cpu.native.sampling.vocabulary import deviation, largest_logit

jit = njit(error_model="numpy")


@jit
def pick(c, row, logits, n_vocab):
    """A token; there is a candidate among the logits."""
    share, chance = uniforms(param(row, "seed"), param(row, "index"))
    _top_n_sigma_and_top_k(c, row, logits, n_vocab)
    if param(row, "typical_p") < 1.0:
        _typical(c, row)
    if param(row, "top_p") < 1.0 or param(row, "min_p") > 0.0:
        _top_p_and_min_p(c, row)
    if _is_excluding(row, chance):
        _xtc(c, row)
    temperature = param(row, "temperature")
    if param(row, "dynatemp_range") > 0.0:
        temperature = _dynamic_temperature(c, row)
    if temperature <= 0.0:
        return first_token(c)
    inverse = inverse_temperature(temperature)
    return token(c, draw(c, inverse, share * total_weight(c, inverse)))


@jit
def inverse_temperature(temperature):
    return 1.0 / (temperature if temperature > 1e-30 else 1e-30)


@jit
def _top_n_sigma_and_top_k(c, row, logits, n_vocab):
    """Open the candidates that both leave, without sorting what they cut off."""
    lowest = -INF
    if param(row, "top_n_sigma") > 0.0:
        n_real, sigma = deviation(logits, n_vocab, c)
        if n_real > 1.0:
            lowest = largest_logit(logits, n_vocab, c) - param(row, "top_n_sigma") * sigma
    k = param(row, "top_k")
    if not 0 < k < n_vocab:
        k = n_vocab
    if k == n_vocab and lowest == -INF:
        open_all(c, logits, n_vocab)
        return
    floor = lowest - abs(lowest) * 1e-6 - 1e-30  # a float below `lowest`, whatever its rounding
    open_first(c, logits, n_vocab, k, floor)
    n = n_sorted(c)
    while n > 1 and logit(c, n - 1) < lowest:
        n -= 1
    keep(c, n)


@jit
def _top_p_and_min_p(c, row):
    """Both keep the first ones, so one walk does for both."""
    top_p, min_p = param(row, "top_p"), param(row, "min_p")
    first, min_keep = largest(c), param(row, "min_keep")
    target = top_p * total_weight(c, 1.0) if top_p < 1.0 else INF
    threshold = first + log(min_p) if min_p > 0.0 else -INF
    n, cum = 0, 0.0
    while has(c, n):
        x = logit(c, n)
        if x < threshold and n >= max(min_keep, 1):
            break
        if top_p < 1.0:
            cum += exp(x - first)
        n += 1
        if cum >= target and n >= min_keep:
            break
    keep(c, n)


# -- locally typical sampling --------------------------------------------------------------------


@jit
def _typical(c, row):
    """Keep the candidates whose surprise is nearest to the entropy.

    The distance falls, then rises along the candidates, so the two ends of a gap that grows meet
    them in order; of equal distances on the left the first comes first.
    """
    n = sort_all(c)
    mean, total = entropy(c)
    log_total = log(total)
    right = 0
    while right < n and log_total - scaled(c, right, 1.0) < mean:
        right += 1
    # [taken, right) are kept, but of equal distances at the left end [start, end) the first ones.
    start = taken = end = right
    limit = param(row, "typical_p") * total
    n_kept, cum = 0, 0.0
    while n_kept < n and not (cum > limit and n_kept >= param(row, "min_keep")):
        if taken == end and start > 0:
            end = start
            start = taken = _run_start(c, end - 1, log_total, mean)
        if taken < end and (
            right == n
            or _distance(c, taken, log_total, mean) <= _distance(c, right, log_total, mean)
        ):
            i = taken
            taken += 1
        else:
            i = right
            right += 1
        cum += exp(scaled(c, i, 1.0))
        n_kept += 1
    keep_two(c, start, taken, end, right)


@jit
def _distance(c, i, log_total, mean):
    return abs((log_total - scaled(c, i, 1.0)) - mean)


@jit
def _run_start(c, i, log_total, mean):
    """The first of the candidates up to i that are as far from the entropy as i is."""
    distance = _distance(c, i, log_total, mean)
    while i > 0 and _distance(c, i - 1, log_total, mean) == distance:
        i -= 1
    return i


# -- XTC and temperature -------------------------------------------------------------------------


@jit
def _is_excluding(row, chance):
    probability = param(row, "xtc_probability")
    return probability > 0.0 and param(row, "xtc_threshold") <= 0.5 and chance <= probability


@jit
def _xtc(c, row):
    """Exclude top choices: drop all but the last that reaches the threshold."""
    n = sort_all(c)
    limit = param(row, "xtc_threshold") * total_weight(c, 1.0)
    last = -1
    while last + 1 < n and exp(scaled(c, last + 1, 1.0)) >= limit:
        last += 1
    if last > 0 and n - last >= param(row, "min_keep"):
        drop(c, last)


@jit
def _dynamic_temperature(c, row):
    n = sort_all(c)
    temperature, around = param(row, "temperature"), param(row, "dynatemp_range")
    if n == 1:
        return temperature
    mean, _ = entropy(c)
    exponent = param(row, "dynatemp_exponent")
    lowest, highest = max(0.0, temperature - around), temperature + around
    share = mean / log(float(n))
    power = 1.0 if exponent == 0.0 else 0.0
    if share > 0.0:
        power = exp(exponent * log(share))
    return lowest + (highest - lowest) * power
