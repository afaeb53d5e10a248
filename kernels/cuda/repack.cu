// Rows of a matrix as they are in a file to tiles: see tiles.cuh.
#include "tiles.cuh"

// Variants: TYPE = Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4 F32 F16
//   BF16
//
// Warp i of a block of threads takes block i of a chunk, or unit i of 8, in 32 rows. Of a row that
// is not there it makes zeros.

template <int N>
EI_DEV void store_words(const unsigned (&words)[N], uint8_t* plane, size_t unit, int row) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        ((unsigned*)plane)[word_at<N>(unit, row, i)] = words[i];
    }
}

// `SIZE` bytes of a row's chunk, of which the file has those of block i, or all, at AT.
template <class T, int SIZE, int AT>
EI_DEV void store_head(uint8_t* to, const uint8_t* file, bool is_there, int i) {
    const int n = T::FILE_BLOCKS == 1 ? SIZE / CHUNK : i == 0 ? SIZE : 0;
    const int first = T::FILE_BLOCKS == 1 ? i * n : 0;
    for (int b = 0; b < n; ++b) {
        to[first + b] = is_there && AT + b < T::FILE_BYTES ? file[AT + b] : 0;
    }
}

template <class T>
EI_DEV void repack_block(
    const uint8_t* raw, uint8_t* w, const Layout<T>& at, int tile, bool is_row) {
    const int row = threadIdx.x & 31;
    const int i = threadIdx.x / 32;
    const int block = CHUNK * blockIdx.y + i;
    const bool is_there = is_row && block < at.n_blocks;
    const uint8_t* file = raw + (size_t)(block / T::FILE_BLOCKS) * T::FILE_BYTES;
    Codes<T> codes = {};
    if (is_there) {
#pragma unroll
        for (int e = 0; e < BLOCK; ++e) {
            put_code(codes, e, T::code(file, block % T::FILE_BLOCKS, e));
        }
    }
    if (block < at.n_blocks) {
        const size_t unit = (size_t)tile * at.n_blocks + block;
        store_words(codes.low, w, unit, row);
        if constexpr (T::HIGH_BITS > 0) {
            store_words(codes.high, w + at.high, unit, row);
        }
    }
    const size_t chunk = ((size_t)tile * at.n_chunks + blockIdx.y) * TILE + row;
    uint8_t* scales = w + at.scales + chunk * T::SCALE_BYTES;
    uint8_t* rest = w + at.rest + chunk * T::REST_BYTES;
    store_head<T, T::SCALE_BYTES, T::AT_SCALES>(scales, file, is_there, i);
    store_head<T, T::REST_BYTES, T::AT_REST>(rest, file, is_there, i);
}

// `raw` is the row of the lane in eight rows.
template <class T>
EI_DEV void repack_unit(const uint8_t* raw, uint8_t* w, int k, int eight, bool is_row) {
    const int n_units = (k + UNIT<T> - 1) / UNIT<T>;
    const int unit = CHUNK * blockIdx.y + threadIdx.x / 32;
    const int lane = threadIdx.x & 31;
    if (unit >= n_units) {
        return;
    }
    uint8_t* to = w + (((size_t)eight * n_units + unit) * 32 + lane) * 16;
    for (int i = 0; i < UNIT<T> / 4; ++i) {
        const int column = UNIT<T> * unit + 4 * i + (lane & 3);
        for (int b = 0; b < T::BYTES; ++b) {
            const bool is_there = is_row && column < k;
            to[T::BYTES * i + b] = is_there ? raw[(size_t)column * T::BYTES + b] : 0;
        }
    }
}

template <class T>
EI_DEV void repack_tile(
    const uint8_t* raw, uint8_t* w, int n, int k, int tile, int first, int n_there) {
    const int lane = threadIdx.x & 31;
    if constexpr (IS_FLOAT<T>) {
        for (int i = 0; i < 4; ++i) {
            const int row = first + 8 * i + lane / 4;
            const uint8_t* file = raw + (size_t)row * k * T::BYTES;
            repack_unit<T>(file, w, k, 4 * tile + i, row < n_there);
        }
    } else {
        const int row = first + lane;
        const size_t n_bytes = (size_t)(k / BLOCK / T::FILE_BLOCKS) * T::FILE_BYTES;
        repack_block(raw + row * n_bytes, w, layout_of<T>(n, k), tile, row < n_there);
    }
}

// Grid: (tiles; k / 256 or, for floats, units / 8, rounded up). `raw` holds rows first .. first +
// n_there - 1 of n, `first` a multiple of 32; tiles that they do not fill get rows of zeros.
EI_KERNEL(256) repack(const Step* step, const uint8_t* raw, uint8_t* w, int n, int k, int first,
                      int n_there) {
    const int tile = first / TILE + blockIdx.x;
    repack_tile<TYPE>(raw, w, n, k, tile, TILE * blockIdx.x, n_there);
}
