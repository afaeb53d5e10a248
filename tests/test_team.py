"""The thread team: every chunk exactly once, ops in order, parking, abort, exit and fork."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.cpu.team import KERNELS, Op, Part, Tape, Team

from .native import header, library
from .refused_threads import few_threads

MAX_CHUNKS = 12


class Probe:
    """A tape of probe ops whose records say what ran; chunk counts follow the step's row count."""

    def __init__(self, n_ops: int, n_threads: int) -> None:
        lib = library()
        lib.load(["probe", *KERNELS])
        self.header = header()
        self.records = np.zeros((n_ops, 4 + MAX_CHUNKS), np.int64)
        self.expected = np.zeros(n_ops, np.int64)
        self.rules = [layout.COUNT_ROWS if i % 3 else 1 + i % 5 for i in range(n_ops)]
        for i in range(1, n_ops):
            self.records[i, 0] = self.records[i - 1, 2:].ctypes.data
            self.records[i, 3] = self.expected[i - 1 :].ctypes.data
        kernel = lib.address("probe")
        ops = [
            Op([Part(kernel, [int(self.records[i].ctypes.data)], rule)])
            for i, rule in enumerate(self.rules)
        ]
        self.tape = Tape(ops, self.header.ctypes.data, n_threads)
        self.team = Team(lib)
        self.team.grow(n_threads)

    def step(self, rows: int) -> None:
        self.header[layout.H_ROWS // 8] = rows
        self.expected += self.counts(rows)
        self.team.run(self.tape)

    def counts(self, rows: int) -> np.ndarray:
        return np.array([rows if r == layout.COUNT_ROWS else r for r in self.rules])


@pytest.mark.parametrize("n_threads", [1, 2, 6])
def test_every_chunk_runs_once_and_ops_in_order(n_threads: int) -> None:
    probe = Probe(20, n_threads)
    rng = np.random.default_rng(0)
    executed = np.zeros((20, MAX_CHUNKS), np.int64)
    for block in range(60):
        rows = int(rng.integers(0, MAX_CHUNKS + 1))
        for _ in range(500):
            probe.step(rows)
        executed += (np.arange(MAX_CHUNKS) < probe.counts(rows)[:, None]) * 500
        assert (probe.records[:, 4:] == executed).all(), "a chunk ran twice or never"
        assert not probe.records[:, 1].any(), "an op ran before its predecessor ended"
        if block % 20 == 0:
            time.sleep(0.05)  # lets the workers park
    probe.team.close()


@pytest.mark.parametrize("n_given", [0, 1])
def test_fewer_workers_than_were_asked_for_do_the_same_work(
    monkeypatch: pytest.MonkeyPatch, n_given: int
) -> None:
    """Where the system gives no more threads; those that it gives later are taken then."""
    with few_threads(n_given, monkeypatch):
        probe = Probe(20, n_threads=4)
    assert len(probe.team._workers) == n_given
    for n_workers in (n_given, 3):
        for rows in range(MAX_CHUNKS):
            probe.step(rows)
        assert (probe.records[:, 4:].sum(axis=1) == probe.expected).all()
        assert not probe.records[:, 1].any()
        assert len(probe.team._workers) == n_workers
        probe.team.grow(4)
    probe.team.close()


def test_counts_are_made_anew_up_to_the_last_op_that_was_planned() -> None:
    """Those behind it keep theirs: a long step is not counted twice."""
    planned, fixed = Op([Part(0, [], layout.COUNT_PLANNED)]), Op([Part(0, [], 1)])
    plans = Op([Part(0, [], 1)], True)
    ops = [fixed, plans, fixed, planned, fixed, planned, fixed, plans, planned, plans, fixed, fixed]
    tape = Tape(ops, header().ctypes.data, 1)
    found = [recounted(tape, i) for i in range(len(ops))]
    assert found == [0, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    tape.close()


def recounted(tape: Tape, i: int) -> int:
    """How many ops behind op i get their counts anew."""
    slot = tape.address + layout.TAPE_SLOTS + layout.SLOT_BYTES * i
    return ctypes.c_int64.from_address(slot + layout.SLOT_RECOUNT).value


def test_an_aborted_step_runs_nothing() -> None:
    probe = Probe(6, 2)
    probe.header[layout.H_ABORT // 8] = 1
    probe.team.run(probe.tape)
    assert not probe.records[:, 2].any()
    probe.header[layout.H_ABORT // 8] = 0
    probe.step(3)
    assert (probe.records[:, 2] == probe.expected).all()
    probe.team.close()


def test_tapes_may_be_freed_after_quiesce() -> None:
    probe = Probe(4, 4)
    for _ in range(300):
        probe.step(3)
        probe.team.quiesce()
        old, probe.tape = probe.tape, Tape(
            [Op([Part(library().address("probe"), [int(r.ctypes.data)], rule)])
             for r, rule in zip(probe.records, probe.rules, strict=True)],
            probe.header.ctypes.data,
            4,
        )  # fmt: skip
        old.close()
    assert not probe.records[:, 1].any()
    probe.team.close()


_SCRIPT = """
    import os, sys
    sys.path.insert(0, {root!r})
    from tests.native import library, header
    from edgeinfer.kernels.cpu.team import KERNELS, Op, Part, Tape, shared_team
    import numpy as np
    lib = library()
    lib.load(["probe", *KERNELS])
    h, record = header(), np.zeros(16, np.int64)
    team = shared_team(lib, 3)
    tape = Tape([Op([Part(lib.address("probe"), [record.ctypes.data], 5)])], h.ctypes.data, 3)
    team.run(tape)
    {body}
"""


def _python(body: str) -> subprocess.CompletedProcess[str]:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    script = textwrap.dedent(_SCRIPT).format(root=root, body=textwrap.dedent(body))
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )


def test_the_interpreter_exits_with_parked_workers() -> None:
    done = _python("import time; time.sleep(0.1); print(record[2])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "5"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_is_told() -> None:
    done = _python(
        "\n".join(
            [
                "pid = os.fork()",
                "if pid == 0:",
                "    try:",
                "        team.run(tape)",
                "    except Exception as error:",
                "        print(type(error).__name__, flush=True)",
                "    os._exit(0)",
                "os.waitpid(pid, 0)",
                "team.run(tape)",
                "print(record[2])",
            ]
        )
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ClosedError", "10"]
