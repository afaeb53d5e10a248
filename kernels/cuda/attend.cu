// Attention of each row by itself: a block takes a segment of 16 pages and leaves a part.
#include "attend.cuh"

// K_DIM, V_DIM: widths of heads, any. QUERIES: query heads of a block. WARPS: of a block.
// K_IS_V 1: V is the first V_DIM values of K, and v_cache is not read. SOFT_CAP 0: soft_cap is not
// used.
// Variants: K_DIM = 128; V_DIM = 128; QUERIES = 1 2 4; WARPS = 8; K_IS_V = 0; SOFT_CAP = 0
// Variants: K_DIM = 128; V_DIM = 128; QUERIES = 8; WARPS = 4; K_IS_V = 0; SOFT_CAP = 0
// Variants: K_DIM = 64; V_DIM = 64; QUERIES = 3 4 7; WARPS = 8; K_IS_V = 0; SOFT_CAP = 0
// Variants: K_DIM = 256; V_DIM = 256; QUERIES = 2; WARPS = 8; K_IS_V = 0; SOFT_CAP = 0 1
typedef Lanes<V_DIM, QUERIES> L;
constexpr int THREADS = 32 * WARPS;
constexpr int K_CHUNKS = (K_DIM + 7) / 8;
constexpr int ITEMS = (QUERIES * V_DIM + THREADS - 1) / THREADS;  // values of o that a thread folds

struct __align__(16) Shared {
    float q[QUERIES][8 * K_CHUNKS];
    float p[WARPS][EI_PAGE][L::PADDED];
    float o[WARPS][QUERIES][V_DIM];
    Folding<WARPS, QUERIES> fold;
};

// Queries that have no head are zeros.
EI_DEV void load_queries(Shared& shared, const float* q, int n_queries) {
    for (int i = threadIdx.x; i < QUERIES * K_DIM; i += THREADS) {
        const int g = i / K_DIM;
        shared.q[g][i % K_DIM] = g < n_queries ? q[i] : 0.0f;
    }
}

// A warp's part of the page at k and v, of which positions first to end - 1 are seen.
EI_DEV void attend_page(
    Shared& shared, const uint16_t* k, const uint16_t* v, int first, int end, float scale,
    float soft_cap) {
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    float scores[QUERIES];
    score_page<K_DIM, SOFT_CAP>(shared.q, k, scale, soft_cap, scores);
#pragma unroll
    for (int g = 0; g < QUERIES; ++g) {
        float m, l;
        shared.p[warp][lane][g] = soften(scores[g], lane >= first && lane < end, &m, &l);
        if (lane == 0) {
            shared.fold.m[warp][g] = m;
            shared.fold.l[warp][g] = l;
        }
    }
    __syncwarp();
    float o[L::ROUNDS][L::SET_QUERIES][8];
    const int chunk_stride = K_IS_V ? 8 * EI_PAGE : 8;
    const int position_stride = K_IS_V ? 8 : 8 * L::CHUNKS;
    add_values<V_DIM, QUERIES>(
        shared.p[warp], v, chunk_stride, position_stride, first, end,
        [](int query, int position) { return true; }, o);
    for_values<V_DIM, QUERIES>([&](int query, int value, int round, int g, int e) {
        shared.o[warp][query][value] = o[round][g][e];
    });
}

// What the warps have left of n pages folded into o, page after page. All threads.
EI_DEV void fold_pages(Shared& shared, int n, bool starts, float (&o)[ITEMS]) {
    __syncthreads();
    fold_scales(shared.fold, n, starts);
    __syncthreads();
    fold_sums(shared.fold, n, starts);
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        const int i = threadIdx.x + item * THREADS;
        if (i < QUERIES * V_DIM) {
            const int g = i / V_DIM;
            for (int part = 0; part < n; ++part) {
                const float x = shared.o[part][g][i % V_DIM];
                o[item] = fold_value(shared.fold, part, g, starts, o[item], x);
            }
        }
    }
    __syncthreads();
}

