"""A kernel that computes nothing but notices a broken team: for tests.

Its one argument word is the address of a record: address of the previous op's runs (or 0),
violations seen, runs of this op, address of the runs the previous op should have, then runs per
chunk.
"""

from __future__ import annotations

from edgeinfer.kernels.cpu.native.words import fetch_add, load_acquire, word


def make(isa):
    def kernel(h, a, chunk, thread):
        record = word(a)
        if word(record) and load_acquire(word(record)) != load_acquire(word(record + 24)):
            fetch_add(record + 8, 1)
        fetch_add(record + 16, 1)
        fetch_add(record + 32 + 8 * chunk, 1)

    return kernel
