"""Which rows of which sequence a chunk of an op with states has, and where their states are."""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.layout import (
    H_KEPT,
    OF_RUNS_AT,
    OF_RUNS_PER_RUN,
    OF_RUNS_SLOT_BYTES,
    OF_RUNS_STATES,
    RUN_BYTES,
    RUN_N_ROWS,
    RUN_ROW,
    RUN_STATE,
    RUNS_FIRST,
)
from edgeinfer.kernels.cpu.native.words import load_i32, word

jit = njit(error_model="numpy")


@jit
def run_of(a, chunk):
    """The run of a chunk, and which of its chunks this is."""
    per_run = word(a + OF_RUNS_PER_RUN)
    run = word(a + OF_RUNS_AT) + RUNS_FIRST + RUN_BYTES * (chunk // per_run)
    return run, chunk % per_run


@jit
def rows_of(run):
    """First row of a run, and how many there are."""
    return word(run + RUN_ROW), word(run + RUN_N_ROWS)


@jit
def slot_at(a, slot):
    """Where an op's part of a slot is; 0 where there is none."""
    if slot < 0:
        return 0
    return word(a + OF_RUNS_STATES) + slot * word(a + OF_RUNS_SLOT_BYTES)


@jit
def first_state(a, run):
    """Where the state that a run starts from is; 0 where that is zeros."""
    return slot_at(a, word(run + RUN_STATE))


@jit
def kept_state(h, a, row):
    """Where the state behind a row is kept; 0 where it isn't."""
    return slot_at(a, load_i32(word(h + H_KEPT) + 4 * row))