// parts: that of the block's first query; those of the next lie gridDim.y further.
EI_DEV void write_parts(
    const Shared& shared, const float (&o)[ITEMS], int n_queries, float* parts) {
    const size_t stride = (size_t)gridDim.y * EI_PART(V_DIM);
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        const int i = threadIdx.x + item * THREADS;
        if (i < n_queries * V_DIM) {
            parts[i / V_DIM * stride + i % V_DIM] = o[item];
        }
    }
    for (int g = threadIdx.x; g < n_queries; g += THREADS) {
        parts[g * stride + EI_PART(V_DIM) - 4] = shared.fold.top[g];
        parts[g * stride + EI_PART(V_DIM) - 3] = shared.fold.sum[g];
    }
}

// Grid: (kv heads * tiles, segments, rows), 32 * WARPS threads; a tile is QUERIES query heads of a
// kv head. Segments: as many as the row has that sees most, or more.
// q, pinned_q: float (row, n_heads * K_DIM); pinned_q is read of rows that have slid.
// k_cache, v_cache: halves of a layer's pages, (page, kv head, ceil(K_DIM / 8), 32 positions, 8) and
// (page, kv head, 32 positions, V_DIM rounded up to 8).
// parts: float (row, query head, segment, EI_PART(V_DIM)). window 0: all.
EI_KERNEL(32 * WARPS, 1) attend(
    const Step* step, const float* q, const float* pinned_q, int q_stride, const uint16_t* k_cache,
    const uint16_t* v_cache, const int64_t* pos, const int* seq, const int4* tables,
    const int* pages, float* parts, int n_heads, int n_kv_heads, int window, float scale,
    float soft_cap) {
    EI_SHARED(Shared, memory, [1]);
    Shared& shared = memory[0];
    const int row = blockIdx.z;
    if (row >= ei_rows(step, 0) || ei_aborted(step)) {
        return;
    }
    const Table table = table_of(tables, pages, seq, row);
    const Seen seen = seen_of(table, pos[row], window);
    const Segments segments = segments_of(seen);
    if ((int)blockIdx.y >= segments.n) {
        return;
    }
    const int group = n_heads / n_kv_heads;
    const int n_tiles = (group + QUERIES - 1) / QUERIES;
    const int kv_head = blockIdx.x / n_tiles;
    const int first_query = blockIdx.x % n_tiles * QUERIES;
    const int n_queries = min(QUERIES, group - first_query);
    const int head = kv_head * group + first_query;
    const int first_page = EI_SEGMENT_PAGES * segment_at(segments, blockIdx.y);
    float o[ITEMS];
    bool starts = true;
    for (int is_pinned = 1; is_pinned >= 0; --is_pinned) {
        const int begin = max(first_page, is_pinned ? seen.pinned_begin : seen.begin);
        const int behind = is_pinned ? seen.pinned_end : seen.end;
        const int end = min(first_page + EI_SEGMENT_PAGES, behind);
        if (begin >= end) {
            continue;
        }
        const float* queries = is_pinned ? pinned_q : q;
        load_queries(shared, queries + (size_t)row * q_stride + head * K_DIM, n_queries);
        __syncthreads();
        for (int first = begin; first < end; first += WARPS) {
            const int page = first + threadIdx.x / 32;
            if (page < end) {
                const size_t place = (size_t)arena_page(table, page) * n_kv_heads + kv_head;
                const uint16_t* k = k_cache + place * (K_CHUNKS * 8 * EI_PAGE);
                const uint16_t* v = K_IS_V ? k : v_cache + place * (L::CHUNKS * 8 * EI_PAGE);
                attend_page(
                    shared, k, v, first_seen(seen, page), end_seen(seen, page), scale, soft_cap);
            }
            fold_pages(shared, min(WARPS, end - first), starts, o);
            starts = false;
        }
    }
    const size_t part = ((size_t)row * n_heads + head) * gridDim.y + blockIdx.y;
    write_parts(shared, o, n_queries, parts + part * EI_PART(V_DIM));
}
