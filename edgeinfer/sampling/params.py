"""How a token is picked: the parameters of a request, and the flat table that backends read.

Knows no logits: the chain itself is in `sampler.py` and, natively, in the kernel `sample`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgeinfer.errors import InvalidRequestError
from edgeinfer.parameters import MAX_LOGPROBS, SAMPLING, checked
from edgeinfer.sampling.recommended import recommended

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DEFAULTS = {name: parameter.default for name, parameter in SAMPLING.items()}


@dataclass(frozen=True, init=False)
class SamplingParams:
    """How tokens of one request are picked; ranges and defaults are those of `SAMPLING`.

    The chain: logit_bias, penalties, DRY, top_n_sigma, top_k, typical_p, top_p, min_p, XTC,
    temperature, draw. Mirostat replaces all but logit_bias and temperature. A temperature of 0
    or less picks the highest logit after bias and penalties.
    """

    temperature: float
    top_k: int  # 0 or less: off
    top_p: float  # 1: off
    min_p: float  # 0: off
    typical_p: float  # 1: off
    top_n_sigma: float  # 0 or less: off
    xtc_probability: float
    xtc_threshold: float  # above 0.5: off
    repeat_last_n: int  # -1: the whole sequence
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    dry_multiplier: float  # 0: off
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int  # -1: the whole sequence
    dry_sequence_breakers: tuple[str, ...]
    dynatemp_range: float
    dynatemp_exponent: float
    mirostat: int  # or 1 or 2
    mirostat_tau: float
    mirostat_eta: float
    min_keep: int
    seed: int | None  # None: drawn by `resolve`
    logit_bias: Mapping[int, float]
    logprobs: int | None  # the chosen token's and those of the n likeliest
    # The breakers as tokens, (head, *tail), found with `breaker_tokens` when DRY is on.
    dry_breaker_tokens: tuple[tuple[int, ...], ...]

    def __init__(
        self, *, dry_breaker_tokens: tuple[tuple[int, ...], ...] = (), **given: Any
    ) -> None:
        values = _DEFAULTS | checked("SamplingParams", given, SAMPLING)
        vars(self).update(values, dry_breaker_tokens=dry_breaker_tokens)

    @classmethod
    def resolve(
        cls, given: Mapping[str, Any], model_defaults: Mapping[str, Any] | None = None
    ) -> SamplingParams:
        """What the user set, else what the file recommends, else the default; a seed is drawn.

        `given` was `checked` against SAMPLING. `model_defaults` are the file's
        `general.sampling.*` values, with or without that prefix.
        """
        values = recommended(model_defaults or {}, but=given) | dict(given)
        if "seed" not in values:
            import secrets  # 2 ms that a given seed saves

            values["seed"] = secrets.randbits(32)
        return cls._of(values)

    def with_breakers(self, tokens: tuple[tuple[int, ...], ...]) -> SamplingParams:
        """The same, where these sequences of tokens stop a DRY match."""
        return self._of({name: getattr(self, name) for name in SAMPLING}, tokens)

    @classmethod
    def _of(
        cls, values: dict[str, Any], breakers: tuple[tuple[int, ...], ...] = ()
    ) -> SamplingParams:
        """From values that were checked."""
        params = cls.__new__(cls)
        vars(params).update(_DEFAULTS | values, dry_breaker_tokens=breakers)
        return params

    def check_vocabulary(self, n_vocab: int) -> None:
        """Raise for a token id that the model does not have."""
        for token in self.logit_bias:
            if token >= n_vocab:
                raise InvalidRequestError(
                    f"logit_bias names token {token}; the vocabulary has 0 .. {n_vocab - 1}",
                    param="logit_bias",
                )

    @property
    def has_penalties(self) -> bool:
        changes = (self.repeat_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return self.mirostat == 0 and self.repeat_last_n != 0 and any(changes)

    @property
    def has_dry(self) -> bool:
        on = self.dry_multiplier > 0 and self.dry_base >= 1 and self.dry_penalty_last_n != 0
        return self.mirostat == 0 and on

    @cached_property
    def is_greedy(self) -> bool:
        """Whether a token is that of the largest logit, none changed, and nothing else is asked."""
        changes = self.logit_bias or self.has_penalties or self.has_dry
        return self.temperature <= 0 and not changes and self.logprobs is None

    @cached_property
    def n_history(self) -> int:
        """How many of the latest tokens the chain looks at; -1 for all."""
        wanted = [self.repeat_last_n] * self.has_penalties
        wanted += [self.dry_penalty_last_n] * self.has_dry
        return -1 if -1 in wanted else max(wanted, default=0)

    @cached_property
    def bias_arrays(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        ids = np.array(sorted(self.logit_bias), np.int32)
        values = np.array([self.logit_bias[int(i)] for i in ids], np.float64)
        with np.errstate(over="ignore"):
            return ids, values.astype(np.float32)

    @cached_property
    def breaker_array(self) -> NDArray[np.int32]:
        """n heads ascending, n ends of tails counted from the first tail, then the tails."""
        sequences = sorted(set(self.dry_breaker_tokens))
        ends = np.cumsum([len(s) - 1 for s in sequences], dtype=np.int64)
        tails = [t for s in sequences for t in s[1:]]
        return np.array([*(s[0] for s in sequences), *ends, *tails], np.int32)

    @cached_property
    def words(self) -> NDArray[np.int64]:
        """The fields of ROW that are the same for every token of a request."""
        row = np.zeros(1, ROW)
        for name in _NUMBERS:
            row[name] = getattr(self, name)
        ids, values = self.bias_arrays
        row["bias_ids"], row["bias_values"] = ids.ctypes.data, values.ctypes.data
        row["n_bias"] = len(ids)
        row["breakers"] = self.breaker_array.ctypes.data
        row["n_breakers"] = len(set(self.dry_breaker_tokens))
        row["n_logprobs"] = -1 if self.logprobs is None else self.logprobs
        row["repeat_last_n"] = self.repeat_last_n if self.has_penalties else 0
        row["dry_penalty_last_n"] = self.dry_penalty_last_n if self.has_dry else 0
        return row.view(np.int64)[: len(_STATIC)]


def breaker_tokens(
    breakers: Sequence[str], pieces: Sequence[bytes], encode: Callable[[str], Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """Token sequences that stop a DRY match, for the vocabulary whose tokens read `pieces`.

    A token containing a breaker is one by itself; a token ending in the start of a breaker is
    one when followed by the tokens of the rest (at most 20, so that the search stays linear).
    """
    as_read = (_LONE_SURROGATE.sub("\ufffd", text).encode() for text in breakers)
    wholes = list(dict.fromkeys(as_read))
    most = max(map(len, pieces), default=0)  # bytes of a token
    short = [whole for whole in wholes if len(whole) <= most]
    found: set[tuple[int, ...]] = {
        (id,) for whole in short for id, piece in enumerate(pieces) if whole in piece
    }
    begun: dict[bytes, list[bytes]] = {}  # the breakers that begin so
    for whole in wholes:
        for n in range(1, min(most + 1, len(whole))):
            begun.setdefault(whole[:n], []).append(whole)
    rests: dict[bytes, tuple[int, ...]] = {}
    longest = max(map(len, begun), default=0)
    for id, piece in enumerate(pieces):
        for n in range(1, min(longest, len(piece)) + 1):
            for whole in begun.get(piece[-n:], ()):
                rest = whole[n:]
                if whole in piece:
                    continue
                if rest not in rests:
                    rests[rest] = tuple(encode(_decode(rest)))[:20]
                found.add((id, *rests[rest]))
    return tuple(sorted(found))


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def _decode(tail: bytes) -> str:
    return tail.decode(errors="ignore")


# -- the table -----------------------------------------------------------------------------------

# One row as backends read it, by name; every field has 8 bytes. First the numbers of
# SamplingParams, as they are declared there, and what else is the same for all tokens of a request.
_NUMBERS = tuple(f.name for f in fields(SamplingParams) if f.type in ("int", "float"))
_STATIC = (*_NUMBERS, "breakers", "n_breakers", "bias_ids", "bias_values", "n_bias", "n_logprobs")
_DYNAMIC = ("seed", "index", "history", "n_history", "mu")
_DYNAMIC_FIELDS = struct.Struct("=QqQqd")
_FLOATS = {"mu", *(f.name for f in fields(SamplingParams) if f.type == "float")}
ROW = np.dtype([(n, "f8" if n in _FLOATS else "i8") for n in (*_STATIC, *_DYNAMIC)])
# The rows of a step, and the addresses of what is left of each.
ARRAYS = np.dtype([(name, "i8") for name in (
    "rows", "row_bytes", "ids", "status", "logprobs", "mu", "top_ids", "top_logprobs",
    "max_logprobs", "masks",
)])  # fmt: skip

OK, NO_CANDIDATE = 0, 1  # status: NO_CANDIDATE where every logit is NaN, -inf or masked


def mask_words(n_vocab: int) -> int:
    """Words of 32 bits of a mask: a bit for each token, and one to spare."""
    return n_vocab // 32 + 1


@dataclass(frozen=True, slots=True, eq=False)
class SampleRow:
    """Everything that decides one token, besides its logits."""

    params: SamplingParams
    seed: int
    index: int  # of the token within its sequence: the counter of the random numbers
    history: NDArray[np.int32]  # tokens before it, at least the last `params.n_history`
    mu: float  # mirostat's state
    mask: NDArray[np.uint32] | None = None  # bit t % 32 of word t // 32: whether it may be token t


class Sampled(NamedTuple):
    """One token; `logprob` and `top` are those of the untouched logits, if asked for."""

    id: int
    logprob: float  # NaN where params.logprobs is None
    top: tuple[NDArray[np.int32], NDArray[np.float32]]
    mu: float  # for the next token
    status: int


class SampleTable:
    """The rows to sample in a step, in flat arrays that are filled anew for every step.

    Output arrays are indexed by row and valid until the next step. Masks take memory once used.
    """

    def __init__(self, max_rows: int, max_logprobs: int = MAX_LOGPROBS) -> None:
        self.rows = np.zeros(max_rows, ROW)
        self.ids = np.zeros(max_rows, np.int32)
        self.status = np.zeros(max_rows, np.int32)
        self.logprobs = np.full(max_rows, np.nan, np.float32)
        self.mu = np.zeros(max_rows, np.float64)
        self.top_ids = np.zeros((max_rows, max_logprobs), np.int32)
        self.top_logprobs = np.zeros((max_rows, max_logprobs), np.float32)
        self.n_rows = 0
        self._masks: NDArray[np.uint32] | None = None  # (max_rows, mask_words)
        self._mask_addresses = np.zeros(max_rows, np.int64)  # of each row's mask, 0 for none
        self._words = self.rows.view(np.int64).reshape(max_rows, -1)
        self._bytes = self.rows.view(np.uint8).data
        self._params: list[SamplingParams | None] = [None] * max_rows  # whose words a row has
        self._histories: list[NDArray[np.int32]] = [_EMPTY] * max_rows
        self._given: list[SampleRow | None] = [None] * max_rows  # once somebody has asked
        self._has_mirostat = False  # whether any row ever had: else nobody reads `mu`
        self._seeds = self.rows["seed"].view(np.uint64)
        self._indices, self._mus = self.rows["index"], self.rows["mu"]
        self._arguments = np.zeros(1, ARRAYS)
        for name in ("rows", "ids", "status", "logprobs", "mu", "top_ids", "top_logprobs"):
            self._arguments[name] = getattr(self, name).ctypes.data
        self._arguments["masks"] = self._mask_addresses.ctypes.data
        self._arguments["row_bytes"] = ROW.itemsize
        self._arguments["max_logprobs"] = max_logprobs
        self.address: int = self._arguments.ctypes.data

    @property
    def n_bytes(self) -> int:
        outputs = (self.ids, self.status, self.logprobs, self.mu, self.top_ids, self.top_logprobs)
        return self.rows.nbytes + sum(a.nbytes for a in outputs) + self._arguments.nbytes

    def clear(self) -> None:
        """Start a step with no rows."""
        self.n_rows = 0
        if self.has_masks:
            self._mask_addresses[:] = 0
            self._given[:] = [None] * len(self._given)

    def set_row(
        self,
        i: int,
        params: SamplingParams,
        seed: int,
        index: int,
        history: NDArray[np.int32] | Sequence[int] = (),
        mu: float | None = None,
    ) -> None:
        """Describe row i. The tokens of `history` must not change until the step is done.

        `mu` is the `mu` output of the token before, None for the first one.
        """
        assert (params.logprobs or 0) <= self.top_ids.shape[1]
        n, tokens, address = params.n_history, _EMPTY, 0
        if n != 0 and len(history):
            tokens = np.ascontiguousarray(history if n < 0 else history[-n:], np.int32)
            address = tokens.ctypes.data
        mu = 2.0 * params.mirostat_tau if mu is None else mu
        if self._params[i] is not params:
            self._has_mirostat = self._has_mirostat or params.mirostat != 0
            self._params[i] = None  # what a fault cuts short is written anew
            self._words[i, : len(_STATIC)] = params.words
        at = i * ROW.itemsize + 8 * len(_STATIC)
        _DYNAMIC_FIELDS.pack_into(self._bytes, at, seed, index, address, len(tokens), mu)
        self._histories[i], self._params[i], self._given[i] = tokens, params, None
        self.n_rows = max(self.n_rows, i + 1)

    def set_rows(
        self, params: Sequence[SamplingParams], indices: Sequence[int], mu: Sequence[float | None]
    ) -> None:
        """Describe all rows, with the seeds of their params, where none looks at a history.

        Rows that go on from the last step, as most do, are written together.
        """
        n = len(params)
        for i, each in enumerate(params):
            if self._params[i] is not each:
                self.set_row(i, each, each.seed or 0, indices[i], _EMPTY, mu[i])
        self._given[:n] = [None] * n
        self._indices[:n] = indices
        if self._has_mirostat:
            self._mus[:n] = [
                2.0 * each.mirostat_tau if of_row is None else of_row
                for each, of_row in zip(params, mu, strict=True)
            ]
        self.n_rows = n

    def go_on(self, indices: NDArray[np.int64]) -> None:
        """The rows of the last step, none of which looks at a history, with other indices."""
        self.n_rows = n = len(indices)
        self._given[:n] = [None] * n
        self._indices[:n] = indices

    def masks(self, start: int, n: int, n_vocab: int) -> NDArray[np.uint32]:
        """The masks (n, `mask_words`) of rows from `start` on, which are described: fill them."""
        if self._masks is None:
            self._masks = np.zeros((len(self.rows), mask_words(n_vocab)), np.uint32)
        masks = self._masks[start : start + n]
        assert masks.shape == (n, mask_words(n_vocab)), "rows of one vocabulary, as many as fit"
        first, stride = masks.ctypes.data, masks.strides[0]
        self._mask_addresses[start : start + n] = first + stride * np.arange(n)
        self._given[start : start + n] = [None] * n
        return masks

    @property
    def has_masks(self) -> bool:
        """Whether a row has one."""
        return self._masks is not None and bool(self._mask_addresses.any())

    def row(self, i: int) -> SampleRow:
        """What was given for row i."""
        given, params = self._given[i], self._params[i]
        if given is None:
            assert params is not None
            seed, index, mu = int(self._seeds[i]), int(self._indices[i]), float(self._mus[i])
            mask = self._masks[i] if self._masks is not None and self._mask_addresses[i] else None
            given = SampleRow(params, seed, index, self._histories[i], mu, mask)
            self._given[i] = given
        return given

    def is_greedy(self, n_rows: int) -> bool:
        """Whether the lowest id with the largest logit is all that is asked for, of any row."""
        return not self.has_masks and all(
            [params is not None and params.is_greedy for params in self._params[:n_rows]]
        )

    def store(self, i: int, sampled: Sampled) -> None:
        """Fill row i's outputs, for a backend that samples in Python."""
        self.ids[i], self.status[i], self.mu[i] = sampled.id, sampled.status, sampled.mu
        self.logprobs[i] = sampled.logprob
        ids, logprobs = sampled.top
        self.top_ids[i, : len(ids)], self.top_logprobs[i, : len(ids)] = ids, logprobs

    def top(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The likeliest tokens of row i and their logprobs, as many as were asked for."""
        n = max(0, int(self.rows["n_logprobs"][i]))
        return self.top_ids[i, :n].copy(), self.top_logprobs[i, :n].copy()


_EMPTY = np.zeros(0, np.int32)
