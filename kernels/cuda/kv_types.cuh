// Types of K and V in pages: halves, or blocks of 32 values of a head, each with a scale.
// kernels/reference/caches.py is their arithmetic. Knows no attention.
//
// What a page has of a head is units of 16 bytes, then, of blocks, their scales as halves. Of K:
// [unit][32 positions] and [block][32 positions], of V: [32 positions][unit] and [32 positions]
// [block]. Heads are filled up to whole units of halves, or whole blocks, with zeros.
#pragma once
#include "pages.cuh"

// Each type says what a chunk of 8 values is, and the product of a block with one of int8: its
// codes as `place_of` puts them, and their sum.
struct f16 {
    static constexpr bool IS_BLOCKS = false;
    typedef uint4 Chunk;

    EI_DEV void unpack(uint4 chunk, float (&x)[8]) {
        const unsigned words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[2 * i] = ei_from_half((uint16_t)(words[i] & 0xffffu));
            x[2 * i + 1] = ei_from_half((uint16_t)(words[i] >> 16));
        }
    }
};

struct q8_0 {
    static constexpr bool IS_BLOCKS = true;
    static constexpr int UNITS = 2;  // of a block
    typedef uint2 Chunk;

    EI_DEV void unpack(uint2 chunk, float (&x)[8]) {
        const unsigned words[2] = {chunk.x ^ 0x80808080u, chunk.y ^ 0x80808080u};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            x[i] = ei_byte_to_float(words[i / 4], i % 4) - 128.0f;
        }
    }

    EI_DEV int place_of(int i) { return i; }

    EI_DEV int dot(const uint4 (&units)[UNITS], const uint4* q, int sum) {
        int total = 0;
#pragma unroll
        for (int i = 0; i < UNITS; ++i) {
            const uint4 codes = q[i];
            total = __dp4a((int)units[i].x, (int)codes.x, total);
            total = __dp4a((int)units[i].y, (int)codes.y, total);
            total = __dp4a((int)units[i].z, (int)codes.z, total);
            total = __dp4a((int)units[i].w, (int)codes.w, total);
        }
        return total;
    }
};

// Codes plus 8, that of value i of a chunk in its bits 4i to 4i + 3.
struct q4_0 {
    static constexpr bool IS_BLOCKS = true;
    static constexpr int UNITS = 1;
    typedef unsigned Chunk;

    EI_DEV void unpack(unsigned chunk, float (&x)[8]) {
        const unsigned words[2] = {chunk & 0x0f0f0f0fu, chunk >> 4 & 0x0f0f0f0fu};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            x[i] = ei_byte_to_float(words[i % 2], i / 2) - 8.0f;
        }
    }

    // Of a chunk the even values, then the odd ones.
    EI_DEV int place_of(int i) { return i / 8 * 8 + i % 2 * 4 + i % 8 / 2; }

    EI_DEV int dot_chunk(unsigned chunk, unsigned even, unsigned odd, int total) {
        total = __dp4a((int)(chunk & 0x0f0f0f0fu), (int)even, total);
        return __dp4a((int)(chunk >> 4 & 0x0f0f0f0fu), (int)odd, total);
    }

    EI_DEV int dot(const uint4 (&units)[UNITS], const uint4* q, int sum) {
        const uint4 first = q[0];
        const uint4 second = q[1];
        int total = -8 * sum;
        total = dot_chunk(units[0].x, first.x, first.y, total);
        total = dot_chunk(units[0].y, first.z, first.w, total);
        total = dot_chunk(units[0].z, second.x, second.y, total);
        return dot_chunk(units[0].w, second.z, second.w, total);
    }
};

// Sizes of what a page has of a head.
template <class T, int DIM>
struct PageOf {
    static constexpr int CHUNK_BYTES = sizeof(typename T::Chunk);
    static constexpr int BLOCKS = (DIM + 31) / 32;
    static constexpr int CHUNKS = T::IS_BLOCKS ? 4 * BLOCKS : (DIM + 7) / 8;
    static constexpr int CODE_BYTES = EI_PAGE * CHUNKS * CHUNK_BYTES;
    static constexpr int BYTES = CODE_BYTES + (T::IS_BLOCKS ? 2 * EI_PAGE * BLOCKS : 0);
};

// A head's values in a page, and how far what follows each other lies apart.
template <class T>
struct PageView {
    const uint8_t* codes;
    const uint16_t* scales;
    int unit_bytes;
    int position_bytes;
    int block_scales;
    int position_scales;

    __device__ __forceinline__ const typename T::Chunk* chunk(int chunk, int position) const {
        constexpr int N = 16 / sizeof(typename T::Chunk);  // of a unit
        const uint8_t* unit = codes + chunk / N * unit_bytes + position * position_bytes;
        return (const typename T::Chunk*)unit + chunk % N;
    }

    __device__ __forceinline__ uint16_t scale(int chunk, int position) const {
        return scales[chunk / 4 * block_scales + position * position_scales];
    }
};

template <class T, int DIM>
EI_DEV PageView<T> view_keys(const uint8_t* page) {
    const uint16_t* scales = (const uint16_t*)(page + PageOf<T, DIM>::CODE_BYTES);
    return {page, scales, 16 * EI_PAGE, 16, EI_PAGE, 1};
}

