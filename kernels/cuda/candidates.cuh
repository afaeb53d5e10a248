// The candidates of a row in descending order of logit, sorted only as far as is looked at.
// A block of SAMPLE_THREADS does everything together: all threads call, with the same arguments,
// and get the same answers. Sums are in the order of edgeinfer/sampling/sampler.py.
#pragma once
#include "sample_numbers.cuh"

constexpr int SAMPLE_THREADS = 512;
constexpr int SAMPLE_WARPS = SAMPLE_THREADS / 32;
constexpr int SORTED = 2048;    // candidates that are sorted at a time, at most
constexpr int WEIGHTS = 1024;   // that are added up at a time
constexpr int SUM_CHUNK = 4096;
constexpr int SUM_LANES = 8;
constexpr int SUMS = SAMPLE_THREADS / SUM_LANES;  // chunks that are added up at a time
constexpr int FIRST_DISTANCES = 8;
constexpr int LOWEST_TOKEN = 0x7fffffff;

// What the threads of a block share.
struct SampleRoom {
    long long keys[SORTED];
    double weights[WEIGHTS];
    double sums[SUMS];
    long long of_warps[SAMPLE_WARPS];
    double number;
    int found;
    int positive;
};

// A key is ordered as the logit is, and of equal ones the lower token has the higher.
EI_DEV long long key_of(float logit, int token) {
    return (long long)ei_order(logit) * (1LL << 32) + (LOWEST_TOKEN - token);
}

EI_DEV int token_of(long long key) {
    return LOWEST_TOKEN - (int)(key & LOWEST_TOKEN);
}

// The logit of the highest key that is below this one, or of this one.
EI_DEV float logit_of(long long key) {
    const int order = (int)(key >> 32);
    const unsigned bits = order < 0 ? 0x80000000u - (unsigned)order : (unsigned)order;
    return __int_as_float((int)bits);
}

// Below every candidate's key.
EI_DEV long long no_key() {
    return key_of(-EI_INFINITY, 0);
}

struct Candidates {
    const float* logits;
    int n_vocab;
    int* order;          // tokens, as far as they are sorted
    int n;               // the first so many of the order are candidates
    int n_sorted;
    int n_below;         // how many logits are below those that are sorted
    long long last;      // the key of the last that is sorted; above all where none is
    bool is_whole;       // nothing was cut off yet
    double largest;      // the first one's logit
    SampleRoom* room;
};

// -- a value of each thread --

EI_DEV long long largest_of_block(SampleRoom* room, long long x) {
    for (int step = 16; step > 0; step >>= 1) {
        x = max(x, __shfl_xor_sync(EI_ALL_LANES, x, step));
    }
    if (threadIdx.x % 32 == 0) {
        room->of_warps[threadIdx.x / 32] = x;
    }
    __syncthreads();
    x = room->of_warps[threadIdx.x % SAMPLE_WARPS];
    for (int step = SAMPLE_WARPS / 2; step > 0; step >>= 1) {
        x = max(x, __shfl_xor_sync(EI_ALL_LANES, x, step));
    }
    __syncthreads();
    return x;
}

EI_DEV int sum_of_block(SampleRoom* room, int x) {
    x = ei_sum32(x);
    if (threadIdx.x % 32 == 0) {
        room->of_warps[threadIdx.x / 32] = x;
    }
    __syncthreads();
    x = (int)room->of_warps[threadIdx.x % SAMPLE_WARPS];
    for (int step = SAMPLE_WARPS / 2; step > 0; step >>= 1) {
        x += __shfl_xor_sync(EI_ALL_LANES, x, step);
    }
    __syncthreads();
    return x;
}

// -- the whole vocabulary --

// How many tokens have a key that is so.
template <class Test>
EI_DEV int count_keys(const Candidates& c, Test test) {
    int n = 0;
#pragma unroll 4
    for (int token = threadIdx.x; token < c.n_vocab; token += SAMPLE_THREADS) {
        n += test(key_of(clean_logit(c.logits[token]), token));
    }
    return sum_of_block(c.room, n);
}

