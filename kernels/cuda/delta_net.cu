// The gated delta rule, a row after the other: kernels/reference/quantised.py `delta`.
//
// Columns of S are independent of each other, and so are the four sums that make a product with
// one. So four lanes have a column, each every fourth of its values, in registers from a sequence's
// first row to its last: a prompt reads and writes S once.
#include "math.cuh"
#include "norm.cuh"

// DIM: values of a column, at most 2048; shapes.py lets through fewer.
// Variants: DIM = 64 128
constexpr int LANES = 4;     // of a column
constexpr int COLUMNS = 32;  // of a block
constexpr int THREADS = LANES * COLUMNS;
constexpr int EACH = (DIM + LANES - 1) / LANES;  // values of a lane
// Rows of the step in shared memory at a time, while the next ones are on their way: one for each
// column of a warp, or as many as there is room for.
constexpr int ROWS = DIM <= 256 ? 8 : DIM <= 512 ? 4 : 1;

struct Row {
    float q[DIM];
    float k[DIM];
    float v[COLUMNS];
    float unused[LANES];  // where DIM is usual, so that rows begin in different banks
};

// What a block reads of the step.
struct Source {
    const float* q;  // of its key head
    const float* k;
    const float* v;  // of its columns
    int key_stride;
    int v_stride;
    int n_columns;

    // Starts to copy rows to shared memory.
    __device__ __forceinline__ void load(Row* rows, int begin, int n) const {
        for (int row = 0; row < n; ++row) {
            const size_t key = (size_t)(begin + row) * key_stride;
            const size_t value = (size_t)(begin + row) * v_stride;
            for (int i = threadIdx.x; i < DIM; i += THREADS) {
                ei_copy_async<4>(rows[row].q + i, q + key + i);
                ei_copy_async<4>(rows[row].k + i, k + key + i);
            }
            if ((int)threadIdx.x < n_columns) {
                ei_copy_async<4>(rows[row].v + threadIdx.x, v + value + threadIdx.x);
            }
        }
        ei_copy_group();
    }
};

// A warp norms a part of a row and multiplies it by a factor, as two ops would.
EI_DEV void norm_part(float* x, float eps, float factor) {
    const float scale = norm_scale(x, DIM, eps);
    for (int i = threadIdx.x & 31; i < DIM; i += 32) {
        x[i] = normed(x[i], scale, nullptr, i) * factor;
    }
}

// What a lane has of one row, for all of its warp.
struct Scalars {
    float decay;
    float beta;
    int kept;  // the slot for the state behind it, or -1
};

// The sum of what four lanes have, in the order of the reference's `sum_of_products`.
EI_DEV float sum4(float x) {
    x += __shfl_xor_sync(EI_ALL_LANES, x, 1);
    x += __shfl_xor_sync(EI_ALL_LANES, x, 2);
    return x;
}

// A lane's values of a column or of a row: i, i + LANES, ...
struct Part {
    int lane;

    __device__ __forceinline__ bool has(int i) const {
        return DIM % LANES == 0 || LANES * i + lane < DIM;
    }

    __device__ __forceinline__ int at(int i) const { return LANES * i + lane; }
};

EI_DEV float product_of_rows(const float* x, const float* y, Part part) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (part.has(i)) {
            sum = ei_fma(x[part.at(i)], y[part.at(i)], sum);
        }
    }
    return sum4(sum);
}

EI_DEV float product_of_column(const float (&s)[EACH], const float* x, Part part) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (part.has(i)) {
            sum = ei_fma(s[i], x[part.at(i)], sum);
        }
    }
    return sum4(sum);
}

EI_DEV void update(float (&s)[EACH], const float* k, float g, float delta, Part part) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (part.has(i)) {
            s[i] = ei_fma(k[part.at(i)], delta, s[i] * g);
        }
    }
}

EI_DEV void load_column(float (&s)[EACH], const float* from, Part part) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        s[i] = from && part.has(i) ? from[(size_t)part.at(i) * DIM] : 0.0f;
    }
}

EI_DEV void store_column(const float (&s)[EACH], float* to, Part part) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (part.has(i)) {
            to[(size_t)part.at(i) * DIM] = s[i];
        }
    }
}