template <class T, int DIM>
EI_DEV PageView<T> view_values(const uint8_t* page) {
    typedef PageOf<T, DIM> P;
    const uint16_t* scales = (const uint16_t*)(page + P::CODE_BYTES);
    return {page, scales, 16, P::CHUNKS * P::CHUNK_BYTES, 1, P::BLOCKS};
}

// A warp has values `lane` and `lane` + 32 of 64: they times the Hadamard matrix, divided by 8.
EI_DEV void hadamard64(float& x0, float& x1) {
    for (int step = 1; step < 32; step *= 2) {
        const float other0 = __shfl_xor_sync(EI_ALL_LANES, x0, step);
        const float other1 = __shfl_xor_sync(EI_ALL_LANES, x1, step);
        const bool is_second = threadIdx.x & step;
        x0 = is_second ? other0 - x0 : x0 + other0;
        x1 = is_second ? other1 - x1 : x1 + other1;
    }
    const float sum = x0 + x1;
    x1 = (x0 - x1) * 0.125f;
    x0 = sum * 0.125f;
}

// -- storing, of types that are known as a kernel runs --

enum KvType { KV_F16, KV_Q8_0, KV_Q4_0 };  // layout.py has the same numbers

// How a cache keeps the heads of K or of V.
struct Kept {
    int type;
    bool transforms;
    int dim;

    __device__ __forceinline__ int n_blocks() const { return (dim + 31) / 32; }

    // Of a head in a page.
    __device__ __forceinline__ int code_bytes() const {
        const int block_bytes = type == KV_Q8_0 ? 32 : 16;
        return EI_PAGE * (type == KV_F16 ? (dim + 7) / 8 * 16 : n_blocks() * block_bytes);
    }

    __device__ __forceinline__ size_t bytes() const {
        return code_bytes() + (type == KV_F16 ? 0 : 2 * EI_PAGE * n_blocks());
    }
};

// Where a head of one position lies in a page: its first unit and scale, and from there to the next.
struct Place {
    uint8_t* codes;
    uint16_t* scales;
    int unit_bytes;
    int block_scales;
};

EI_DEV Place place_key(uint8_t* page, const Kept& kept, int position) {
    uint16_t* scales = (uint16_t*)(page + kept.code_bytes());
    return {page + 16 * position, scales + position, 16 * EI_PAGE, EI_PAGE};
}

EI_DEV Place place_value(uint8_t* page, const Kept& kept, int position) {
    uint16_t* scales = (uint16_t*)(page + kept.code_bytes());
    const int position_bytes = kept.code_bytes() / EI_PAGE;
    return {page + position_bytes * position, scales + kept.n_blocks() * position, 16, 1};
}

// The scale of a block, of which each lane has a value.
EI_DEV float block_scale(int type, float x) {
    const float high = ei_max32(x);
    const float low = -ei_max32(-x);
    const float largest = high > -low ? high : low;
    if (__any_sync(EI_ALL_LANES, x != x)) {
        return __int_as_float(0x7fffffff);
    }
    return type == KV_Q8_0 ? ei_div(fmaxf(high, -low), 127.0f) : largest * -0.125f;
}

// A warp stores a block, of which each lane has a value.
EI_DEV void store_block(const Place& place, int type, int block, float x) {
    const int lane = threadIdx.x % 32;
    const uint16_t scale = ei_to_half(block_scale(type, x));
    const float d = ei_from_half(scale);
    const float least = type == KV_Q8_0 ? -127.0f : -8.0f;
    const float most = type == KV_Q8_0 ? 127.0f : 7.0f;
    float code = ei_rint(x * (d != 0.0f ? ei_div(1.0f, d) : 0.0f));
    code = code < least ? least : code;  // what is no number becomes 0
    const int q = __float2int_rn(code > most ? most : code);
    if (type == KV_Q8_0) {
        place.codes[(2 * block + lane / 16) * place.unit_bytes + lane % 16] = (uint8_t)q;
    } else {
        const int next = __shfl_xor_sync(EI_ALL_LANES, q, 1);
        if (lane % 2 == 0) {
            const int byte = (q + 8) | (next + 8) << 4;
            place.codes[block * place.unit_bytes + lane / 2] = (uint8_t)byte;
        }
    }
    if (lane == 0) {
        place.scales[block * place.block_scales] = scale;
    }
}

// Warps store a head: of blocks each 64 values at a time, of halves a thread 8.
EI_DEV void store_head(
    const Place& place, const Kept& kept, const float* head, int thread, int n_threads) {
    if (kept.type == KV_F16) {
        for (int chunk = thread; 8 * chunk < kept.dim; chunk += n_threads) {
            *(uint4*)(place.codes + chunk * place.unit_bytes) =
                pack_halves(head + 8 * chunk, kept.dim - 8 * chunk);
        }
        return;
    }
    for (int first = thread / 32 * 64; first < kept.dim; first += 2 * n_threads) {
        const int i = first + thread % 32;
        float x0 = i < kept.dim ? head[i] : 0.0f;
        float x1 = i + 32 < kept.dim ? head[i + 32] : 0.0f;
        if (kept.transforms) {
            hadamard64(x0, x1);
        }
        store_block(place, kept.type, first / 32, x0);
        if (first + 32 < kept.dim) {
            store_block(place, kept.type, first / 32 + 1, x1);
        }
    }
}
