// Attention of each row by itself: a block takes a segment of 16 pages; the last block that is done
// with a row folds the segments.
#include "attend_queries.cuh"
#include "await.cuh"
#include "x8.cuh"

// K_DIM, V_DIM: widths of heads, any. QUERIES: query heads of a block. WARPS: of a block.
// K_IS_V 1: V is the first V_DIM values of K, and v_cache is not read. SOFT_CAP 0: soft_cap is not
// used. K_TYPE, V_TYPE: of the cache. MMA 1: by tensor cores, "fast" numerics, QUERIES at most 16.
// Variants: K_DIM = 128; V_DIM = 128; QUERIES = 1 2 4; WARPS = 16; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = f16; V_TYPE = f16; MMA = 0
// Variants: K_DIM = 128; V_DIM = 128; QUERIES = 1 2 4; WARPS = 8; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = f16; V_TYPE = f16; MMA = 1
// Variants: K_DIM = 128; V_DIM = 128; QUERIES = 8; WARPS = 8; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = f16; V_TYPE = f16; MMA = 0 1
// Variants: K_DIM = 64; V_DIM = 64; QUERIES = 3 4; WARPS = 16; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = f16; V_TYPE = f16; MMA = 0
// Variants: K_DIM = 64; V_DIM = 64; QUERIES = 3 4; WARPS = 8; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = f16; V_TYPE = f16; MMA = 1
// Variants: K_DIM = 64; V_DIM = 64; QUERIES = 7; WARPS = 8; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = f16; V_TYPE = f16; MMA = 0 1
// Variants: K_DIM = 256; V_DIM = 256; QUERIES = 2; WARPS = 16; K_IS_V = 0; SOFT_CAP = 0 1;
//   K_TYPE = f16; V_TYPE = f16; MMA = 0
// Variants: K_DIM = 256; V_DIM = 256; QUERIES = 2; WARPS = 8; K_IS_V = 0; SOFT_CAP = 0 1;
//   K_TYPE = f16; V_TYPE = f16; MMA = 1
// Variants: K_DIM = 128; V_DIM = 128; QUERIES = 4; WARPS = 8; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = q8_0 q4_0; V_TYPE = q8_0 q4_0; MMA = 0 1
// Variants: K_DIM = 64; V_DIM = 64; QUERIES = 3; WARPS = 16; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = q8_0; V_TYPE = q8_0 q4_0; MMA = 0
// Variants: K_DIM = 64; V_DIM = 64; QUERIES = 3; WARPS = 8; K_IS_V = 0; SOFT_CAP = 0;
//   K_TYPE = q8_0; V_TYPE = q8_0 q4_0; MMA = 1
typedef Lanes<V_DIM, QUERIES> L;
constexpr int THREADS = 32 * WARPS;
constexpr bool IS_BLOCKS = K_TYPE::IS_BLOCKS;
constexpr int K_PAGE = PageOf<K_TYPE, K_DIM>::BYTES;  // of a head
constexpr int V_PAGE = PageOf<V_TYPE, V_DIM>::BYTES;
constexpr bool TRANSFORMS_K = IS_BLOCKS && K_DIM % 64 == 0 && (!K_IS_V || V_DIM % 64 == 0);
constexpr bool TRANSFORMS_V =
    K_IS_V ? TRANSFORMS_K : V_TYPE::IS_BLOCKS && V_DIM % 64 == 0;
constexpr int ITEMS = (QUERIES * V_DIM + THREADS - 1) / THREADS;  // values of o that a thread folds
// Loads of a lane in flight. Below sm_70 there are no registers for more in a block of 512 threads.
#if __CUDA_ARCH__ >= 700
constexpr int BATCH = 16;
#else
constexpr int BATCH = 8;
#endif

template <class T>
constexpr int KIND = KV_F16;
template <>
constexpr int KIND<q8_0> = KV_Q8_0;
template <>
constexpr int KIND<q4_0> = KV_Q4_0;

struct __align__(16) Shared {
    typename PageQueries<MMA, IS_BLOCKS, QUERIES, K_DIM>::Type queries;
    float p[WARPS][EI_PAGE][L::PADDED];
    float o[WARPS][QUERIES * V_DIM];
    Folding<WARPS, QUERIES> fold;
    int n_done;
};

// What is the same for all pages of a block.
struct Heads {
    uint8_t* k_cache;
    uint8_t* v_cache;
    int n_kv_heads;
    int kv_head;
    int first;  // query head of the block,
    int n;      // and how many it has, at most QUERIES
    float scale;
    float soft_cap;
};

