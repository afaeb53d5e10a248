// Gate and up of normed rows: silu(norm(x) G^T + bias) * (norm(x) U^T + bias), as floats, as X8, or
// both.
#include "matmul.cuh"
#include "math.cuh"
#include "norm.cuh"

// WARPS warps share a tile of 32 rows of both matrices, for ROWS rows of x.
// Variants: TYPE = Q4_0 Q4_K Q5_K Q6_K Q8_0; WARPS = 4 8; ROWS = 1

// Blocks a processor should have, 0: as the compiler likes. Two matrices of Q5_K want more registers
// than it takes by itself on sm_70 and sm_72, where it spills.
template <class T>
constexpr int LEAST_BLOCKS = 0;
#if __CUDA_ARCH__ == 700 || __CUDA_ARCH__ == 720
template <>
constexpr int LEAST_BLOCKS<Q5_K> = 1;
#endif

// A tile is a block of X8.
template <int N_ROWS>
struct SwiGlu {
    float* y;
    uint8_t* x8;
    const float* gate_bias;
    const float* up_bias;
    int n, first_row, n_rows;
    float gates[N_ROWS];

    __device__ __forceinline__ void operator()(int tile, int part, const float (&sums)[N_ROWS]) {
        const int lane = threadIdx.x & 31;
        const int at = TILE * tile + lane;
        const float* biases = part == 0 ? gate_bias : up_bias;
        const float bias = biases && at < n ? biases[at] : 0.0f;
#pragma unroll
        for (int r = 0; r < N_ROWS; ++r) {
            const float sum = biases ? sums[r] + bias : sums[r];
            if (part == 0) {
                gates[r] = sum;
                continue;
            }
            const float value = ei_silu(gates[r]) * sum;
            const int row = first_row + r;
            if (y && at < n && row < n_rows) {
                y[(size_t)row * row_stride(n) + at] = value;
            }
            if (x8 && row < n_rows) {
                quantise_block(x8_row(x8, row, n), tile, value);
            }
        }
    }
};

// Grid: (n / 32 or fewer, rows / ROWS rounded up). Its dynamic shared memory: tiles.py
// `normed_bytes`. `gather`, if any, names rows of x; biases, y and x8 may be null; for x8 n is a
// multiple of 32.
EI_KERNEL(32 * WARPS, LEAST_BLOCKS<TYPE>) norm_swiglu(
    const Step* step, int rows, const int* gather, const float* x, const float* norm, float eps,
    const uint8_t* gate, const uint8_t* up, const float* gate_bias, const float* up_bias, float* y,
    uint8_t* x8, int n, int k) {
    const int n_rows = ei_rows(step, rows);
    const int first_row = blockIdx.y * ROWS;
    if (ei_aborted(step) || first_row >= n_rows) {
        return;
    }
    EI_DYN_SHARED(uint8_t, shared);
    using Lefts = Left<TYPE, WARPS, ROWS>;
    Normed<WARPS, ROWS> normed = {x, gather, norm, eps, true, k, first_row, n_rows};
    place(normed, shared, 2 * sizeof(Lefts));
    const X8 row = x8_row(normed.x8, 0, k);
    const Factors<TYPE> f = {gate, up, layout_of<TYPE>(n, k), row, k, first_row, n_rows};
    SwiGlu<ROWS> swiglu = {y, x8, gate_bias, up_bias, n, first_row, n_rows};
    multiply<2>(f, (Lefts*)shared, blockIdx.x, gridDim.x, normed, swiglu);
}
