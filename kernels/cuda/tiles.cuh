// How weights lie in memory: tiles of 32 rows, one lane of a warp per row. tiles.py says the same
// of sizes and offsets, weight_types.cuh what a code and its scale are.
//
// 32 columns of a row are a block, 256 a chunk; the last chunk may have fewer blocks. A matrix has
// up to four planes, a row's bytes innermost:
//   codes   [tile][block][row]   the low 2, 4 or 8 bits of 32 codes
//   high    [tile][block][row]   their upper 1 or 2 bits
//   scales  [tile][chunk][row]   scales as in the file, 8 or 16 bytes
//   rest    [tile][chunk][row]   m of each block, or d (and dmin) where 16 bytes are full
// 8-bit codes lie as [tile][block][columns 0..15 or 16..31][row]: loads are of 16 bytes.
// Code 4 * j + b of a block is in byte b of word j % BITS, from bit j / BITS * BITS on: 4-bit codes
// lie as Q4_0 has them, and what a lane of an int8 mma wants of a row is a word or two. Where codes
// are places of a table, it is 4 bits of word j % 4 from bit 4 * b + j / 4 * 16 on.
//
// Matrices of floats: 8 rows x 4 columns of k % 4 are the lanes, 16 bytes of a lane their values
// at every fourth column: [row / 8][k / 32 or 16][row % 8][k % 4], 8 halves or 4 floats.
#pragma once
#include "weight_types.cuh"

constexpr int TILE = 32;  // rows
constexpr int CHUNK = 8;  // blocks

// -- where things are ----------------------------------------------------------------------------

EI_DEV size_t align_256(size_t n_bytes) {
    return (n_bytes + 255) & ~(size_t)255;
}

// Floats of a row of activations, from one to the next.
EI_DEV int row_stride(int dim) {
    return (dim + 31) & ~31;
}

// Sizes of an (n, k) matrix of blocks, and bytes from its beginning to the planes behind `codes`.
template <class T>
struct Layout {
    int n_tiles, n_blocks, n_chunks;
    size_t high, scales, rest, end;
};

template <class T>
EI_DEV Layout<T> layout_of(int n, int k) {
    Layout<T> at;
    at.n_tiles = (n + TILE - 1) / TILE;
    at.n_blocks = k / BLOCK;
    at.n_chunks = (at.n_blocks + CHUNK - 1) / CHUNK;
    const size_t blocks = (size_t)at.n_tiles * at.n_blocks * TILE;
    const size_t chunks = (size_t)at.n_tiles * at.n_chunks * TILE;
    at.high = blocks * T::LOW_BITS * 4;
    at.scales = align_256(at.high + blocks * T::HIGH_BITS * 4);
    at.rest = at.scales + chunks * T::SCALE_BYTES;
    at.end = align_256(at.rest + chunks * T::REST_BYTES);
    return at;
}

// Columns of a matrix of floats of which the lanes of a warp have 16 bytes each.
template <class T>
constexpr int UNIT = 64 / T::BYTES;

// From a matrix of a stack to the next.
template <class T>
EI_DEV size_t matrix_bytes(int n, int k) {
    if constexpr (IS_FLOAT<T>) {
        return (size_t)((n + TILE - 1) / TILE * 4) * ((k + UNIT<T> - 1) / UNIT<T>) * 512;
    } else {
        return layout_of<T>(n, k).end;
    }
}

// -- blocks of a row -----------------------------------------------------------------------------

// The codes of one row's block as they lie in memory.
template <class T>
struct Codes {
    unsigned low[T::LOW_BITS];
    unsigned high[T::HIGH_BITS ? T::HIGH_BITS : 1];
};

// Word `word` of N that a row has of a unit, be it a block or a chunk: what a warp loads at once,
// up to 16 bytes a lane, is contiguous.
template <int N>
EI_DEV size_t word_at(size_t unit, int row, int word) {
    const int n = N < 4 ? N : 4;
    return ((unit * (N / n) + word / n) * TILE + row) * n + word % n;
}

