"""The thread team's native half: workers that walk a tape of ops, chunk by chunk.

Knows no operation. A tape is a list of op slots; an op is cut into chunks; a thread takes the
next chunk, counts it done, and goes on when all chunks are done, not when all threads arrived: a
descheduled thread that holds no chunk delays nobody.

Every word that a late worker could misread (ticket, count, done) carries the step's epoch in its
upper half, so a worker of an old step can neither take nor count anything of a new one. A worker
finds a step through one pointer, so it never sees a mixture of two tapes.

An op may decide how many chunks later ones have: who ran it writes their counts before it counts
as done, and no thread reads them earlier.
"""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.layout import (
    COUNT_ITEMS,
    COUNT_PLANNED,
    COUNT_ROWS,
    COUNT_WANTED,
    H_ABORT,
    H_ROWS,
    H_WANTED_ROWS,
    PART_ARGS,
    PART_BYTES,
    PART_COUNT,
    PART_KERNEL,
    PART_RULE,
    SLOT_BYTES,
    SLOT_COUNT,
    SLOT_DONE,
    SLOT_N_PARTS,
    SLOT_PARTS,
    SLOT_RECOUNT,
    SLOT_TICKET,
    TAPE_HEADER,
    TAPE_N_OPS,
    TAPE_N_PROLOGUE,
    TAPE_N_THREADS,
    TAPE_PROLOGUE,
    TAPE_SLOTS,
    TEAM_ACTIVE,
    TEAM_EPOCH,
    TEAM_FUTEX,
    TEAM_SLEEP_ARG,
    TEAM_SLEEPERS,
    TEAM_STOP,
    TEAM_TAPE,
    TEAM_WAIT,
    TEAM_YIELD,
    WORD,
)
from edgeinfer.kernels.cpu.native.words import (
    call_os,
    compare_and_swap,
    fetch_add,
    invoke,
    load_acquire,
    set_word,
    store_release,
    swap,
    word,
)

_LOW = 0xFFFFFFFF
_FUTEX_WAIT, _FUTEX_WAKE = 128, 129  # with FUTEX_PRIVATE_FLAG
_SPINS_BEFORE_YIELD = 500
_SPINS_BEFORE_PARK = 4000


