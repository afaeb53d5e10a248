// How weights lie in memory: tiles of 32 rows, one lane of a warp per row. tiles.py says the same
// of sizes and offsets; here is what the bytes mean, for every type of edgeinfer/quant.py.
//
// 32 columns of a row are a block, 256 a chunk; the last chunk may have fewer blocks. A weight is
// scale * (code - ZERO) + low. A matrix has up to four planes, a row's bytes innermost:
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
#include "dev.cuh"

constexpr int TILE = 32;   // rows
constexpr int BLOCK = 32;  // columns that have a scale of their own
constexpr int CHUNK = 8;   // blocks

// -- what a type is ------------------------------------------------------------------------------

// Bits of a code in `codes` and `high`; bytes of a row's chunk in `scales` and `rest`.
template <int LOW, int HIGH, int SCALES, int REST>
struct Planes {
    static constexpr int LOW_BITS = LOW;
    static constexpr int HIGH_BITS = HIGH;
    static constexpr int SCALE_BYTES = SCALES;
    static constexpr int REST_BYTES = REST;
    static constexpr int ZERO = 0;
    static constexpr bool IS_TABLE = false;   // a code is an index of IQ4_VALUES or the like
    static constexpr bool HAS_LOW = false;    // low(): added to every weight of a block
    static constexpr bool HAS_PARTS = false;  // part(): integer scales of 16 columns
    static constexpr bool HAS_MINS = false;   // min(): integers of 16 columns that multiply low()
};

// Blocks of the file: bytes of `COLUMNS` columns, and where `scales` and `rest` begin in them.
template <int COLUMNS, int BYTES, int SCALES, int REST>
struct File {
    static constexpr int FILE_BLOCKS = COLUMNS / BLOCK;
    static constexpr int FILE_BYTES = BYTES;
    static constexpr int AT_SCALES = SCALES;
    static constexpr int AT_REST = REST;
};

// The scales and rest of one row's chunk.
template <class T>
struct Head {
    unsigned scales[T::SCALE_BYTES / 4];
    unsigned rest[T::REST_BYTES < 4 ? 1 : T::REST_BYTES / 4];
};

EI_DEV float half_of(const unsigned* words, int i) {
    return ei_from_half((uint16_t)(words[i >> 1] >> (16 * (i & 1))));
}

EI_DEV int byte_of(const unsigned* words, int i) {
    return (words[i >> 2] >> (8 * (i & 3))) & 255;
}

// Code `e` of 32 whose low nibbles are codes 0..15 and whose high nibbles are codes 16..31.
EI_DEV int nibble(const uint8_t* bytes, int e) {
    return (bytes[e & 15] >> (e & 16 ? 4 : 0)) & 15;
}

// 2-bit code e of block i of 8: of each 32 bytes bits 0-1 are a block, then bits 2-3, and so on.
EI_DEV int pair_code(const uint8_t* bytes, int i, int e) {
    return (bytes[(i >> 2) * 32 + e] >> (2 * (i & 3))) & 3;
}

EI_DEV int bit_code(const uint8_t* bytes, int bit) {
    return (bytes[bit >> 3] >> (bit & 7)) & 1;
}

// Eight 6-bit scales and mins of Q4_K and Q5_K in three words, as edgeinfer/dequantize.py says.
EI_DEV float scale_6_bits(const unsigned* words, int i) {
    const unsigned first = words[0] & 0x3f3f3f3fu;
    const unsigned second = (words[2] & 0x0f0f0f0fu) | ((words[0] >> 2) & 0x30303030u);
    return ei_byte_to_float(i < 4 ? first : second, i & 3);
}

EI_DEV float min_6_bits(const unsigned* words, int i) {
    const unsigned first = words[1] & 0x3f3f3f3fu;
    const unsigned second = ((words[2] >> 4) & 0x0f0f0f0fu) | ((words[1] >> 2) & 0x30303030u);
    return ei_byte_to_float(i < 4 ? first : second, i & 3);
}

// -- the types: code e of block i in the file's block, then scale and low of block i -------------

struct Q4_0 : Planes<4, 0, 16, 0>, File<32, 18, 0, 0> {
    static constexpr int ZERO = 8;

    EI_DEV int code(const uint8_t* file, int, int e) {
        return nibble(file + 2, e);
    }
    EI_DEV float scale(const Head<Q4_0>& head, int i) {
        return half_of(head.scales, i);
    }
};

