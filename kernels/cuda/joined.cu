// Launches of a step of one row joined into one kernel: the blocks of this one stay, and take those
// of all launches in turns. What becomes of a part's blocks, and in which order, changes no bit.
#include "joined.cuh"

// Grid: as many blocks as can be at once, or fewer. Dynamic shared memory: the most that a part
// has, and at least 48 KB. calls: n_calls. count: zero before the first launch, then its own.
EI_KERNEL(JOINED_THREADS, 1) joined(
    const Step* step, const Call* calls, int n_calls, unsigned* count) {
    Joined& joined = ei_joined[0];
    if (threadIdx.x == 0) {
        joined.count = count;
        joined.is_waiting = false;
    }
    for (int i = 0; i < n_calls; ++i) {
        const Call& call = calls[i];
        const unsigned n_x = call.blocks[0], n_y = call.blocks[1];
        const unsigned n_blocks = n_x * n_y * call.blocks[2];
        for (unsigned at = ei_real_block(); at < n_blocks; at += ei_n_real_blocks()) {
            __syncthreads();  // nobody reads shared memory of the block before any more
            if (threadIdx.x == 0) {
                joined.block = {at % n_x, at / n_x % n_y, at / n_x / n_y};
                joined.grid = {n_x, n_y, call.blocks[2]};
            }
            __syncthreads();
            ei_run_part(call);
        }
        ei_await_input();  // where there was no block for this one, or that has read nothing
        if (i + 1 < n_calls) {
            ei_arrive();
        }
    }
}