template <int N>
EI_DEV void load_words(unsigned (&words)[N], const uint8_t* plane, size_t unit, int row) {
    const unsigned* from = (const unsigned*)plane;
    if constexpr (N == 1) {
        words[0] = ei_stream(from + word_at<N>(unit, row, 0));
    } else if constexpr (N == 2) {
        const uint2 v = ei_stream((const uint2*)(from + word_at<N>(unit, row, 0)));
        words[0] = v.x;
        words[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const uint4 v = ei_stream((const uint4*)(from + word_at<N>(unit, row, i)));
            words[i] = v.x;
            words[i + 1] = v.y;
            words[i + 2] = v.z;
            words[i + 3] = v.w;
        }
    }
}

// Of block `unit` of a matrix, counted tile by tile.
template <class T>
EI_DEV Codes<T> load_codes(const uint8_t* w, const Layout<T>& at, size_t unit, int row) {
    Codes<T> codes;
    load_words(codes.low, w, unit, row);
    if constexpr (T::HIGH_BITS > 0) {
        load_words(codes.high, w + at.high, unit, row);
    }
    return codes;
}

template <class T>
EI_DEV Head<T> load_head(
    const uint8_t* w, const Layout<T>& at, int tile, int chunk, int row) {
    const size_t unit = (size_t)tile * at.n_chunks + chunk;
    Head<T> head;
    load_words(head.scales, w + at.scales, unit, row);
    if constexpr (T::REST_BYTES == 2) {
        head.rest[0] = ((const uint16_t*)(w + at.rest))[unit * TILE + row];
    } else if constexpr (T::REST_BYTES > 0) {
        load_words(head.rest, w + at.rest, unit, row);
    }
    return head;
}

template <int BITS>
EI_DEV unsigned bits_of(unsigned word, int j) {
    return (word >> (j / BITS * BITS)) & (0x01010101u * ((1u << BITS) - 1));
}

// Bytes of the table at four 4-bit places.
EI_DEV unsigned look_up(uint4 table, unsigned places) {
    const unsigned place = places & 0x7777u;
    const unsigned first = __byte_perm(table.x, table.y, place);
    const unsigned second = __byte_perm(table.z, table.w, place);
    return __byte_perm(first, second, ((places & 0x8888u) >> 1) | 0x3210u);
}

// Value i of a lane's 16 bytes of a unit of floats.
template <class T>
EI_DEV float value_of(uint4 words, int i) {
    const unsigned word[4] = {words.x, words.y, words.z, words.w};
    return T::value(T::BYTES == 4 ? word[i] : (word[i >> 1] >> (16 * (i & 1))) & 0xffffu);
}

// Codes 4 * j .. 4 * j + 3 as bytes, from the words of `low` and `high` that hold them: those at
// j % LOW_BITS and j % HIGH_BITS. Of a table its values.
template <class T>
EI_DEV unsigned code_word(unsigned low, unsigned high, int j) {
    if constexpr (T::IS_TABLE) {
        return look_up(T::table(), low >> (j / 4 * 16));
    } else if constexpr (T::HIGH_BITS > 0) {
        return bits_of<T::LOW_BITS>(low, j) | bits_of<T::HIGH_BITS>(high, j) << T::LOW_BITS;
    } else {
        return bits_of<T::LOW_BITS>(low, j);
    }
}

template <class T>
EI_DEV unsigned code_word(const Codes<T>& codes, int j) {
    if constexpr (T::HIGH_BITS > 0) {
        return code_word<T>(codes.low[j % T::LOW_BITS], codes.high[j % T::HIGH_BITS], j);
    } else {
        return code_word<T>(codes.low[j % T::LOW_BITS], 0, j);
    }
}

// Puts code `e` into codes that are zero there.
template <class T>
EI_DEV void put_code(Codes<T>& codes, int e, int code) {
    const int j = e / 4;
    const int byte = 8 * (e % 4);
    if constexpr (T::IS_TABLE) {
        codes.low[j % 4] |= (unsigned)code << (j / 4 * 16 + byte / 2);
    } else {
        const unsigned low = code & ((1 << T::LOW_BITS) - 1);
        codes.low[j % T::LOW_BITS] |= low << (byte + j / T::LOW_BITS * T::LOW_BITS);
    }
    if constexpr (T::HIGH_BITS > 0) {
        const unsigned high = code >> T::LOW_BITS;
        codes.high[j % T::HIGH_BITS] |= high << (byte + j / T::HIGH_BITS * T::HIGH_BITS);
    }
}
