// Root mean square norm of a row: (x * s) * weight, in the order of kernels/reference/quantised.py.
#pragma once
#include "await.cuh"
#include "tiles.cuh"
#include "x8.cuh"

// s = 1 / sqrt(sum(x * x) / width + eps), by a warp. Element e is added to sum e % 32.
EI_DEV float norm_scale(const float* x, int width, float eps) {
    float sum = 0.0f;
#pragma unroll 16
    for (int i = threadIdx.x & 31; i < width; i += 32) {
        sum = ei_fma(x[i], x[i], sum);
    }
    const float mean = ei_div(ei_sum32(sum), ei_to_float(width));
    return ei_div(1.0f, ei_sqrt(mean + eps));
}

EI_DEV float normed(float x, float scale, const float* weight, int i) {
    const float value = x * scale;
    return weight ? value * weight[i] : value;
}

// What a product of normed rows begins with: rows first ... of x, or those that `gather` names, are
// normed and quantised in shared memory.
template <int N_WARPS, int N_ROWS>
struct Normed {
    const float* x;
    const int* gather;
    const float* weight;
    float eps;
    bool is_normed;  // or as they are, with no weight
    int k, first, n_rows;
    float* floats;  // for N_ROWS rows, used by nobody else before it ends
    uint8_t* x8;

    __device__ __forceinline__ void operator()() const {
        EI_SHARED(float, scales, [N_ROWS]);
        EI_AWAIT_INPUT();
        const int warp = threadIdx.x / 32;
        const int lane = threadIdx.x & 31;
        const int there = min(N_ROWS, n_rows - first);
        const int stride = row_stride(k);
        for (int r = 0; r < there; ++r) {
            const int row = gather ? gather[first + r] : first + r;
            const float* from = x + (size_t)row * stride;
#pragma unroll 8
            for (int i = 4 * threadIdx.x; i < k; i += 128 * N_WARPS) {
                *(float4*)(floats + r * stride + i) = *(const float4*)(from + i);
            }
        }
        __syncthreads();
        for (int r = warp; r < there; r += N_WARPS) {
            const float scale = is_normed ? norm_scale(floats + r * stride, k, eps) : 1.0f;
            if (lane == 0) {
                scales[r] = scale;
            }
        }
        __syncthreads();
        for (int r = 0; r < there; ++r) {
            for (int column = 128 * warp; column < k; column += 128 * N_WARPS) {
                const int at = column + 4 * lane;
                float values[4] = {};
                if (at < k) {
                    const float* from = floats + r * stride + at;
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        values[i] = normed(from[i], scales[r], weight, at + i);
                    }
                }
                quantise_columns(x8_row(x8, r, k), k, column, values);
            }
        }
        __syncthreads();
    }
};

// Where the two lie in dynamic shared memory: `left_bytes` serve for what warps leave afterwards.
template <int N_WARPS, int N_ROWS>
EI_DEV void place(Normed<N_WARPS, N_ROWS>& normed, uint8_t* shared, size_t left_bytes) {
    const size_t float_bytes = (size_t)N_ROWS * row_stride(normed.k) * 4;
    normed.floats = (float*)shared;
    normed.x8 = shared + (float_bytes < left_bytes ? left_bytes : float_bytes);
}
