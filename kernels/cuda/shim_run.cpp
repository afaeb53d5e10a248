// Runs a kernel on the CPU: its blocks one after another, the threads of a block as fibres that
// take turns where they wait. In random order, so that what lacks a barrier gives another result.
#ifdef __APPLE__  // which hides ucontext.h otherwise
#define _XOPEN_SOURCE 700
#define _DARWIN_C_SOURCE
#endif

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <numeric>
#include <vector>

#include "shim_run.h"

namespace {

constexpr size_t STACK_BYTES = 128 << 10;
constexpr size_t FENCE_BYTES = 256;  // behind dynamic shared memory
constexpr unsigned char POISON = 0xFF, FENCE = 0xA5;
constexpr size_t MOST_STATIC_BYTES = 48 << 10;

struct Copy {
    void* to;
    const void* from;
    unsigned n_bytes, group;
};

struct Fibre : ei::Thread {
    enum State { READY, AT_BLOCK, AT_WARP, ENDED };

    State state;
    const char* where;  // of the wait it is in
    jmp_buf start, place;
    std::vector<Copy> copies;  // that are to be done, in order
    unsigned n_copy_groups;
};

// Threads that wait for each other.
struct Barrier {
    std::vector<Fibre*> waiting;
    size_t n_threads;
};

ei::Run run;
const ei::Entry* kernel;
const void* kernel_slots;
std::vector<std::unique_ptr<Fibre>> fibres;  // one for each thread of the largest block so far
size_t n_threads;                            // of this launch
std::vector<ei::Warp> warps;
std::vector<Barrier> warp_barriers;
Barrier block_barrier;
std::deque<Fibre*> ready;
size_t n_alive;
jmp_buf scheduler;  // where a block ends, or fails
char failure[1000];
unsigned chance;  // 0: no chance, threads take turns in the order of their numbers

unsigned random_below(unsigned n) {  // xorshift
    chance ^= chance << 13;
    chance ^= chance >> 17;
    chance ^= chance << 5;
    return chance % n;
}

Fibre* running() { return static_cast<Fibre*>(run.thread); }
unsigned number(const Fibre* fibre) { return fibre->index.x; }

__attribute__((format(printf, 1, 2))) void add_to_failure(const char* format, ...) {
    const size_t n = strlen(failure);
    va_list values;
    va_start(values, format);
    vsnprintf(failure + n, sizeof failure - n, format, values);
    va_end(values);
}

void begin_failure(const char* what) {
    snprintf(failure, sizeof failure, "%s in block (%u, %u, %u): ", what, run.block.x, run.block.y,
             run.block.z);
}

// No C++ object that needs destroying may be alive in a function that calls this.
[[noreturn]] void stop() { _longjmp(scheduler, 1); }

// Tells of every place at which threads are, when none of them can go on.
void tell_where_threads_are() {
    begin_failure("divergent threads");
    const char* separator = "";
    for (size_t i = 0; i < n_threads; ++i) {
        const Fibre& first = *fibres[i];
        size_t n = 0;
        bool is_told = false;
        for (size_t j = 0; j < n_threads; ++j) {
            const Fibre& other = *fibres[j];
            if (other.state == first.state &&
                (first.state == Fibre::ENDED || other.where == first.where)) {
                is_told = is_told || j < i;
                ++n;
            }
        }
        if (is_told) {
            continue;
        }
        add_to_failure("%s%zu threads (%u first) ", separator, n, number(&first));
        if (first.state == Fibre::ENDED) {
            add_to_failure("ended");
        } else {
            const char* whom = first.state == Fibre::AT_BLOCK ? "block" : "warp";
            add_to_failure("wait for their %s at %s", whom, first.where);
        }
        separator = ", ";
    }
}

[[noreturn]] void run_next() {
    if (ready.empty()) {
        if (n_alive > 0) {
            tell_where_threads_are();
        }
        stop();
    }
    if (chance != 0) {
        std::swap(ready.front(), ready[random_below(ready.size())]);
    }
    Fibre* next = ready.front();
    ready.pop_front();
    next->state = Fibre::READY;
    run.thread = next;
    _longjmp(next->place, 1);
}

void release_if_complete(Barrier& barrier) {
    if (!barrier.waiting.empty() && barrier.waiting.size() == barrier.n_threads) {
        ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
        barrier.waiting.clear();
    }
}

void wait_at(Barrier& barrier, Fibre::State state, const char* where) {
    Fibre* me = running();
    me->state = state;
    me->where = where;
    if (!barrier.waiting.empty()) {
        const Fibre* other = barrier.waiting.front();
        if (strcmp(other->where, where) != 0) {
            begin_failure("divergent threads");
            add_to_failure("thread %u waits at %s, thread %u at %s", number(other), other->where,
                           number(me), where);
            stop();
        }
    }
    barrier.waiting.push_back(me);
    release_if_complete(barrier);
    if (_setjmp(me->place) == 0) {
        run_next();
    }
}

void wait_for_block(const char* where) { wait_at(block_barrier, Fibre::AT_BLOCK, where); }

// All lanes must come: on a GPU a lane that has ended shows its warp anything.
void wait_for_warp(const char* where) {
    wait_at(warp_barriers[number(running()) / ei::N_LANES], Fibre::AT_WARP, where);
}

void copy_later(void* to, const void* from, unsigned n_bytes) {
    memset(to, POISON, n_bytes);
    running()->copies.push_back({to, from, n_bytes, running()->n_copy_groups});
}

void end_copy_group() { ++running()->n_copy_groups; }

void wait_for_copies(unsigned n_groups_pending) {
    std::vector<Copy>& copies = running()->copies;
    size_t n_done = 0;
    while (n_done < copies.size() &&
           copies[n_done].group + n_groups_pending < running()->n_copy_groups) {
        memcpy(copies[n_done].to, copies[n_done].from, copies[n_done].n_bytes);
        ++n_done;
    }
    copies.erase(copies.begin(), copies.begin() + n_done);
}

void fail(const char* why, const char* where) {
    begin_failure(why);
    add_to_failure("thread %u at %s", number(running()), where);
    stop();
}

// What a fibre does: it comes back here for every block that it is a thread of.
void live() {
    Fibre* me = running();
    if (_setjmp(me->start) == 0) {
        _longjmp(scheduler, 1);
    }
    kernel->call(kernel_slots);
    running()->state = Fibre::ENDED;
    --n_alive;
    --block_barrier.n_threads;  // a barrier waits for those only that have not ended
    release_if_complete(block_barrier);
    run_next();
}

// A stack above a page that can't be touched; null where there is no memory.
char* make_stack() {
    const size_t page = sysconf(_SC_PAGESIZE);
    void* base = mmap(nullptr, page + STACK_BYTES, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mprotect(base, page, PROT_NONE) != 0) {
        return nullptr;
    }
    return static_cast<char*>(base) + page;
}

bool add_fibre() {
    char* stack = make_stack();
    if (stack == nullptr) {
        return false;
    }
    fibres.push_back(std::make_unique<Fibre>());
    // Stacks that began at the same place of a page would share few lines of the cache.
    const size_t shift = fibres.size() * 704 % 4096 / 64 * 64;
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK_BYTES - shift;
    context.uc_link = nullptr;
    makecontext(&context, live, 0);
    run.thread = fibres.back().get();
    if (_setjmp(scheduler) == 0) {
        setcontext(&context);
    }
    return true;
}

void prepare_threads() {
    const size_t n_warps = n_threads / ei::N_LANES;
    warps.resize(n_warps);
    warp_barriers.resize(n_warps);
    for (Barrier& barrier : warp_barriers) {
        barrier.waiting.clear();
        barrier.n_threads = ei::N_LANES;
    }
    block_barrier.waiting.clear();
    block_barrier.n_threads = n_alive = n_threads;
    ready.clear();
    for (size_t i = 0; i < n_threads; ++i) {
        Fibre& fibre = *fibres[i];
        fibre.index = {unsigned(i), 0, 0};
        fibre.lane = i % ei::N_LANES;
        fibre.warp = &warps[i / ei::N_LANES];
        fibre.n_exchanges = 0;
        fibre.copies.clear();
        fibre.n_copy_groups = 0;
        fibre.state = Fibre::READY;
        memcpy(&fibre.place, &fibre.start, sizeof fibre.place);
        ready.push_back(&fibre);
    }
}

void run_block(unsigned char* dynamic, size_t n_dynamic) {
    ++run.n_blocks;
    for (const ei::Shared* array = kernel->shared; array != nullptr; array = array->next) {
        memset(array->data, POISON, array->n_bytes);
    }
    memset(dynamic, POISON, n_dynamic);
    memset(dynamic + n_dynamic, FENCE, FENCE_BYTES);
    prepare_threads();
    if (_setjmp(scheduler) == 0) {
        run_next();
    }
    for (size_t i = 0; i < FENCE_BYTES && failure[0] == 0; ++i) {
        if (dynamic[n_dynamic + i] != FENCE) {
            begin_failure("a write behind shared memory");
            add_to_failure("%zu bytes behind the %zu that the launch asked for", i, n_dynamic);
        }
    }
}

void check_shared_memory(size_t n_dynamic, size_t n_most) {
    size_t n_static = 0;
    for (const ei::Shared* array = kernel->shared; array != nullptr; array = array->next) {
        n_static += array->n_bytes;
    }
    if (n_static > MOST_STATIC_BYTES || n_static + n_dynamic > n_most) {
        begin_failure("too much shared memory");
        add_to_failure("%zu bytes, %zu is the most, and %zu dynamic ones, %zu is the most of both",
                       n_static, MOST_STATIC_BYTES, n_dynamic, n_most);
    }
}

void run_blocks(size_t n_dynamic, size_t n_most) {
    const ei::Dim grid = run.grid_dim;
    std::vector<unsigned> order(size_t(grid.x) * grid.y * grid.z);
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = order.size(); chance != 0 && i > 1; --i) {
        std::swap(order[i - 1], order[random_below(i)]);
    }
    std::vector<unsigned char> memory(n_dynamic + FENCE_BYTES + 127);
    void* dynamic = memory.data();
    size_t space = memory.size();
    std::align(128, n_dynamic + FENCE_BYTES, dynamic, space);
    run.dynamic_shared = dynamic;
    for (unsigned at : order) {
        run.block = {at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y};
        run_block(static_cast<unsigned char*>(dynamic), n_dynamic);
        if (failure[0] == 0) {  // each array is known once a thread has come to it
            check_shared_memory(n_dynamic, n_most);
        }
        if (failure[0] != 0) {
            return;
        }
    }
}

}  // namespace

extern "C" ei::Run* ei_run() {
    run.wait_for_block = wait_for_block;
    run.wait_for_warp = wait_for_warp;
    run.copy_later = copy_later;
    run.end_copy_group = end_copy_group;
    run.wait_for_copies = wait_for_copies;
    run.fail = fail;
    return &run;
}

// Runs a kernel to its end; one launch at a time in a process. What went wrong goes to `why`.
extern "C" void ei_launch(const ei::Entry* entry, const unsigned* grid, unsigned threads,
                          size_t n_dynamic, size_t n_most, const void* slots, unsigned seed,
                          char* why) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    failure[0] = 0;
    kernel = entry;
    kernel_slots = slots;
    n_threads = threads;
    chance = seed * 2654435769u;  // neighbouring seeds give unlike orders
    run.grid_dim = {grid[0], grid[1], grid[2]};
    run.block_dim = {threads, 1, 1};
    while (fibres.size() < threads && failure[0] == 0) {
        if (!add_fibre()) {
            add_to_failure("no memory for the stacks of %u threads", threads);
        }
    }
    if (failure[0] == 0) {
        run_blocks(n_dynamic, n_most);
    }
    memcpy(why, failure, sizeof failure);
}
