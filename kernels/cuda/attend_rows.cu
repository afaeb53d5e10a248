// Attention of many rows: a warp takes rows of one sequence over all pages that they see, in order.
#include "attend_rows.cuh"

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
typedef Rows<GROUP> TileRows;
constexpr int BATCH = 4;  // loads of a lane in flight: other warps and blocks wait less than these
typedef float Values[L::ROUNDS][L::SET_QUERIES][8];

struct __align__(16) Shared {
    Queries queries[WARPS];
    float p[WARPS][EI_PAGE][L::PADDED];
    float whole[WARPS][8 * L::ROUNDS][L::SET_QUERIES][32];  // of segments folded so far, by lane
};

// The values of a part into those of a state, as each query's lane has said. state(i, g): where it
// has this lane's value i of query g of its set.
template <typename Value>
EI_DEV void take_values(const Take& take, const Values& part, Value state) {
#pragma unroll
    for (int g = 0; g < L::SET_QUERIES; ++g) {
        const int from = L::first_query() + g;
        Take each;
        each.how = __shfl_sync(EI_ALL_LANES, take.how, from);
        each.state_scale = __shfl_sync(EI_ALL_LANES, take.state_scale, from);
        each.part_scale = __shfl_sync(EI_ALL_LANES, take.part_scale, from);
#pragma unroll
        for (int i = 0; i < 8 * L::ROUNDS; ++i) {
            each.value(state(i, g), part[i / 8][g][i % 8]);
        }
    }
}

// Queries of rows to the warp's shared memory; those that are missing as zeros.
EI_DEV void load_queries(
    FloatQueries<QUERIES, K_DIM>& to, const Layer& layer, const float* q, const TileRows& rows) {
    for (int i = threadIdx.x % 32; i < QUERIES * K_DIM; i += 32) {
        const float* query = rows.query_of<K_DIM>(layer, q, i / K_DIM);
        to.q[i / K_DIM][i % K_DIM] = query ? query[i % K_DIM] : 0.0f;
    }
}

template <int WIDTH>
EI_DEV void load_queries(
    BlockQueries<QUERIES, WIDTH>& to, const Layer& layer, const float* q, const TileRows& rows) {
    for (int i = 0; i < QUERIES; ++i) {
        load_query<K_TYPE, TRANSFORMS_K>(to, i, rows.query_of<K_DIM>(layer, q, i));
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

// Queries of a warp, and what is folded of them so far.
struct Tile {
    Shared& shared;
    const Layer& layer;
    TileRows rows;
    State segment, whole;  // of the lane's query
    Values segment_o;

    __device__ __forceinline__ void load(const float* q) {
        load_queries(shared.queries[threadIdx.x / 32], layer, q, rows);
    }

    __device__ __forceinline__ void take(int arena_page, int bounds, bool sees, bool is_next) {
        Values o;
        float m, l;
        attend_page(shared, layer, arena_page, bounds, &m, &l, o);
        if (__any_sync(EI_ALL_LANES, is_next)) {
            end_segment(is_next && !segment.is_empty);
            segment.is_empty |= is_next;
        }
        take_values(take_part(segment, m, l, sees), o, [&](int i, int g) -> float& {
            return segment_o[i / 8][g][i % 8];
        });
    }

    // Of queries that are done with one.
    __device__ __forceinline__ void end_segment(bool is_done) {
        take_values(
            take_part(whole, segment.m, segment.l, is_done), segment_o,
            [&](int i, int g) -> float& {
                return shared.whole[threadIdx.x / 32][i][g][threadIdx.x % 32];
            });
    }
};

EI_DEV void attend_run(
    Shared& shared, const Layer& layer, const Table& table, const int64_t* pos, int window,
    const TileRows& rows) {
    const int lane = threadIdx.x % 32;
    const bool has_query = rows.has(layer, lane);
    const Seen seen = seen_of(table, pos[rows.row + min(lane / GROUP, rows.n - 1)], window);
    Tile tile = {shared, layer, rows, {0, 0, true}, {0, 0, true}};
    take_pages(tile, layer, table, seen, has_query);
    tile.end_segment(has_query);
    write_rows<GROUP, QUERIES, V_DIM, TRANSFORMS_V>(
        layer, rows, tile.whole, [&](int query, int value) {
            const int held_by = query / L::SET_QUERIES * L::WIDTH + value / 8 % L::WIDTH;
            const int held_as = value / 8 / L::WIDTH * 8 + value % 8;
            return shared.whole[threadIdx.x / 32][held_as][query % L::SET_QUERIES][held_by];
        });
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
    const Layer layer = layer_of_block<GROUP, V_DIM>(
        {q, pinned_q, q_stride, k_cache, v_cache, sinks, out, out_stride, x8, n_kv_heads, scale,
         soft_cap},
        n_heads);
    for_runs<GROUP>(ROWS, ei_rows(step, 0), seq, [&](const TileRows& rows) {
        const Table table = table_of(tables, pages, seq, rows.row);
        attend_run(memory[0], layer, table, pos, window, rows);
    });
}
