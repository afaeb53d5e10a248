// Attention of many rows: a warp takes rows of one sequence over all pages that they see, in order.
#include "attend.cuh"
#include "x8.cuh"

// K_DIM, V_DIM: widths of heads, any. GROUP: query heads of a kv head that a warp takes. ROWS: rows
// that it takes at a time. WARPS: of a block. K_IS_V 1: V is the first V_DIM values of K, and
// v_cache is not read. SOFT_CAP 0: soft_cap is not used. K_TYPE, V_TYPE: of the cache.
// Variants: K_DIM = 128; V_DIM = 128; GROUP = 1; ROWS = 8; WARPS = 4; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = f16; V_TYPE = f16
// Variants: K_DIM = 128; V_DIM = 128; GROUP = 2; ROWS = 4; WARPS = 4; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = f16; V_TYPE = f16
// Variants: K_DIM = 128; V_DIM = 128; GROUP = 4; ROWS = 2; WARPS = 4; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = f16; V_TYPE = f16
// Variants: K_DIM = 128; V_DIM = 128; GROUP = 8; ROWS = 1; WARPS = 4; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = f16; V_TYPE = f16
// Variants: K_DIM = 64; V_DIM = 64; GROUP = 3; ROWS = 4; WARPS = 4; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = f16; V_TYPE = f16
// Variants: K_DIM = 64; V_DIM = 64; GROUP = 4; ROWS = 3; WARPS = 4; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = f16; V_TYPE = f16
// Variants: K_DIM = 64; V_DIM = 64; GROUP = 7; ROWS = 1; WARPS = 4; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = f16; V_TYPE = f16
// Variants: K_DIM = 256; V_DIM = 256; GROUP = 2; ROWS = 2; WARPS = 4; K_IS_V = 0; SOFT_CAP = 0 1;
//   K_TYPE = f16; V_TYPE = f16
// Variants: K_DIM = 128; V_DIM = 128; GROUP = 4; ROWS = 2; WARPS = 4; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = q8_0 q4_0; V_TYPE = q8_0 q4_0
// Variants: K_DIM = 64; V_DIM = 64; GROUP = 3; ROWS = 4; WARPS = 4; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = q8_0; V_TYPE = q8_0 q4_0
constexpr int QUERIES = ROWS * GROUP;  // of a warp, at most 16 (`first_query` counts to 31)
constexpr bool IS_BLOCKS = K_TYPE::IS_BLOCKS;
constexpr bool TRANSFORMS_K = IS_BLOCKS && K_DIM % 64 == 0 && (!K_IS_V || V_DIM % 64 == 0);
constexpr bool TRANSFORMS_V =
    K_IS_V ? TRANSFORMS_K : V_TYPE::IS_BLOCKS && V_DIM % 64 == 0;
typedef QueriesOf<IS_BLOCKS, QUERIES, K_DIM>::Type Queries;
typedef Lanes<V_DIM, QUERIES> L;
constexpr int BATCH = 4;  // loads of a lane in flight: other warps and blocks wait less than these
typedef float Values[L::ROUNDS][L::SET_QUERIES][8];

struct __align__(16) Shared {
    Queries queries[WARPS];
    float p[WARPS][EI_PAGE][L::PADDED];
    float whole[WARPS][8 * L::ROUNDS][L::SET_QUERIES][32];  // of segments folded so far, by lane
};

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
    int x8_dim;  // values of a row
    int kv_head;
    int n_kv_heads;
    int head;     // the first of the query heads of the block,
    int n_heads;  // and how many of GROUP there are
    float scale;
    float soft_cap;
};

// m and l of a lane's query, for lanes that have one: query GROUP * r + g is head g of row r.
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

// The values of a part into those of a state, as each query's lane has said. state(i, g): where it
// has this lane's value i of query g of its set.
template <typename Value>
EI_DEV void take_values(const Take& take, const Values& part, Value state) {
#pragma unroll
    for (int g = 0; g < L::SET_QUERIES; ++g) {
        const int from = L::first_query() + g;
        const int how = __shfl_sync(EI_ALL_LANES, take.how, from);
        const float state_scale = __shfl_sync(EI_ALL_LANES, take.state_scale, from);
        const float part_scale = __shfl_sync(EI_ALL_LANES, take.part_scale, from);
#pragma unroll
        for (int i = 0; i < 8 * L::ROUNDS; ++i) {
            float& o = state(i, g);
            const float x = part[i / 8][g][i % 8];
            if (how == START) {
                o = x;
            } else if (how == FOLD) {
                o = ei_fma(o, state_scale, x * part_scale);
            }
        }
    }
}

// Query `query` of n rows from `row` on, null where there is none.
EI_DEV const float* query_of(const Layer& layer, const float* q, int row, int n, int query) {
    const int r = query / GROUP;
    const int g = query % GROUP;
    const size_t at = (size_t)(row + r) * layer.q_stride + (layer.head + g) * K_DIM;
    return r < n && g < layer.n_heads ? q + at : nullptr;
}

