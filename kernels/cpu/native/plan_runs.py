"""Finds the runs of rows of one sequence in a step. Knows no states."""

from __future__ import annotations

from edgeinfer.kernels.cpu.layout import (
    H_ROWS,
    H_SEQ,
    H_STATES,
    RUN_BYTES,
    RUN_N_ROWS,
    RUN_ROW,
    RUN_STATE,
    RUNS_AT,
    RUNS_FIRST,
)
from edgeinfer.kernels.cpu.native.words import load_i32, set_word, word


def make(isa):
    def kernel(h, a, chunk, thread):
        at, seqs, states = word(a + RUNS_AT), word(h + H_SEQ), word(h + H_STATES)
        run, row, n_rows = at + RUNS_FIRST, 0, word(h + H_ROWS)
        while row < n_rows:
            first, seq = row, load_i32(seqs + 4 * row)
            while row < n_rows and load_i32(seqs + 4 * row) == seq:
                row += 1
            set_word(run + RUN_ROW, first)
            set_word(run + RUN_N_ROWS, row - first)
            set_word(run + RUN_STATE, load_i32(states + 4 * seq))
            run += RUN_BYTES
        set_word(at, (run - at - RUNS_FIRST) // RUN_BYTES)

    return kernel
