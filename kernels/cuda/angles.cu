// Cosine and sine of every row's rotation, times its magnitude: once a step, for all layers.
#include "math.cuh"
#include "pages.cuh"

// Grid: (pairs / 32, 1 or 2, rows), 32 threads.
// angles: (cosine, sine) (row, n_pairs), by the row's own position; pinned_angles: by the one by
// which pinned pages are read. Blocks of y 0 make the first, or where that is null the second.
// frequencies: radians a position, (n_pairs,). magnitudes: n_magnitudes of them, one for each `span`
// positions, the last for all behind. seq and tables are read for the second only.
EI_KERNEL(32) angles(
    const Step* step, const int64_t* pos, const int* seq, const int4* tables,
    const double* frequencies, int n_pairs, const double* magnitudes, int n_magnitudes,
    long long span, float2* angles, float2* pinned_angles) {
    const bool is_pinned = !angles || blockIdx.y == 1;
    const int row = blockIdx.z;
    const int pair = blockIdx.x * 32 + threadIdx.x;
    if (row >= ei_rows(step, 0) || ei_aborted(step) || pair >= n_pairs) {
        return;
    }
    long long at = pos[row];
    if (is_pinned) {
        at = pinned_pos(table_of(tables, nullptr, seq, row), at);
    }
    double sine, cosine;
    ei_sincos((double)at * frequencies[pair], &sine, &cosine);
    const double magnitude = magnitudes[min(at / span, n_magnitudes - 1LL)];
    const float2 angle = {(float)(cosine * magnitude), (float)(sine * magnitude)};
    (is_pinned ? pinned_angles : angles)[(size_t)row * n_pairs + pair] = angle;
}
