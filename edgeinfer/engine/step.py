"""One step as a program reads it, and what it yields as it becomes part of its sequences.

Knows nothing of scheduling or threads.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from edgeinfer.batch import Batch, Outputs, PageTable
from edgeinfer.engine.generation import Generation, LogitsJob
from edgeinfer.engine.sequence import FinishReason, Rows, Sequence, Token
from edgeinfer.errors import EdgeInferError, InvalidRequestError
from edgeinfer.sampling.params import OK, SampleTable, SamplingParams

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Ends(Protocol):
    """Who is told that a request has ended."""

    def finish(
        self, work: Generation | LogitsJob, reason: FinishReason, stop_id: int | None = None
    ) -> None: ...

    def fail(self, work: Generation | LogitsJob, error: BaseException) -> None: ...


# -- before it -----------------------------------------------------------------------------------


class Steps:
    """Makes what programs read.

    In most steps the answers of the last one go on by a token each: only the tokens are new then,
    and where they stand.
    """

    def __init__(self, samples: SampleTable, n_vocab: int) -> None:
        self._samples, self._n_vocab = samples, n_vocab
        self._last: Batch | None = None
        self._parts: list[Rows] = []  # of the last step, where another of the same may follow
        self._before = np.zeros(0, np.int64)  # of each its position when its answer began

    def next(self, parts: list[Rows]) -> tuple[Batch, list[Masked]]:
        """The batch of some parts, and masks that are still to be filled."""
        if self._last is not None and parts == self._parts:
            return self._go_on(self._last), []
        self._last = None
        masked = fill_samples(self._samples, parts, self._n_vocab)
        batch = build_batch(parts, self._samples)
        if all([_is_plain(part) for part in parts]) and not masked:
            self._before = np.array([part.sequence.n_prompt - 1 for part in parts], np.int64)
            self._parts, self._last = parts, batch
        return batch, masked

    def _go_on(self, last: Batch) -> Batch:
        sequences = [part.sequence for part in self._parts]
        pos = np.array([sequence.cache.n_tokens for sequence in sequences], np.int64)
        self._samples.go_on(pos - self._before)
        return Batch(
            ids=np.array([sequence.ids[-1] for sequence in sequences], np.int32),
            pos=pos,
            seq=last.seq,
            tables=[sequence.cache.tables for sequence in sequences],
            wanted=last.wanted,
            output="ids",
            samples=self._samples,
        )


def _is_plain(part: Rows) -> bool:
    """Whether its answer goes on from its last token, and nothing else decides about the next."""
    work = part.work
    return (
        isinstance(work, Generation)
        and part is work.next_row
        and work.hook is None
        and not work.n_history
        and not work.has_mirostat
        and not part.sequence.cache.has_state
    )


def build_batch(parts: SequenceOf[Rows], samples: SampleTable) -> Batch:
    """The flat arrays of a step: of logits where some are asked for, else of picked tokens.

    Parts of generations come first, so that theirs are the first rows of logits.
    """
    ids, pos, tables = list[int](), list[int](), list[tuple[PageTable, ...]]()
    for part in parts:
        sequence, n = part.sequence, part.n
        start = sequence.cache.n_tokens
        tables.append(sequence.cache.tables)
        if n == 1:  # as most have
            ids.append(sequence.ids[start])
            pos.append(start)
        else:
            ids += sequence.ids[start : start + n]
            ids += part.drafts
            pos += range(start, start + n)
    seq, wanted = _seq_and_wanted(parts, len(pos))
    states, kept = _states(parts)
    is_picked = len(wanted) == samples.n_rows > 0
    return Batch(
        ids=np.array(ids, np.int32),
        pos=np.array(pos, np.int64),
        seq=seq,
        tables=tables,
        wanted=wanted,
        output="ids" if is_picked else "logits",
        samples=samples if is_picked else None,
        states=states,
        kept=kept,
    )


def _seq_and_wanted(
    parts: SequenceOf[Rows], n_rows: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Whose each row is, and the rows of which outputs are wanted."""
    n_wanted = [part.n_wanted for part in parts]
    rows = _FEW[:n_rows] if n_rows <= len(_FEW) else np.arange(n_rows, dtype=np.int32)
    if n_rows == len(parts) == sum(n_wanted):  # as in most steps: one of each
        return rows, rows
    counts = [part.n for part in parts]
    ends = np.cumsum(counts)
    is_wanted = ends.repeat(counts) - rows <= np.repeat(n_wanted, counts)
    return np.arange(len(parts), dtype=np.int32).repeat(counts), rows[is_wanted]


_FEW = np.arange(64, dtype=np.int32)
_FEW.flags.writeable = False  # batches share them
_BANS = -1e30  # a bias below this leaves a token no chance


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