// The sum of a term of each candidate's logit. A thread adds one lane of a chunk.
template <class Term>
EI_DEV double sum_vocabulary(const Candidates& c, Term term) {
    double total = 0.0;
    const int n_chunks = (c.n_vocab + SUM_CHUNK - 1) / SUM_CHUNK;
    for (int first = 0; first < n_chunks; first += SUMS) {
        const int n = min(SUMS, n_chunks - first);
        const int chunk = threadIdx.x / SUM_LANES;
        double sum = 0.0;
        if (chunk < n) {
            const int start = (first + chunk) * SUM_CHUNK;
            const int end = min(start + SUM_CHUNK, c.n_vocab);
#pragma unroll 1
            for (int token = start + threadIdx.x % SUM_LANES; token < end; token += SUM_LANES) {
                const float logit = clean_logit(c.logits[token]);
                sum = sum + (logit > -EI_INFINITY ? term((double)logit) : 0.0);
            }
        }
        for (int lanes = SUM_LANES / 2; lanes > 0; lanes >>= 1) {
            sum = sum + __shfl_xor_sync(EI_ALL_LANES, sum, lanes);
        }
        if (threadIdx.x % SUM_LANES == 0) {
            c.room->sums[chunk] = sum;
        }
        __syncthreads();
        for (int i = 0; i < n; ++i) {
            total = total + c.room->sums[i];
        }
        __syncthreads();
    }
    return total;
}

// All candidates, none of them sorted; n is 0 where there are none.
EI_DEV Candidates open_candidates(
    const float* logits, int n_vocab, int* order, SampleRoom* room) {
    Candidates c = {logits, n_vocab, order, 0, 0, 0, 0, true, 0.0, room};
    long long best = no_key();
    int n = 0;
#pragma unroll 4
    for (int token = threadIdx.x; token < n_vocab; token += SAMPLE_THREADS) {
        const long long key = key_of(clean_logit(logits[token]), token);
        best = max(best, key);
        n += key > no_key();
    }
    best = largest_of_block(room, best);
    c.n = sum_of_block(room, n);
    c.n_below = c.n;
    c.last = best + 1;
    c.largest = (double)logit_of(best);
    return c;
}

// -- the order --

EI_DEV void sort_keys(long long* keys, int n) {
    for (int size = 2; size <= n; size *= 2) {
        for (int step = size / 2; step > 0; step /= 2) {
            for (int i = threadIdx.x; i < n / 2; i += SAMPLE_THREADS) {
                const int low = 2 * i - (i & (step - 1));
                const int high = low + step;
                const long long a = keys[low];
                const long long b = keys[high];
                if ((a < b) == ((low & size) == 0)) {
                    keys[low] = b;
                    keys[high] = a;
                }
            }
            __syncthreads();
        }
    }
}

// A key such that `least` to SORTED of those that are not sorted have it or a higher one. There
// are `least` of them, and `least` is no more than SORTED.
EI_DEV long long lowest_to_sort(const Candidates& c, int least) {
    long long low = no_key() + 1;
    long long high = c.last;
    int n = c.n_below;
    const auto count_from = [&](long long key) {
        return count_keys(c, [&](long long each) { return each >= key && each < c.last; });
    };
    // Twice the distance from the last one each time, then half of what is between two keys: keys
    // differ, so that in the end one more would make the difference.
    const float from = logit_of(c.last);
    float distance = 2.0f;
    for (int i = 0; i < FIRST_DISTANCES && n > SORTED; ++i) {
        const long long key = key_of(from - distance, LOWEST_TOKEN);
        if (key <= low) {
            break;
        }
        const int n_from = count_from(key);
        if (n_from >= least) {
            low = key;
            n = n_from;
            break;
        }
        high = key;
        distance = distance + distance;
    }
    while (n > SORTED) {
        const long long middle = low + (long long)(((uint64_t)high - (uint64_t)low) / 2);
        const int n_from = count_from(middle);
        if (n_from >= least) {
            low = middle;
            n = n_from;
        } else {
            high = middle;
        }
    }
    return low;
}

