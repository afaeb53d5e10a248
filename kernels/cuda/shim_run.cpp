// Runs a kernel on the CPU: its blocks one after another, or in turns where they run at once: then
// others go on where all threads of one wait.
#include "shim_threads.h"

namespace {

void begin(Block& begun, unsigned at) {
    const ei::Dim grid = run.grid_dim;
    const size_t n_warps = n_threads / ei::N_LANES;
    begun.index = {at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y};
    begun.warps.resize(n_warps);
    begun.warp_barriers.resize(n_warps);
    for (Barrier& barrier : begun.warp_barriers) {
        barrier.waiting.clear();
        barrier.n_threads = ei::N_LANES;
    }
    begun.barrier.waiting.clear();
    begun.barrier.n_threads = begun.n_alive = n_threads;
    begun.waiting.clear();
    begun.ready.clear();
    begun.kept.clear();
    for (size_t i = 0; i < n_threads; ++i) {
        Fibre& fibre = *fibres[begun.first + i];
        fibre.index = {unsigned(i), 0, 0};
        fibre.lane = i % ei::N_LANES;
        fibre.warp = &begun.warps[i / ei::N_LANES];
        fibre.n_exchanges = 0;
        fibre.copies.clear();
        fibre.n_copy_groups = 0;
        fibre.state = Fibre::READY;
        memcpy(&fibre.place, &fibre.start, sizeof fibre.place);
        begun.ready.push_back(&fibre);
    }
}

// Shared memory of the block to where its threads find it; what it has not had yet is poison.
void bring_shared_memory() {
    for (const ei::Shared* array = &shared; array != nullptr; array = array->next) {
        const auto kept = block->kept.find(array);
        if (kept == block->kept.end()) {
            memset(array->data, POISON, array->n_bytes);
        } else {
            memcpy(array->data, kept->second.data(), array->n_bytes);
        }
    }
}

void keep_shared_memory() {
    for (const ei::Shared* array = &shared; array != nullptr; array = array->next) {
        const auto* bytes = static_cast<const unsigned char*>(array->data);
        block->kept[array].assign(bytes, bytes + array->n_bytes);
    }
}

// Runs a block until all that can be done without others is done.
void go_on(Block& next) {
    block = &next;
    run.block = next.index;
    ++run.n_barriers;
    shared.next = kernel->shared;
    bring_shared_memory();
    release(next.waiting);
    if (_setjmp(scheduler) == 0) {
        run_next();
    }
    shared.next = kernel->shared;  // each array is known once a thread has come to it
    const unsigned char* fence = static_cast<unsigned char*>(shared.data) + shared.n_bytes;
    for (size_t i = 0; i < FENCE_BYTES && failure[0] == 0; ++i) {
        if (fence[i] != FENCE) {
            begin_failure("a write behind shared memory");
            add_to_failure("%zu bytes behind the %u that the launch asked for", i, shared.n_bytes);
        }
    }
}

void check_shared_memory(size_t n_most) {
    size_t n_static = 0;
    for (const ei::Shared* array = kernel->shared; array != nullptr; array = array->next) {
        n_static += array->n_bytes;
    }
    if (n_static > MOST_STATIC_BYTES || n_static + shared.n_bytes > n_most) {
        begin_failure("too much shared memory");
        add_to_failure("%zu bytes, %zu is the most, and %u dynamic ones, %zu is the most of both",
                       n_static, MOST_STATIC_BYTES, shared.n_bytes, n_most);
    }
}

// Runs blocks that are at once to their ends.
void run_together(size_t n_most) {
    std::vector<Block*> alive;
    for (Block& each : blocks) {
        alive.push_back(&each);
    }
    while (!alive.empty()) {
        const unsigned long long n_before = n_waits;
        std::vector<Block*> waiting;
        shuffle(alive);
        for (Block* each : alive) {
            go_on(*each);
            if (failure[0] == 0) {
                check_shared_memory(n_most);
            }
            if (failure[0] != 0) {
                return;
            }
            if (each->n_alive > 0) {
                keep_shared_memory();
                waiting.push_back(each);
            }
        }
        if (n_waits == n_before) {
            tell_where_threads_are();
            return;
        }
        alive = waiting;
    }
}

void run_blocks(size_t n_dynamic, size_t n_most) {
    std::vector<unsigned> order(size_t(run.grid_dim.x) * run.grid_dim.y * run.grid_dim.z);
    std::iota(order.begin(), order.end(), 0);
    shuffle(order);
    std::vector<unsigned char> memory(n_dynamic + FENCE_BYTES + 127);
    void* dynamic = memory.data();
    size_t space = memory.size();
    std::align(128, n_dynamic + FENCE_BYTES, dynamic, space);
    memset(static_cast<unsigned char*>(dynamic) + n_dynamic, FENCE, FENCE_BYTES);
    shared = {dynamic, unsigned(n_dynamic), nullptr};
    run.dynamic_shared = dynamic;
    for (size_t first = 0; first < order.size() && failure[0] == 0; first += blocks.size()) {
        for (size_t i = 0; i < blocks.size(); ++i) {
            begin(blocks[i], order[first + i]);
        }
        run_together(n_most);
    }
}

// Blocks that run at once and a fibre for each of their threads.
void prepare_blocks(size_t n_blocks) {
    blocks.resize(n_blocks);
    for (size_t i = 0; i < n_blocks; ++i) {
        blocks[i].first = i * n_threads;
    }
    while (fibres.size() < n_blocks * n_threads && failure[0] == 0) {
        if (!add_fibre()) {
            add_to_failure("no memory for the stacks of %zu threads", n_blocks * n_threads);
        }
    }
}

}  // namespace

extern "C" ei::Run* ei_run() {
    run.wait_for_block = wait_for_block;
    run.wait_for_warp = wait_for_warp;
    run.let_others_run = let_others_run;
    run.copy_later = copy_later;
    run.end_copy_group = end_copy_group;
    run.wait_for_copies = wait_for_copies;
    run.fail = fail;
    return &run;
}

// Runs a kernel to its end, its blocks `at_once` or one after another; one launch at a time in a
// process. What went wrong goes to `why`.
extern "C" void ei_launch(const ei::Entry* entry, const unsigned* grid, unsigned threads,
                          size_t n_dynamic, size_t n_most, const void* slots, unsigned seed,
                          unsigned at_once, char* why) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    failure[0] = 0;
    kernel = entry;
    kernel_slots = slots;
    n_threads = threads;
    chance = seed * 2654435769u;  // neighbouring seeds give unlike orders
    run.grid_dim = {grid[0], grid[1], grid[2]};
    run.block_dim = {threads, 1, 1};
    prepare_blocks(at_once ? size_t(grid[0]) * grid[1] * grid[2] : 1);
    if (failure[0] == 0) {
        run_blocks(n_dynamic, n_most);
    }
    memcpy(why, failure, sizeof failure);
}
