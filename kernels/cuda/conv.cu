// Causal convolution of every channel: kernels/reference/quantised.py `convolve`.
#include "math.cuh"

constexpr int THREADS = 256;

// What a sequence has of a channel: the rows of a step, behind those that its state holds.
struct Channel {
    const float* x;      // of the step
    const float* state;  // the n_before rows before them; null: zeros
    int x_stride;
    int dim;
    int first;  // row of the sequence
    int n_before;

    __device__ __forceinline__ float at(int row) const {
        if (row >= first) {
            return x[(size_t)row * x_stride];
        }
        return state ? state[(size_t)(row - first + n_before) * dim] : 0.0f;
    }
};

// Grid: (channels / 256, rows), 256 threads.
// x, out: float (row, dim); weight: float (dim, n_taps); bias: float (dim), or null.
// spans, states: of a sequence its (first row, rows), and the slot it goes on from, -1 for none;
// kept: the slot that gets the state behind a row, -1 for none. slots: float (slot, n_taps - 1,
// dim), the oldest row first. None is both read and written. n_taps is 2 or more. silu: out is that
// of the convolution.
EI_KERNEL(256) conv(
    const Step* step, const float* x, int x_stride, const float* weight, const float* bias,
    const int* seq, const int2* spans, const int* states, const int* kept, float* slots, int n_taps,
    int dim, int silu, float* out, int out_stride) {
    const int row = blockIdx.y;
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (row >= ei_rows(step, 0) || ei_aborted(step) || i >= dim) {
        return;
    }
    const int sequence = seq[row];
    const int n_before = n_taps - 1;
    const size_t slot_floats = (size_t)n_before * dim;
    const int from = states[sequence];
    const float* state = from < 0 ? nullptr : slots + from * slot_floats + i;
    const Channel channel = {x + i, state, x_stride, dim, spans[sequence].x, n_before};
    weight += (size_t)i * n_taps;
    float sum = 0.0f;
    for (int tap = 0; tap < n_taps; ++tap) {
        sum = ei_fma(weight[tap], channel.at(row - n_before + tap), sum);
    }
    sum = bias ? sum + bias[i] : sum;
    out[(size_t)row * out_stride + i] = silu ? ei_silu(sum) : sum;
    if (kept[row] >= 0) {
        float* to = slots + kept[row] * slot_floats + i;
        for (int tap = 1; tap < n_taps; ++tap) {
            to[(size_t)(tap - 1) * dim] = channel.at(row - n_before + tap);
        }
    }
}