// Those of this block: a tile of the query heads that read one kv head.
EI_DEV void find_heads(Heads& heads, int n_heads) {
    const int group = n_heads / heads.n_kv_heads;
    const int n_tiles = (group + QUERIES - 1) / QUERIES;
    const int in_group = blockIdx.x % n_tiles * QUERIES;
    heads.kv_head = blockIdx.x / n_tiles;
    heads.first = heads.kv_head * group + in_group;
    heads.n = min(QUERIES, group - in_group);
}

// Room for a head that a warp makes, while it has no values of a page.
EI_DEV float* head_room(Shared& shared) {
    return shared.o[threadIdx.x / 32];
}

// K and V of the row into its page, by two warps. All tiles of a kv head leave the same bytes there:
// each reads only what it has written itself.
EI_DEV void store_row(
    Shared& shared, const Heads& heads, const Row& row, int arena_page, int position) {
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const size_t place = (size_t)arena_page * heads.n_kv_heads + heads.kv_head;
    if (warp == WARPS - 1) {
        float* head = head_room(shared);
        make_head(head, row.k, row.k_norm, K_DIM, row, false);
        const Kept kept = {KIND<K_TYPE>, TRANSFORMS_K, K_DIM};
        store_head(place_key(heads.k_cache + place * K_PAGE, kept, position), kept, head, lane, 32);
        __syncwarp();
    }
    if (!K_IS_V && warp == WARPS / 2) {
        const Kept kept = {KIND<V_TYPE>, TRANSFORMS_V, V_DIM};
        const Place value = place_value(heads.v_cache + place * V_PAGE, kept, position);
        store_head(value, kept, row.v, lane, 32);
    }
}

// What a page of a head is made of.
struct Page {
    const uint8_t* k;
    PageView<V_TYPE> v;
    Bounds seen;
};

// A warp's part of a page.
template <class Queries>
EI_DEV void attend_page(
    Shared& shared, const Queries& queries, const Heads& heads, const Page& page) {
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    float scores[QUERIES];
    score_page<K_TYPE, BATCH, SOFT_CAP>(queries, page.k, heads.scale, heads.soft_cap, scores);
#pragma unroll
    for (int g = 0; g < QUERIES; ++g) {
        float m, l;
        shared.p[warp][lane][g] = soften(scores[g], page.seen.has(lane), &m, &l);
        if (lane == 0) {
            shared.fold.m[warp][g] = m;
            shared.fold.l[warp][g] = l;
        }
    }
    __syncwarp();
    float o[L::ROUNDS][L::SET_QUERIES][8];
    add_values<V_DIM, QUERIES, BATCH>(
        shared.p[warp], page.v, [&](int query, int position) { return page.seen.has(position); },
        o);
    for_values<V_DIM, QUERIES>([&](int query, int value, int round, int g, int e) {
        shared.o[warp][query * V_DIM + value] = o[round][g][e];
    });
}

template <int WIDTH>
EI_DEV void attend_page(
    Shared& shared, const HalfQueries<QUERIES, WIDTH>& queries, const Heads& heads,
    const Page& page) {
    const int warp = threadIdx.x / 32;
    const auto keys = view_keys<K_TYPE, K_DIM>(page.k);
    float scores[4][4], m[2], l[2];
    unsigned p[2][4];
    score_page<K_TYPE, SOFT_CAP>(queries, keys, heads.scale, heads.soft_cap, scores);
    soften(scores, {page.seen, page.seen}, p, m, l);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int query = query_of_value(2 * i);
        if (threadIdx.x % 4 == 0 && query < QUERIES) {
            shared.fold.m[warp][query] = m[i];
            shared.fold.l[warp][query] = l[i];
        }
    }
#pragma unroll 1
    for (int group = 0; group < GROUPS<V_DIM>; ++group) {
        float o[8][4];
        add_values<V_DIM>(p, page.v, group, page.seen, o);
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const int query = query_of_value(i % 4);
            const int value = place_of_value(group, i / 4, i % 4);
            if (query < QUERIES && value < V_DIM) {
                shared.o[warp][query * V_DIM + value] = o[i / 4][i % 4];
            }
        }
    }
}

// The part of page `page`, which the row sees.
EI_DEV void attend_page(
    Shared& shared, const Heads& heads, const Table& table, const Seen& seen, int page) {
    const size_t place = (size_t)arena_page(table, page) * heads.n_kv_heads + heads.kv_head;
    const uint8_t* k = heads.k_cache + place * K_PAGE;
    const uint8_t* v = heads.v_cache + place * V_PAGE;
    for (int i = 128 * (threadIdx.x % 32); i < V_PAGE && !K_IS_V; i += 128 * 32) {
        ei_prefetch(v + i);
    }
    const auto view = K_IS_V ? view_keys<V_TYPE, K_DIM>(k) : view_values<V_TYPE, V_DIM>(v);
    const Bounds bounds = {first_seen(seen, page), end_seen(seen, page)};
    attend_page(shared, shared.queries, heads, Page{k, view, bounds});
}

