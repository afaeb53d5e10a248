// Root mean square norm of each of `gridDim.x` equal parts of a row: as floats, as X8, or both.
#include "norm.cuh"

// WARPS warps share a part: one of them adds up, all write.
// Variants: WARPS = 1 8
//
// Grid: (parts of a row, rows). `gather`, if any, says which rows of x; `weight`, if any, has
// `width` values for all parts. y and x8 may each be null and y may be x; for x8 there is one part,
// its width a multiple of 32.
EI_KERNEL(32 * WARPS) rms_norm(const Step* step, int rows, const int* gather, const float* x,
                               const float* weight, float* y, uint8_t* x8, int width, float eps) {
    EI_SHARED(float, shared_scale, [1]);
    EI_AWAIT_INPUT();
    const int row = blockIdx.y;
    if (ei_aborted(step) || row >= ei_rows(step, rows)) {
        return;
    }
    const int first = blockIdx.x * width;
    const int stride = row_stride(width * gridDim.x);
    x += (size_t)(gather ? gather[row] : row) * stride + first;
    if (threadIdx.x < 32) {
        const float scale = norm_scale(x, width, eps);
        if (threadIdx.x == 0) {
            shared_scale[0] = scale;
        }
    }
    __syncthreads();
    for (int column = threadIdx.x / 32 * 128; column < width; column += 128 * WARPS) {
        float values[4] = {};
        const int at = column + 4 * (threadIdx.x & 31);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (at + i < width) {
                values[i] = normed(x[at + i], shared_scale[0], weight, at + i);
                if (y) {
                    y[(size_t)row * stride + first + at + i] = values[i];
                }
            }
        }
        if (x8) {
            quantise_columns(x8_row(x8, row, width), width, column, values);
        }
    }
}
