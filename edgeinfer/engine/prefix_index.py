"""What has been computed of which beginnings: a tree of pages of tokens, and what is kept of each.

Knows nothing of requests; never touches K, V or state values.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import Literal, NamedTuple, TypeAlias

from edgeinfer.batch import PAGE
from edgeinfer.engine.cache import CacheLayout, PagePool
from edgeinfer.engine.holdings import Holdings

# Why no more of a prompt came from the cache: all did; the rest was never read; its pages, those of
# a window or the state there have been given up.
Miss: TypeAlias = Literal["", "new", "evicted", "window", "state"]

_BYTES = 4  # of a token
_FEW_NODES = 1024


class Node:
    """The tokens of a page, after those of the nodes above it, and what is kept of them.

    Keys begin with the ids, so a lookup compares them. `held` are the page of each cache group and,
    where a model has state, the slot of the state after the last token; -1 is none. `tails` are
    nodes of less than a page, whose pages may have been written further since.
    """

    __slots__ = ("children", "held", "ids", "tails")

    def __init__(self, ids: bytes, n_kinds: int) -> None:
        self.ids = ids
        self.children = self.tails = _NO_NODES
        self.held = [-1] * n_kinds

    @property
    def is_full(self) -> bool:
        return len(self.ids) == PAGE * _BYTES

    @property
    def is_empty(self) -> bool:
        return max(self.held, default=-1) < 0 and not self.children and not self.tails

    def add(self, key: bytes, node: Node) -> None:
        """A full one as a child, another as a tail."""
        name = "children" if node.is_full else "tails"
        if not (nodes := getattr(self, name)):
            setattr(self, name, nodes := {})
        nodes[key] = node


_NO_NODES: dict[bytes, Node] = {}  # of all that have none: an answer without end has many nodes


class Match(NamedTuple):
    """The longest beginning that can be gone on with: `path`, then the first of `last`'s tokens."""

    n_tokens: int
    path: list[Node]
    last: Node | None
    miss: Miss