// All that a row sees of the segment that begins with page `first_page`, into o and shared.fold.
EI_DEV void attend_segment(
    Shared& shared, const Heads& heads, const Table& table, const Seen& seen, const Row& row,
    int first_page, float (&o)[ITEMS]) {
    const int last_page = seen.end - 1;
    if (!row.is_ready() && row.k && last_page < first_page + EI_SEGMENT_PAGES) {
        store_row(shared, heads, row, arena_page(table, last_page), seen.last);
    }
    bool starts = true;
    for (int is_pinned = 1; is_pinned >= 0; --is_pinned) {
        const int begin = max(first_page, is_pinned ? seen.pinned_begin : seen.begin);
        const int behind = is_pinned ? seen.pinned_end : seen.end;
        const int end = min(first_page + EI_SEGMENT_PAGES, behind);
        if (begin >= end) {
            continue;
        }
        load_queries<WARPS, QUERIES, K_DIM, K_TYPE, TRANSFORMS_K>(
            shared.queries, heads.n, head_room(shared), row, is_pinned);
        __syncthreads();
        for (int first = begin; first < end; first += WARPS) {
            const int page = first + threadIdx.x / 32;
            if (page < end) {
                attend_page(shared, heads, table, seen, page);
            }
            fold_parts<V_DIM>(
                shared.fold, min(WARPS, end - first), starts,
                [&](int warp, int item) { return shared.o[warp][item]; }, o);
            starts = false;
        }
    }
}

// parts: of the first query of the block and the first of n_segments segments; V_DIM values, then m
// and l. Whether all blocks of these queries have written theirs: true for one of them.
EI_DEV bool write_part(
    Shared& shared, const Heads& heads, const float (&o)[ITEMS], float* parts, int n_segments,
    int* counter, bool is_aborted) {
    float* part = parts + (size_t)blockIdx.y * (V_DIM + 2);
    const size_t stride = (size_t)gridDim.y * (V_DIM + 2);
#pragma unroll
    for (int j = 0; j < ITEMS && !is_aborted; ++j) {
        const int item = threadIdx.x + j * THREADS;
        if (item < heads.n * V_DIM) {
            part[item / V_DIM * stride + item % V_DIM] = o[j];
        }
    }
    for (int g = threadIdx.x; g < heads.n && !is_aborted; g += THREADS) {
        part[g * stride + V_DIM] = shared.fold.top[g];
        part[g * stride + V_DIM + 1] = shared.fold.sum[g];
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        shared.n_done = atomicAdd(counter, 1) + 1;
        if (shared.n_done == n_segments) {
            *counter = 0;
        }
    }
    __syncthreads();
    return shared.n_done == n_segments;
}

// The parts of n_segments segments folded into o and shared.fold.
EI_DEV void fold_segments(
    Shared& shared, const Heads& heads, const float* parts, int n_segments, float (&o)[ITEMS]) {
    const size_t stride = (size_t)gridDim.y * (V_DIM + 2);
    const auto at = [&](int segment, int g, int i) {
        return ei_load_shared_by_blocks(parts + g * stride + (size_t)segment * (V_DIM + 2) + i);
    };
    for (int first = 0; first < n_segments; first += WARPS) {
        const int n = min(WARPS, n_segments - first);
        for (int i = threadIdx.x; i < n * heads.n; i += THREADS) {
            const int g = i % heads.n;
            shared.fold.m[i / heads.n][g] = at(first + i / heads.n, g, V_DIM);
            shared.fold.l[i / heads.n][g] = at(first + i / heads.n, g, V_DIM + 1);
        }
        fold_parts<V_DIM>(
            shared.fold, n, first == 0,
            [&](int i, int item) {
                const int g = min(item / V_DIM, heads.n - 1);
                return at(first + i, g, item % V_DIM);
            },
            o);
    }
}

// Where results of a row go.
struct Results {
    float* out;
    bool has_x8;
    X8 x8;

    __device__ __forceinline__ void write(int at, float value) const {
        if (out) {
            out[at] = value;
        }
        if (V_DIM % 32 == 0 && has_x8) {  // then a warp is one block of 32
            quantise_block(x8, at / 32, value);
        }
    }
};

