"""One step as a program reads it, and what it yields as it becomes part of its sequences.

Knows nothing of scheduling or threads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from edgeinfer.batch import Batch, Outputs
from edgeinfer.engine.generation import Generation, LogitsJob
from edgeinfer.engine.sequence import FinishReason, Rows, Sequence, Token
from edgeinfer.errors import EdgeInferError
from edgeinfer.sampling.params import OK, SampleTable

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Ends(Protocol):
    """Who is told that a request has ended."""

    def finish(
        self, work: Generation | LogitsJob, reason: FinishReason, stop_id: int | None = None
    ) -> None: ...

    def fail(self, work: Generation | LogitsJob, error: BaseException) -> None: ...


# -- before it -----------------------------------------------------------------------------------


def build_batch(parts: SequenceOf[Rows], samples: SampleTable | None) -> Batch:
    """The flat arrays of a step; logits are asked for where there is nothing to sample."""
    ids: list[int] = []
    pos: list[int] = []
    seq: list[int] = []
    wanted: list[int] = []
    for i, part in enumerate(parts):
        start = part.sequence.cache.n_tokens
        if part.n == 1:
            ids.append(part.sequence.ids[start])
            pos.append(start)
            seq.append(i)
        else:
            end = start + part.n
            ids += part.sequence.ids[start:end]
            ids += part.drafts
            pos += range(start, end)
            seq += [i] * part.n
        wanted += range(len(pos) - part.n_wanted, len(pos))
    states, kept = _states(parts)
    return Batch(
        ids=np.array(ids, np.int32),
        pos=np.array(pos, np.int64),
        seq=np.array(seq, np.int32),
        tables=[part.sequence.cache.tables for part in parts],
        wanted=np.array(wanted, np.int32),
        output="logits" if samples is None else "ids",
        samples=samples,
        states=states,
        kept=kept,
    )


def _states(
    parts: SequenceOf[Rows],
) -> tuple[NDArray[np.int32] | None, NDArray[np.int32] | None]:
    """The slots that a step starts from, and those for the states behind its rows."""
    if not parts[0].sequence.cache.has_state:
        return None, None
    kept: list[int] = []
    for part in parts:
        cache = part.sequence.cache
        counts = range(cache.n_tokens + 1, cache.n_tokens + part.n + 1)
        kept += [cache.kept.get(n_tokens, -1) for n_tokens in counts]
    states = [part.sequence.cache.state for part in parts]
    return np.array(states, np.int32), np.array(kept, np.int32)


def fill_samples(table: SampleTable, parts: SequenceOf[Rows]) -> None:
    """How the token of each wanted row is picked."""
    table.clear()
    row = 0
    for part in parts:
        if not part.n_wanted:
            continue
        assert isinstance(part.work, Generation)
        params, sequence = part.work.request.params, part.sequence
        seed, index, mu = params.seed or 0, sequence.n_generated, sequence.mu
        n_history = params.n_history
        history = part.history(n_history) if n_history else _EMPTY
        n_before = len(history) - len(part.drafts)
        for i in range(part.n_wanted):
            tokens = history[: n_before + i] if n_history else _EMPTY
            table.set_row(row, params, seed, index + i, tokens, mu)
            row += 1


# -- after it ------------------------------------------------------------------------------------


class _Picked(NamedTuple):
    """What was sampled, by row; `at` is when."""

    ids: list[int]
    status: list[int]
    mu: list[float]
    table: SampleTable
    at: float


def commit(parts: SequenceOf[Rows], outputs: Outputs, table: SampleTable, ends: Ends) -> None:
    """The one place where what a step has computed becomes part of its sequences."""
    n = len(outputs.ids)
    picked = _Picked(
        outputs.ids.tolist(), table.status[:n].tolist(), table.mu[:n].tolist(), table,
        time.perf_counter(),
    )  # fmt: skip
    row = 0
    for part in parts:
        work = part.work
        assert isinstance(work, (Generation, LogitsJob))
        try:
            if work.is_cancelled or part.sequence not in work.sequences:
                pass  # nobody wants it any more
            elif isinstance(work, Generation):
                _commit_part(part, work, picked, row, ends)
            else:
                work.commit(part, outputs.logits[row : row + part.n_wanted])
                if work.is_complete:
                    ends.finish(work, "stop")
        except BaseException as error:
            ends.fail(work, error)
        row += part.n_wanted


def _commit_part(part: Rows, work: Generation, picked: _Picked, row: int, ends: Ends) -> None:
    sequence = part.sequence
    sequence.cache.advance(part.n - len(part.drafts))
    if len(sequence.ids) == sequence.n_prompt:
        work.emit(sequence.progress(picked.at))
    if not part.n_wanted:
        return
    n_before = len(sequence.ids)
    _take_token(work, sequence, picked, row, ends)
    if part.drafts:
        _take_drafts(part, work, picked, row, ends)
    if work.speculator is not None and work.sequence is not None:
        work.speculator.learn(len(sequence.ids) - n_before)


def _take_drafts(part: Rows, work: Generation, picked: _Picked, row: int, ends: Ends) -> None:
    """The tokens after the first, while the drafts are what was sampled."""
    work.n_proposed += len(part.drafts)
    for i, draft in enumerate(part.drafts, row):
        if work.sequence is None or draft != picked.ids[i]:
            return
        # Only now does its row in the cache count as stored.
        part.sequence.cache.advance(1)
        work.n_accepted += 1
        _take_token(work, part.sequence, picked, i + 1, ends)


def _take_token(
    work: Generation, sequence: Sequence, picked: _Picked, row: int, ends: Ends
) -> None:
    request, token, table = work.request, picked.ids[row], picked.table
    if picked.status[row] != OK:
        raise EdgeInferError("the model yields no number to choose a token by")
    sequence.mu = picked.mu[row]
    if token in request.stop_ids:
        ends.finish(work, "stop", token)
        return
    sequence.ids.append(token)
    if request.params.logprobs is None:
        work.emit(Token(token, picked.at))
    else:
        ids, logprobs = table.top(row)
        top = tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))
        work.emit(Token(token, picked.at, float(table.logprobs[row]), top))
    if sequence.n_generated == work.max_tokens:
        ends.finish(work, "length")


_EMPTY = np.zeros(0, np.int32)
