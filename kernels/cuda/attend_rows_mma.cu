// Attention of many rows by tensor cores, "fast" numerics: as attend_rows.cu, with the sums of
// attend.cu where MMA is 1.
#include "attend_mma.cuh"
#include "attend_rows.cuh"

// K_DIM, V_DIM: widths of heads, any. GROUP: query heads of a kv head that a warp takes. ROWS: rows
// that it takes at a time, GROUP * ROWS is at most 16. WARPS: of a block. K_IS_V 1: V is the first
// V_DIM values of K, and v_cache is not read. SOFT_CAP 0: soft_cap is not used. K_TYPE, V_TYPE: of
// the cache. Needs sm_75.
// Variants: K_DIM = 128; V_DIM = 128; GROUP = 1; ROWS = 16; WARPS = 2; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = f16; V_TYPE = f16
// Variants: K_DIM = 128; V_DIM = 128; GROUP = 2; ROWS = 8; WARPS = 2; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = f16; V_TYPE = f16
// Variants: K_DIM = 128; V_DIM = 128; GROUP = 4; ROWS = 4; WARPS = 2; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = f16 q8_0; V_TYPE = f16 q8_0
// Variants: K_DIM = 128; V_DIM = 128; GROUP = 8; ROWS = 2; WARPS = 2; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = f16; V_TYPE = f16
// Variants: K_DIM = 64; V_DIM = 64; GROUP = 3; ROWS = 5; WARPS = 4; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = f16 q4_0; V_TYPE = f16 q4_0
// Variants: K_DIM = 64; V_DIM = 64; GROUP = 4; ROWS = 4; WARPS = 4; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = f16; V_TYPE = f16
// Variants: K_DIM = 64; V_DIM = 64; GROUP = 7; ROWS = 2; WARPS = 4; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = f16; V_TYPE = f16
// Variants: K_DIM = 256; V_DIM = 256; GROUP = 2; ROWS = 8; WARPS = 1; K_IS_V = 0; SOFT_CAP = 0 1;
//   K_TYPE = f16; V_TYPE = f16
constexpr int QUERIES = ROWS * GROUP;  // of a warp
constexpr bool TRANSFORMS_K =
    K_TYPE::IS_BLOCKS && K_DIM % 64 == 0 && (!K_IS_V || V_DIM % 64 == 0);
constexpr bool TRANSFORMS_V =
    K_IS_V ? TRANSFORMS_K : V_TYPE::IS_BLOCKS && V_DIM % 64 == 0;
constexpr int N_GROUPS = GROUPS<V_DIM>;
typedef Rows<GROUP> TileRows;

struct __align__(16) Shared {
    HalfQueries<QUERIES, K_DIM> queries[WARPS];
    // Of the segment, and of those before: values of add_values, by lane.
    float segment[WARPS][N_GROUPS][8][32][4];
    float whole[WARPS][N_GROUPS][8][32][4];
};

// Takes four values of a lane, two of each of its queries, into what is held of them.
EI_DEV void take_values(const Take (&takes)[2], const float (&o)[4], float (&held)[32][4]) {
    float4& place = *(float4*)held[threadIdx.x % 32];
    float4 value = place;
    takes[0].value(value.x, o[0]);
    takes[0].value(value.y, o[1]);
    takes[1].value(value.z, o[2]);
    takes[1].value(value.w, o[3]);
    place = value;
}

// A page that a tile takes, as seen by this lane's queries, g and g + 8, and by any.
struct Taken {
    Bounds seen[2];
    bool sees[2];
    bool is_next[2];
    Bounds any;
};

// Of what each query's lane has.
EI_DEV Taken taken_of(int bounds, bool sees, bool is_next) {
    const int packed = bounds | sees << 12 | is_next << 13;
    Taken taken;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int of_query = __shfl_sync(EI_ALL_LANES, packed, query_of_value(2 * i));
        taken.seen[i] = Bounds{of_query % 64, of_query / 64 % 64};
        taken.sees[i] = of_query >> 12 & 1;
        taken.is_next[i] = of_query >> 13;
    }
    taken.any = Bounds{least_lane(sees ? bounds % 64 : EI_PAGE), -least_lane(-(bounds / 64))};
    return taken;
}

// Queries of a warp, and what is folded of them so far.
struct Tile {
    Shared& shared;
    const Layer& layer;
    TileRows rows;
    State segment[2], whole[2];  // of the lane's queries

