// Rows of floats as X8. A block of threads takes 256 columns of a row, a warp 32 of them.
#include "tiles.cuh"
#include "x8.cuh"

// Grid: (k / 256 rounded up, rows). k is a multiple of 32.
EI_KERNEL(256) quantise(const Step* step, int rows, const float* x, uint8_t* x8, int k) {
    const int row = blockIdx.y;
    const int block = blockIdx.x * 8 + threadIdx.x / 32;
    if (ei_aborted(step) || row >= ei_rows(step, rows) || block >= k / 32) {
        return;
    }
    const float value = x[(size_t)row * row_stride(k) + 32 * block + (threadIdx.x & 31)];
    quantise_block(x8_row(x8, row, k), block, value);
}
