// The likeliest token of every wanted row, as edgeinfer/sampling/sampler.py picks it.
#include "math.cuh"

constexpr int THREADS = 1024;

// The larger of a value of each lane, in every lane.
EI_DEV long long largest_lane(long long x) {
    for (int step = 16; step > 0; step >>= 1) {
        x = max(x, __shfl_xor_sync(EI_ALL_LANES, x, step));
    }
    return x;
}

// Grid: (1, wanted rows), 1024 threads. logits: float (wanted row, n_vocab).
// ids: the lowest of the tokens of the largest logit. NaN and -inf are no candidates, +inf counts
// as the largest float. status: 0, or 1 where there is no candidate: the id is then 0.
EI_KERNEL(1024) argmax(
    const Step* step, const float* logits, int logits_stride, int n_vocab, int* ids, int* status) {
    EI_SHARED(long long, best_of, [THREADS / 32]);
    const int row = blockIdx.y;
    if (row >= ei_rows(step, 1) || ei_aborted(step)) {
        return;
    }
    logits += (size_t)row * logits_stride;
    // The order of a logit, and below it what is larger for lower tokens.
    const long long nothing = (long long)ei_order(-EI_INFINITY) * (1LL << 32) + 0x7fffffff;
    long long best = nothing;
#pragma unroll 8
    for (int token = threadIdx.x; token < n_vocab; token += THREADS) {
        const float logit = logits[token];
        const int order = ei_order(logit > EI_LARGEST ? EI_LARGEST : logit);
        best = max(best, (long long)order * (1LL << 32) + (0x7fffffff - token));
    }
    best = largest_lane(best);
    if (threadIdx.x % 32 == 0) {
        best_of[threadIdx.x / 32] = best;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        best = largest_lane(best_of[threadIdx.x]);
        if (threadIdx.x == 0) {
            ids[row] = 0x7fffffff - (int)(best & 0x7fffffff);
            status[row] = best == nothing;
        }
    }
}
