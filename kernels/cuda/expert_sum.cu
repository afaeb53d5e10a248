// Adds up what the experts of a row have left, each times its weight, in the order of its route.
#include "dev.cuh"

constexpr int THREADS = 256;

// Grid: (dim / 256, rows), 256 threads. x: float (row, n_used * dim); out: float (row, dim).
// route: float (row, 2 * n_used), numbers of experts, then their weights.
EI_KERNEL(256) expert_sum(
    const Step* step, const float* x, int x_stride, const float* route, int route_stride,
    float* out, int out_stride, int dim, int n_used) {
    const int row = blockIdx.y;
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (row >= ei_rows(step, 0) || ei_aborted(step) || i >= dim) {
        return;
    }
    const float* weights = route + (size_t)row * route_stride + n_used;
    x += (size_t)row * x_stride + i;
    float total = x[0] * weights[0];
    for (int part = 1; part < n_used; ++part) {
        total = total + x[(size_t)part * dim] * weights[part];
    }
    out[(size_t)row * out_stride + i] = total;
}
