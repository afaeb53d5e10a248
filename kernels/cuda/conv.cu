// Causal convolutions of every channel: kernels/reference/quantised.py `convolve`.
#include "math.cuh"
#include "tiles.cuh"

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

// One of the convolutions, and which of the blocks of threads that take it a block is.
struct Part {
    const float* x;
    const float* weight;
    const float* bias;
    float* slots;
    float* out;
    int dim;
    int block;
};

// Grid: (blocks of all parts, rows), 256 threads; a part has blocks of 256 channels each.
// x_, out_: float (row, dim) of each of one to three parts; weight_: float (dim, n_taps); bias_:
// float (dim), or null; slots_: float (slot, n_taps - 1, dim), the oldest row first.
// spans, states: of a sequence its (first row, rows), and the slot it goes on from, -1 for none;
// kept: the slot that gets the state behind a row, -1 for none. No slot is both read and written.
// n_taps is 2 or more. silu: out is that of the convolution.
EI_KERNEL(256) conv(
    const Step* step, const int* seq, const int2* spans, const int* states, const int* kept,
    int n_taps, int silu, const float* x_0, const float* weight_0, const float* bias_0,
    float* slots_0, float* out_0, int dim_0, const float* x_1, const float* weight_1,
    const float* bias_1, float* slots_1, float* out_1, int dim_1, const float* x_2,
    const float* weight_2, const float* bias_2, float* slots_2, float* out_2, int dim_2) {
    const int blocks_0 = (dim_0 + THREADS - 1) / THREADS;
    const int blocks_1 = (dim_1 + THREADS - 1) / THREADS;
    const int block = blockIdx.x;
    Part part = {x_0, weight_0, bias_0, slots_0, out_0, dim_0, block};
    if (block >= blocks_0 + blocks_1) {
        part = {x_2, weight_2, bias_2, slots_2, out_2, dim_2, block - blocks_0 - blocks_1};
    } else if (block >= blocks_0) {
        part = {x_1, weight_1, bias_1, slots_1, out_1, dim_1, block - blocks_0};
    }
    const int row = blockIdx.y;
    const int i = part.block * THREADS + threadIdx.x;
    if (row >= ei_rows(step, 0) || ei_aborted(step) || i >= part.dim) {
        return;
    }
    const int sequence = seq[row];
    const int n_before = n_taps - 1;
    const size_t slot_floats = (size_t)n_before * part.dim;
    const int from = states[sequence];
    const float* state = from < 0 ? nullptr : part.slots + from * slot_floats + i;
    const int stride = row_stride(part.dim);
    const Channel channel = {part.x + i, state, stride, part.dim, spans[sequence].x, n_before};
    const float* weight = part.weight + (size_t)i * n_taps;
    float sum = 0.0f;
    for (int tap = 0; tap < n_taps; ++tap) {
        sum = ei_fma(weight[tap], channel.at(row - n_before + tap), sum);
    }
    sum = part.bias ? sum + part.bias[i] : sum;
    part.out[(size_t)row * stride + i] = silu ? ei_silu(sum) : sum;
    if (kept[row] >= 0) {
        float* to = part.slots + kept[row] * slot_floats + i;
        for (int tap = 1; tap < n_taps; ++tap) {
            to[(size_t)(tap - 1) * part.dim] = channel.at(row - n_before + tap);
        }
    }
}
