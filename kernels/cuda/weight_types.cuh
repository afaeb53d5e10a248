// What a weight is, for every type of edgeinfer/quant.py: in blocks, scale * (code - ZERO) + low of
// what the planes of tiles.cuh hold, or a float.
#pragma once
#include "dev.cuh"

constexpr int BLOCK = 32;  // columns that have a scale of their own

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

// -- of blocks: code e of block i in the file's block, then scale and low of block i --------------

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

// -- of floats ----------------------------------------------------------------------------------

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