// Puts at least `wanted` more in order, which there are, or as many as are sorted at a time.
EI_DEV void sort_more(Candidates& c, int wanted) {
    SampleRoom* room = c.room;
    const long long low = lowest_to_sort(c, min(wanted, SORTED));
    if (threadIdx.x == 0) {
        room->found = 0;
    }
    __syncthreads();
    for (int token = threadIdx.x; token < c.n_vocab; token += SAMPLE_THREADS) {
        const long long key = key_of(clean_logit(c.logits[token]), token);
        if (key >= low && key < c.last) {
            room->keys[atomicAdd(&room->found, 1)] = key;
        }
    }
    __syncthreads();
    const int n = room->found;
    int room_for = 1;
    while (room_for < n) {
        room_for *= 2;
    }
    for (int i = n + threadIdx.x; i < room_for; i += SAMPLE_THREADS) {
        room->keys[i] = no_key();
    }
    __syncthreads();
    sort_keys(room->keys, room_for);
    for (int i = threadIdx.x; i < n; i += SAMPLE_THREADS) {
        c.order[c.n_sorted + i] = token_of(room->keys[i]);
    }
    c.last = room->keys[n - 1];
    c.n_sorted += n;
    c.n_below -= n;
    __syncthreads();
}

// Puts the first n in order, or all where there are fewer.
EI_DEV void sort_to(Candidates& c, int n) {
    while (c.n_sorted < min(n, c.n)) {
        sort_more(c, min(n, c.n) - c.n_sorted);
    }
}

EI_DEV double logit_at(const Candidates& c, int i) {
    return (double)clean_logit(c.logits[c.order[i]]);
}

// (logit - largest) / temperature.
EI_DEV double scaled_at(const Candidates& c, int i, double inverse) {
    return (logit_at(c, i) - c.largest) * inverse;
}

// -- what is kept --

// Cuts off all but the first n.
EI_DEV void keep(Candidates& c, int n) {
    c.n = min(n, c.n);
    c.is_whole = false;
}

// Cuts off the first n, but not all.
EI_DEV void drop(Candidates& c, int n) {
    sort_to(c, n + 1);
    c.order += n;
    c.n -= n;
    c.n_sorted -= n;
    c.largest = logit_at(c, 0);
    c.is_whole = false;
}

// How many have a logit that is so, if those are the first ones.
template <class Test>
EI_DEV int count_first(const Candidates& c, Test test) {
    int n = 0;
    if (c.n <= c.n_sorted) {
        for (int i = threadIdx.x; i < c.n; i += SAMPLE_THREADS) {
            n += test(logit_at(c, i));
        }
        return sum_of_block(c.room, n);
    }
    n = count_keys(c, [&](long long key) {
        return key > no_key() && test((double)logit_of(key));
    });
    return min(n, c.n);
}

// -- sums from left to right --

struct Walk {
    double sum;
    int reached;   // where it was, -1 where it was not
    int positive;  // the last that added anything
};

enum Reach { never, at_least, above };

// Adds a term of each logit until the sum is the target, or above it, after `min_keep` or more.
template <class Term>
EI_DEV Walk walk(Candidates& c, Term term, Reach reach, double target, long long min_keep) {
    Walk w = {0.0, -1, 0};
    SampleRoom* room = c.room;
    for (int start = 0; start < c.n && w.reached < 0; start += WEIGHTS) {
        const int n = min(WEIGHTS, c.n - start);
        sort_to(c, start + n);
#pragma unroll 1
        for (int i = threadIdx.x; i < n; i += SAMPLE_THREADS) {
            room->weights[i] = term(logit_at(c, start + i));
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int i = 0; i < n && w.reached < 0; ++i) {
                const double x = room->weights[i];
                w.sum = w.sum + x;
                w.positive = x > 0.0 ? start + i : w.positive;
                const bool is_there = reach == above ? w.sum > target : w.sum >= target;
                if (reach != never && is_there && start + i + 1 >= min_keep) {
                    w.reached = start + i;
                }
            }
            room->number = w.sum;
            room->found = w.reached;
            room->positive = w.positive;
        }
        __syncthreads();
        w = {room->number, room->found, room->positive};
        __syncthreads();
    }
    return w;
}

// The sum of a term of each logit: over the vocabulary, in its order, while it is whole.
template <class Term>
EI_DEV double sum_candidates(Candidates& c, Term term) {
    return c.is_whole ? sum_vocabulary(c, term) : walk(c, term, never, 0.0, 0).sum;
}
