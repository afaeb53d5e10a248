"""Shared pages and kept states: whoever is given them finds what it would have computed itself."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeinfer.batch import PAGE, StepLimits
from edgeinfer.engine.cache import CacheLayout, Overflow
from edgeinfer.engine.cache_store import CacheStore
from edgeinfer.engine.leaders import waits
from edgeinfer.engine.sequence import Rows, Sequence
from edgeinfer.engine.step import build_batch
from edgeinfer.sampling.params import SampleTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

N_CTX = 480
MAX_ROWS = 48
NO_SAMPLES = SampleTable(1)
NO_SAMPLES.clear()


class Memory:
    """Stands for a program: what it stores of a position is which tokens came before it."""

    def __init__(self, limits: StepLimits, windows: SequenceOf[int]) -> None:
        self.windows = windows
        self.pages = [np.zeros((n, PAGE), np.int64) for n in limits.n_pages.values()]
        self.states = [0] * limits.n_states
        self.n_computed, self.rng = 0, random.Random(0)

    def copy_pages(self, group: int, sources: SequenceOf[int], targets: SequenceOf[int]) -> None:
        for source, target in zip(sources, targets, strict=True):
            self.pages[group][target] = self.pages[group][source]

    def run(self, part: Rows, *, fails: bool = False) -> None:
        """A step of one sequence: it reads what every row sees, then it has stored the rows."""
        batch = build_batch([part], NO_SAMPLES)
        batch.check()
        known = _prefixes([*part.sequence.ids[: int(batch.pos[0])], *batch.ids.tolist()])
        rows = {0, batch.n_rows - 1, self.rng.randrange(batch.n_rows)}
        state = -1 if batch.states is None else int(batch.states[0])
        if batch.states is not None:
            assert (state < 0) == (batch.pos[0] == 0)
            assert state < 0 or self.states[state] == known[int(batch.pos[0]) - 1]
        for row in range(batch.n_rows if not fails else self.rng.randrange(batch.n_rows + 1)):
            self._store(batch, row, known)
        if not fails:
            self.n_computed += batch.n_rows
            for row in rows:
                self._read(batch, row, known)

    def _store(self, batch: Any, row: int, known: NDArray[np.int64]) -> None:
        pos = int(batch.pos[row])
        for group, table in enumerate(batch.tables[0]):
            page = int(table.pages[table.slot(pos // PAGE)])
            self.pages[group][page][pos % PAGE] = known[pos]
        if batch.kept is not None and batch.kept[row] >= 0:
            self.states[int(batch.kept[row])] = known[pos]

    def _read(self, batch: Any, row: int, known: NDArray[np.int64]) -> None:
        pos = int(batch.pos[row])
        for group, (table, window) in enumerate(zip(batch.tables[0], self.windows, strict=True)):
            for page in table.visible(pos, window):
                number = int(table.pages[table.slot(page)])
                assert number >= 0
                seen = np.flatnonzero(table.sees(pos, page, window))
                np.testing.assert_array_equal(
                    self.pages[group][number][seen], known[page * PAGE + seen]
                )


def _prefixes(ids: list[int]) -> NDArray[np.int64]:
    """By position a number that tells the tokens up to it from others."""
    return np.array(list(accumulate(ids, lambda a, b: hash((a, b)), initial=1))[1:])


class Requests:
    """Sequences of one store: opened, read in steps, guessed for, failed, ended, in any order."""

    def __init__(self, windows: SequenceOf[int], n_pages: int, n_states: int, seed: int) -> None:
        self.rng, self.windows = random.Random(seed), windows
        sizes = {window or -1 - i: n_pages for i, window in enumerate(windows)}
        self.limits = StepLimits(sizes, MAX_ROWS, 8, 4, 1, n_states=n_states)
        self.memory = Memory(self.limits, windows)
        self.store = CacheStore(self.limits, self.memory)  # type: ignore[arg-type]
        self.running: list[Sequence] = []
        words = [[self.rng.randrange(3) for _ in range(self.rng.randrange(1, 90))] for _ in "abcd"]
        self.words = words

    def layout(self, overflow: Overflow) -> CacheLayout:
        n_pinned, has_state = self.rng.choice([0, 40, 40, 250]), self.limits.n_states > 0
        return CacheLayout.of(overflow, N_CTX, n_pinned, self.windows, MAX_ROWS, has_state)

    def open(self) -> None:
        layout = self.layout(self.rng.choice(["error", "error", "slide"]))
        held = np.sum([each.cache.layout.most_pages for each in self.running], axis=0)
        if np.any(held + layout.most_pages > self.store.n_pages):
            return
        ids: list[int] = []
        borders = []
        for _ in range(self.rng.randrange(1, 9)):
            ids += self.rng.choice(self.words)
            borders.append(len(ids))
        ids = ids[: N_CTX - 20]
        n_stable = self.rng.choice([0, 0, 33, len(ids)])
        sequence = self.store.open(ids, layout, borders, n_stable)
        assert sequence.n_cached == sequence.cache.n_tokens < len(sequence.ids)
        self.running.append(sequence)

    def step(self, *, fails: bool = False) -> None:
        """Who computes what is settled before anything of it is computed, as in an engine."""
        parts: dict[Sequence, int] = {}
        for sequence in self.running:
            self.store.catch_up(sequence)
            if not waits(sequence, [*parts]):
                if not sequence.n_waiting:
                    sequence.ids.append(self.rng.randrange(3))
                most = min(sequence.n_waiting, sequence.cache.step_limit())
                n = min(most, self.rng.randrange(1, 40))
                if n > 0:
                    parts[sequence] = n
        for sequence, n in parts.items():
            drafts: list[int] = []
            if n == sequence.n_waiting:
                room = min(MAX_ROWS, sequence.cache.step_limit()) - n
                room = min(room, self.store.most_rows() - 1)
                drafts = [self.rng.randrange(3) for _ in range(min(room, self.rng.randrange(4)))]
            self._run(sequence, n, drafts, fails)

    def _run(self, sequence: Sequence, n: int, drafts: list[int], fails: bool) -> None:
        part = Rows(sequence, n, 0, None)  # type: ignore[arg-type]
        part = part.with_drafts(drafts) if drafts else part
        for each in self.running:
            self.store.settle(each)
        assert self.store.hold(sequence, part.n, len(drafts)), "what was promised is not there"
        self.memory.run(part, fails=fails)
        if fails:
            return
        sequence.cache.advance(n)
        for each in drafts[: self.rng.randrange(len(drafts) + 1)]:
            sequence.ids.append(each)
            sequence.cache.advance(1)
        if sequence.n_waiting == 0 and sequence.cache.step_limit() > 0:
            sequence.ids.append(self.rng.randrange(3))

    def turn(
        self, ids: list[int], n_user: int, n_answer: int, n_stable: int = 0, n_system: int = 0
    ) -> tuple[list[int], int]:
        """A request that goes on behind `ids`, from start to end: its tokens; how many were cached.

        `n_stable` -1 is the whole prompt.
        """
        ids = [*ids, *(self.rng.randrange(9, 9999) for _ in range(n_user))]
        n_stable, borders = n_stable % (len(ids) + 1), [n_system, len(ids) - n_user, len(ids) - 4]
        sequence = self.store.open(ids, self.layout("error"), borders, n_stable)
        n_cached, self.running = sequence.n_cached, [sequence]
        ids += (self.rng.randrange(9, 9999) for _ in range(n_answer))
        while sequence.cache.n_tokens < len(ids):
            if not sequence.n_waiting:
                sequence.ids.append(ids[len(sequence.ids)])
            self._run(sequence, min(MAX_ROWS, sequence.n_waiting), [], fails=False)
            del sequence.ids[max(sequence.n_prompt, sequence.cache.n_tokens) :]
        self.running = []
        self.store.keep(sequence)
        return ids, n_cached

    def end(self, how: str) -> None:
        if self.running:
            sequence = self.rng.choice(self.running)
            getattr(self.store, how)(sequence)
            if how != "park":
                self.running = [each for each in self.running if each is not sequence]

    def act(self, action: str) -> None:
        if action in ("keep", "free", "park"):
            self.end(action)
        elif action in ("recover", "lose"):
            if action == "lose" and self.running:  # one whose request has failed
                self.running.remove(self.rng.choice(self.running))
            self.store.recover(self.running)
        elif action == "open":
            self.open()
        else:
            self.step(fails=action == "fail")

    def close(self) -> None:
        for sequence in self.running:
            self.store.free(sequence)
        kinds = self.store._kinds
        for kind, pool in enumerate(kinds):
            assert pool.n_free + self.store.index.n_idle(kind) == pool.n_pages
        self.store.index.clear()
        assert all(pool.n_free == pool.n_pages for pool in kinds)


ACTIONS = ["open", "step", "fail", "keep", "free", "park", "recover", "lose"]
MIXES = [
    (4, 20, 2, 2, 1, 1, 1, 1),
    (3, 40, 0, 3, 0, 0, 0, 0),
    (2, 60, 1, 1, 0, 1, 0, 0),
    (9, 9, 1, 5, 1, 1, 0, 2),
]


KINDS = st.tuples(
    st.sampled_from([(0,), (0, 40), (33,), (0, 70), (0, 440), ()]), st.integers(30, 80),
    st.sampled_from([0, 8, 14, 40]), st.sampled_from(MIXES), st.integers(0, 100000),
)  # fmt: skip


def _run_requests(kind: tuple[tuple[int, ...], int, int, tuple[int, ...], int]) -> None:
    windows, n_pages, n_states, mix, seed = kind
    requests = Requests(windows, n_pages, n_states or (8 if not windows else 0), seed)
    for action in requests.rng.choices(ACTIONS, mix, k=100):
        requests.act(action)
    requests.close()


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(KINDS)
def test_what_is_shared_is_what_would_be_computed(kind: Any) -> None:
    _run_requests(kind)


@pytest.mark.parametrize("is_entered", [False, True])
@pytest.mark.parametrize("n_others", [0, 1])
def test_nothing_is_taken_over_of_who_has_failed(n_others: int, is_entered: bool) -> None:
    requests = Requests((0,), 30, 0, seed=1)
    store, layout = requests.store, requests.layout("error")
    leader, follower = (store.open([*[7] * 45, *[k] * 20], layout) for k in (1, 2))
    requests.running = [follower]
    store.catch_up(follower)
    assert waits(follower, [leader])
    requests._run(leader, 50, [], fails=False)
    if is_entered:  # as all that run are when a prompt comes
        requests.running.append(store.open([5] * 9, layout))
    store.recover(requests.running)
    for _ in range(n_others):  # which write to the pages that the leader has had
        requests.running.insert(0, other := store.open([3] * 90, layout))
        requests._run(other, 90, [], fails=False)
    store.catch_up(follower)
    requests._run(follower, 5, [], fails=False)
    requests.close()


@pytest.mark.parametrize(
    ("windows", "n_states", "n_stable"),
    [((0,), 0, 0), ((0,), 0, 40), ((0, 70), 0, 0), ((0,), 60, 0), ((0, 70), 60, 40), ((), 60, 0)],
)
def test_what_was_dear_long_ago_gives_way_to_what_is_new(
    windows: tuple[int, ...], n_states: int, n_stable: int
) -> None:
    """Six conversations at a time, for long: all that was read of one is there in its next turn."""
    requests = Requests(windows, 120, n_states, seed=1)
    talks: list[list[int]] = [[]] * 6
    for _ in range(150):
        talk = talks.pop(0)
        ids, n_cached = requests.turn(talk or [1] * 40, 10, 15, n_stable)
        assert n_cached >= len(talk)
        talks.append([] if len(ids) > 120 else ids)
    requests.close()


def test_a_conversation_needs_few_slots_however_many_turns_it_has() -> None:
    """Of ten that go on in turn each finds what it has read: states behind it go first."""
    requests = Requests((0,), 400, 37, seed=1)
    talks: list[list[int]] = [[]] * 10
    n_read = n_cached = 0
    for turn in range(120):
        talk = talks.pop(0) or [1] * 40
        ids, n = requests.turn(talk, 20, 40)
        if turn >= 40:
            n_read, n_cached = n_read + len(talk), n_cached + n
        talks.append([] if len(ids) > 300 else ids)
    assert n_cached > 0.9 * n_read
    requests.close()


def test_where_many_prompts_part_outlasts_what_nobody_goes_on_with() -> None:
    """Two systems, whose turn it is after each second text that is read once."""
    requests = Requests((0,), 300, 10, seed=1)
    found = []
    for turn in range(60):
        system = [turn % 2 + 1] * 60
        found.append(requests.turn(system, 10, 5, n_system=60)[1])
        for _ in range(2):
            requests.turn([], 60, 5)
    assert found[2:] == [60] * 58
    requests.close()


def test_of_what_was_asked_to_stay_the_last_of_a_conversation_does() -> None:
    """Two agents, who ask much aside, with a slot each beside those of steps."""
    requests = Requests((0,), 300, 6, seed=1)
    talks = [[1] * 60, [2] * 60]
    for turn in range(20):
        talk = talks[turn % 2]
        talks[turn % 2], n_cached = requests.turn(talk, 10, 8, n_stable=-1)
        assert turn < 2 or n_cached >= len(talk) - 8  # but the answer
        for _ in range(3):
            requests.turn([], 60, 5)
    requests.close()


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, database=None)
@given(KINDS)
def test_what_is_shared_is_what_would_be_computed_in_many(kind: Any) -> None:
    _run_requests(kind)