struct Q4_1 : Planes<4, 0, 16, 16>, File<32, 20, 0, 2> {
    static constexpr bool HAS_LOW = true;

    EI_DEV int code(const uint8_t* file, int, int e) {
        return nibble(file + 4, e);
    }
    EI_DEV float scale(const Head<Q4_1>& head, int i) {
        return half_of(head.scales, i);
    }
    EI_DEV float low(const Head<Q4_1>& head, int i) {
        return half_of(head.rest, i);
    }
};

struct Q5_0 : Planes<4, 1, 16, 0>, File<32, 22, 0, 0> {
    static constexpr int ZERO = 16;

    EI_DEV int code(const uint8_t* file, int, int e) {
        return nibble(file + 6, e) | bit_code(file + 2, e) << 4;
    }
    EI_DEV float scale(const Head<Q5_0>& head, int i) {
        return half_of(head.scales, i);
    }
};

struct Q5_1 : Planes<4, 1, 16, 16>, File<32, 24, 0, 2> {
    static constexpr bool HAS_LOW = true;

    EI_DEV int code(const uint8_t* file, int, int e) {
        return nibble(file + 8, e) | bit_code(file + 4, e) << 4;
    }
    EI_DEV float scale(const Head<Q5_1>& head, int i) {
        return half_of(head.scales, i);
    }
    EI_DEV float low(const Head<Q5_1>& head, int i) {
        return half_of(head.rest, i);
    }
};

struct Q8_0 : Planes<8, 0, 16, 0>, File<32, 34, 0, 0> {
    EI_DEV int code(const uint8_t* file, int, int e) {
        return file[2 + e];
    }
    EI_DEV float scale(const Head<Q8_0>& head, int i) {
        return half_of(head.scales, i);
    }
};

struct Q2_K : Planes<2, 0, 16, 4>, File<256, 84, 0, 80> {
    static constexpr bool HAS_LOW = true;
    static constexpr bool HAS_PARTS = true;
    static constexpr bool HAS_MINS = true;

    EI_DEV int code(const uint8_t* file, int i, int e) {
        return pair_code(file + 16, i, e);
    }
    EI_DEV float scale(const Head<Q2_K>& head, int) {
        return half_of(head.rest, 0);
    }
    EI_DEV float low(const Head<Q2_K>& head, int) {
        return -half_of(head.rest, 1);
    }
    EI_DEV int part(const Head<Q2_K>& head, int s) {
        return byte_of(head.scales, s) & 15;
    }
    EI_DEV int min(const Head<Q2_K>& head, int s) {
        return byte_of(head.scales, s) >> 4;
    }
};

struct Q3_K : Planes<2, 1, 16, 0>, File<256, 110, 96, 0> {
    static constexpr int ZERO = 4;
    static constexpr bool HAS_PARTS = true;

    EI_DEV int code(const uint8_t* file, int i, int e) {
        return pair_code(file + 32, i, e) | bit_code(file, 8 * e + i) << 2;
    }
    EI_DEV float scale(const Head<Q3_K>& head, int) {
        return half_of(head.scales, 6);
    }
    EI_DEV int part(const Head<Q3_K>& head, int s) {
        const int low = (byte_of(head.scales, s & 7) >> (4 * (s >> 3))) & 15;
        const int high = (byte_of(head.scales, 8 + (s & 3)) >> (2 * (s >> 2))) & 3;
        return (low | high << 4) - 32;
    }
};

struct Q4_K : Planes<4, 0, 16, 0>, File<256, 144, 0, 0> {
    static constexpr bool HAS_LOW = true;

    EI_DEV int code(const uint8_t* file, int i, int e) {
        return (file[16 + (i >> 1) * 32 + e] >> (4 * (i & 1))) & 15;
    }
    EI_DEV float scale(const Head<Q4_K>& head, int i) {
        return half_of(head.scales, 0) * scale_6_bits(head.scales + 1, i);
    }
    EI_DEV float low(const Head<Q4_K>& head, int i) {
        return -(half_of(head.scales, 1) * min_6_bits(head.scales + 1, i));
    }
};

struct Q5_K : Planes<4, 1, 16, 0>, File<256, 176, 0, 0> {
    static constexpr bool HAS_LOW = true;

