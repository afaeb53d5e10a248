// Cosine and sine of every row's rotation, times its magnitude: once a step, for all layers.
#include "math.cuh"
#include "pages.cuh"

// Grid: (pairs / 32, rows), 32 threads.
// angles: (cosine, sine) (row, n_pairs). frequencies: radians a position, (n_pairs,).
// magnitudes: n_magnitudes of them, one for each `span` positions, the last for all behind.
// With pinned 1 the position is the one by which pinned pages are read, with 0 the row's own, and
// seq and tables are not read.
EI_KERNEL(32) angles(
    const Step* step, const int64_t* pos, const int* seq, const int4* tables, int pinned,
    const double* frequencies, int n_pairs, const double* magnitudes, int n_magnitudes,
    long long span, float2* angles) {
    const int row = blockIdx.y;
    const int pair = blockIdx.x * 32 + threadIdx.x;
    if (row >= ei_rows(step, 0) || ei_aborted(step) || pair >= n_pairs) {
        return;
    }
    long long at = pos[row];
    if (pinned) {
        at = pinned_pos(table_of(tables, nullptr, seq, row), at);
    }
    double sine, cosine;
    ei_sincos((double)at * frequencies[pair], &sine, &cosine);
    const double magnitude = magnitudes[min(at / span, n_magnitudes - 1LL)];
    const float2 angle = {(float)(cosine * magnitude), (float)(sine * magnitude)};
    angles[(size_t)row * n_pairs + pair] = angle;
}
