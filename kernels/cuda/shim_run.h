// What a kernel compiled for the CPU (shim.h) and the code that runs it (shim_run.cpp) share.
#pragma once

namespace ei {

struct Dim {
    unsigned x, y, z;
};

constexpr int N_LANES = 32;

// What the lanes of a warp show each other. Two, in turns: a lane may already be at the next
// exchange while others still read this one.
struct Exchange {
    unsigned words[N_LANES][8];
};

struct Warp {
    Exchange exchanges[2];
};

// A CUDA thread.
struct Thread {
    Dim index;
    int lane;
    Warp* warp;
    unsigned n_exchanges;
};

// An array in shared memory, in a list of those of its kernel.
struct Shared {
    void* data;
    unsigned n_bytes;
    Shared* next;
};

// What a kernel is run with. A wait goes on once all threads of the block or warp wait at `where`.
struct Run {
    Thread* thread;
    Dim block, block_dim, grid_dim;
    unsigned long long n_barriers;  // of blocks that were passed, and times that a block went on
    void* dynamic_shared;
    void (*wait_for_block)(const char* where);
    void (*wait_for_warp)(const char* where);
    // Goes on once all other blocks have run on that are there at once.
    void (*let_others_run)(const char* where);
    // Copies to shared memory that are done when a thread waits for their group; until then there
    // is nothing but 0xFF bytes.
    void (*copy_later)(void* to, const void* from, unsigned n_bytes);
    void (*end_copy_group)();
    void (*wait_for_copies)(unsigned n_groups_pending);
    void (*fail)(const char* why, const char* where);
};

// What a compiled kernel is known by.
struct Entry {
    void (*call)(const void* slots);
    unsigned most_threads;
    Shared* shared;
};

}  // namespace ei
