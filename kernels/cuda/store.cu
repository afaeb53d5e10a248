// Stores K and V of every row in the row's page.
#include "kv_types.cuh"

// Grid: (kv heads, rows), 32 threads or more.
// k: float (row, kv heads * k_dim), v: (row, kv heads * v_dim). The caches: pages of a layer, (page,
// kv head), as kv_types.cuh has them; transforms_k, transforms_v: types in blocks hold what the
// Hadamard transform makes of a head. v_dim 0: K serves as V, v and v_cache are not touched.
EI_KERNEL(128) store(
    const Step* step, const float* k, int k_stride, const float* v, int v_stride,
    const int64_t* pos, const int* seq, const int4* tables, const int* pages, uint8_t* k_cache,
    uint8_t* v_cache, int k_dim, int v_dim, int k_type, int v_type, int transforms_k,
    int transforms_v) {
    const int head = blockIdx.x;
    const int row = blockIdx.y;
    if (row >= ei_rows(step, 0) || ei_aborted(step)) {
        return;
    }
    const Table table = table_of(tables, pages, seq, row);
    const int page = arena_page(table, (int)(pos[row] / EI_PAGE));
    const int position = (int)(pos[row] % EI_PAGE);
    const size_t page_head = (size_t)page * gridDim.x + head;
    const Kept keys = {k_type, transforms_k != 0, k_dim};
    const Kept values = {v_type, transforms_v != 0, v_dim};
    const Place key = place_key(k_cache + page_head * keys.bytes(), keys, position);
    const Place value = place_value(v_cache + page_head * values.bytes(), values, position);
    k += (size_t)row * k_stride + head * k_dim;
    v += (size_t)row * v_stride + head * v_dim;
    store_head(key, keys, k, threadIdx.x, blockDim.x);
    store_head(value, values, v, threadIdx.x, blockDim.x);
}