// The queries of n rows from `row` on to the warp's shared memory; those that are missing as zeros.
EI_DEV void load_queries(
    FloatQueries<QUERIES, K_DIM>& to, const Layer& layer, const float* q, int row, int n) {
    for (int i = threadIdx.x % 32; i < QUERIES * K_DIM; i += 32) {
        const float* query = query_of(layer, q, row, n, i / K_DIM);
        to.q[i / K_DIM][i % K_DIM] = query ? query[i % K_DIM] : 0.0f;
    }
}

template <int WIDTH>
EI_DEV void load_queries(
    BlockQueries<QUERIES, WIDTH>& to, const Layer& layer, const float* q, int row, int n) {
    for (int i = 0; i < QUERIES; ++i) {
        load_query<K_TYPE, TRANSFORMS_K>(to, i, query_of(layer, q, row, n, i));
    }
}

// The part of one page: m and l in each query's lane, values in o. bounds: of this lane's query,
// the first position that it sees and, times 64, the one behind the last.
EI_DEV void attend_page(
    Shared& shared, const Layer& layer, int arena_page, int bounds, float* m, float* l, Values& o) {
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const size_t place = (size_t)arena_page * layer.n_kv_heads + layer.kv_head;
    const uint8_t* k = layer.k_cache + place * PageOf<K_TYPE, K_DIM>::BYTES;
    const uint8_t* v = layer.v_cache + place * PageOf<V_TYPE, V_DIM>::BYTES;
    float scores[QUERIES];
    score_page<K_TYPE, BATCH, SOFT_CAP>(
        shared.queries[warp], k, layer.scale, layer.soft_cap, scores);
#pragma unroll
    for (int g = 0; g < QUERIES; ++g) {
        const int seen = __shfl_sync(EI_ALL_LANES, bounds, g);
        float query_m, query_l;
        const bool is_seen = lane >= seen % 64 && lane < seen / 64;
        shared.p[warp][lane][g] = soften(scores[g], is_seen, &query_m, &query_l);
        if (lane == g) {
            *m = query_m;
            *l = query_l;
        }
    }
    __syncwarp();
    const auto view = K_IS_V ? view_keys<V_TYPE, K_DIM>(k) : view_values<V_TYPE, V_DIM>(v);
    const bool sees_all_or_none = bounds == 0 || bounds == 64 * EI_PAGE;
    if (__all_sync(EI_ALL_LANES, sees_all_or_none)) {
        add_values<V_DIM, QUERIES, BATCH>(
            shared.p[warp], view, [](int query, int position) { return true; }, o);
    } else {
        int seen[L::SET_QUERIES];
#pragma unroll
        for (int g = 0; g < L::SET_QUERIES; ++g) {
            seen[g] = __shfl_sync(EI_ALL_LANES, bounds, L::first_query() + g);
        }
        add_values<V_DIM, QUERIES, BATCH>(
            shared.p[warp], view,
            [&](int query, int position) {
                return position >= seen[query] % 64 && position < seen[query] / 64;
            },
            o);
    }
    __syncwarp();
}

EI_DEV int least_lane(int x) {
    for (int step = 16; step > 0; step >>= 1) {
        x = min(x, __shfl_xor_sync(EI_ALL_LANES, x, step));
    }
    return x;
}

// What attention leaves for n rows from `row` on.
EI_DEV void write_rows(Shared& shared, const Layer& layer, const State& whole, int row, int n) {
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const bool has_query = lane / GROUP < n && lane % GROUP < layer.n_heads;
    const float* sink = layer.sinks + layer.head + lane % GROUP;
    const Scales scales =
        last_scales(whole.m, whole.l, layer.sinks && has_query ? sink : nullptr);
    __syncwarp();
    const auto value_of = [&](int i) {
        const int query = i / V_DIM;
        const float factor = __shfl_sync(EI_ALL_LANES, scales.factor, query);
        const float inverse = __shfl_sync(EI_ALL_LANES, scales.inverse, query);
        const int chunk = i % V_DIM / 8;
        const int held_by = query / L::SET_QUERIES * L::WIDTH + chunk % L::WIDTH;
        const int held_as = chunk / L::WIDTH * 8 + i % V_DIM % 8;
        const float held = shared.whole[warp][held_as][query % L::SET_QUERIES][held_by];
        return (held * factor) * inverse;
    };
    const auto write = [&](int i, float value) {
        const int query = i / V_DIM;
        if (query / GROUP >= n || query % GROUP >= layer.n_heads) {
            return;  // all lanes of a block of 32
        }
        const int at = (layer.head + query % GROUP) * V_DIM + i % V_DIM;
        if (layer.out) {
            layer.out[(size_t)(row + query / GROUP) * layer.out_stride + at] = value;
        }
        if (V_DIM % 32 == 0 && layer.x8) {
            quantise_block(x8_row(layer.x8, row + query / GROUP, layer.x8_dim), at / 32, value);
        }
    };
    for (int first = 0; first < QUERIES * V_DIM; first += TRANSFORMS_V ? 64 : 32) {
        const int i = min(first + lane, QUERIES * V_DIM - 1);
        float x0 = value_of(i);
        if (TRANSFORMS_V) {
            float x1 = value_of(i + 32);
            hadamard64(x0, x1);
            write(i + 32, x1);
        }
        write(i, x0);
    }
    __syncwarp();
}

