"""Which turns of a conversation are left out once it outgrows the context.

Knows nothing of tokens but how many a message has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

SYSTEM = ("system", "developer")
# A cut makes room for several turns, so that not every one of them reads the rest anew.
_KEPT_SHARE = 0.5
# Part of the context that is kept free for the answer before turns are dropped.
ANSWER_SHARE = 0.25


def drop_turns(
    messages: Sequence[dict[str, Any]],
    n_tokens: Callable[[Mapping[str, Any]], int],
    n_ctx: int,
    n_held: int = 0,
) -> tuple[list[dict[str, Any]], int]:
    """The messages that are kept, and how many turns before them are not.

    A turn is a user's message and what follows it; the system's messages and the last turn stay,
    as do `n_held` tokens that are no message's.
    The answer depends on the messages alone: a longer conversation is cut at the same places.
    """
    n_system = next((i for i, m in enumerate(messages) if m["role"] not in SYSTEM), len(messages))
    system, rest = list(messages[:n_system]), messages[n_system:]
    starts = [i for i, m in enumerate(rest) if m["role"] == "user"] or [0]
    starts[0] = 0
    ends = [*starts[1:], len(rest)]
    turns = [rest[start:end] for start, end in zip(starts, ends, strict=True)]
    asked = [sum(map(n_tokens, turn[:1])) for turn in turns]
    answered = [sum(map(n_tokens, turn[1:])) for turn in turns]
    first = _first_kept(asked, answered, n_held + sum(map(n_tokens, system)), n_ctx)
    return [*system, *(message for turn in turns[first:] for message in turn)], first


def _first_kept(asked: list[int], answered: list[int], held: int, n_ctx: int) -> int:
    """Walk through the conversation as it grew, cutting where it had to be cut.

    Beside what is always `held`, and may be long, half of what turns can have stays.
    """
    first, most = 0, n_ctx * (1 - ANSWER_SHARE)
    kept = max(n_ctx * _KEPT_SHARE, (held + most) / 2)
    for i, (question, answer) in enumerate(zip(asked, answered, strict=True)):
        held += question
        if held > most:
            while first < i and held > kept:
                held -= asked[first] + answered[first]
                first += 1
        held += answer
    return first
