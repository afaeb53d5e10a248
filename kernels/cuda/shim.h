// CUDA C for g++: what the text of a kernel asks of the language, on a CPU.
// It includes no header of C: so kernels compile in a tenth of a second.
#pragma once
#include "shim_run.h"
#define EI_CPU 1

static ei::Run* ei_run;
static ei::Entry ei_kernel;

// -- the language --

#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) alignas(n)

#define threadIdx (ei_run->thread->index)
#define blockIdx (ei_run->block)
#define blockDim (ei_run->block_dim)
#define gridDim (ei_run->grid_dim)
#define warpSize 32

#define EI_KERNEL(THREADS, ...) static constexpr unsigned ei_most_threads = THREADS; static void
#define EI_DEV static inline

typedef __INT8_TYPE__ int8_t;
typedef __UINT8_TYPE__ uint8_t;
typedef __INT16_TYPE__ int16_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __INT32_TYPE__ int32_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __INT64_TYPE__ int64_t;
typedef __UINT64_TYPE__ uint64_t;
typedef __SIZE_TYPE__ size_t;

#define EI_VECTORS(T, NAME)                                                              \
    struct alignas(2 * sizeof(T)) NAME##2 { T x, y; };                                   \
    struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) NAME##4 { T x, y, z, w; };   \
    EI_DEV NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                           \
    EI_DEV NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EI_VECTORS(signed char, char)
EI_VECTORS(unsigned char, uchar)
EI_VECTORS(short, short)
EI_VECTORS(unsigned short, ushort)
EI_VECTORS(int, int)
EI_VECTORS(unsigned, uint)
EI_VECTORS(long long, longlong)
EI_VECTORS(unsigned long long, ulonglong)
EI_VECTORS(float, float)
EI_VECTORS(double, double)

// -- shared memory --

// One array serves all blocks, for they run one after another; each finds it full of 0xFF bytes.
template <class T>
struct EiSharedArray {
    alignas(128) T value;
    ei::Shared entry;

    EiSharedArray() {
        __builtin_memset(&value, 0xFF, sizeof value);
        entry = {&value, sizeof value, ei_kernel.shared};
        ei_kernel.shared = &entry;
    }
};

#define EI_SHARED(T, name, ...)                       \
    static EiSharedArray<T __VA_ARGS__> name##_array; \
    T(&name) __VA_ARGS__ = name##_array.value
#define EI_DYN_SHARED(T, name) T* name = (T*)ei_run->dynamic_shared

// -- barriers and warps --

#define EI_TEXT_OF(x) #x
#define EI_TEXT(x) EI_TEXT_OF(x)
#define EI_HERE __FILE__ ":" EI_TEXT(__LINE__)

#define __syncthreads() ei_run->wait_for_block(EI_HERE)
#define __syncwarp(...) ei_run->wait_for_warp(EI_HERE)
#define __threadfence()
#define __threadfence_block()

// A word of memory as the first thread of a block finds it, for all threads of the block.
EI_DEV int ei_cpu_block_value(const volatile int* word, const char* where) {
    static unsigned long long asked_at;
    static int value;
    if (asked_at != ei_run->n_barriers) {
        asked_at = ei_run->n_barriers;
        value = *word;
    }
    const int found = value;
    ei_run->wait_for_block(where);
    return found;
}

// Shows bytes of this lane to its warp; returns what all lanes show, rows of 8 words.
EI_DEV unsigned (*ei_exchange(const void* data, size_t n_bytes, const char* where))[8] {
    ei::Thread* me = ei_run->thread;
    ei::Exchange* exchange = &me->warp->exchanges[me->n_exchanges++ % 2];
    __builtin_memcpy(exchange->words[me->lane], data, n_bytes);
    ei_run->wait_for_warp(where);
    return exchange->words;
}

EI_DEV void ei_check_mask(unsigned mask, const char* where) {
    if (mask != 0xffffffffu) {
        ei_run->fail("a mask of some lanes of a warp: the shim knows 0xffffffff only", where);
    }
}

template <class T>
EI_DEV T ei_shuffle(unsigned mask, T value, int from, const char* where) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move words of 4 or 8 bytes");
    ei_check_mask(mask, where);
    T got;
    __builtin_memcpy(&got, ei_exchange(&value, sizeof value, where)[from], sizeof got);
    return got;
}

