// Rows of floats as halves: see halves.cuh.
#include "halves.cuh"
#include "tiles.cuh"

constexpr int WARPS = 8;

// Grid: (1, rows). out: rows of half_row_bytes(k).
EI_KERNEL(32 * WARPS) halve(const Step* step, int rows, const float* x, uint8_t* out, int k) {
    EI_SHARED(float, largest, [WARPS]);
    const int row = blockIdx.y;
    if (ei_aborted(step) || row >= ei_rows(step, rows)) {
        return;
    }
    const float* values = x + (size_t)row * row_stride(k);
    float most = 0.0f;
    for (int i = threadIdx.x; i < k; i += 32 * WARPS) {
        most = fmaxf(most, fabsf(values[i]));
    }
    most = ei_max32(most);
    if (threadIdx.x % 32 == 0) {
        largest[threadIdx.x / 32] = most;
    }
    __syncthreads();
    for (int warp = 0; warp < WARPS; ++warp) {
        most = fmaxf(most, largest[warp]);
    }
    const float size = size_of(most);
    const float inverse = ei_div(1.0f, size);
    uint8_t* halves = out + row * half_row_bytes(k);
    for (int i = threadIdx.x; i < (k + 31) / 32 * 32; i += 32 * WARPS) {
        const int at = i / 32 * 32 + i % 4 * 8 + i % 32 / 4;
        ((uint16_t*)halves)[at] = ei_to_half(i < k ? values[i] * inverse : 0.0f);
    }
    if (threadIdx.x == 0) {
        *half_row_size(halves, k) = size;
    }
}
