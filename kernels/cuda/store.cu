// Stores K and V of every row, rounded to halves, in the row's page.
#include "pages.cuh"

// Grid: (kv heads, rows), 32 threads or more; a thread takes 8 values of a head.
// k: float (row, kv heads * k_dim), v: (row, kv heads * v_dim). The caches: as attend.cu has them.
// v_dim 0: K serves as V, v and v_cache are not touched.
EI_KERNEL(128) store(
    const Step* step, const float* k, int k_stride, const float* v, int v_stride,
    const int64_t* pos, const int* seq, const int4* tables, const int* pages, uint16_t* k_cache,
    uint16_t* v_cache, int k_dim, int v_dim) {
    const int head = blockIdx.x;
    const int row = blockIdx.y;
    if (row >= ei_rows(step, 0) || ei_aborted(step)) {
        return;
    }
    const Table table = table_of(tables, pages, seq, row);
    const int page = arena_page(table, (int)(pos[row] / EI_PAGE));
    const int place = (int)(pos[row] % EI_PAGE);
    const size_t page_head = (size_t)page * gridDim.x + head;
    const int k_chunks = (k_dim + 7) / 8;
    const int v_chunks = (v_dim + 7) / 8;
    k += (size_t)row * k_stride + head * k_dim;
    v += (size_t)row * v_stride + head * v_dim;
    uint4* k_page = (uint4*)k_cache + page_head * k_chunks * EI_PAGE;
    uint4* v_page = (uint4*)v_cache + page_head * v_chunks * EI_PAGE;
    for (int chunk = threadIdx.x; chunk < k_chunks; chunk += blockDim.x) {
        k_page[chunk * EI_PAGE + place] = pack_halves(k + 8 * chunk, k_dim - 8 * chunk);
    }
    for (int chunk = threadIdx.x; chunk < v_chunks; chunk += blockDim.x) {
        v_page[place * v_chunks + chunk] = pack_halves(v + 8 * chunk, v_dim - 8 * chunk);
    }
}
