"""Which rows the next step computes: one of every answer, guesses, and a slice of the prompts.

Knows nothing of pages or queues.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any, TypeAlias

from edgeinfer.batch import StepLimits
from edgeinfer.engine.generation import Generation, LogitsJob
from edgeinfer.engine.sequence import Rows
from edgeinfer.engine.speculation import best_drafts
from edgeinfer.engine.step_costs import StepCosts

Fail: TypeAlias = Callable[[Any, BaseException], None]  # ends a request for an error
# Whether a prompt is to be read in a step that has some parts already.
MayRead: TypeAlias = Callable[[Generation | LogitsJob, list[Rows]], bool]


def next_rows(
    running: SequenceOf[Generation],
    jobs: SequenceOf[LogitsJob],
    limits: StepLimits,
    costs: StepCosts,
    fail: Fail,
    may_read: MayRead,
) -> tuple[list[Rows], bool]:
    """One row of all that decode, then prompts by rank; beside others, so many that those flow.

    And whether there are prompts to be read.
    """
    parts: list[Rows] = []
    reading: list[Generation | LogitsJob] = []
    for generation in running:
        sequence, row = generation.sequence, generation.next_row
        assert sequence is not None and row is not None, "the generation does not run"
        n_tokens = len(sequence.ids)
        if n_tokens - sequence.cache.n_tokens == 1 and n_tokens > sequence.n_prompt:
            parts.append(row)
        else:
            reading.append(generation)
    reading += jobs
    if not reading:
        return parts, False
    # There is always room for rows that decode: there are at most max_sequences.
    n_left = limits.max_rows - len(parts)
    if parts:
        n_left = min(n_left, limits.shared_rows, costs.rows_beside(len(parts)))
    n_outputs = limits.max_outputs - len(running)  # beside what these may pick
    for work in sorted(reading, key=lambda work: work.rank):
        if n_left < 1:
            break
        try:
            more = work.next_rows(n_left, n_outputs) if may_read(work, parts) else []
        except BaseException as error:
            fail(work, error)
            continue
        parts += more
        n_left -= sum([part.n for part in more])
        n_outputs -= sum([part.n_wanted for part in more if work in jobs])
    return parts, True


def with_drafts(parts: list[Rows], most: int, costs: StepCosts, fail: Fail) -> list[Rows]:
    """With guesses of the tokens after the next ones, as far as checking them pays.

    `most` is the most rows in the step.
    """
    if not any([part.work.can_guess for part in parts]):  # type: ignore[attr-defined]
        return parts
    kept: list[Rows] = []
    guesses: list[tuple[list[int], list[float]]] = []
    for part in parts:
        assert isinstance(part.work, Generation)
        try:
            guesses.append(part.work.guess() if part.work.can_guess else _NONE)
            kept.append(part)
        except BaseException as error:
            fail(part.work, error)
    if not any(tokens for tokens, _ in guesses):
        return kept
    try:
        n_drafts = best_drafts([chances for _, chances in guesses], costs, most)
        return [
            part.with_drafts(tokens[:n])
            for part, (tokens, _), n in zip(kept, guesses, n_drafts, strict=True)
        ]
    except BaseException:  # guesses are nobody's answer: the step does without
        return kept


_NONE: tuple[list[int], list[float]] = ([], [])