// The first and last lane of this lane's part of `width` lanes.
EI_DEV int ei_first_lane(int width) { return ei_run->thread->lane & ~(width - 1); }
EI_DEV int ei_last_lane(int width) { return ei_run->thread->lane | (width - 1); }
EI_DEV int ei_lane_at(int lane, int width) { return ei_first_lane(width) | (lane & (width - 1)); }
EI_DEV int ei_lane_above(int delta, int width) {
    const int lane = ei_run->thread->lane;
    return lane + delta <= ei_last_lane(width) ? lane + delta : lane;
}
EI_DEV int ei_lane_below(int delta, int width) {
    const int lane = ei_run->thread->lane;
    return lane - delta >= ei_first_lane(width) ? lane - delta : lane;
}
EI_DEV int ei_lane_across(int flipped, int width) {
    const int lane = ei_run->thread->lane;
    return (lane ^ flipped) <= ei_last_lane(width) ? lane ^ flipped : lane;
}

#define EI_WIDTH(first, ...) first
#define EI_SHUFFLE(mask, value, lane, which, ...) \
    ei_shuffle(mask, value, which(lane, EI_WIDTH(__VA_ARGS__)), EI_HERE)
#define __shfl_sync(mask, value, lane, ...) \
    EI_SHUFFLE(mask, value, lane, ei_lane_at, ##__VA_ARGS__, 32)
#define __shfl_up_sync(mask, value, delta, ...) \
    EI_SHUFFLE(mask, value, delta, ei_lane_below, ##__VA_ARGS__, 32)
#define __shfl_down_sync(mask, value, delta, ...) \
    EI_SHUFFLE(mask, value, delta, ei_lane_above, ##__VA_ARGS__, 32)
#define __shfl_xor_sync(mask, value, flipped, ...) \
    EI_SHUFFLE(mask, value, flipped, ei_lane_across, ##__VA_ARGS__, 32)

EI_DEV unsigned ei_ballot(unsigned mask, bool vote, const char* where) {
    ei_check_mask(mask, where);
    const unsigned word = vote;
    unsigned(*shown)[8] = ei_exchange(&word, sizeof word, where);
    unsigned votes = 0;
    for (int lane = 0; lane < ei::N_LANES; ++lane) {
        votes |= shown[lane][0] << lane;
    }
    return votes;
}

#define __ballot_sync(mask, vote) ei_ballot(mask, (vote) != 0, EI_HERE)
#define __any_sync(mask, vote) (ei_ballot(mask, (vote) != 0, EI_HERE) != 0)
#define __all_sync(mask, vote) (ei_ballot(mask, (vote) != 0, EI_HERE) == 0xffffffffu)

// -- bits and integers --

template <class To, class From>
EI_DEV To ei_same_bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "of one size");
    To bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

EI_DEV float __int_as_float(int x) { return ei_same_bits<float>(x); }
EI_DEV float __uint_as_float(unsigned x) { return ei_same_bits<float>(x); }
EI_DEV int __float_as_int(float x) { return ei_same_bits<int>(x); }
EI_DEV unsigned __float_as_uint(float x) { return ei_same_bits<unsigned>(x); }
EI_DEV double __longlong_as_double(long long x) { return ei_same_bits<double>(x); }
EI_DEV long long __double_as_longlong(double x) { return ei_same_bits<long long>(x); }

EI_DEV int __popc(unsigned x) { return __builtin_popcount(x); }
EI_DEV int __ffs(int x) { return __builtin_ffs(x); }
EI_DEV int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }

template <class T>
EI_DEV T min(T a, T b) { return b < a ? b : a; }
template <class T>
EI_DEV T max(T a, T b) { return a < b ? b : a; }
EI_DEV int abs(int x) { return x < 0 ? -x : x; }

// Sums wrap around, as they do on a GPU.
EI_DEV int __dp4a(int a, int b, int sum) {
    unsigned total = sum;
    for (int i = 0; i < 4; ++i) {
        total += int8_t(unsigned(a) >> (8 * i)) * int8_t(unsigned(b) >> (8 * i));
    }
    return total;
}
EI_DEV int __dp2a_lo(int a, int b, int sum) {
    const unsigned first = int16_t(a) * int8_t(b), second = (a >> 16) * int8_t(unsigned(b) >> 8);
    return unsigned(sum) + first + second;
}
EI_DEV unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
    for (int i = 0; i < 4; ++i) {
        sum += (a >> (8 * i) & 255) * (b >> (8 * i) & 255);
    }
    return sum;
}

// Byte i of the result is the byte of b:a that digit i of the selector names, by its low 3 bits.
EI_DEV unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = a | uint64_t(b) << 32;
    unsigned chosen = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned at = selector >> (4 * i) & 7;
        chosen |= unsigned(bytes >> (8 * at) & 255) << (8 * i);
    }
    return chosen;
}

