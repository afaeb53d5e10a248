// Rows of floats times a matrix of floats: y = residual + (x W^T + bias).
#include "matmul.cuh"

// A warp takes 8 rows of the matrix, for ROWS rows of x.
// Variants: TYPE = F32 F16 BF16; WARPS = 4; ROWS = 1 4
//
// Grid: (n / (8 * WARPS) rounded up, rows / ROWS rounded up). w is (n, k) tiles; bias and residual
// may be null, the residual may be y.
EI_KERNEL(32 * WARPS) matmul_float(const Step* step, int rows, const float* x, const uint8_t* w,
                                   const float* bias, const float* residual, float* y, int n,
                                   int k) {
    const int n_rows = ei_rows(step, rows);
    const int first_row = blockIdx.y * ROWS;
    if (ei_aborted(step) || first_row >= n_rows) {
        return;
    }
    const float* row[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        row[r] = x + (size_t)min(first_row + r, n_rows - 1) * row_stride(k);
    }
    const Output out = {y, residual, bias, nullptr, (size_t)row_stride(n)};
    multiply_floats<TYPE, WARPS, ROWS>(w, row, out, n, k, first_row, n_rows);
}