// What attention leaves for this block's queries of a row.
EI_DEV void write_row(
    Shared& shared, const Heads& heads, const float (&o)[ITEMS], const float* sinks,
    const Results& results) {
    float* values = &shared.o[0][0];
    const int n_values = heads.n * V_DIM;
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) {
        const int item = threadIdx.x + j * THREADS;
        const int g = item / V_DIM;
        if (item < n_values) {
            const float* sink = sinks ? sinks + heads.first + g : nullptr;
            const Scales scales = last_scales(shared.fold.top[g], shared.fold.sum[g], sink);
            const float value = (o[j] * scales.factor) * scales.inverse;
            if (TRANSFORMS_V) {
                values[item] = value;
            } else {
                results.write(heads.first * V_DIM + item, value);
            }
        }
    }
    if (!TRANSFORMS_V) {
        return;
    }
    __syncthreads();
    for (int item = threadIdx.x / 32 * 64 + threadIdx.x % 32; item < n_values;
         item += 2 * THREADS) {
        float x0 = values[item];
        float x1 = values[item + 32];
        hadamard64(x0, x1);
        results.write(heads.first * V_DIM + item, x0);
        results.write(heads.first * V_DIM + item + 32, x1);
    }
}

// Grid: (kv heads * tiles, segments, rows), 32 * WARPS threads; a tile is QUERIES query heads of a
// kv head. Segments: as many as the row has that sees most, or more.
// q, pinned_q: float (row, n_heads * K_DIM); pinned_q is read of rows that have slid. Where angles
// are not null, q is not yet normed and rotated, nor k, float (row, kv heads * K_DIM), which, with v
// like it, is stored first: see rotate_store.cu. This is for steps of one row, and K_DIM is at most
// QUERIES * V_DIM then.
// k_cache, v_cache: pages of a layer, (page, kv head), as kv_types.cuh has them. window 0: all.
// parts: float (row, query head, segment, V_DIM + 2), not used where there is one segment.
// counters: int (row, kv heads * tiles), zeros before the first step; they are zeros afterwards.
// sinks: a float of each query head, or null. out: float (row, n_heads * V_DIM), or null. x8: the
// same quantised, or null; there is none where V_DIM is no multiple of 32.
EI_KERNEL(32 * WARPS, 1) attend(
    const Step* step, const float* q, const float* pinned_q, int q_stride, const float* k,
    const float* v, const float* q_norm, const float* k_norm, float eps, const float2* angles,
    const float2* pinned_angles, int n_pairs, int is_neox, uint8_t* k_cache, uint8_t* v_cache,
    const int64_t* pos, const int* seq, const int4* tables, const int* pages, const float* sinks,
    float* parts, int* counters, float* out, int out_stride, uint8_t* x8, int n_heads,
    int n_kv_heads, int window, float scale, float soft_cap) {
    EI_SHARED(Shared, memory, [1]);
    Shared& shared = memory[0];
    EI_AWAIT_INPUT();
    const int row = blockIdx.z;
    const bool is_aborted = ei_aborted(step);
    if (row >= ei_rows(step, 0)) {
        return;
    }
    const Table table = table_of(tables, pages, seq, row);
    const Seen seen = seen_of(table, pos[row], window);
    const Segments segments = segments_of(seen);
    if ((int)blockIdx.y >= segments.n) {
        return;
    }
    Heads heads = {k_cache, v_cache, n_kv_heads};
    find_heads(heads, n_heads);
    heads.scale = scale;
    heads.soft_cap = soft_cap;
    const size_t first_value = (size_t)row * q_stride + heads.first * K_DIM;
    float o[ITEMS];
    if (!is_aborted) {
        const int page = EI_SEGMENT_PAGES * segment_at(segments, blockIdx.y);
        const Row values = {
            q + first_value, pinned_q + first_value, k ? k + heads.kv_head * K_DIM : nullptr,
            v + heads.kv_head * V_DIM, q_norm, k_norm, eps, angles, pinned_angles, n_pairs,
            is_neox != 0};
        attend_segment(shared, heads, table, seen, values, page, o);
    }
    if (segments.n > 1) {
        float* row_parts =
            parts + ((size_t)row * n_heads + heads.first) * gridDim.y * (V_DIM + 2);
        int* counter = counters + row * gridDim.x + blockIdx.x;
        if (!write_part(shared, heads, o, row_parts, segments.n, counter, is_aborted)) {
            return;
        }
        fold_segments(shared, heads, row_parts, segments.n, o);
    }
    if (!is_aborted) {
        float* out_row = out ? out + (size_t)row * out_stride : nullptr;
        const Results results = {out_row, x8 != nullptr, x8_row(x8, row, n_heads * V_DIM)};
        write_row(shared, heads, o, sinks, results);
    }
}