// Grid: (DIM / 32, value heads, sequences), 128 threads.
// q, k: float (row, key heads, DIM), value head h reads key head h % n_key_heads if `tiled`, else
// h * n_key_heads / value heads; v, out: float (row, value heads, DIM); decay, beta: float (row,
// value heads). is_normed: q and k are normed with eps and multiplied by their factors; rate, if
// any: decay is softplus(decay + bias) * rate, each (value heads), and beta its sigmoid.
// spans, states, kept: as conv.cu has them; slots: float (slot, value heads, DIM,
// DIM), a row of S in place.
EI_KERNEL(THREADS) delta_net(
    const Step* step, const float* q, const float* k, int key_stride, int is_normed, float eps,
    float q_factor, float k_factor, const float* v, int v_stride, const float* decay,
    const float* beta, int head_stride, const float* bias, const float* rate, const int2* spans,
    const int* states, const int* kept, float* slots, int n_key_heads, int tiled, float* out,
    int out_stride) {
    EI_SHARED(Row, shared, [2][ROWS]);
    const int sequence = blockIdx.z;
    if (sequence >= step->n_sequences || ei_aborted(step)) {
        return;
    }
    const int head = blockIdx.y;
    const int n_heads = gridDim.y;
    const int key_head = tiled ? head % n_key_heads : head * n_key_heads / n_heads;
    const int first_column = blockIdx.x * COLUMNS;
    const int in_block = threadIdx.x / LANES;
    const int column = first_column + in_block;
    const bool has_column = column < DIM;
    const Part part = {(int)threadIdx.x % LANES};
    const int of_warp = threadIdx.x % 32 / LANES;  // of the rows in shared memory, whose scalars
    const int end = spans[sequence].x + spans[sequence].y;
    const Source source = {
        q + key_head * DIM, k + key_head * DIM, v + head * DIM + first_column, key_stride, v_stride,
        min(COLUMNS, DIM - first_column)};
    const auto scalars_of = [&](int begin) {
        const int row = begin + of_warp;
        if (of_warp >= ROWS || row >= end) {
            return Scalars{0.0f, 0.0f, -1};
        }
        const size_t at = (size_t)row * head_stride + head;
        return Scalars{decay[at], beta[at], kept[row]};
    };

    const size_t slot_floats = (size_t)n_heads * DIM * DIM;
    slots += (size_t)head * DIM * DIM + column;
    out += head * DIM + column;
    const int from = states[sequence];
    float s[EACH];
    load_column(s, from >= 0 && has_column ? slots + from * slot_floats : nullptr, part);

    int begin = spans[sequence].x;
    int buffer = 0;
    source.load(shared[buffer], begin, min(ROWS, end - begin));
    Scalars next = scalars_of(begin);
    for (; begin < end; begin += ROWS, buffer ^= 1) {
        ei_copy_wait<0>();
        __syncthreads();  // all have arrived, and nobody reads the other buffer any more
        const int n = min(ROWS, end - begin);
        const Scalars scalars = next;
        source.load(shared[buffer ^ 1], begin + n, min(ROWS, end - begin - n));
        next = scalars_of(begin + n);
        if (is_normed) {
            for (int i = threadIdx.x / 32; i < 2 * n; i += THREADS / 32) {
                Row& row = shared[buffer][i / 2];
                norm_part(i % 2 ? row.k : row.q, eps, i % 2 ? k_factor : q_factor);
            }
            __syncthreads();
        }
        const float gain =
            ei_exp(rate ? ei_softplus(scalars.decay + bias[head]) * rate[head] : scalars.decay);
        const float opening = rate ? ei_sigmoid(scalars.beta) : scalars.beta;
        const Row& own = shared[buffer][min(of_warp, n - 1)];
        const float key_product = product_of_rows(own.k, own.q, part);
        for (int t = 0; t < n; ++t) {
            const Row& row = shared[buffer][t];
            const float a = product_of_column(s, row.k, part);
            const float b = product_of_column(s, row.q, part);
            const float g = __shfl_sync(EI_ALL_LANES, gain, LANES * t);
            const float beta_t = __shfl_sync(EI_ALL_LANES, opening, LANES * t);
            const float c = __shfl_sync(EI_ALL_LANES, key_product, LANES * t);
            const int to = __shfl_sync(EI_ALL_LANES, scalars.kept, LANES * t);
            const float delta = ei_fma(-g, a, row.v[in_block]) * beta_t;
            update(s, row.k, g, delta, part);
            if (has_column && part.lane == 0) {
                out[(size_t)(begin + t) * out_stride] = ei_fma(c, delta, g * b);
            }
            if (has_column && to >= 0) {
                store_column(s, slots + to * slot_floats, part);
            }
        }
    }
}
