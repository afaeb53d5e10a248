"""The load that naive serving is measured at, worked out before it is: a queue of one server.

What one request costs naive serving is told by its prompt and its answer, for it does one at a time
and reuses nothing. So the queue of any traffic is known beforehand (`queue`), and with it the rate
at which what comes in a window is a share of what naive serving can do (`rate_of_share`).

Why `headline.LOADED` is 0.85. The wait in a queue grows as share / (1 - share) (Pollaczek and
Khinchine), so that a tenth more load doubles it from a share of 0.82 on: there p95 is about to run
away. Turns of a conversation come in bunches, which makes waits longer than that, not the place
where they run away another one.

Why a rate is not just a share of the capacity. Some 40 requests, which is what there is time for
with a model that answers one in 9 s, are a dozen conversations. Of 150 seeds of `Shape()` the work
that came in such a window differed by a quarter (standard deviation) from what the rate says, and
p95 with it: half were between 26 and 47 s. With rates chosen by the window's own work half are
between 33 and 52 s. The committed traffic's first 100 conversations come a tenth more often than
its others.

What no window that is possible tells is the p95 that naive serving comes to in the long run. A
queue at 0.85 forgets how it began in some 100 services of whole conversations, an hour with that
model (those of an M/M/1 in 1 / (1 - sqrt(share)) ** 2), and its p95 in windows of two hours is 2.2
times that in windows of eight minutes. What is measured is a queue that has just begun, which is in
naive serving's favour.

How good a queue's p95 is: of two runs from before it was worked out, on a Zen 3, 24.6 s and 7.5 s
were measured (1.1 B and SmolLM2), and it says 27.5 s and 7.1 s.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

from edgeinfer.load.summary import percentiles
from edgeinfer.load.traffic import Conversation, repeated

_MESSAGE_TOKENS = 5  # of a template, about
_GUESSED_SECONDS = 2.0  # that answers took before a run: as `edgeinfer.load.generator` has it
_HALVINGS = 30
_LONG_RUN = 20_000  # services


@dataclass(frozen=True)
class Cost:
    """Seconds that naive serving takes for a token of a prompt and for one of an answer."""

    prompt: float
    answer: float

    @classmethod
    def of(cls, run: dict[str, Any]) -> Cost:
        """As a run of one user (a summary of `edgeinfer.load`) has shown."""
        first, whole = run["first_token_s"]["mean"], run["end_to_end_s"]["mean"]
        answer = (whole - first) / max(run["answer_tokens"] - 1.0, 1.0)
        return cls(max(first - answer, 0.0) / run["prompt_tokens"], answer)

    def seconds(self, n_prompt: int, n_answer: int) -> float:
        return self.prompt * n_prompt + self.answer * n_answer

    def mean_seconds(self, traffic: Iterable[Conversation]) -> float:
        """Of one request of a traffic."""
        costs = [self.seconds(*each) for talk in traffic for each in _requests(talk)]
        return sum(costs) / len(costs)


class Served(NamedTuple):
    """One request of a queue: when it was due and when its answer was whole, and its cost."""

    due: float
    ended: float
    cost: float


def queue(
    conversations: Iterable[Conversation],
    cost: Cost,
    rate: float,
    seconds: float,
    head_start: float = 0.0,
) -> list[Served]:
    """The requests due in a window, one served after the other, in the order they are due.

    Conversations come and go on as `edgeinfer.load.generator` has it, `rate` of them a second.
    """
    waiting: list[tuple[float, int, Conversation, int]] = []  # a turn of a conversation is due
    order, free, served = count(), 0.0, list[Served]()
    for talk in conversations:
        due, n = talk.at / rate - head_start, 0
        if due >= seconds:
            break
        while due < 0.0 and n < len(talk.turns):
            n += 1
            if n < len(talk.turns):
                due += talk.turns[n].think + _GUESSED_SECONDS
        if n < len(talk.turns):
            heapq.heappush(waiting, (due, next(order), talk, n))
    while waiting:
        due, _, talk, n = heapq.heappop(waiting)
        if due >= seconds:
            break
        costs = cost.seconds(*_request(talk, n))
        free = max(free, due) + costs
        served.append(Served(due, free, costs))
        if n + 1 < len(talk.turns):
            heapq.heappush(waiting, (free + talk.turns[n + 1].think, next(order), talk, n + 1))
    return served


def rate_of_share(
    traffic: Sequence[Conversation], cost: Cost, share: float, seconds: float, head_start: float
) -> float:
    """Conversations a second whose requests in a window cost `share` of its seconds."""
    n_turns = sum(len(talk.turns) for talk in traffic) / len(traffic)
    usual = share / cost.mean_seconds(traffic) / n_turns
    low, high = usual / 4, usual * 4
    for _ in range(_HALVINGS):
        rate = (low + high) / 2
        served = queue(repeated(traffic), cost, rate, seconds, head_start)
        if sum(each.cost for each in served) < share * seconds:
            low = rate
        else:
            high = rate
    return low


def p95_of(served: Iterable[Served], warmup: float = 0.0) -> float:
    """Seconds from due to whole, of requests due after a warm-up; 0 where there is none."""
    found = percentiles([each.ended - each.due for each in served if each.due >= warmup])
    return found["p95"] if found else 0.0


def long_run_p95(traffic: Sequence[Conversation], cost: Cost, share: float) -> float:
    """What p95 comes to if a traffic is repeated for ever so long."""
    service = cost.mean_seconds(traffic)
    n_turns = sum(len(talk.turns) for talk in traffic) / len(traffic)
    seconds = _LONG_RUN * service
    served = queue(repeated(traffic), cost, share / service / n_turns, seconds)
    return p95_of(served, seconds / 20)


def _requests(talk: Conversation) -> Iterator[tuple[int, int]]:
    return (_request(talk, n) for n in range(len(talk.turns)))


def _request(talk: Conversation, n: int) -> tuple[int, int]:
    """Tokens of the prompt and of the answer of turn n."""
    before = sum(turn.user + turn.answer + 2 * _MESSAGE_TOKENS for turn in talk.turns[:n])
    system = talk.system_tokens + _MESSAGE_TOKENS if talk.system_tokens else 0
    return system + before + talk.turns[n].user + 2 * _MESSAGE_TOKENS, talk.turns[n].answer