// -- floats --

EI_DEV bool isnan(float x) { return x != x; }
EI_DEV bool isnan(double x) { return x != x; }
EI_DEV bool isinf(float x) { return __builtin_isinf(x); }
EI_DEV bool isinf(double x) { return __builtin_isinf(x); }

// Of a number and no number the number, and -0 below +0, as PTX has it.
EI_DEV float fmaxf(float a, float b) {
    if (a == b) {
        return __int_as_float(__float_as_int(a) & __float_as_int(b));
    }
    return a > b || isnan(b) ? a : b;
}
EI_DEV float fminf(float a, float b) {
    if (a == b) {
        return __int_as_float(__float_as_int(a) | __float_as_int(b));
    }
    return a < b || isnan(b) ? a : b;
}
EI_DEV float fabsf(float x) { return __builtin_fabsf(x); }
EI_DEV double fabs(double x) { return __builtin_fabs(x); }
EI_DEV float rintf(float x) { return __builtin_rintf(x); }
EI_DEV double rint(double x) { return __builtin_rint(x); }
EI_DEV float floorf(float x) { return __builtin_floorf(x); }
EI_DEV float ceilf(float x) { return __builtin_ceilf(x); }
EI_DEV double floor(double x) { return __builtin_floor(x); }
EI_DEV double ceil(double x) { return __builtin_ceil(x); }
EI_DEV float copysignf(float x, float sign) { return __builtin_copysignf(x, sign); }

EI_DEV float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
EI_DEV double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
EI_DEV float __fdiv_rn(float a, float b) { return a / b; }
EI_DEV double __ddiv_rn(double a, double b) { return a / b; }
EI_DEV float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
EI_DEV double __dsqrt_rn(double x) { return __builtin_sqrt(x); }
EI_DEV float __int2float_rn(int x) { return x; }
EI_DEV double __int2double_rn(int x) { return x; }

// Conversions to integers saturate, and make 0 of what is no number; a cast of C may do anything.
EI_DEV int __double2int_rz(double x) {
    if (isnan(x)) {
        return 0;
    }
    return x <= -2147483648.0 ? -2147483647 - 1 : x >= 2147483647.0 ? 2147483647 : int(x);
}
EI_DEV int __double2int_rn(double x) { return __double2int_rz(rint(x)); }
EI_DEV int __float2int_rz(float x) { return __double2int_rz(x); }
EI_DEV int __float2int_rn(float x) { return __double2int_rz(rintf(x)); }

EI_DEV float ei_cpu_from_half(uint16_t half) {
    const unsigned sign = unsigned(half & 0x8000) << 16, exponent = half >> 10 & 31;
    const unsigned fraction = half & 1023;
    if (exponent == 31) {
        return __uint_as_float(fraction ? 0x7fffffff : sign | 0x7f800000);
    }
    if (exponent == 0) {  // subnormal: a multiple of 2^-24
        return __uint_as_float(sign | __float_as_uint(float(fraction) * 0x1p-24f));
    }
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

EI_DEV uint16_t ei_cpu_to_half(float x) {
    const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000;
    unsigned size = bits & 0x7fffffff;
    if (size > 0x7f800000) {
        return 0x7fff;
    }
    if (size >= 0x477ff000) {  // 65520, half-way to what a half no longer holds
        return sign | 0x7c00;
    }
    if (size < 0x38800000) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
        return sign | (__float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000);
    }
    size += 0xfff + (size >> 13 & 1);  // to nearest, ties to even
    return sign | (size - 0x38000000) >> 13;
}

