// What stands between the products q, k, v of a layer and its attention, in one launch: norms of
// heads, rotation of q (also for pinned pages) and k, and storing K and V in the row's page.
#include "heads.cuh"
#include "kv_types.cuh"

// NEOX 1: dims i and i + n_pairs are a pair, 0: dims 2i and 2i + 1.
// Variants: NEOX = 0 1

// A head of q, rotated for the pages of the ring and, where the row has slid, for the pinned ones.
EI_DEV void make_query(
    const float* head, const Angles& angles, const Angles& pinned_angles, int dim, float* out,
    float* pinned_out) {
    turn_head(head, angles, dim, [&](int i, float value) { out[i] = value; });
    if (pinned_out) {
        turn_head(head, pinned_angles, dim, [&](int i, float value) { pinned_out[i] = value; });
    }
}

// Grid: (n_heads + n_kv_heads heads / warps rounded up, rows), at most 128 threads; a warp takes a
// head of q, or one of k and v, and 4 * k_dim bytes of shared memory.
// q: float (row, n_heads * k_dim), k: (row, n_kv_heads * k_dim), v: (row, n_kv_heads * v_dim), rows
// so many floats apart. out, pinned_out: as q; out may be q; pinned_out is written of rows that
// have slid, null: of none. q_norm, k_norm: float (k_dim,) or null. angles, pinned_angles: (cosine,
// sine) (row, n_pairs). The caches, their types and transforms: as store.cu has them. n_kv_heads 0:
// nothing is stored, and k, v and the caches are not touched. v_dim 0: K serves as V.
EI_KERNEL(128) rotate_store(
    const Step* step, const float* q, int q_stride, const float* k, int k_stride, const float* v,
    int v_stride, const float* q_norm, const float* k_norm, float eps, const float2* angles,
    const float2* pinned_angles, int n_pairs, const int64_t* pos, const int* seq,
    const int4* tables, const int* pages, float* out, float* pinned_out, uint8_t* k_cache,
    uint8_t* v_cache, int n_heads, int n_kv_heads, int k_dim, int v_dim, int k_type, int v_type,
    int transforms_k, int transforms_v) {
    EI_DYN_SHARED(float, memory);
    const int row = blockIdx.y;
    const int warp = threadIdx.x / 32;
    int head = blockIdx.x * (blockDim.x / 32) + warp;
    if (ei_aborted(step) || row >= ei_rows(step, 0) || head >= n_heads + n_kv_heads) {
        return;
    }
    const Table table = table_of(tables, pages, seq, row);
    const int page = (int)(pos[row] / EI_PAGE);
    float* values = memory + warp * k_dim;
    const Angles turn = {angles + (size_t)row * n_pairs, n_pairs, NEOX != 0};
    if (head < n_heads) {
        const size_t at = (size_t)row * q_stride + head * k_dim;
        load_head(values, q + at, q_norm, eps, k_dim);
        const bool is_pinned = pinned_out && n_gone(table, page) > 0;
        const Angles pinned = {pinned_angles + (size_t)row * n_pairs, n_pairs, NEOX != 0};
        make_query(
            values, turn, pinned, k_dim, out + at, is_pinned ? pinned_out + at : nullptr);
        return;
    }
    head -= n_heads;
    const int lane = threadIdx.x % 32;
    const int position = (int)(pos[row] % EI_PAGE);
    const size_t page_head = (size_t)arena_page(table, page) * n_kv_heads + head;
    const Kept keys = {k_type, transforms_k != 0, k_dim};
    load_head(values, k + (size_t)row * k_stride + head * k_dim, k_norm, eps, k_dim);
    turn_head(values, turn, k_dim, [&](int i, float value) { values[i] = value; });
    __syncwarp();
    store_head(place_key(k_cache + page_head * keys.bytes(), keys, position), keys, values, lane, 32);
    const Kept kept = {v_type, transforms_v != 0, v_dim};
    v += (size_t)row * v_stride + head * v_dim;
    store_head(place_value(v_cache + page_head * kept.bytes(), kept, position), kept, v, lane, 32);
}
