// Rows of floats as X8.
#include "await.cuh"
#include "tiles.cuh"
#include "x8.cuh"

// Grid: (k / 1024 rounded up, rows). k is a multiple of 32.
EI_KERNEL(256) quantise(const Step* step, int rows, const float* x, uint8_t* x8, int k) {
    EI_AWAIT_INPUT();
    const int row = blockIdx.y;
    const int first = 1024 * blockIdx.x + threadIdx.x / 32 * 128;
    if (ei_aborted(step) || row >= ei_rows(step, rows) || first >= k) {
        return;
    }
    float values[4] = {};
    const int column = first + 4 * (threadIdx.x & 31);
    if (column < k) {
        const float4 v = *(const float4*)(x + (size_t)row * row_stride(k) + column);
        values[0] = v.x;
        values[1] = v.y;
        values[2] = v.z;
        values[3] = v.w;
    }
    quantise_columns(x8_row(x8, row, k), k, first, values);
}