class PrefixIndex:
    """Holds what it was given until room is needed.

    `pools` are those of the cache groups, and that of the state slots where there are any: the
    kinds of what a node holds, by number.
    """

    def __init__(self, pools: SequenceOf[PagePool], has_state: bool) -> None:
        self._has_state = has_state
        self._n_groups = len(pools) - has_state
        self.root = Node(b"", len(pools))
        self._layouts: dict[CacheLayout, bytes] = {}  # what keys that depend on one end with
        self.holdings = [Holdings(pool, kind) for kind, pool in enumerate(pools)]
        self.n_nodes = 0
        self._sweep_at = _FEW_NODES + 2 * sum(pool.n_pages for pool in pools)

    def n_idle(self, kind: int) -> int:
        """How many it holds that nobody else does: there for whoever needs them."""
        return self.holdings[kind].n_idle

    # -- entering --------------------------------------------------------------------------------

    def child(self, node: Node, layout: CacheLayout, page: int, ids: bytes) -> Node:
        """The node of the next tokens, made where there is none; less than a page is a tail."""
        nodes = node.children if len(ids) == PAGE * _BYTES else node.tails
        key = self._key(layout, page, ids)
        found = nodes.get(key)
        if found is None:
            found = Node(ids, len(self.holdings))
            node.add(key, found)
            self.n_nodes += 1
        return found

    def put_state(self, path: list[Node], slot: int, saves: int, *, is_stable: bool) -> None:
        """Hold the state behind a path; one that is to stay does so in place of others on it."""
        states = self.holdings[-1]
        states.put(path[-1], slot, saves, is_stable=is_stable)
        for node in self._passed(path) if is_stable else ():
            if node is not path[-1] and node.held[-1] >= 0:
                states.supersede(node.held[-1])

    def _passed(self, path: list[Node]) -> Iterator[Node]:
        """The nodes of a path, and the tails that it has come through."""
        for above, node in zip([self.root, *path], path, strict=False):
            yield from (tail for tail in above.tails.values() if node.ids.startswith(tail.ids))
            yield node

    def _key(self, layout: CacheLayout, page: int, ids: bytes) -> bytes:
        """What is computed depends on the layout as well once something has been overwritten."""
        if page < layout.n_alike:
            return ids
        # A byte more than a token has: no ids end so.
        number = b"+" + len(self._layouts).to_bytes(_BYTES, "little")
        return ids + self._layouts.setdefault(layout, number)

    # -- forgetting ------------------------------------------------------------------------------

    def clear(self) -> None:
        """Give up everything."""
        for holdings in self.holdings:
            for number in [*holdings]:
                holdings.give_up(number)
        self.root, self.n_nodes = Node(b"", len(self.holdings)), 0

    def sweep(self, in_use: Iterable[Node]) -> None:
        """Forget the tokens of what was given up, once they are many; `in_use` are ends of paths.

        Until then they tell why a prompt is read again.
        """
        if self.n_nodes < self._sweep_at:
            return
        used = set(map(id, in_use))
        nodes = [self.root]  # each after those above it
        for node in nodes:  # NOTE: the list grows while it is walked
            nodes += _next(node)
        for node in reversed(nodes):
            for below in (node.children, node.tails):
                for key in [key for key, each in below.items() if each.is_empty]:
                    if id(below[key]) not in used:
                        del below[key]
                        self.n_nodes -= 1
        self._sweep_at = max(self._sweep_at, 2 * self.n_nodes)

    def recover(self) -> list[list[int]]:
        """Derive what is held from the nodes, after an error anywhere; the numbers of each kind."""
        found: list[dict[int, list[Node]]] = [{} for _ in self.holdings]
        nodes = [self.root]
        for node in nodes:  # NOTE: the list grows while it is walked
            nodes += _next(node)
            for kind, number in enumerate(node.held):
                if number >= 0:
                    found[kind].setdefault(number, []).append(node)
        self.n_nodes = len(nodes) - 1
        for holdings, of_kind in zip(self.holdings, found, strict=True):
            holdings.reset(of_kind)
        return [[*holdings] for holdings in self.holdings]

    # -- finding ---------------------------------------------------------------------------------

    def find(self, layout: CacheLayout, ids: array[int], most: int, least: int = 0) -> Match:
        """The longest beginning of `ids`, of more than `least` and at most `most` tokens."""
        path = self._walk(layout, ids, most)
        found = None
        for n_full in range(len(path), least // PAGE - 1, -1):
            above = path[n_full - 1] if n_full else self.root
            rest = ids[n_full * PAGE : min(most, (n_full + 1) * PAGE)]
            nodes = self._alike(above.tails, layout, n_full, rest)
            if n_full == len(path):
                nodes += self._alike(above.children, layout, n_full, rest)
            for n_tokens, last in self._ends(above, n_full * PAGE, nodes, rest):
                if n_tokens > least and self._lacks(layout, path[:n_full], last, n_tokens) < 0:
                    found = Match(n_tokens, path[:n_full], last, "")
                    break
            if found:
                break
        found = found or Match(least, [], None, "")
        return found._replace(miss=self._miss(layout, path, ids, most, found.n_tokens))

    def _walk(self, layout: CacheLayout, ids: array[int], most: int) -> list[Node]:
        node, path = self.root, []
        for page in range(most // PAGE):
            key = self._key(layout, page, ids[page * PAGE : (page + 1) * PAGE].tobytes())
            child = node.children.get(key)
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def _known(self, layout: CacheLayout, path: list[Node], ids: array[int], most: int) -> int:
        """Tokens of `ids` that have been computed before."""
        above, n_full = path[-1] if path else self.root, len(path)
        rest = ids[n_full * PAGE : min(most, (n_full + 1) * PAGE)]
        nodes = self._alike(above.children, layout, n_full, rest)
        nodes += self._alike(above.tails, layout, n_full, rest)
        return n_full * PAGE + max((_agree(node, rest) for node in nodes), default=0)

    def _alike(
        self, nodes: dict[bytes, Node], layout: CacheLayout, page: int, ids: array[int]
    ) -> list[Node]:
        """Those that hold what is computed under a layout and begin like `ids`; may be many."""
        first = ids[:1].tobytes()
        return [
            node
            for key, node in nodes.items()
            if first and key.startswith(first) and key == self._key(layout, page, node.ids)
        ]

    def _ends(
        self, above: Node, start: int, nodes: list[Node], rest: array[int]
    ) -> Iterator[tuple[int, Node | None]]:
        """Where a path may be gone on from behind `start` tokens: (tokens, which of `nodes`).

        State is known only where it was kept; K and V of every token that agrees.
        """
        ends = [(_agree(node, rest), node) for node in nodes]
        if self._has_state:
            ends = [
                (n, node) for n, node in ends if n * _BYTES == len(node.ids) and node.held[-1] >= 0
            ]
        for n, node in sorted(ends, key=lambda end: -end[0]):
            if n:
                yield start + n, node
        if not self._has_state or above.held[-1] >= 0:
            yield start, None

    def _lacks(self, layout: CacheLayout, path: list[Node], last: Node | None, n: int) -> int:
        """The first cache group of which pages are gone that a query behind n tokens sees."""
        for group in range(self._n_groups):
            for page in reversed(layout.seen_pages(group, n)):
                node = path[page] if page < len(path) else last
                if node is None or node.held[group] < 0:
                    return group
        return -1

    def _miss(
        self, layout: CacheLayout, path: list[Node], ids: array[int], most: int, n: int
    ) -> Miss:
        """Why no more than n tokens are served."""
        if n >= most:
            return ""
        if n >= self._known(layout, path, ids, most):
            return "new"
        n_full = max(n // PAGE, len(path))
        lacking = self._lacks(layout, path[:n_full], None, len(path[:n_full]) * PAGE)
        if lacking >= 0:
            return "window" if layout.rings[lacking].window else "evicted"
        return "state" if self._has_state else "evicted"


def _next(node: Node) -> Iterator[Node]:
    yield from node.children.values()
    yield from node.tails.values()


def _agree(node: Node, ids: array[int]) -> int:
    """How many of a node's tokens the first of `ids` are."""
    own = array(ids.typecode, node.ids)
    n = min(len(own), len(ids))
    return next((i for i in range(n) if own[i] != ids[i]), n)