// -- tensor cores --

// mma.sync.m16n8k32.s8: sum += A B, of a warp. In the fragments of PTX, lane 4g + t has, four codes
// a word: a[i], row g + 8 (i % 2) of A, from column 4t + 16 (i / 2) on; b[i], column g of B, from
// row 4t + 16 i on; sum[i], row g + 8 (i / 2), column 2t + i % 2.
EI_DEV void ei_cpu_mma(int (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                       const char* where) {
    const unsigned words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    unsigned(*shown)[8] = ei_exchange(words, sizeof words, where);
    const int g = ei_run->thread->lane / 4, t = ei_run->thread->lane % 4;
    for (int i = 0; i < 4; ++i) {
        const int low_row = i / 2, column = 2 * t + i % 2;
        for (int word = 0; word < 8; ++word) {
            const int half = word / 4;
            const unsigned left = shown[4 * g + word % 4][low_row + 2 * half];
            const unsigned right = shown[4 * column + word % 4][4 + half];
            sum[i] = __dp4a(int(left), int(right), sum[i]);
        }
    }
}

// mma.sync.m16n8k16.f16: the same of halves, two a word, the first in the low bits: a[i], row
// g + 8 (i % 2) of A, from column 2t + 8 (i / 2) on; b[i], column g of B, from row 2t + 8 i on.
// Products are exact; here they are added one after the other, each sum rounded to a float.
EI_DEV void ei_cpu_mma_halves(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                              const char* where) {
    const unsigned words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    unsigned(*shown)[8] = ei_exchange(words, sizeof words, where);
    const int g = ei_run->thread->lane / 4, t = ei_run->thread->lane % 4;
    float left[2][16], right[2][16];
    for (int k = 0; k < 16; ++k) {
        const int lane = k % 8 / 2, shift = 16 * (k % 2);
        for (int i = 0; i < 2; ++i) {
            const unsigned of_a = shown[4 * g + lane][i + k / 8 * 2] >> shift;
            const unsigned of_b = shown[4 * (2 * t + i) + lane][4 + k / 8] >> shift;
            left[i][k] = ei_cpu_from_half(uint16_t(of_a));
            right[i][k] = ei_cpu_from_half(uint16_t(of_b));
        }
    }
    for (int i = 0; i < 4; ++i) {
        for (int k = 0; k < 16; ++k) {
            sum[i] = __fmaf_rn(left[i / 2][k], right[i % 2][k], sum[i]);
        }
    }
}

// -- memory --

template <class T>
EI_DEV T __ldg(const T* p) { return *p; }
template <class T>
EI_DEV T __ldcs(const T* p) { return *p; }

// Threads take turns only where they wait, so nothing comes between these.
template <class T>
EI_DEV T ei_replace(T* p, T value) {
    const T old = *p;
    *p = value;
    return old;
}
template <class T>
EI_DEV T atomicAdd(T* p, T value) { return ei_replace(p, T(*p + value)); }
template <class T>
EI_DEV T atomicMax(T* p, T value) { return ei_replace(p, max(*p, value)); }
template <class T>
EI_DEV T atomicMin(T* p, T value) { return ei_replace(p, min(*p, value)); }
template <class T>
EI_DEV T atomicOr(T* p, T value) { return ei_replace(p, T(*p | value)); }
template <class T>
EI_DEV T atomicExch(T* p, T value) { return ei_replace(p, value); }
template <class T>
EI_DEV T atomicCAS(T* p, T expected, T value) {
    return ei_replace(p, *p == expected ? value : *p);
}

// -- how a kernel is called: shim.py writes the call --

template <class T>
EI_DEV T ei_argument(const void* slots, int i) {
    T value;
    __builtin_memcpy(&value, (const char*)slots + 8 * i, sizeof value);
    return value;
}

#define EI_ENTRY(...)                                                                       \
    static void ei_call(const void* slots) { __VA_ARGS__; }                                 \
    extern "C" __attribute__((visibility("default"))) ei::Entry* ei_entry(ei::Run* run) {   \
        ei_run = run;                                                                       \
        ei_kernel.call = ei_call;                                                           \
        ei_kernel.most_threads = ei_most_threads;                                           \
        return &ei_kernel;                                                                  \
    }
