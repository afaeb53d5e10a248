// Rows of X8 times a matrix of blocks by int8 tensor cores: y = residual + (x W^T + bias).
#include "mma.cuh"

// A block of WARPS warps takes TOKENS rows of x and 16 * WARPS rows of the matrix, or 32 * WARPS
// where TOKENS is more than 16. Needs sm_75.
// Variants: TYPE = Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4;
//   TOKENS = 8 16; WARPS = 2
// Variants: TYPE = Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4;
//   TOKENS = 64; WARPS = 4

// Blocks a processor should have, 0: as the compiler likes, which spills on sm_103 and sm_107 to
// have 3.
#if __CUDA_ARCH__ == 1030 || __CUDA_ARCH__ == 1070
constexpr int LEAST_BLOCKS = TOKENS > 16 ? 1 : 0;
#else
constexpr int LEAST_BLOCKS = 0;
#endif

// Grid: (n / rows of the matrix, rows / TOKENS, both rounded up). Blocks of threads that take the
// same rows of the matrix run beside each other, so that memory is asked for these once. x is X8,
// w (n, k) tiles; bias and residual may be null, the residual may be y.
EI_KERNEL(32 * WARPS, LEAST_BLOCKS) matmul_mma(
    const Step* step, int rows, const uint8_t* x, const uint8_t* w, const float* bias,
    const float* residual, float* y, int n, int k) {
    const int n_rows = ei_rows(step, rows);
    const int number = blockIdx.y * gridDim.x + blockIdx.x;
    const int first_row = (int)(number % gridDim.y) * TOKENS;
    if (ei_aborted(step) || first_row >= n_rows) {
        return;
    }
    Operands<TYPE> of = {w, layout_of<TYPE>(n, k), x, k};
    of.first_tile = (int)(number / gridDim.y) * Mma<TYPE, TOKENS, WARPS>::N_TILES;
    of.first_row = first_row;
    of.n_rows = n_rows;
    const Output out = {y, residual, bias, nullptr, (size_t)row_stride(n)};
    multiply_mma<TYPE, TOKENS, WARPS>(of, out, n);
}
