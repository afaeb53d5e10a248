"""What an index holds of one kind, pages of a group or slots of state, and what of it goes first.

Knows nothing of tokens but how many a thing saves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from edgeinfer.engine.cache import PagePool

if TYPE_CHECKING:
    from edgeinfer.engine.prefix_index import Node

_MOST_BITS = 9  # of tokens that count: long prompts that nobody goes on with would fill the room
_MOST_DOUBLED = 2


class _Held:
    """A page or slot: for which nodes it is held, and what tells when it may go."""

    __slots__ = ("is_stable", "n_begun", "nodes", "queue", "saves", "used_at")

    queue: OrderedDict[int, _Held]  # with all that are worth as much, by their last use

    def __init__(self, nodes: list[Node], now: int) -> None:
        self.nodes = nodes
        self.saves = 0  # tokens that are read again without it
        self.n_begun = 0  # how often a prompt has gone on behind it
        self.used_at = now
        self.is_stable = False  # it was asked to stay

    @property
    def size(self) -> int:
        """The power of two that it is worth: what it saves, doubled where prompts went on."""
        return min(self.saves.bit_length(), _MOST_BITS) + min(self.n_begun, _MOST_DOUBLED)


class Holdings:
    """What is held of a pool's, each once, until there is need.

    Each is due its worth after it was used last, by a clock that stands where what has been given
    up last was due; the first of those due that nobody else holds is given up. So what saves much
    outlasts several uses of what saves little, and not what is used for ever; of equal worth the
    least recently used goes first. What was asked to stay goes last, but has half of the room at
    most. This is GreedyDual (Young, The k-server dual, 1994), worth in powers of two.
    """

    def __init__(self, pool: PagePool, kind: int) -> None:
        """`kind` is the place in a node's `held`."""
        self._pool, self._kind = pool, kind
        self._held: dict[int, _Held] = {}
        self._now = 0
        # By the worth's power of two, and those that were asked to stay.
        self._queues: dict[int, OrderedDict[int, _Held]] = {}
        self._stable: OrderedDict[int, _Held] = OrderedDict()

    @property
    def n_idle(self) -> int:
        """How many nobody else holds."""
        return sum(self._pool.n_holders(number) == 1 for number in self._held)

    def __iter__(self) -> Iterator[int]:
        return iter(self._held)

    def put(self, node: Node, number: int, saves: int, *, is_stable: bool = False) -> None:
        """Hold a page or slot for a node that has none; it may be another node's, too."""
        if number in self._held:
            self._held[number].nodes.append(node)
        else:
            self._pool.share(number)
            self._add(number, _Held([node], self._now))
        node.held[self._kind] = number
        self.touch(number, saves, is_stable=is_stable)

    def touch(
        self, number: int, saves: int = 0, *, has_begun: bool = False, is_stable: bool = False
    ) -> None:
        """Count one as used now, and what is told of it: a prompt has begun behind it."""
        held = self._held[number]
        held.used_at = self._now
        if saves <= held.saves and not (has_begun or is_stable):  # most: it takes a microsecond
            held.queue.move_to_end(number)
            return
        del held.queue[number]
        held.saves = max(held.saves, saves)
        held.n_begun += has_begun
        held.is_stable |= is_stable
        self._add(number, held)
        if 2 * len(self._stable) > self._pool.n_pages:
            self.unsettle(next(iter(self._stable)))

    def unsettle(self, number: int) -> None:
        """It was asked to stay, and need not any more: it goes as what it is worth."""
        held = self._held[number]
        del held.queue[number]
        held.is_stable, held.used_at = False, self._now
        self._add(number, held)

    def supersede(self, number: int) -> None:
        """One behind it is asked to stay in its place, unless several prompts went on there."""
        held = self._held[number]
        if held.is_stable and held.n_begun < 2:
            self.unsettle(number)

    def _add(self, number: int, held: _Held) -> None:
        held.queue = self._stable
        if not held.is_stable:
            held.queue = self._queues.setdefault(held.size, OrderedDict())
        self._held[number] = held.queue[number] = held

    # -- giving up -------------------------------------------------------------------------------

    def evict(self) -> bool:
        """Give up what is due first of what nobody else holds; False without any."""
        oldest = [(size, self._oldest(queue)) for size, queue in self._queues.items()]
        due = [(self._held[n].used_at + (1 << size), size, n) for size, n in oldest if n >= 0]
        if due:
            at, _, number = min(due)
            self._now = max(self._now, at)
        else:
            number = self._oldest(self._stable)
        return self.give_up(number)

    def _oldest(self, queue: OrderedDict[int, _Held]) -> int:
        """What was used least recently of what nobody else holds; -1 is none."""
        for _ in range(len(queue)):
            number = next(iter(queue))
            if self._pool.n_holders(number) == 1:
                return number
            queue.move_to_end(number)  # in use: as good as used now
            queue[number].used_at = self._now
        return -1

    def give_up(self, number: int) -> bool:
        """Hold one no longer, whoever else does; False if it is not held."""
        held = self._held.pop(number, None)
        if held is None:
            return False
        held.queue.pop(number, None)
        for node in held.nodes:
            node.held[self._kind] = -1
        self._pool.release([number])
        return True

    def reset(self, found: Mapping[int, list[Node]]) -> None:
        """Hold these alone, which nodes have, after an error anywhere."""
        queues, known = [*self._queues.values(), self._stable], self._held
        ordered = dict.fromkeys([*(n for queue in queues for n in queue), *found])
        self._held, self._queues, self._stable = {}, {}, OrderedDict()
        for number in ordered:
            if number in found:
                held = known.get(number) or _Held([], self._now)
                held.nodes = found[number]
                self._add(number, held)
