// Copies the rows whose result the step was asked for.
#include "dev.cuh"

constexpr int THREADS = 256;

// Grid: (dim / 256, wanted rows), 256 threads. x: float (row, dim); out: float (wanted row, dim);
// wanted: a row of x for each row of out, ascending.
EI_KERNEL(256) select(
    const Step* step, const float* x, int x_stride, const int* wanted, float* out, int out_stride,
    int dim) {
    const int row = blockIdx.y;
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (row >= ei_rows(step, 1) || ei_aborted(step) || i >= dim) {
        return;
    }
    out[(size_t)row * out_stride + i] = x[(size_t)wanted[row] * x_stride + i];
}
