// Root mean square norm of a row: (x * s) * weight, in the order of kernels/reference/quantised.py.
#pragma once
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
// normed and quantised at `shared`, where there is room for
// N_ROWS rows of X8 and of floats.
template <int N_WARPS, int N_ROWS>
struct Normed {
    const float* x;
    const int* gather;
    const float* weight;
    float eps;
    bool is_normed;  // or as they are, with no weight
    int k, first, n_rows;
    uint8_t* shared;

    __device__ __forceinline__ float* floats(int r) const {
        return (float*)(shared + N_ROWS * x8_bytes(k)) + r * row_stride(k);
    }

    __device__ __forceinline__ void operator()() const {
        EI_SHARED(float, scales, [N_ROWS]);
        const int warp = threadIdx.x / 32;
        const int lane = threadIdx.x & 31;
        const int there = min(N_ROWS, n_rows - first);
        for (int r = 0; r < there; ++r) {
            const int row = gather ? gather[first + r] : first + r;
            const float* from = x + (size_t)row * row_stride(k);
#pragma unroll 8
            for (int i = 4 * threadIdx.x; i < k; i += 128 * N_WARPS) {
                *(float4*)(floats(r) + i) = *(const float4*)(from + i);
            }
        }
        __syncthreads();
        for (int r = warp; r < there; r += N_WARPS) {
            const float scale = is_normed ? norm_scale(floats(r), k, eps) : 1.0f;
            if (lane == 0) {
                scales[r] = scale;
            }
        }
        __syncthreads();
        for (int r = 0; r < there; ++r) {
            for (int column = 128 * warp; column < k; column += 128 * N_WARPS) {
                const int at = column + 4 * lane;
                float values[4] = {};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    values[i] = at < k ? normed(floats(r)[at + i], scales[r], weight, at + i) : 0;
                }
                quantise_columns(x8_row(shared, r, k), k, column, values);
            }
        }
        __syncthreads();
    }
};