    EI_DEV int code(const uint8_t* file, int i, int e) {
        const int low = (file[48 + (i >> 1) * 32 + e] >> (4 * (i & 1))) & 15;
        return low | bit_code(file + 16, 8 * e + i) << 4;
    }
    EI_DEV float scale(const Head<Q5_K>& head, int i) {
        return half_of(head.scales, 0) * scale_6_bits(head.scales + 1, i);
    }
    EI_DEV float low(const Head<Q5_K>& head, int i) {
        return -(half_of(head.scales, 1) * min_6_bits(head.scales + 1, i));
    }
};

struct Q6_K : Planes<4, 2, 16, 2>, File<256, 210, 192, 208> {
    static constexpr int ZERO = 32;
    static constexpr bool HAS_PARTS = true;

    EI_DEV int code(const uint8_t* file, int i, int e) {
        const int column = 32 * (i & 1) + e;
        const int low = (file[(i >> 2) * 64 + column] >> (i & 2 ? 4 : 0)) & 15;
        return low | pair_code(file + 128, i, e) << 4;
    }
    EI_DEV float scale(const Head<Q6_K>& head, int) {
        return half_of(head.rest, 0);
    }
    EI_DEV int part(const Head<Q6_K>& head, int s) {
        return (signed char)byte_of(head.scales, s);
    }
};

struct IQ4_NL : Planes<4, 0, 16, 0>, File<32, 18, 0, 0> {
    static constexpr bool IS_TABLE = true;

    EI_DEV int code(const uint8_t* file, int, int e) {
        return nibble(file + 2, e);
    }
    // -127 -104 -83 -65, -49 -35 -22 -10, 1 13 25 38, 53 69 89 113
    EI_DEV uint4 table() {
        return make_uint4(0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u);
    }
    EI_DEV float scale(const Head<IQ4_NL>& head, int i) {
        return half_of(head.scales, i);
    }
};

struct IQ4_XS : Planes<4, 0, 8, 0>, File<256, 136, 0, 0> {
    static constexpr bool IS_TABLE = true;

    EI_DEV int code(const uint8_t* file, int i, int e) {
        return nibble(file + 8 + 16 * i, e);
    }
    EI_DEV uint4 table() {
        return IQ4_NL::table();
    }
    EI_DEV float scale(const Head<IQ4_XS>& head, int i) {
        const int low = (head.scales[1] >> (4 * i)) & 15;
        const int high = (head.scales[0] >> (16 + 2 * i)) & 3;
        return half_of(head.scales, 0) * ei_to_float((low | high << 4) - 32);
    }
};

struct MXFP4 : Planes<4, 0, 8, 0>, File<32, 17, 0, 0> {
    static constexpr bool IS_TABLE = true;

    EI_DEV int code(const uint8_t* file, int, int e) {
        return nibble(file + 1, e);
    }
    // 0 1 2 3, 4 6 8 12, 0 -1 -2 -3, -4 -6 -8 -12
    EI_DEV uint4 table() {
        return make_uint4(0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu);
    }
    // 2^(e - 128); the second is larger where that is denormal.
    EI_DEV float scale(const Head<MXFP4>& head, int i) {
        const int e = byte_of(head.scales, i);
        const int normal = (int)((unsigned)(e - 1) << 23);
        const int denormal = (e + 1) << 21;
        return __int_as_float(normal > denormal ? normal : denormal);
    }
};

struct F32 {
    static constexpr int BYTES = 4;

    EI_DEV float value(unsigned bits) {
        return __uint_as_float(bits);
    }

    EI_DEV float load(const uint8_t* p) {
        return *(const float*)p;
    }
};

struct F16 {
    static constexpr int BYTES = 2;

    EI_DEV float value(unsigned bits) {
        return ei_from_half((uint16_t)bits);
    }

    EI_DEV float load(const uint8_t* p) {
        return ei_from_half(*(const uint16_t*)p);
    }
};

struct BF16 {
    static constexpr int BYTES = 2;

    EI_DEV float value(unsigned bits) {
        return __uint_as_float(bits << 16);
    }

    EI_DEV float load(const uint8_t* p) {
        return __uint_as_float((unsigned)*(const uint16_t*)p << 16);
    }
};

template <class T>
constexpr bool IS_FLOAT = false;
template <>
constexpr bool IS_FLOAT<F32> = true;
template <>
constexpr bool IS_FLOAT<F16> = true;
template <>
constexpr bool IS_FLOAT<BF16> = true;

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
