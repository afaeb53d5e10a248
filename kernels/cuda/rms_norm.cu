// Root mean square norm of each of `gridDim.x` equal parts of a row: (x * s) * weight, with
// s = 1 / sqrt(sum(x * x) / width + eps); as floats, as X8, or both.
#include "tiles.cuh"
#include "x8.cuh"

// WARPS warps share a part: one of them adds up, in the order that is the law, all write.
// Variants: WARPS = 1 8
//
// Grid: (parts of a row, rows). `gather`, if any, says which rows of x; `weight`, if any, has
// `width` values for all parts. y and x8 may each be null and y may be x; for x8 there is one part,
// its width a multiple of 32.
EI_KERNEL(32 * WARPS) rms_norm(const Step* step, int rows, const int* gather, const float* x,
                               const float* weight, float* y, uint8_t* x8, int width, float eps) {
    EI_SHARED(float, shared_scale, [1]);
    const int lane = threadIdx.x & 31;
    const int row = blockIdx.y;
    if (ei_aborted(step) || row >= ei_rows(step, rows)) {
        return;
    }
    const int first = blockIdx.x * width;
    const int stride = row_stride(width * gridDim.x);
    x += (size_t)(gather ? gather[row] : row) * stride + first;
    if (threadIdx.x < 32) {
        float sum = 0.0f;
#pragma unroll 8
        for (int i = lane; i < width; i += 32) {
            sum = ei_fma(x[i], x[i], sum);
        }
        const float mean = ei_div(ei_sum32(sum), ei_to_float(width));
        if (lane == 0) {
            shared_scale[0] = ei_div(1.0f, ei_sqrt(mean + eps));
        }
    }
    __syncthreads();
    const float scale = shared_scale[0];
    for (int block = threadIdx.x / 32; 32 * block < width; block += WARPS) {
        const int i = 32 * block + lane;
        float value = 0.0f;
        if (i < width) {
            value = x[i] * scale;
            value = weight ? value * weight[i] : value;
            if (y) {
                y[(size_t)row * stride + first + i] = value;
            }
        }
        if (x8) {
            quantise_block(x8_row(x8, row, width), block, value);
        }
    }
}
