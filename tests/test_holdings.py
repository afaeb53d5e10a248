"""What goes first of what is held: against the rule, and whatever else is in use."""

from __future__ import annotations

import random
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeinfer.engine.cache import PagePool
from edgeinfer.engine.holdings import Holdings
from edgeinfer.engine.prefix_index import Node

N = 12


class Slots:
    """What is kept of a pool, and the same by the rule: what is due first, then used first."""

    def __init__(self) -> None:
        self.pool, self.nodes = PagePool(N), dict[int, Node]()
        self.holdings = Holdings(self.pool, 0)
        self.told: dict[int, list[int]] = {}  # saves, begun, clock at its last use, when that was
        self.stable: dict[int, None] = {}  # by use
        self.now, self.uses = 0, count()

    def put(self, saves: int) -> None:
        if not self.pool.n_free:
            assert self.holdings.evict()
            gone = [number for number, node in self.nodes.items() if node.held[0] < 0]
            assert gone == [self.expected()]
            self.forget(gone[0])
        number = self.pool.take()
        self.nodes[number] = node = Node(b"", 1)
        self.holdings.put(node, number, saves)
        self.pool.release([number])
        self.told[number] = [saves, 0, self.now, next(self.uses)]

    def forget(self, number: int) -> None:
        del self.told[number], self.nodes[number]
        self.stable.pop(number, None)

    def expected(self) -> int:
        """What is to go, by the rule; the clock goes on to when that was due."""
        due = {n: (self.due(n), self.bits(n), self.told[n][3]) for n in self.told}
        plain = [n for n in self.told if n not in self.stable]
        if not plain:
            return next(iter(self.stable))
        number = min(plain, key=lambda n: due[n])
        self.now = max(self.now, due[number][0])
        return number

    def bits(self, number: int) -> int:
        saves, begun, _, _ = self.told[number]
        return min(saves.bit_length(), 9) + min(begun, 2)

    def due(self, number: int) -> int:
        return self.told[number][2] + int(2 ** self.bits(number))

    def touch(
        self, number: int, saves: int = 0, *, begun: bool = False, stays: bool = False
    ) -> None:
        self.holdings.touch(number, saves, has_begun=begun, is_stable=stays)
        before = self.told[number]
        self.told[number] = [max(before[0], saves), before[1] + begun, self.now, next(self.uses)]
        if self.stable.pop(number, 0) is None or stays:
            self.stable[number] = None
        if 2 * len(self.stable) > N:
            self.settle(next(iter(self.stable)))

    def settle(self, number: int) -> None:
        del self.stable[number]
        self.told[number][2:] = self.now, next(self.uses)

    def act(self, rng: random.Random) -> None:
        action, number = rng.randrange(8), rng.choice([*self.told])
        if action < 4:
            self.put(rng.choice([0, 1, 3, 30, 500, 9000]))
        elif action == 4:
            self.touch(number, rng.randrange(99))
        elif action == 5:
            self.touch(number, begun=True)
        elif action == 6:
            self.touch(number, stays=True)
        else:
            self.holdings.supersede(number)
            if number in self.stable and self.told[number][1] < 2:
                self.settle(number)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 1 << 30))
def test_what_is_due_first_goes_first(seed: int) -> None:
    slots, rng = Slots(), random.Random(seed)
    slots.put(1)
    for _ in range(150):
        slots.act(rng)
        assert {*slots.holdings} == {*slots.told} and slots.holdings.n_idle == len(slots.told)
        if rng.random() < 0.05:  # as after an error, which changes nothing here
            slots.holdings.reset({n: [node] for n, node in slots.nodes.items()})
    for number in [*slots.holdings]:
        assert slots.holdings.give_up(number) and not slots.holdings.give_up(number)
    assert slots.pool.n_free == N and not slots.holdings.evict()


@pytest.mark.parametrize("saves", [[5] * N, [1 << i for i in range(N)], [900, 1] * (N // 2)])
def test_what_is_in_use_stays(saves: list[int]) -> None:
    slots = Slots()
    for each in saves:
        slots.put(each)
    used = [*slots.told][::3]
    for number in used:
        slots.pool.share(number)
    while slots.holdings.evict():
        pass
    assert sorted(slots.holdings) == sorted(used) and slots.holdings.n_idle == 0
    slots.pool.release(used)
    assert [slots.holdings.evict() for _ in range(5)] == [True] * 4 + [False]


def test_a_text_of_any_length_does_not_stay_for_ever() -> None:
    """Where nobody goes on with it, and there is much that saves little."""
    slots = Slots()
    for _ in range(N // 2):
        slots.put(1 << 20)
    first = [*slots.nodes.values()]
    for _ in range(N * 99):
        slots.put(3)
    assert all(node.held == [-1] for node in first)
