"""One generation: what is asked for, what has happened, and where its cache lies.

Knows token ids only, and nothing of scheduling or threads.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np

from edgeinfer.engine.cache import Overflow, SequenceCache
from edgeinfer.engine.prefix_index import Miss, Node
from edgeinfer.errors import InvalidRequestError
from edgeinfer.parameters import REQUEST
from edgeinfer.sampling.params import SamplingParams

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeinfer.engine.constraint import Constraint
    from edgeinfer.engine.hooks import Hook

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "error"]

# Measured, CPython 3.11: a request with its `Generation`, one of its biases, 256 events unread.
REQUEST_BYTES, _BIAS_BYTES, _EVENTS_BYTES = 2816, 112, 40 << 10
ID_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """`n_pinned` tokens at the start stay visible for ever when the context slides.

    With `speculation` tokens are guessed ahead where that is faster; the answer is the same. What
    has a larger `priority` runs first, and of equals what came first. An answer is what a
    `constraint` allows, and ends with it. `borders` are numbers of
    tokens behind which later prompts are likely to differ, the ends of messages; what is kept of
    the first `n_stable` tokens is the last to be given up. `n_beside` bytes are held for who asks
    for it as long as it waits, such as its stop strings.
    """

    ids: SequenceOf[int]
    params: SamplingParams
    max_tokens: int | None = None
    overflow: Overflow = "error"
    stop_ids: frozenset[int] = frozenset()
    n_pinned: int = 0
    speculation: bool = False
    priority: int = 0
    borders: tuple[int, ...] = ()
    n_stable: int = 0
    hook: Hook | None = None
    constraint: Constraint | None = None
    n_beside: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            REQUEST["max_tokens"].check(self.max_tokens)
        if type(self.priority) is not int:
            raise InvalidRequestError(
                f"priority is {self.priority!r}; it must be a whole number, larger ones go first",
                param="priority",
            )

    @property
    def n_bytes(self) -> int:
        """About what it takes while it waits, its ids in an array."""
        n_biases = len(self.params.logit_bias)
        return REQUEST_BYTES + ID_BYTES * len(self.ids) + _BIAS_BYTES * n_biases + self.n_beside

    @property
    def can_speculate(self) -> bool:
        # Mirostat's state after a token is known only once the token is.
        # And who is shown steps is shown none that did not happen.
        return self.speculation and self.params.mirostat == 0 and self.hook is None


class Prefilled(NamedTuple):
    """`done` of `total` prompt tokens are in the cache, `cached` of them computed by others.

    `miss` tells why the others were not.
    """

    done: int
    total: int
    cached: int
    at: float  # time.perf_counter(), taken by the engine
    miss: Miss = ""


class Token(NamedTuple):
    """A sampled token; log-probabilities where they were asked for."""

    id: int
    at: float
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Finished(NamedTuple):
    """The last event. `stop_id` is the token that ended the generation, if one did."""

    reason: FinishReason
    at: float
    stop_id: int | None = None
    error: BaseException | None = None


EngineEvent: TypeAlias = Prefilled | Token | Finished


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one generation; `ids` are the prompt and what was generated after it."""

    ids: array[int]
    n_prompt: int
    cache: SequenceCache
    n_cached: int = 0
    mu: float | None = None  # mirostat's state
    # The store's: why no more was cached; its nodes in the index; where to enter what it has
    # computed, with what rank; tokens up to the last state that prompts may go on at; another that
    # begins alike, with how many tokens.
    miss: Miss = ""
    path: list[Node] = field(default_factory=list)
    borders: list[tuple[int, int]] = field(default_factory=list)
    n_marked: int = 0
    leader: tuple[Sequence, int] | None = None
    is_behind: bool = False  # the index may hold more of it than it does itself

    def progress(self, at: float) -> Prefilled:
        done = self.cache.n_tokens
        return Prefilled(done, self.n_prompt, self.n_cached, at, self.miss)

    @property
    def n_bytes(self) -> int:
        """About what it takes beside its request while it gives way to others, events unread."""
        return _EVENTS_BYTES + ID_BYTES * len(self.ids)

    @property
    def n_generated(self) -> int:
        return len(self.ids) - self.n_prompt

    @property
    def n_waiting(self) -> int:
        """Tokens whose K and V are not stored yet: 1 while decoding."""
        return len(self.ids) - self.cache.n_tokens


class Work(Protocol):
    """What a part of a step is done for."""

    is_cancelled: bool
    rank: Rank
    hook: Hook | None

    @property
    def sequences(self) -> list[Sequence]:
        """Those that hold pages for it, while it runs."""
        ...


# Who goes first, ascending: the largest priority, then who came first.
Rank: TypeAlias = tuple[int, int]


@dataclass(slots=True)
class Rows:
    """A part of a step: the next `n` rows of a sequence, with the output of the last ones.

    The last rows may be `drafts`: guesses of tokens that the sequence does not have yet.
    """

    sequence: Sequence
    n: int
    n_wanted: int
    work: Work
    drafts: tuple[int, ...] = ()

    @property
    def is_decoding(self) -> bool:
        """Whether it goes on from an answer, and reads nothing of a prompt or of what was lost."""
        return self.n == self.n_wanted and len(self.sequence.ids) > self.sequence.n_prompt

    def history(self, n: int) -> NDArray[np.int32]:
        """The last `n` tokens before the drafts, all if n is -1, and the drafts."""
        ids = self.sequence.ids
        before = ids if n < 0 else ids[max(0, len(ids) - n) :]
        return np.array([*before, *self.drafts], np.int32)

    def with_drafts(self, tokens: Iterable[int]) -> Rows:
        """With these drafts instead."""
        drafts = tuple(tokens)
        n = len(drafts) - len(self.drafts)
        return Rows(self.sequence, self.n + n, self.n_wanted + n, self.work, drafts)
