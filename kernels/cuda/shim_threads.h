// The threads of a CUDA block as fibres of one thread: they take turns where they wait. In random
// order, so that what lacks a barrier gives another result.
#pragma once
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
#include <map>
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
    enum State { READY, AT_BLOCK, AT_WARP, AT_OTHERS, ENDED };

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

struct Block {
    ei::Dim index;
    size_t first;  // of its threads in `fibres`
    std::vector<ei::Warp> warps;
    std::vector<Barrier> warp_barriers;
    Barrier barrier;
    std::deque<Fibre*> ready;
    std::vector<Fibre*> waiting;  // for other blocks
    size_t n_alive;
    // Arrays of shared memory, while other blocks have theirs there.
    std::map<const ei::Shared*, std::vector<unsigned char>> kept;
};

ei::Run run;
const ei::Entry* kernel;
const void* kernel_slots;
std::vector<std::unique_ptr<Fibre>> fibres;  // one for each thread that has ever run at once
size_t n_threads;                            // of a block of this launch
std::vector<Block> blocks;                   // that run at once
Block* block;                                // the one that runs
ei::Shared shared;                           // the arrays of a block: the dynamic one is the first
unsigned long long n_waits;                  // for a block or warp, or ends of threads
jmp_buf scheduler;  // where a block waits for others, ends, or fails
char failure[1000];
unsigned chance;  // 0: no chance, threads take turns in the order of their numbers

unsigned random_below(unsigned n) {  // xorshift
    chance ^= chance << 13;
    chance ^= chance >> 17;
    chance ^= chance << 5;
    return chance % n;
}

template <class T>
void shuffle(std::vector<T>& all) {
    for (size_t i = all.size(); chance != 0 && i > 1; --i) {
        std::swap(all[i - 1], all[random_below(i)]);
    }
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

// Tells of every place at which threads of the block are, when none of them can go on.
void tell_where_threads_are() {
    const char* const whom[] = {"", "wait for their block", "wait for their warp",
                                "wait for other blocks", "ended"};
    begin_failure("divergent threads");
    const char* separator = "";
    for (size_t i = 0; i < n_threads; ++i) {
        const Fibre& first = *fibres[block->first + i];
        size_t n = 0;
        bool is_told = false;
        for (size_t j = 0; j < n_threads; ++j) {
            const Fibre& other = *fibres[block->first + j];
            if (other.state == first.state &&
                (first.state == Fibre::ENDED || other.where == first.where)) {
                is_told = is_told || j < i;
                ++n;
            }
        }
        if (is_told) {
            continue;
        }
        add_to_failure("%s%zu threads (%u first) %s", separator, n, number(&first),
                       whom[first.state]);
        if (first.state != Fibre::ENDED) {
            add_to_failure(" at %s", first.where);
        }
        separator = ", ";
    }
}

[[noreturn]] void run_next() {
    std::deque<Fibre*>& ready = block->ready;
    if (ready.empty()) {
        if (block->n_alive > 0 && block->waiting.empty()) {
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

void release(std::vector<Fibre*>& waiting) {
    block->ready.insert(block->ready.end(), waiting.begin(), waiting.end());
    waiting.clear();
}

void release_if_complete(Barrier& barrier) {
    if (!barrier.waiting.empty() && barrier.waiting.size() == barrier.n_threads) {
        run.n_barriers += &barrier == &block->barrier;
        release(barrier.waiting);
    }
}

void wait_among(std::vector<Fibre*>& waiting, Fibre::State state, const char* where) {
    Fibre* me = running();
    me->state = state;
    me->where = where;
    waiting.push_back(me);
}

void go_on_later() {
    if (_setjmp(running()->place) == 0) {
        run_next();
    }
}

void wait_at(Barrier& barrier, Fibre::State state, const char* where) {
    if (!barrier.waiting.empty()) {
        const Fibre* other = barrier.waiting.front();
        if (strcmp(other->where, where) != 0) {
            begin_failure("divergent threads");
            add_to_failure("thread %u waits at %s, thread %u at %s", number(other), other->where,
                           number(running()), where);
            stop();
        }
    }
    wait_among(barrier.waiting, state, where);
    ++n_waits;
    release_if_complete(barrier);
    go_on_later();
}

void wait_for_block(const char* where) { wait_at(block->barrier, Fibre::AT_BLOCK, where); }

// All lanes must come: on a GPU a lane that has ended shows its warp anything.
void wait_for_warp(const char* where) {
    wait_at(block->warp_barriers[number(running()) / ei::N_LANES], Fibre::AT_WARP, where);
}

void let_others_run(const char* where) {
    wait_among(block->waiting, Fibre::AT_OTHERS, where);
    go_on_later();
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
    ++n_waits;
    --block->n_alive;
    --block->barrier.n_threads;  // a barrier waits for those only that have not ended
    release_if_complete(block->barrier);
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

}  // namespace
