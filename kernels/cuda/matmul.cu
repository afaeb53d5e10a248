// Rows of X8 times a matrix of blocks: y = residual + (x W^T + bias).
#include "matmul.cuh"

// WARPS warps of a block of threads share a tile of 32 rows of the matrix, for ROWS rows of x.
// Variants: TYPE = Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4;
//   WARPS = 4 8; ROWS = 1
// Variants: TYPE = Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4;
//   WARPS = 2; ROWS = 2 4
// Variants: TYPE = Q2_K; WARPS = 4; ROWS = 1
// Variants: TYPE = Q2_K; WARPS = 2; ROWS = 2
// Variants: TYPE = Q2_K; WARPS = 1; ROWS = 4

// Several rows, and some types beside many warps, want more registers than the compiler takes by
// itself: it may take all that a block of threads can have. Tables do, Q4_K on sm_100 to 107,
// 120 and 121, Q5_0 on sm_72, Q5_1 on sm_86, 88 and 89; Q6_K beside any warps on sm_100 to 107.
template <class T>
constexpr bool IS_LARGE = T::IS_TABLE;
template <class T>
constexpr bool IS_LARGEST = false;
#if __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1100
template <>
constexpr bool IS_LARGE<Q4_K> = true;
template <>
constexpr bool IS_LARGEST<Q6_K> = true;
#elif __CUDA_ARCH__ >= 1200
template <>
constexpr bool IS_LARGE<Q4_K> = true;
#elif __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 880 || __CUDA_ARCH__ == 890
template <>
constexpr bool IS_LARGE<Q5_1> = true;
#elif __CUDA_ARCH__ == 720
template <>
constexpr bool IS_LARGE<Q5_0> = true;
#endif

// Grid: (n / 32 or, for the first values of each row alone, fewer; rows / ROWS rounded up): a block
// of threads takes a tile. x is X8, w (n, k) tiles; bias and residual may be null, the residual may
// be y.
EI_KERNEL(32 * WARPS, ROWS > 1 || IS_LARGEST<TYPE> || (IS_LARGE<TYPE> && WARPS > 4)) matmul(
    const Step* step, int rows, const uint8_t* x, const uint8_t* w, const float* bias,
    const float* residual, float* y, int n, int k) {
    const int n_rows = ei_rows(step, rows);
    const int first_row = blockIdx.y * ROWS;
    if (ei_aborted(step) || first_row >= n_rows) {
        return;
    }
    const X8 row = x8_row(x, first_row, k);
    const Factors<TYPE> f = {w, nullptr, layout_of<TYPE>(n, k), row, k, first_row, n_rows};
    const Output out = {y, residual, bias, nullptr, (size_t)row_stride(n)};
    const Stores stores = {out, n, first_row, n_rows};
    using Lefts = Left<TYPE, WARPS, ROWS>;
    EI_SHARED(Lefts, left, [2]);
    multiply<1>(f, left, blockIdx.x, f.at.n_tiles, NothingToBegin(), stores);
}