    __device__ __forceinline__ void load(const float* q) {
        for (int i = 0; i < QUERIES; ++i) {
            load_query<K_TYPE, TRANSFORMS_K>(
                shared.queries[threadIdx.x / 32], i, rows.query_of<K_DIM>(layer, q, i));
        }
    }

    __device__ __forceinline__ void take(int arena_page, int bounds, bool sees, bool is_next) {
        const size_t place = (size_t)arena_page * layer.n_kv_heads + layer.kv_head;
        const uint8_t* k = layer.k_cache + place * PageOf<K_TYPE, K_DIM>::BYTES;
        const uint8_t* v = layer.v_cache + place * PageOf<V_TYPE, V_DIM>::BYTES;
        const auto keys = view_keys<K_TYPE, K_DIM>(k);
        const auto values = K_IS_V ? view_keys<V_TYPE, K_DIM>(k) : view_values<V_TYPE, V_DIM>(v);
        const Taken taken = taken_of(bounds, sees, is_next);
        float scores[4][4], m[2], l[2];
        unsigned p[2][4];
        score_page<K_TYPE, SOFT_CAP>(
            shared.queries[threadIdx.x / 32], keys, layer.scale, layer.soft_cap, scores);
        soften(scores, taken.seen, p, m, l);
        if (__any_sync(EI_ALL_LANES, is_next)) {
            end_segment(taken.is_next);
        }
        const Take takes[2] = {
            take_part(segment[0], m[0], l[0], taken.sees[0]),
            take_part(segment[1], m[1], l[1], taken.sees[1])};
#pragma unroll 1
        for (int group = 0; group < N_GROUPS; ++group) {
            float o[8][4];
            add_values<V_DIM>(p, values, group, taken.any, o);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                take_values(takes, o[j], shared.segment[threadIdx.x / 32][group][j]);
            }
        }
    }

    // Of queries that begin another one, or that have seen all.
    __device__ __forceinline__ void end_segment(const bool (&is_done)[2]) {
        Take takes[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const bool is_there = is_done[i] && !segment[i].is_empty;
            takes[i] = take_part(whole[i], segment[i].m, segment[i].l, is_there);
            segment[i].is_empty |= is_done[i];
        }
        const int warp = threadIdx.x / 32;
#pragma unroll 1
        for (int i = 0; i < 8 * N_GROUPS; ++i) {
            const float(&o)[4] = shared.segment[warp][i / 8][i % 8][threadIdx.x % 32];
            take_values(takes, o, shared.whole[warp][i / 8][i % 8]);
        }
    }

    // Of the lane's query, of those that any lane has.
    __device__ __forceinline__ State whole_of(int query) const {
        State found[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            found[i].m = __shfl_sync(EI_ALL_LANES, whole[i].m, 4 * (query % 8));
            found[i].l = __shfl_sync(EI_ALL_LANES, whole[i].l, 4 * (query % 8));
        }
        return query < 8 ? found[0] : found[1];
    }
};

EI_DEV void attend_run(
    Shared& shared, const Layer& layer, const Table& table, const int64_t* pos, int window,
    const TileRows& rows) {
    const int lane = threadIdx.x % 32;
    const Seen seen = seen_of(table, pos[rows.row + min(lane / GROUP, rows.n - 1)], window);
    Tile tile = {shared, layer, rows};
    tile.segment[0] = tile.segment[1] = tile.whole[0] = tile.whole[1] = {0, 0, true};
    take_pages(tile, layer, table, seen, rows.has(layer, lane));
    tile.end_segment({true, true});
    write_rows<GROUP, QUERIES, V_DIM, TRANSFORMS_V>(
        layer, rows, tile.whole_of(lane % TILE_QUERIES), [&](int query, int value) {
            const auto& group = shared.whole[threadIdx.x / 32][value / 64];
            const int held_by = query % 8 * 4 + value % 64 / 16;
            return group[value % 8][held_by][query / 8 * 2 + value % 16 / 8];
        });
}

// Grid: (kv heads * tiles, rows / (ROWS * WARPS)), 32 * WARPS threads; a tile is GROUP query heads
// of a kv head. Rows of any sequences; those of one that follow each other share what is read.
// q, pinned_q: float (row, n_heads * K_DIM); pinned_q is read of rows that have slid.
// k_cache, v_cache: as attend.cu reads them. out, x8: as attend.cu leaves them.
// sinks: a float of each query head, or null. window 0: all.
EI_KERNEL(32 * WARPS, 1) attend_rows_mma(
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
