"""Vectors of texts: what the head would read of their tokens, pooled to one row a text.

Knows nothing of APIs. Texts are jobs of the engine, beside the answers that it computes.
"""

from __future__ import annotations

import math
import threading
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeinfer.backend import HeadReader
from edgeinfer.engine.generation import WAKE_SECONDS, LogitsJob, check_ids
from edgeinfer.engine.hooks import Hook, Step
from edgeinfer.engine.waits import Outcome
from edgeinfer.errors import (
    BusyError,
    ClosedError,
    ContextLengthError,
    EdgeInferError,
    InvalidRequestError,
    Keyword,
    another,
)
from edgeinfer.parameters import EMBED, POOLINGS, checked, id_list, shown
from edgeinfer.requesting import COUNTED_BEYOND
from edgeinfer.runtime import Runtime
from edgeinfer.stream import items
from edgeinfer.text.tokenizer import Tokenizer, TooManyTokens
from edgeinfer.watching import check_room


class Embedding:
    """The vectors of some texts, before they are computed, meanwhile and after."""

    def __init__(
        self, opened: Runtime, lists: Sequence[Sequence[int]], pooling: str, n_dims: int
    ) -> None:
        self.n_tokens = sum(map(len, lists))
        self._vectors = np.empty((len(lists), n_dims), np.float32)
        self._engine, self._lists, self._pooling = opened.engine, lists, pooling
        self._layer = opened.model.hparams.n_layers
        self._read = opened.head_reader
        self._lock = threading.Lock()
        self._waiting = deque(range(len(lists)))
        self._jobs: dict[int, LogitsJob | None] = {}  # of texts that run, None until it is made
        # More at a time would be in no step together, and make others wait.
        self._most_running = opened.plan.limits.max_sequences
        self._error: BaseException | None = None
        self._outcome = Outcome()
        self._tell: Callable[[], object] | None = None

    # -- who waits -------------------------------------------------------------------------------

    def begin(self) -> Embedding:
        """Begin, where that was not done; an interrupt ends it."""
        try:
            self._begin_more()
            self._end_if_over()
        except BaseException:  # each begins the next, also where nobody waits for them
            self.cancel()
            raise
        return self

    def result(self) -> NDArray[np.float32]:
        """The vectors, (texts, dimensions), once all are there; an interrupt ends them."""
        try:
            self.begin()
            while not self._outcome.wait(WAKE_SECONDS):
                self._engine.check_waiting()
        except BaseException:
            self.cancel()
            raise
        if self._error is not None:
            raise another(self._error)
        return self._vectors

    def check_waiting(self) -> None:
        """Raise unless there can be a result for who waits for it in this thread."""
        self._engine.check_waiting()

    def notify(self, tell: Callable[[], object]) -> None:
        """Call `tell` once there is a result, from any thread; it can't raise."""
        with self._lock:
            self._tell = tell
        if self._outcome.is_told:
            tell()

    def cancel(self) -> None:
        """End what is left, from any thread."""
        self._stop(ClosedError("the embedding was cancelled"))

    # -- any thread, most often the engine's -----------------------------------------------------

    def _begin_more(self) -> None:
        while self._begin_next():
            pass

    def _begin_next(self) -> bool:
        """Whether to begin another. One that is not taken on waits for those that run."""
        with self._lock:
            is_full = len(self._jobs) >= self._most_running
            if self._error is not None or not self._waiting or is_full:
                return False
            i, n_before = self._waiting.popleft(), len(self._jobs)
            self._jobs[i] = None
        ids = self._lists[i]
        pool = _Pool(self._read, self._layer, self._pooling, len(ids))
        hook = Hook(pool.take, residuals=(self._layer,))
        try:
            job = self._engine.job(ids, hook, partial(self._ended, i, pool))
            self._jobs[i] = job
            self._engine.begin(job)
        except BaseException as error:
            with self._lock:
                self._jobs.pop(i, None)  # an interrupted one may have begun, and ended
                if isinstance(error, BusyError) and n_before:
                    self._waiting.appendleft(i)
                    return not self._jobs  # all have ended since: none begins it but this one
            self._stop(error)
            if not isinstance(error, Exception):
                raise
            return False
        with self._lock:
            is_stopped = self._error is not None
        if is_stopped:
            self._cancel_jobs()
        return not is_stopped

    def _ended(self, i: int, pool: _Pool, error: BaseException | None) -> None:
        try:
            if error is not None:
                self._stop(error)
            elif self._error is None:
                self._vectors[i] = pool.vector(self._vectors.shape[1])
        except BaseException as own:
            self._stop(own)
        with self._lock:
            self._jobs.pop(i, None)
        self._begin_more()
        self._end_if_over()

    def _stop(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
        self._cancel_jobs()

    def _cancel_jobs(self) -> None:
        with self._lock:
            jobs = [job for job in self._jobs.values() if job is not None]
        for job in jobs:
            job.is_cancelled = True
        if jobs:
            self._engine.interrupt()

    def _end_if_over(self) -> None:
        with self._lock:
            is_whole = self._error is not None or not self._waiting
            if not is_whole or self._jobs or self._outcome.is_told:
                return
            self._outcome.tell()
            tell = self._tell
        if tell is not None:
            tell()


class _Pool:
    """One text's vector, from its rows as they come."""

    def __init__(
        self,
        read: HeadReader,
        layer: int,
        pooling: str,
        n_rows: int,
    ) -> None:
        self._read, self._layer, self._pooling, self._n_rows = read, layer, pooling, n_rows
        self._n_taken = 0
        self._sum: NDArray[np.float64] | None = None

    def take(self, step: Step) -> None:
        """Add the rows that were not taken yet."""
        rows = step.residuals[self._layer][max(0, self._n_taken - step.position) :]
        self._n_taken += len(rows)
        if self._pooling == "last":
            rows = rows[-1:] if self._n_taken == self._n_rows else rows[:0]
        # One after the other in float64: the same sum wherever steps have cut the text.
        with np.errstate(all="ignore"):  # what is no number is told of the whole
            for row in self._read(rows):
                if self._sum is None:
                    self._sum = row.astype(np.float64)
                else:
                    self._sum += row

    def vector(self, n_dims: int) -> NDArray[np.float64]:
        """The first values, of length 1 together; those of a zero vector stay zeros."""
        assert self._sum is not None and self._n_taken == self._n_rows, "rows are missing"
        values = self._sum[:n_dims] / (1 if self._pooling == "last" else self._n_rows)
        if not np.isfinite(values).all():
            raise EdgeInferError("the model yields an embedding that is no number")
        length = math.sqrt(math.fsum((values * values).tolist()))
        return values / length if length else values


# -- what is asked for ---------------------------------------------------------------------------


def embedding_of(opened: Runtime, texts: Any, given: dict[str, Any]) -> Embedding:
    """Of a text, token ids, or several of either, which has not begun; see `LLM.embed`."""
    options = checked("embed", given, EMBED)
    pooling = options.get("pooling") or opened.pooling
    if not opened.pooling:
        raise _without_pooling(opened)
    dim = opened.segment.hidden.dim
    n_dims = options.get("dimensions", dim)
    if n_dims > dim:
        raise InvalidRequestError(
            f"dimensions is {n_dims}; the model's embeddings have {dim}", param="dimensions"
        )
    truncate = options.get("truncate", False)
    lists = [_ids(opened, each, f"text {i}", truncate) for i, each in enumerate(_each(texts))]
    n_bytes = 4 * len(lists) * n_dims
    check_room(n_bytes, f"the vectors of {len(lists)} texts", ("give fewer at a time",))
    return Embedding(opened, lists, pooling, n_dims)


def _without_pooling(opened: Runtime) -> InvalidRequestError:
    model = opened.model
    found = f"{shown(model.name)} does not say how its embeddings are pooled"
    if model.pooling:
        found = f"{model.architecture}.pooling_type is {model.pooling!r}, which is not done here"
    ways = [Keyword("pooling", each) for each in POOLINGS]
    return InvalidRequestError(
        found, advice=("load it with ", ways[0], " or ", ways[1]), param="model"
    )


def _each(texts: Any) -> list[Any]:
    """Several texts; one, or one as token ids, is a list of it."""
    if isinstance(texts, str):
        return [texts]
    found = list(items(texts, "texts"))
    return [found] if found and isinstance(found[0], Integral) else found


def _ids(opened: Runtime, text: Any, name: str, truncate: bool) -> array[int]:
    """The tokens of a text as the model was trained to embed them; ids are taken as they are."""
    n_ctx, tokenizer = opened.plan.n_ctx, opened.tokenizer
    if isinstance(text, str):
        ids = _encoded(tokenizer, text, n_ctx, name, truncate)
    else:
        ids = id_list(text, name)
    check_ids(ids, tokenizer.n_vocab, "texts", name)
    if len(ids) > n_ctx:
        if not truncate:
            raise _too_long(name, f"{len(ids)}", len(ids), n_ctx)
        ids = ids[:n_ctx]
    return array("i", ids)  # a ninth of a list's bytes: there may be millions of them


def _encoded(tokenizer: Tokenizer, text: str, n_ctx: int, name: str, truncate: bool) -> list[int]:
    if truncate:  # of what is cut off in the end not all is read
        text = text[: (n_ctx + 1) * tokenizer.longest_text]
    most = None if truncate else n_ctx + COUNTED_BEYOND
    try:
        ids = tokenizer.encode(text, parse_special=True, most=most)
    except TooManyTokens as error:
        raise _too_long(name, f"at least {error.at_least}", error.at_least, n_ctx) from None
    if tokenizer.add_eos and tokenizer.eos_id is not None:
        ids = ids[: n_ctx - 1] if truncate else ids
        ids += [] if ids[-1:] == [tokenizer.eos_id] else [tokenizer.eos_id]
    return ids


def _too_long(name: str, counted: str, n_tokens: int, n_ctx: int) -> ContextLengthError:
    return ContextLengthError(
        f"{name} is {counted} tokens, the context holds {n_ctx}",
        advice=("raise ", Keyword("n_ctx"), ", shorten it, or give ", Keyword("truncate", True)),
        n_tokens=n_tokens,
        n_ctx=n_ctx,
    )
