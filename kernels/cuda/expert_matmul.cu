// Rows times the matrices of their experts, one beside the other: (x W^T) * scale + bias.
#include "matmul.cuh"

// WARPS warps share a tile of 32 rows of a matrix.
// Variants: TYPE = Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4 F32 F16
//   BF16; WARPS = 4
//
template <class T, int N_WARPS>
EI_DEV void multiply_part(
    const uint8_t* w, const void* x, const Output& out, int n, int k, int n_parts, int part,
    int row) {
    if constexpr (IS_FLOAT<T>) {
        const size_t stride = row_stride(n_parts * k);
        const float* const parts[1] = {(const float*)x + row * stride + part * k};
        multiply_floats<T, N_WARPS, 1>(w, parts, out, n, k, row, row + 1);
    } else {
        const X8 x8 = x8_from(x8_row((const uint8_t*)x, row, n_parts * k), part * (k / BLOCK));
        const Factors<T> f = {w, nullptr, layout_of<T>(n, k), x8, k, row, row + 1};
        const Stores stores = {out, n, row, row + 1};
        using Lefts = Left<T, N_WARPS, 1>;
        EI_SHARED(Lefts, left, [2]);
        multiply<1>(f, left, blockIdx.x, gridDim.x, NothingToBegin(), stores);
    }
}

// Blocks a processor should have, 0: as the compiler likes, which spills to have more of one.
template <class T>
constexpr int LEAST_BLOCKS = 0;
template <>
constexpr int LEAST_BLOCKS<Q3_K> = 3;
template <>
constexpr int LEAST_BLOCKS<F32> = 5;

// Grid: (n / 32 or fewer, for floats n / (8 * WARPS) rounded up; experts of a row; rows). A row of
// `route` holds the numbers of its experts, then as many weights. A row of x has `n_parts` of k
// values: one for all experts or one for each; X8, or floats where w holds floats. w is a stack of
// (n, k) tiles; scale, a value of each expert, and bias, n values of each, may be null.
EI_KERNEL(32 * WARPS, LEAST_BLOCKS<TYPE>) expert_matmul(
    const Step* step, int rows, const float* route, const void* x, const uint8_t* w,
    const float* scale, const float* bias, float* y, int n, int k, int n_parts) {
    const int n_used = gridDim.y;
    const int slot = blockIdx.y;
    const int row = blockIdx.z;
    if (ei_aborted(step) || row >= ei_rows(step, rows)) {
        return;
    }
    const int expert = (int)route[(size_t)row * row_stride(2 * n_used) + slot];
    Output out = {y + slot * n};
    out.scale = scale ? scale + expert : nullptr;
    out.bias = bias ? bias + (size_t)expert * n : nullptr;
    out.stride = row_stride(n_used * n);
    const uint8_t* matrix = w + expert * matrix_bytes<TYPE>(n, k);
    const int part = n_parts > 1 ? slot : 0;
    multiply_part<TYPE, WARPS>(matrix, x, out, n, k, n_parts, part, row);
}
