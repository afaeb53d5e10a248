// What the kernels of many rows share: a warp has a tile of query heads of a few rows of one
// sequence, takes in all pages that they see, in order, and leaves the rows.
#pragma once
#include "attend.cuh"
#include "x8.cuh"

// What a block reads and writes.
struct Layer {
    const float* q;
    const float* pinned_q;
    int q_stride;
    const uint8_t* k_cache;
    const uint8_t* v_cache;
    const float* sinks;
    float* out;
    int out_stride;
    uint8_t* x8;
    int n_kv_heads;
    float scale;
    float soft_cap;
    int x8_dim;  // values of a row
    int kv_head;
    int head;     // the first of the query heads of the block,
    int n_heads;  // and how many of the tile's there are
};

// That of this block, which takes a tile of N_HEADS query heads of a kv head.
template <int N_HEADS, int V_WIDTH>
EI_DEV Layer layer_of_block(Layer layer, int n_heads) {
    const int group = n_heads / layer.n_kv_heads;
    const int n_tiles = (group + N_HEADS - 1) / N_HEADS;
    const int first_head = blockIdx.x % n_tiles * N_HEADS;
    layer.x8_dim = n_heads * V_WIDTH;
    layer.kv_head = blockIdx.x / n_tiles;
    layer.head = layer.kv_head * group + first_head;
    layer.n_heads = min(N_HEADS, group - first_head);
    return layer;
}

// Rows row .. row + n - 1 of a step. Query N_HEADS * r + g is head g of row r.
template <int N_HEADS>
struct Rows {
    int row;
    int n;

    __device__ __forceinline__ bool has(const Layer& layer, int query) const {
        return query / N_HEADS < n && query % N_HEADS < layer.n_heads;
    }

    // Null where there is none.
    template <int K_WIDTH>
    __device__ __forceinline__ const float* query_of(
        const Layer& layer, const float* q, int query) const {
        const size_t of_row = (size_t)(row + query / N_HEADS) * layer.q_stride;
        return has(layer, query) ? q + of_row + (layer.head + query % N_HEADS) * K_WIDTH : nullptr;
    }
};

// m and l of a query.
struct State {
    float m;
    float l;
    bool is_empty;
};

// How a state takes in a part. A scale of NaN would do for neither: so `how` is beside them.
enum How { KEEP, START, FOLD };
struct Take {
    int how;
    float state_scale;
    float part_scale;

    __device__ __forceinline__ void value(float& state, float part) const {
        if (how == START) {
            state = part;
        } else if (how == FOLD) {
            state = ei_fma(state, state_scale, part * part_scale);
        }
    }
};

EI_DEV Take take_part(State& state, float m, float l, bool is_wanted) {
    Take take = {KEEP, 1.0f, 1.0f};
    if (!is_wanted) {
        return take;
    }
    if (state.is_empty) {
        take.how = START;
        state = State{m, l, false};
        return take;
    }
    const float top = fmaxf(state.m, m);
    take.how = FOLD;
    take.state_scale = ei_exp(state.m - top);
    take.part_scale = ei_exp(m - top);
    state.l = ei_fma(state.l, take.state_scale, l * take.part_scale);
    state.m = top;
    return take;
}

EI_DEV int least_lane(int x) {
    for (int step = 16; step > 0; step >>= 1) {
        x = min(x, __shfl_xor_sync(EI_ALL_LANES, x, step));
    }
    return x;
}

// A tile takes in, in order, what its queries see. `seen` is that of the lane's query, if it
// `has_query`. tile.load(q) loads queries; tile.take(page of the arena, bounds, sees, is_next) takes
// a page, of which the lane's query `sees` anything: from position bounds % 64 to the one before
// bounds / 64. `is_next`: it begins a segment of its own.
template <class Tile>
EI_DEV void take_pages(
    Tile& tile, const Layer& layer, const Table& table, const Seen& seen, bool has_query) {
    int last_segment = -1;
    for (int is_pinned = 1; is_pinned >= 0; --is_pinned) {
        const int begin = is_pinned ? seen.pinned_begin : seen.begin;
        const int end = is_pinned ? seen.pinned_end : seen.end;
        const int first = least_lane(begin);
        const int behind = -least_lane(-end);
        if (first >= behind) {
            continue;
        }
        tile.load(is_pinned ? layer.pinned_q : layer.q);
        __syncwarp();
        for (int page = first; page < behind; ++page) {
            const bool sees = has_query && page >= begin && page < end;
            if (!__any_sync(EI_ALL_LANES, sees)) {
                continue;
            }
            const int bounds = sees ? first_seen(seen, page) + 64 * end_seen(seen, page) : 0;
            const bool is_next = sees && last_segment != page / EI_SEGMENT_PAGES;
            tile.take(arena_page(table, page), bounds, sees, is_next);
            last_segment = sees ? page / EI_SEGMENT_PAGES : last_segment;
        }
        __syncwarp();
    }
}

// What attention leaves for rows. `whole`: of the lane's query. held(query, value): that value of a
// head before it is divided, of all lanes at once.
template <int N_HEADS, int N_QUERIES, int V_WIDTH, bool TRANSFORMS, class Held>
EI_DEV void write_rows(
    const Layer& layer, const Rows<N_HEADS>& rows, const State& whole, const Held& held) {
    const int lane = threadIdx.x % 32;
    const float* sink = layer.sinks + layer.head + lane % N_HEADS;
    const bool has_sink = layer.sinks && rows.has(layer, lane);
    const Scales scales = last_scales(whole.m, whole.l, has_sink ? sink : nullptr);
    __syncwarp();
    const auto value_of = [&](int i) {
        const int query = i / V_WIDTH;
        const float factor = __shfl_sync(EI_ALL_LANES, scales.factor, query);
        const float inverse = __shfl_sync(EI_ALL_LANES, scales.inverse, query);
        return (held(query, i % V_WIDTH) * factor) * inverse;
    };
    const auto write = [&](int i, float value) {
        const int query = i / V_WIDTH;
        if (!rows.has(layer, query)) {
            return;  // all lanes of a block of 32
        }
        const int row = rows.row + query / N_HEADS;
        const int at = (layer.head + query % N_HEADS) * V_WIDTH + i % V_WIDTH;
        if (layer.out) {
            layer.out[(size_t)row * layer.out_stride + at] = value;
        }
        if (V_WIDTH % 32 == 0 && layer.x8) {
            quantise_block(x8_row(layer.x8, row, layer.x8_dim), at / 32, value);
        }
    };
    for (int first = 0; first < N_QUERIES * V_WIDTH; first += TRANSFORMS ? 64 : 32) {
        const int i = min(first + lane, N_QUERIES * V_WIDTH - 1);
        float x0 = value_of(i);
        if (TRANSFORMS) {
            float x1 = value_of(i + 32);
            hadamard64(x0, x1);
            write(i + 32, x1);
        }
        write(i, x0);
    }
    __syncwarp();
}

// attend(rows) for each run of rows of one sequence, of the n_most that this warp has.
template <int N_HEADS, class Attend>
EI_DEV void for_runs(int n_most, int n_rows, const int* seq, const Attend& attend) {
    const int first = (blockIdx.y * blockDim.x + threadIdx.x) / 32 * n_most;
    const int end = min(first + n_most, n_rows);
    for (int row = first, n; row < end; row += n) {
        n = 1;
        while (row + n < end && seq[row + n] == seq[row]) {
            ++n;
        }
        attend(Rows<N_HEADS>{row, n});
    }
}
