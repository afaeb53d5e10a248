// Launches that have become parts of one kernel: all its blocks run at once, and take the blocks of
// one part after the other, with a barrier between two parts.
#pragma once
#define EI_AWAIT_INPUT() ei_await_input()
#include "dev.cuh"

constexpr int JOINED_THREADS = 256;  // of a block of every part
constexpr int MOST_ARGUMENTS = 32;

// A launch as a part; joined.py writes them.
struct Call {
    int kernel;  // its number in `ei_run_part`
    unsigned blocks[3];
    uint64_t arguments[MOST_ARGUMENTS];
};

struct Extent {
    unsigned x, y, z;
};

// What a block is at. Thread 0 writes all, and it alone reads what the barrier is made of.
struct Joined {
    Extent block;
    Extent grid;
    unsigned* count;  // of all blocks that have come to a barrier, in device memory
    unsigned before;  // what it was when this one came to the last barrier
    bool is_waiting;
};
EI_SHARED(Joined, ei_joined, [1]);

// While a thread waits for other blocks.
EI_DEV void ei_let_others_run() {
#ifdef EI_CPU
    ei_run->let_others_run(EI_HERE);
#endif
}

EI_DEV unsigned ei_real_block() { return blockIdx.x; }
EI_DEV unsigned ei_n_real_blocks() { return gridDim.x; }

// From here on these are a part's own.
#undef blockIdx
#undef gridDim
#define blockIdx (ei_joined[0].block)
#define gridDim (ei_joined[0].grid)

// Shared memory of a part is that of all parts. (Headers have a few bytes of their own.)
#define EI_SHARED_OF_PART(T, name, ...)                                              \
    static_assert(sizeof(T __VA_ARGS__) <= 48 << 10, "what joined.py has at least"); \
    EI_DYN_SHARED(uint8_t, name##_bytes);                                            \
    T(&name) __VA_ARGS__ = *(T(*) __VA_ARGS__)name##_bytes

#ifndef EI_CPU
template <class T>
EI_DEV T ei_argument(const void* slots, int i) {
    return *(const T*)((const uint64_t*)slots + i);
}
#endif

// This block is done with a part. The count goes up by 2^31 with each barrier: its top bit changes
// once all blocks have come, and nobody ever sets it back.
EI_DEV void ei_arrive() {
    __syncthreads();
    if (threadIdx.x == 0) {
        const unsigned n_others = ei_n_real_blocks() - 1;
        __threadfence();
        const unsigned step = ei_real_block() == 0 ? 0x80000000u - n_others : 1u;
        ei_joined[0].before = atomicAdd(ei_joined[0].count, step);
        ei_joined[0].is_waiting = true;
    }
}

// All blocks are done with the part before, and what they have written is seen. Whatever a part
// reads of others it reads behind this; to come here once more does no harm.
EI_DEV void ei_await_input() {
    Joined& joined = ei_joined[0];
    if (threadIdx.x == 0 && joined.is_waiting) {
        while (((joined.before ^ *(volatile unsigned*)joined.count) >> 31) == 0) {
            ei_let_others_run();
        }
        joined.is_waiting = false;
        __threadfence();
    }
    __syncthreads();
}

EI_DEV void ei_run_part(const Call& call);  // written by kernel.py
