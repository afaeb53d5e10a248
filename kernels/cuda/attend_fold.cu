// The segments' parts of each query folded into a row of attention, sinks last.
#include "attend.cuh"

// V_DIM: width of a value head, any.
// Variants: V_DIM = 64 128 256 512
constexpr int THREADS = 128;
constexpr int N_PARTS = 32;  // at a time
constexpr int ITEMS = (V_DIM + THREADS - 1) / THREADS;

// Grid: (query heads, rows). parts: as `attend` leaves them of up to n_segments segments.
// sinks: a float of each query head, or null. out: float (row, heads * V_DIM), rows out_stride apart.
EI_KERNEL(128, 1) attend_fold(
    const Step* step, const float* parts, const int64_t* pos, const int* seq, const int4* tables,
    const float* sinks, float* out, int out_stride, int n_segments, int window) {
    typedef Folding<N_PARTS, 1> Fold;
    EI_SHARED(Fold, memory, [1]);
    Fold& fold = memory[0];
    const int head = blockIdx.x;
    const int row = blockIdx.y;
    if (row >= ei_rows(step, 0) || ei_aborted(step)) {
        return;
    }
    const Table table = table_of(tables, nullptr, seq, row);
    const int n = segments_of(seen_of(table, pos[row], window)).n;
    parts += ((size_t)row * gridDim.x + head) * n_segments * EI_PART(V_DIM);
    float o[ITEMS];
    for (int first = 0; first < n; first += N_PARTS) {
        const int n_here = min(N_PARTS, n - first);
        for (int part = threadIdx.x; part < n_here; part += THREADS) {
            const float* end = parts + (size_t)(first + part + 1) * EI_PART(V_DIM);
            fold.m[part][0] = end[-4];
            fold.l[part][0] = end[-3];
        }
        __syncthreads();
        fold_scales(fold, n_here, first == 0);
        __syncthreads();
        fold_sums(fold, n_here, first == 0);
#pragma unroll
        for (int item = 0; item < ITEMS; ++item) {
            const int i = threadIdx.x + item * THREADS;
            for (int part = 0; part < n_here && i < V_DIM; ++part) {
                const float x = parts[(size_t)(first + part) * EI_PART(V_DIM) + i];
                o[item] = fold_value(fold, part, 0, first == 0, o[item], x);
            }
        }
        __syncthreads();
    }
    float sum = fold.sum[0];
    float factor = 1.0f;
    if (sinks) {
        const float top = fmaxf(fold.top[0], sinks[head]);
        factor = ei_exp(fold.top[0] - top);
        sum = ei_fma(sum, factor, ei_exp(sinks[head] - top));
    }
    const float inverse = ei_div(1.0f, sum);
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        const int i = threadIdx.x + item * THREADS;
        if (i < V_DIM) {
            out[(size_t)row * out_stride + head * V_DIM + i] = (o[item] * factor) * inverse;
        }
    }
}
