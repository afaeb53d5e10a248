"""From logits to a token, in NumPy: what every backend's sampler must agree with, id for id.

Knows no sequences and keeps no state: history and token index in, id out.

Arithmetic is float64, each operation rounded once, in the order written here, with an exp and a
log of our own: so kernels give the same bits. Candidates are ordered by logit, ties by id. NaN and
-inf are never candidates; +inf counts as the largest float.

A sum over candidates adds them in their order, from left to right. Before the first `keep`, which
may keep all, it adds the vocabulary in the order of ids instead, what is no candidate as +0; so
does any other sum over the vocabulary. Ids are cut into chunks of 4,096, so that a device can add
chunks side by side. In a chunk, 8 lanes start at +0, and lane j adds values j, j + 8, j + 16, ...;
then lane l adds lane l + 4, then l + 2, then l + 1: lane 0 is the chunk's sum. Sums of chunks are
added from left to right.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from edgeinfer.sampling.exact_math import (
    LN2,
    LOG2_E,
    Floats,
    add_up,
    exp,
    exp1,
    log,
    sum_vocabulary,
)
from edgeinfer.sampling.params import (
    NO_CANDIDATE,
    OK,
    Sampled,
    SampleRow,
    SampleTable,
    SamplingParams,
)
from edgeinfer.sampling.philox import uniforms

_LARGEST = float(np.finfo(np.float32).max)
DRY_LONGEST = 128  # tokens of a repeat that count: by then its penalty is past any logit


def sample_reference(logits: NDArray[np.float32], row: SampleRow) -> Sampled:
    """The token that follows, given the logits of one position (V,)."""
    params = row.params
    raw = _clean(logits)
    changed = _changed(raw, row)
    token, mu, status = 0, row.mu, OK
    if np.max(changed) == -np.inf:
        status = NO_CANDIDATE
    elif params.temperature <= 0:
        token = int(np.argmax(changed))
    elif params.mirostat:
        token, mu = _mirostat(_Candidates(changed), row)
    else:
        token = _chain(_Candidates(changed), row)
    logprob, top = _logprobs(raw, token, params.logprobs)
    return Sampled(token, logprob, top, mu, status)


class ReferenceSampler:
    """`sample_reference` for the rows of a step: a `batch.Sampler` that needs no kernels."""

    n_bytes = building_bytes = 0  # that it holds from one call to the next

    def open(self) -> None:
        pass

    def sample(self, logits: NDArray[np.float32], table: SampleTable) -> None:
        """Fill the outputs of a table's first R rows from logits (R, V)."""
        for i, row in enumerate(logits):
            table.store(i, sample_reference(row, table.row(i)))

    def close(self) -> None:
        pass


# -- logits that are changed one by one ----------------------------------------------------------