// n rows of one sequence, from `row` on.
EI_DEV void attend_run(
    Shared& shared, const Layer& layer, const Table& table, const int64_t* pos, int window, int row,
    int n) {
    const int lane = threadIdx.x % 32;
    const bool has_query = lane / GROUP < n && lane % GROUP < layer.n_heads;
    const Seen seen = seen_of(table, pos[row + min(lane / GROUP, n - 1)], window);
    State page_state, segment = {0, 0, true}, whole = {0, 0, true};
    Values page_o, segment_o;
    const auto segment_value = [&](int i, int g) -> float& { return segment_o[i / 8][g][i % 8]; };
    const auto whole_value = [&](int i, int g) -> float& {
        return shared.whole[threadIdx.x / 32][i][g][lane];
    };
    int last_segment = -1;
    for (int is_pinned = 1; is_pinned >= 0; --is_pinned) {
        const int begin = is_pinned ? seen.pinned_begin : seen.begin;
        const int end = is_pinned ? seen.pinned_end : seen.end;
        const int first = least_lane(begin);
        const int behind = -least_lane(-end);
        if (first >= behind) {
            continue;
        }
        load_queries(
            shared.queries[threadIdx.x / 32], layer, is_pinned ? layer.pinned_q : layer.q, row, n);
        __syncwarp();
        for (int page = first; page < behind; ++page) {
            const bool sees = has_query && page >= begin && page < end;
            if (!__any_sync(EI_ALL_LANES, sees)) {
                continue;
            }
            const int bounds = sees ? first_seen(seen, page) + 64 * end_seen(seen, page) : 0;
            attend_page(
                shared, layer, arena_page(table, page), bounds, &page_state.m, &page_state.l,
                page_o);
            const bool is_next = sees && last_segment != page / EI_SEGMENT_PAGES;
            if (__any_sync(EI_ALL_LANES, is_next)) {
                const bool is_done = is_next && !segment.is_empty;
                const Take take = take_part(whole, segment.m, segment.l, is_done);
                take_values(take, segment_o, whole_value);
                segment.is_empty |= is_next;
            }
            last_segment = sees ? page / EI_SEGMENT_PAGES : last_segment;
            const Take take = take_part(segment, page_state.m, page_state.l, sees);
            take_values(take, page_o, segment_value);
        }
        __syncwarp();
    }
    take_values(take_part(whole, segment.m, segment.l, has_query), segment_o, whole_value);
    write_rows(shared, layer, whole, row, n);
}

// Grid: (kv heads * tiles, rows / (ROWS * WARPS)), 32 * WARPS threads; a tile is GROUP query heads
// of a kv head. Rows of any sequences; those of one that follow each other share what is read.
// q, pinned_q: float (row, n_heads * K_DIM); pinned_q is read of rows that have slid.
// k_cache, v_cache: as attend.cu reads them. out, x8: as attend.cu leaves them.
// sinks: a float of each query head, or null. window 0: all.
EI_KERNEL(32 * WARPS, 1) attend_rows(
    const Step* step, const float* q, const float* pinned_q, int q_stride, const uint8_t* k_cache,
    const uint8_t* v_cache, const int64_t* pos, const int* seq, const int4* tables,
    const int* pages, const float* sinks, float* out, int out_stride, uint8_t* x8, int n_heads,
    int n_kv_heads, int window, float scale, float soft_cap) {
    EI_SHARED(Shared, memory, [1]);
    if (ei_aborted(step)) {
        return;
    }
    const int group = n_heads / n_kv_heads;
    const int n_tiles = (group + GROUP - 1) / GROUP;
    const int first_head = blockIdx.x % n_tiles * GROUP;
    Layer layer = {q, pinned_q, q_stride, k_cache, v_cache, sinks, out, out_stride, x8};
    layer.x8_dim = n_heads * V_DIM;
    layer.kv_head = blockIdx.x / n_tiles;
    layer.n_kv_heads = n_kv_heads;
    layer.head = layer.kv_head * group + first_head;
    layer.n_heads = min(GROUP, group - first_head);
    layer.scale = scale;
    layer.soft_cap = soft_cap;
    const int first = (blockIdx.y * WARPS + threadIdx.x / 32) * ROWS;
    const int end = min(first + ROWS, ei_rows(step, 0));
    for (int row = first, n; row < end; row += n) {
        n = 1;
        while (row + n < end && seq[row + n] == seq[row]) {
            ++n;
        }
        const Table table = table_of(tables, pages, seq, row);
        attend_run(memory[0], layer, table, pos, window, row, n);
    }
}