class Masked(NamedTuple):
    """Wanted rows of which not every token may be picked, and the memory for which may."""

    part: Rows
    masks: NDArray[np.uint32]


def fill_samples(table: SampleTable, parts: SequenceOf[Rows], n_vocab: int) -> list[Masked]:
    """How the token of each wanted row of a generation is picked; masks are still to be filled."""
    table.clear()
    params, indices, mu = list[SamplingParams](), list[int](), list[float | None]()
    for part in parts:
        work, sequence = part.work, part.sequence
        if part.n_wanted and isinstance(work, Generation):
            params.append(work.request.params)
            indices.append(len(sequence.ids) - sequence.n_prompt)
            mu.append(sequence.mu)
            if part.drafts or work.n_history:
                _fill_one_by_one(table, parts)
                break
    else:
        table.set_rows(params, indices, mu)
    return _open_masks(table, parts, n_vocab)


def _fill_one_by_one(table: SampleTable, parts: SequenceOf[Rows]) -> None:
    """Where there are guesses, or tokens before that matter."""
    row = 0
    for part in parts:
        if not isinstance(part.work, Generation):
            continue
        sequence, params = part.sequence, part.work.request.params
        history = part.history(part.work.n_history)
        n_before = len(history) - len(part.drafts)
        for i in range(part.n_wanted):
            index, tokens = sequence.n_generated + i, history[: n_before + i]
            table.set_row(row, params, params.seed or 0, index, tokens, sequence.mu)
            row += 1


def _open_masks(table: SampleTable, parts: SequenceOf[Rows], n_vocab: int) -> list[Masked]:
    masked, row = list[Masked](), 0
    for part in parts:
        if part.n_wanted and isinstance(part.work, Generation):
            if part.work.matcher is not None:
                masked.append(Masked(part, table.masks(row, part.n_wanted, n_vocab)))
            row += part.n_wanted
    return masked


def fill_masks(masked: Iterable[Masked]) -> list[tuple[Rows, BaseException]]:
    """Which tokens may be picked, told until a step is waited for; parts where that can't be."""
    failed: list[tuple[Rows, BaseException]] = []
    for part, masks in masked:
        assert isinstance(part.work, Generation) and part.work.matcher is not None
        try:
            part.work.matcher.fill(masks, part.drafts)
        except BaseException as error:
            masks[:] = 0
            failed.append((part, error))
    return failed


# -- after it ------------------------------------------------------------------------------------


class _Picked(NamedTuple):
    """What was sampled, by row; `at` is when."""

    ids: list[int]
    status: list[int]
    table: SampleTable
    at: float


def commit(parts: SequenceOf[Rows], outputs: Outputs, table: SampleTable, ends: Ends) -> None:
    """The one place where what a step has computed becomes part of its sequences."""
    n, row = len(outputs.ids), 0
    picked = _Picked(outputs.ids.tolist(), table.status[:n].tolist(), table, time.perf_counter())
    for part in parts:
        work = part.work
        try:
            if work.is_cancelled:
                pass
            elif isinstance(work, Generation):
                if work.sequence is part.sequence:  # what has ended has none
                    _commit_part(part, work, picked, row, ends)
            elif part.sequence in work.sequences:
                assert isinstance(work, LogitsJob)
                work.commit(part, outputs.logits[row : row + part.n_wanted])
                if work.is_complete:
                    ends.finish(work, "stop")
        except BaseException as error:
            ends.fail(work, error)  # type: ignore[arg-type]
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
        what = "of what the grammar allows here" if work.matcher is not None else "a token"
        found = f"the model yields no number to choose {what} by"
        if min(request.params.logit_bias.values(), default=0.0) < _BANS:
            param = "logit_bias"
            raise InvalidRequestError(f"{found} with this {param}; ban fewer tokens", param=param)
        if work.hook is not None and work.hook.logits:
            param = "on_step"
            found = f"the logits hold no number to choose {what} by once {param} was shown them"
            raise InvalidRequestError(f"{found}; leave some of them numbers", param=param)
        raise EdgeInferError(found)
    if work.has_mirostat:
        sequence.mu = float(table.mu[row])
    if request.max_tokens == 0:
        ends.finish(work, "length")
        return
    if token in request.stop_ids:
        ends.finish(work, "stop", token)
        return
    sequence.ids.append(token)
    if work.n_logprobs is None:
        work.emit(Token(token, picked.at))
    else:
        ids, logprobs = table.top(row)
        top = tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))
        work.emit(Token(token, picked.at, float(table.logprobs[row]), top))
    if work.matcher is not None:
        work.matcher.advance(token)
    if work.matcher is not None and work.matcher.is_ended:
        ends.finish(work, "stop")
    elif sequence.n_generated == work.max_tokens:
        ends.finish(work, "length")
