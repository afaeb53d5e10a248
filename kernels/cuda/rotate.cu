// Rotates the first dims of each head of a row by the row's angles and copies the rest.
#include "dev.cuh"

// NEOX 1: dims i and i + n_pairs are a pair, 0: dims 2i and 2i + 1.
// Variants: NEOX = 0 1
// Grid: (heads, rows), 32 threads or more.
// x, out: float (row, heads * head_dim), out may be x. angles: (cosine, sine) (row, n_pairs).
EI_KERNEL(128) rotate(
    const Step* step, const float* x, int x_stride, const float2* angles, int n_pairs, int head_dim,
    float* out, int out_stride) {
    const int row = blockIdx.y;
    if (ei_aborted(step) || row >= ei_rows(step, 0)) {
        return;
    }
    x += (size_t)row * x_stride + blockIdx.x * head_dim;
    out += (size_t)row * out_stride + blockIdx.x * head_dim;
    for (int i = threadIdx.x; i < n_pairs; i += blockDim.x) {
        const int first = NEOX ? i : 2 * i;
        const int second = NEOX ? i + n_pairs : 2 * i + 1;
        const float2 angle = angles[(size_t)row * n_pairs + i];
        const float x0 = x[first];
        const float x1 = x[second];
        out[first] = ei_fma(x0, angle.x, -(x1 * angle.y));
        out[second] = ei_fma(x0, angle.y, x1 * angle.x);
    }
    for (int i = 2 * n_pairs + threadIdx.x; i < head_dim; i += blockDim.x) {
        out[i] = x[i];
    }
}
