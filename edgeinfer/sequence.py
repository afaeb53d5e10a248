"""One generation: what is asked for, what has happened, and where its cache lies.

Knows token ids only, and nothing of batches or threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from edgeinfer.kvcache import CacheLayout, Overflow, SequenceCache
from edgeinfer.sampling import SamplingParams

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """`n_pinned` tokens at the start stay visible for ever when the context slides."""

    ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int | None = None
    overflow: Overflow = "error"
    stop_ids: frozenset[int] = frozenset()
    n_pinned: int = 0


@dataclass(frozen=True, slots=True)
class Prefilled:
    """`done` of `total` prompt tokens are in the cache, `cached` of them from before."""

    done: int
    total: int
    cached: int
    at: float  # time.perf_counter(), taken by the engine


@dataclass(frozen=True, slots=True)
class Token:
    """A sampled token; log-probabilities where they were asked for."""

    id: int
    at: float
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event. `stop_id` is the token that ended the generation, if one did."""

    reason: FinishReason
    at: float
    stop_id: int | None = None
    error: BaseException | None = None


Event: TypeAlias = Prefilled | Token | Finished


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one generation; `ids` are the prompt and what was generated after it."""

    ids: list[int]
    n_prompt: int
    cache: SequenceCache
    n_cached: int = 0
    mu: float | None = None  # mirostat's state

    @property
    def n_generated(self) -> int:
        return len(self.ids) - self.n_prompt

    @property
    def n_waiting(self) -> int:
        """Tokens whose K and V are not stored yet: 1 while decoding."""
        return len(self.ids) - self.cache.n_tokens

    def common_prefix(self, ids: tuple[int, ...], layout: CacheLayout) -> int:
        """How many of `ids` this sequence's cache can serve, the last one excepted."""
        if layout != self.cache.layout:
            return 0
        stored = self.ids[: self.cache.n_tokens]
        limit = min(len(stored), len(ids) - 1)
        n = next((i for i in range(limit) if stored[i] != ids[i]), limit)
        return n if not self.cache.has_slid or n == len(stored) else 0
