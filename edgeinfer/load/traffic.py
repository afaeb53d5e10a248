"""Who asks what, and when: conversations made by a seed, or recorded in a file.

Lengths are in tokens, times in units that a rate divides. Knows nothing of servers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgeinfer.errors import InvalidRequestError

_MOST_BYTES = 256 << 20  # of a file
_MOST_TOKENS = 1 << 24  # of a text


class Turn(msgspec.Struct, array_like=True, frozen=True):
    """What a user says, how long the answer to it is, and seconds of thought before."""

    user: int
    answer: int
    think: float = 0.0


class Conversation(msgspec.Struct, frozen=True):
    """`at` is when it begins: conversations come once in a unit of time. `system` names a prompt.

    Equal names are equal texts; without tokens there is no such prompt.
    """

    at: float
    turns: list[Turn]
    system: int = 0
    system_tokens: int = 0


class Shape(NamedTuple):
    """What conversations are like. Ranges hold 19 of 20 values of a log-normal distribution."""

    n_systems: int = 4
    system_tokens: int = 500
    turns: tuple[int, int] = (1, 6)  # all alike likely
    user: tuple[int, int] = (20, 200)
    answer: tuple[int, int] = (30, 300)
    think: float = 5.0  # seconds


def synthetic(shape: Shape, seed: int) -> Iterator[Conversation]:
    """Conversations without end, which come as a Poisson process does."""
    rng, at = random.Random(seed), 0.0
    while True:
        at += rng.expovariate(1.0)
        turns = [
            Turn(_length(rng, shape.user), _length(rng, shape.answer), shape.think if i else 0.0)
            for i in range(rng.randint(*shape.turns))
        ]
        system = rng.randrange(max(1, shape.n_systems))
        yield Conversation(round(at, 3), turns, system, shape.system_tokens)


def _length(rng: random.Random, limits: tuple[int, int]) -> int:
    low, high = map(math.log, limits)
    value = math.exp(rng.gauss((low + high) / 2, (high - low) / 4))
    return round(min(max(value, limits[0]), limits[1]))


def write_traffic(path: Path, conversations: Sequence[Conversation]) -> None:
    """A line of JSON each."""
    encode = msgspec.json.Encoder().encode
    path.write_bytes(b"".join(encode(each) + b"\n" for each in conversations))


def read_traffic(path: Path) -> list[Conversation]:
    """What `write_traffic` has written; InvalidRequestError names the line that is none."""
    if path.stat().st_size > _MOST_BYTES:
        raise InvalidRequestError(f"{path} has more than {_MOST_BYTES >> 20} MiB", param="traffic")
    decoder, found = msgspec.json.Decoder(Conversation), list[Conversation]()
    for i, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            each = decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise InvalidRequestError(
                f"line {i} of {path} is no conversation: {error}; one is "
                '{"at": 0.5, "system": 0, "system_tokens": 500, "turns": [[20, 30, 0.0]]}',
                param="traffic",
            ) from None
        _check(each, i, path, found)
        found.append(each)
    if not found:
        raise InvalidRequestError(f"there is no conversation in {path}", param="traffic")
    return found


def _check(each: Conversation, i: int, path: Path, before: Sequence[Conversation]) -> None:
    counts = [each.system_tokens, *(n for turn in each.turns for n in (turn.user, turn.answer))]
    times = [each.at, *(turn.think for turn in each.turns)]
    if not each.turns or any(not 0 <= n <= _MOST_TOKENS for n in counts):
        raise InvalidRequestError(
            f"line {i} of {path} has no turns, or counts of tokens below 0 or above {_MOST_TOKENS}",
            param="traffic",
        )
    if any(not (0 <= t < math.inf) for t in times) or (before and each.at < before[-1].at):
        raise InvalidRequestError(
            f"line {i} of {path} has a time below 0, or before that of the line above",
            param="traffic",
        )


def repeated(conversations: Sequence[Conversation]) -> Iterator[Conversation]:
    """The same once more after the last one, and so on."""
    length = conversations[-1].at + 1.0
    for n in count():
        for each in conversations:
            yield msgspec.structs.replace(each, at=each.at + n * length)


class Texts:
    """Texts of a length: common words, which most vocabularies have as one token each."""

    def __init__(self, tokens_per_word: float = 1.0) -> None:
        self._tokens_per_word = tokens_per_word

    def words(self, n_tokens: int, key: str) -> str:
        """About so many tokens; equal for equal keys."""
        n_words = max(1, round(n_tokens / self._tokens_per_word))
        return " ".join(random.Random(key).choices(_WORDS, k=n_words))


_WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work number night "
    "point home water room mother area money story fact month lot right study book eye job word "
    "business issue side kind head house service friend father power hour game line end member law "
    "car city name team minute idea body back parent face others level office door health person "
    "art war history party result change morning reason research girl guy moment air teacher force "
    "order light plan paper space ground form event matter center couple site project activity "
    "star table need court oil situation cost industry figure street image phone data picture "
    "practice piece land product doctor wall patient worker news test movie north love support "
    "technology"
).split()