def _clean(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Without NaN, +inf and -0."""
    clean = np.where(np.isnan(logits), np.float32(-np.inf), logits) + np.float32(0)
    finite: NDArray[np.float32] = np.minimum(clean, np.float32(_LARGEST))
    return finite


def _changed(raw: NDArray[np.float32], row: SampleRow) -> NDArray[np.float32]:
    params, logits = row.params, raw.copy()
    if row.mask is not None:
        is_allowed = np.unpackbits(row.mask.view(np.uint8), count=len(logits), bitorder="little")
        logits[is_allowed == 0] = -np.inf
    for token, bias in zip(*params.bias_arrays, strict=True):
        if token < len(logits):
            _set(logits, token, float(logits[token]) + float(bias))
            if bias == -np.inf:
                logits[token] = -np.inf
    if params.has_penalties:
        _penalise(logits, params, _last(row.history, params.repeat_last_n))
    if params.has_dry:
        _dry(logits, params, _last(row.history, params.dry_penalty_last_n))
    return _clean(logits)


def _last(history: NDArray[np.int32], n: int) -> list[int]:
    return list(map(int, history if n < 0 else history[max(0, len(history) - n) :]))


def _set(logits: NDArray[np.float32], token: int, value: float) -> None:
    """Change a logit, unless it is -inf; a finite one stays finite."""
    if logits[token] > -np.inf:
        logits[token] = np.float32(max(-_LARGEST, min(_LARGEST, value)))


def _penalise(logits: NDArray[np.float32], params: SamplingParams, history: list[int]) -> None:
    for token, n in Counter(history).items():
        if not 0 <= token < len(logits):
            continue
        x = float(logits[token])
        x = x * params.repeat_penalty if x <= 0 else x / params.repeat_penalty
        _set(logits, token, x - (n * params.frequency_penalty + params.presence_penalty))


def _dry(logits: NDArray[np.float32], params: SamplingParams, history: list[int]) -> None:
    """Penalise tokens that would continue a repeat of the latest tokens.

    DRY (p-e-w 2024): a match of n tokens before the token costs multiplier * base**(n - allowed).
    """
    allowed, n_history = params.dry_allowed_length, len(history)
    if n_history <= allowed:
        return
    limit = _dry_limit(params, history)
    if limit < allowed:
        return
    limit = min(limit, allowed + DRY_LONGEST)
    longest: dict[int, int] = {}
    for back in range(1, n_history):
        n = 0
        while n < limit and n + back < n_history and history[-1 - n] == history[-1 - n - back]:
            n += 1
        token = history[-back]
        if n >= allowed:
            longest[token] = max(n, longest.get(token, 0))
    for token, n in longest.items():
        if 0 <= token < len(logits) and (token,) not in params.dry_breaker_tokens:
            penalty = params.dry_multiplier
            for _ in range(n - allowed):
                penalty = min(penalty * params.dry_base, _LARGEST)
            _set(logits, token, float(logits[token]) - penalty)


def _dry_limit(params: SamplingParams, history: list[int]) -> int:
    """How many of the latest tokens come after the last breaker."""
    for back in range(len(history)):
        after = history[len(history) - back :]
        lengths = [
            len(tail)
            for head, *tail in params.dry_breaker_tokens
            if head == history[-1 - back] and after[: len(tail)] == tail
        ]
        if lengths:
            return back - max(lengths)
    return len(history)


# -- the chain -----------------------------------------------------------------------------------


class _Candidates:
    """Token ids in descending order of logit; `whole` until a sampler has cut some off."""

    def __init__(self, logits: NDArray[np.float32]) -> None:
        self.all = logits.astype(np.float64)
        order = np.lexsort((np.arange(len(logits)), -self.all))
        self.ids = order[self.all[order] > -np.inf]
        self.whole = True

    @property
    def logits(self) -> Floats:
        kept: Floats = self.all[self.ids]
        return kept

    def keep(self, ids: NDArray[np.intp]) -> None:
        self.ids, self.whole = ids, False

    def scaled(self, inverse: float = 1.0) -> Floats:
        """(logit - largest) / temperature."""
        scaled: Floats = (self.logits - self.all[self.ids[0]]) * inverse
        return scaled

    def sum(self, terms: Floats) -> float:
        """Of a term for each candidate: over the vocabulary, in its order, while it is whole."""
        if not self.whole:
            return add_up(terms)
        by_id = np.zeros(len(self.all))
        by_id[self.ids] = terms
        return sum_vocabulary(by_id)

    def total(self, inverse: float = 1.0) -> float:
        """Sum of the exp of `scaled`."""
        return self.sum(exp(self.scaled(inverse)))


def _chain(c: _Candidates, row: SampleRow) -> int:
    p = row.params
    draw, chance = uniforms(row.seed, row.index)
    if p.top_n_sigma > 0 and len(c.ids) > 1:
        c.keep(c.ids[c.logits >= _sigma_limit(c.all, p.top_n_sigma)])
    if 0 < p.top_k < len(c.all):
        c.keep(c.ids[: p.top_k])
    if p.typical_p < 1:
        _typical(c, p)
    if p.top_p < 1:
        reached = np.cumsum(exp(c.scaled())) >= p.top_p * c.total()
        c.keep(c.ids[: _first(reached, p.min_keep)])
    if p.min_p > 0:
        below = c.logits < c.logits[0] + log(p.min_p)
        below[: max(p.min_keep, 1)] = False
        c.keep(c.ids[~below])
    if p.xtc_probability > 0 and p.xtc_threshold <= 0.5 and chance <= p.xtc_probability:
        _xtc(c, p)
    temperature = p.temperature
    if p.dynatemp_range > 0 and len(c.ids) > 1:
        temperature = _dynamic_temperature(c, p)
    if temperature <= 0:
        return int(c.ids[0])
    inverse = inverse_temperature(temperature)
    return int(c.ids[_draw(exp(c.scaled(inverse)), c.total(inverse), draw)])


def inverse_temperature(temperature: float) -> float:
    return 1.0 / max(temperature, 1e-30)


def _first(reached: NDArray[np.bool_], min_keep: int) -> int:
    """How many to keep: up to the first that reaches, but at least `min_keep`."""
    hits = np.flatnonzero(reached)
    hits = hits[hits + 1 >= min_keep]
    return int(hits[0]) + 1 if len(hits) else len(reached)


def _sigma_limit(logits: Floats, n_sigma: float) -> float:
    finite = logits > -np.inf
    n = float(np.count_nonzero(finite))
    mean = sum_vocabulary(np.where(finite, logits, 0.0)) / n
    off = np.where(finite, logits, mean) - mean
    return float(np.max(logits)) - n_sigma * math.sqrt(sum_vocabulary(off * off) / n)


def _entropy(c: _Candidates) -> tuple[float, Floats, float]:
    """The entropy, and all exp(scaled) with their sum."""
    scaled = c.scaled()
    weights = exp(scaled)
    total = c.sum(weights)
    return log(total) - c.sum(weights * scaled) / total, weights, total


def _typical(c: _Candidates, p: SamplingParams) -> None:
    """Locally typical sampling (Meister et al. 2022)."""
    entropy, weights, total = _entropy(c)
    order = np.argsort(np.abs((log(total) - c.scaled()) - entropy), kind="stable")
    above = np.cumsum(weights[order]) > p.typical_p * total
    c.keep(c.ids[np.sort(order[: _first(above, p.min_keep)])])


def _xtc(c: _Candidates, p: SamplingParams) -> None:
    """Exclude top choices (p-e-w 2024): drop all but the last that reaches the threshold."""
    weights = exp(c.scaled())
    last = int(np.count_nonzero(weights >= p.xtc_threshold * c.sum(weights))) - 1
    if last > 0 and len(c.ids) - last >= p.min_keep:
        c.keep(c.ids[last:])


def _dynamic_temperature(c: _Candidates, p: SamplingParams) -> float:
    entropy, _, _ = _entropy(c)
    lowest, highest = max(0.0, p.temperature - p.dynatemp_range), p.temperature + p.dynatemp_range
    share = entropy / log(float(len(c.ids)))
    power = exp1(p.dynatemp_exponent * log(share)) if share > 0 else 0.0**p.dynatemp_exponent
    return lowest + (highest - lowest) * power


def _draw(weights: Floats, total: float, draw: float) -> int:
    """The first whose running sum exceeds draw * total; the last with any weight if none does."""
    above = np.flatnonzero(np.cumsum(weights) > draw * total)
    return int(above[0]) if len(above) else int(np.flatnonzero(weights)[-1])


# -- mirostat ------------------------------------------------------------------------------------


def _mirostat(c: _Candidates, row: SampleRow) -> tuple[int, float]:
    """Mirostat 1 or 2 (Basu et al. 2021): hold the surprise near tau. Returns id and next mu."""
    p = row.params
    inverse = inverse_temperature(p.temperature)
    scaled = c.scaled(inverse)
    if p.mirostat == 1:
        n = _mirostat_k(scaled, row.mu, len(c.all))
    else:
        surprise = (log(c.total(inverse)) - scaled) * LOG2_E
        n = max(1, int(np.count_nonzero(surprise <= row.mu)))
    c.keep(c.ids[:n])
    total = c.total(inverse)
    i = _draw(exp(scaled[:n]), total, uniforms(row.seed, row.index)[0])
    surprise_i = (log(total) - float(scaled[i])) * LOG2_E
    return int(c.ids[i]), row.mu - p.mirostat_eta * (surprise_i - p.mirostat_tau)


def _mirostat_k(scaled: Floats, mu: float, n_vocab: int) -> int:
    """How many candidates to keep, from Zipf's exponent estimated on the first 100."""
    products = squares = 0.0
    for i in range(min(99, len(scaled) - 1)):
        t = log((i + 2.0) / (i + 1.0))
        products += t * (float(scaled[i]) - float(scaled[i + 1]))
        squares += t * t
    if not products > 0:
        return len(scaled)
    s = products / squares
    epsilon = s - 1.0
    above = epsilon * exp1(mu * LN2)
    below = 1.0 - exp1(-epsilon * log(float(n_vocab)))
    if below == 0 or not 0 < above / below < 1e300:
        return len(scaled)
    k = exp1(log(above / below) / s)
    return len(scaled) if k >= len(scaled) else max(1, int(k))


# -- log probabilities ---------------------------------------------------------------------------


def _logprobs(
    raw: NDArray[np.float32], token: int, n: int | None
) -> tuple[float, tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """Of the token and of the n likeliest, over the untouched logits as llama.cpp's server does.

    Where there are fewer than n candidates the rest reads (-1, -inf).
    """
    ids = np.full(n or 0, -1, np.int32)
    values = np.full(n or 0, -np.inf, np.float32)
    if n is None:
        return math.nan, (ids, values)
    c = _Candidates(raw)
    if not len(c.ids):
        return -math.inf, (ids, values)
    log_total = log(c.total())
    scaled = c.all - c.logits[0] - log_total
    best = c.ids[:n]
    ids[: len(best)], values[: len(best)] = best, scaled[best]
    return float(np.float32(scaled[token])), (ids, values)