def make(isa, function):
    """`team.work` (team, worker): a worker's whole life. `team.step` (team, tape): one step."""
    jit = njit(error_model="numpy")
    pause, reset_float = isa.pause, isa.reset_float

    @jit
    def run_chunk(slot, chunk, header, thread):
        part = word(slot + SLOT_PARTS)
        for _ in range(word(slot + SLOT_N_PARTS)):
            count = word(part + PART_COUNT)
            if chunk < count:
                invoke(word(part + PART_KERNEL), header, word(part + PART_ARGS), chunk, thread)
                return
            chunk -= count
            part += PART_BYTES

    @jit
    def chunk_count(part, header, is_planned):
        rule = word(part + PART_RULE)
        if rule == COUNT_ROWS:
            return word(header + H_ROWS)
        if rule == COUNT_WANTED:
            return word(header + H_WANTED_ROWS)
        if rule == COUNT_ITEMS or (rule == COUNT_PLANNED and is_planned):
            args = word(part + PART_ARGS)
            return word(word(args)) * word(args + WORD)
        if rule == COUNT_PLANNED:
            return 0
        return rule  # a fixed count

    @jit
    def count_chunks(slot, header, is_planned):
        """Of an op; its parts have their own from here on."""
        total = 0
        part = word(slot + SLOT_PARTS)
        for _ in range(word(slot + SLOT_N_PARTS)):
            count = chunk_count(part, header, is_planned)
            set_word(part + PART_COUNT, count)
            total += count
            part += PART_BYTES
        return total

    @jit
    def recount(slot, header, tag):
        """Behind an op that plans: the counts of those that follow."""
        for _ in range(word(slot + SLOT_RECOUNT)):
            slot += SLOT_BYTES
            store_release(slot + SLOT_COUNT, tag << 32 | count_chunks(slot, header, True))

    @jit
    def walk(team, tape, epoch, thread):
        """Run every op of this epoch, or leave when a newer one has begun."""
        header = word(tape + TAPE_HEADER)
        slot = tape + TAPE_SLOTS
        tag = epoch & _LOW
        for _ in range(word(tape + TAPE_N_OPS)):
            count = load_acquire(slot + SLOT_COUNT)
            if (count >> 32) & _LOW != tag:
                return
            count &= _LOW
            while True:
                ticket = load_acquire(slot + SLOT_TICKET)
                if (ticket >> 32) & _LOW != tag:
                    return
                chunk = ticket & _LOW
                if chunk >= count:
                    break
                if compare_and_swap(slot + SLOT_TICKET, ticket, ticket + 1):
                    if not load_acquire(header + H_ABORT):
                        run_chunk(slot, chunk, header, thread)
                        recount(slot, header, tag)
                    fetch_add(slot + SLOT_DONE, 1)
            spins = 0
            while True:
                done = load_acquire(slot + SLOT_DONE)
                if (done >> 32) & _LOW != tag:
                    return
                if done & _LOW >= count:
                    break
                pause()
                spins += 1
                if spins > _SPINS_BEFORE_YIELD:
                    call_os(word(team + TEAM_YIELD), 0, 0, 0, 0, 0)
            slot += SLOT_BYTES

    def work(team, worker):
        reset_float()
        seen = 0
        while not load_acquire(team + TEAM_STOP):
            spins = 0
            while load_acquire(team + TEAM_EPOCH) == seen and not load_acquire(team + TEAM_STOP):
                pause()
                spins += 1
                if spins > _SPINS_BEFORE_PARK:
                    fetch_add(team + TEAM_SLEEPERS, 1)
                    if load_acquire(team + TEAM_EPOCH) == seen:
                        if not load_acquire(team + TEAM_STOP):
                            futex = word(team + TEAM_FUTEX)
                            if futex:
                                wait, value = word(team + TEAM_WAIT), seen & _LOW
                                call_os(wait, futex, team + TEAM_EPOCH, _FUTEX_WAIT, value, 0)
                            else:
                                wait = word(team + TEAM_WAIT)
                                call_os(wait, word(team + TEAM_SLEEP_ARG), 0, 0, 0, 0)
                    fetch_add(team + TEAM_SLEEPERS, -1)
                elif spins > _SPINS_BEFORE_YIELD and spins & 15 == 0:
                    call_os(word(team + TEAM_YIELD), 0, 0, 0, 0, 0)
            # Active before reading the tape: `Team.quiesce` waits for it before freeing one.
            fetch_add(team + TEAM_ACTIVE, 1)
            seen = load_acquire(team + TEAM_EPOCH)
            tape = load_acquire(team + TEAM_TAPE)
            if tape and worker < word(tape + TAPE_N_THREADS):
                walk(team, tape, seen, worker)
            fetch_add(team + TEAM_ACTIVE, -1)

    @jit
    def publish(tape, epoch):
        """Fill in this step's chunk counts under its epoch."""
        header = word(tape + TAPE_HEADER)
        slot = tape + TAPE_SLOTS
        tag = (epoch & _LOW) << 32
        for _ in range(word(tape + TAPE_N_OPS)):
            total = count_chunks(slot, header, False)
            store_release(slot + SLOT_DONE, tag)
            store_release(slot + SLOT_TICKET, tag)
            store_release(slot + SLOT_COUNT, tag | total)
            slot += SLOT_BYTES

    def step(team, tape):
        reset_float()
        part = word(tape + TAPE_PROLOGUE)
        for _ in range(word(tape + TAPE_N_PROLOGUE)):
            kernel, args = word(part + PART_KERNEL), word(part + PART_ARGS)
            invoke(kernel, word(tape + TAPE_HEADER), args, 0, 0)
            part += PART_BYTES
        epoch = load_acquire(team + TEAM_EPOCH) + 1
        publish(tape, epoch)
        swap(team + TEAM_TAPE, tape)
        swap(team + TEAM_EPOCH, epoch)
        if load_acquire(team + TEAM_SLEEPERS) > 0 and word(team + TEAM_FUTEX):
            futex, everyone = word(team + TEAM_FUTEX), 1 << 30
            call_os(word(team + TEAM_WAIT), futex, team + TEAM_EPOCH, _FUTEX_WAKE, everyone, 0)
        walk(team, tape, epoch, 0)

    return {"work": work, "step": step}[function]
