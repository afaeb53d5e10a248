// Multiplies each part of a row by a factor of its own.
#include "dev.cuh"

constexpr int THREADS = 256;

// Grid: (parts * part_dim / 256, rows), 256 threads. rows: as ei_rows counts them.
// x, out: float (row, n_parts * part_dim), out may be x; factors: float (row, n_parts).
EI_KERNEL(256) mul_parts(
    const Step* step, const float* x, int x_stride, const float* factors, int factors_stride,
    float* out, int out_stride, int n_parts, int part_dim, int rows) {
    const int row = blockIdx.y;
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (row >= ei_rows(step, rows) || ei_aborted(step) || i >= n_parts * part_dim) {
        return;
    }
    const float factor = factors[(size_t)row * factors_stride + i / part_dim];
    out[(size_t)row * out_stride + i] = x[(size_t)row * x_stride + i] * factor;
}
