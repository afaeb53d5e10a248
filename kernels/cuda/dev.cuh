// What kernels share: declarations, a step's rows, and arithmetic that rounds as it is written.
// PTX stands here only, beside what the CPU does instead (shim.h, which is included before).
#pragma once

#ifndef EI_CPU
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
typedef decltype(sizeof 0) size_t;

// A kernel's declaration: its most threads a block, then, if wanted, its least blocks a processor.
#define EI_KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)
#define EI_DEV static __device__ __forceinline__
#define EI_SHARED(T, name, ...) __shared__ __align__(16) T name __VA_ARGS__
#define EI_DYN_SHARED(T, name)                               \
    extern __shared__ __align__(128) unsigned char ei_dyn[]; \
    T* name = (T*)ei_dyn
#endif

#define EI_ALL_LANES 0xffffffffu

// Written to device memory before each step.
struct Step {
    int n_rows;
    int n_wanted;     // rows whose logits or hidden state are wanted
    int n_sequences;
    int abort;        // set: what is computed is of no use any more
};

// How many rows there are of a kind: 0 all rows of the step, 1 the wanted ones.
EI_DEV int ei_rows(const Step* step, int rows) {
    return rows == 0 ? step->n_rows : step->n_wanted;
}

// Whether the step is given up: one answer for all threads of a block, all of which must ask. The
// host may write the word while kernels run, so that threads for themselves would see it or not.
EI_DEV bool ei_aborted(const Step* step) {
#ifdef EI_CPU
    return ei_cpu_block_value(&step->abort, EI_HERE) != 0;
#else
    return __syncthreads_or(*(const volatile int*)&step->abort) != 0;
#endif
}

// -- arithmetic that no compiler may reorder or contract --

EI_DEV float ei_fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
EI_DEV double ei_fma(double a, double b, double c) { return __fma_rn(a, b, c); }
EI_DEV float ei_div(float a, float b) { return __fdiv_rn(a, b); }
EI_DEV double ei_div(double a, double b) { return __ddiv_rn(a, b); }
EI_DEV float ei_sqrt(float x) { return __fsqrt_rn(x); }
EI_DEV double ei_sqrt(double x) { return __dsqrt_rn(x); }
EI_DEV float ei_rint(float x) { return rintf(x); }
EI_DEV double ei_rint(double x) { return rint(x); }
EI_DEV float ei_to_float(int x) { return __int2float_rn(x); }

EI_DEV float ei_from_half(uint16_t half) {
#ifdef EI_CPU
    return ei_cpu_from_half(half);
#else
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
    return x;
#endif
}

EI_DEV uint16_t ei_to_half(float x) {
#ifdef EI_CPU
    return ei_cpu_to_half(x);
#else
    uint16_t half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
#endif
}

// Two halves in a word, `low` in its low bits.
EI_DEV unsigned ei_to_halves(float low, float high) {
#if !defined(EI_CPU) && __CUDA_ARCH__ >= 800
    unsigned halves;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(high), "f"(low));
    return halves;
#else
    return ei_to_half(low) | (unsigned)ei_to_half(high) << 16;
#endif
}

// The float of byte i of a word: exact, one permutation and one subtraction.
EI_DEV float ei_byte_to_float(unsigned word, int i) {
    return __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440u | i)) - 8388608.0f;
}

// -- memory --

// Loads what is read once, such as weights, and does not keep it in the cache.
EI_DEV uint4 ei_stream(const uint4* p) {
#ifdef EI_CPU
    return *p;
#else
    uint4 v;
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
#endif
}

EI_DEV uint2 ei_stream(const uint2* p) {
#ifdef EI_CPU
    return *p;
#else
    uint2 v;
    asm volatile("ld.global.cs.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
#endif
}

EI_DEV unsigned ei_stream(const unsigned* p) {
#ifdef EI_CPU
    return *p;
#else
    unsigned v;
    asm volatile("ld.global.cs.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
#endif
}

// A float that another block has written while this kernel runs.
EI_DEV float ei_load_shared_by_blocks(const float* p) {
#ifdef EI_CPU
    return *p;
#else
    return __ldcg(p);
#endif
}

// Asks for the 128 bytes around an address before they are loaded.
EI_DEV void ei_prefetch(const void* p) {
#ifndef EI_CPU
    asm volatile("prefetch.global.L2 [%0];" : : "l"(p));
#endif
}

// Copies N bytes, 4, 8 or 16, to shared memory, where they are once a wait for their group is over.
template <int N>
EI_DEV void ei_copy_async(void* shared, const void* global) {
#if defined(EI_CPU)
    ei_run->copy_later(shared, global, N);
#elif __CUDA_ARCH__ < 800
    struct alignas(N) Bytes { unsigned words[N / 4]; };
    *(Bytes*)shared = *(const Bytes*)global;
#else
    const unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    if constexpr (N == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                     : : "r"(to), "l"(global) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
                     : : "r"(to), "l"(global), "n"(N) : "memory");
    }
#endif
}

// Ends a group of a thread's copies.
EI_DEV void ei_copy_group() {
#if defined(EI_CPU)
    ei_run->end_copy_group();
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

// Waits for all of a thread's groups but the last N.
template <int N>
EI_DEV void ei_copy_wait() {
#if defined(EI_CPU)
    ei_run->wait_for_copies(N);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
#endif
}

// -- warps --

// The sum of 32 accumulators, one a lane, in the order of the reference's `sum_lanes`.
EI_DEV float ei_sum32(float x) {
    x += __shfl_xor_sync(EI_ALL_LANES, x, 8);
    x += __shfl_xor_sync(EI_ALL_LANES, x, 16);
    x += __shfl_xor_sync(EI_ALL_LANES, x, 4);
    x += __shfl_xor_sync(EI_ALL_LANES, x, 2);
    x += __shfl_xor_sync(EI_ALL_LANES, x, 1);
    return x;
}

EI_DEV float ei_max32(float x) {
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        x = fmaxf(x, __shfl_xor_sync(EI_ALL_LANES, x, lanes));
    }
    return x;
}

EI_DEV int ei_sum32(int x) {
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        x += __shfl_xor_sync(EI_ALL_LANES, x, lanes);
    }
    return x;
}

// -- tensor cores: int8, or halves, and sums of 32 bits; fragments as PTX has them --

#if !defined(EI_CPU) && __CUDA_ARCH__ >= 750 && __CUDA_ARCH__ < 800
// 8 rows by 8 columns, 16 deep: all that sm_75 has.
EI_DEV void ei_mma_m8n8k16(int& sum0, int& sum1, unsigned a, unsigned b) {
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+r"(sum0), "+r"(sum1) : "r"(a), "r"(b));
}
#endif

// sum += A B, 16 rows by 8 columns, 32 deep. Below sm_75 there is none: kernels use __dp4a there.
EI_DEV void ei_mma_m16n8k32(int (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if defined(EI_CPU)
    ei_cpu_mma(sum, a, b, EI_HERE);
#elif __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif __CUDA_ARCH__ >= 750
    ei_mma_m8n8k16(sum[0], sum[1], a[0], b[0]);
    ei_mma_m8n8k16(sum[2], sum[3], a[1], b[0]);
    ei_mma_m8n8k16(sum[0], sum[1], a[2], b[1]);
    ei_mma_m8n8k16(sum[2], sum[3], a[3], b[1]);
#endif
}

// The same, 16 deep.
EI_DEV void ei_mma_m16n8k16(int (&sum)[4], const unsigned (&a)[2], unsigned b) {
#if defined(EI_CPU)
    const unsigned whole_a[4] = {a[0], a[1], 0, 0}, whole_b[2] = {b, 0};
    ei_cpu_mma(sum, whole_a, whole_b, EI_HERE);
#elif __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
                 "{%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));
#elif __CUDA_ARCH__ >= 750
    ei_mma_m8n8k16(sum[0], sum[1], a[0], b);
    ei_mma_m8n8k16(sum[2], sum[3], a[1], b);
#endif
}

// sum += A B of halves, 16 rows by 8 columns, 16 deep, in floats; in which order a GPU adds up, and
// whether it rounds or cuts off, is its own. Below sm_75 there is none.
EI_DEV void ei_mma_halves(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if defined(EI_CPU)
    ei_cpu_mma_halves(sum, a, b, EI_HERE);
#elif __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif __CUDA_ARCH__ >= 750
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
                     "{%4, %5}, {%6}, {%0, %1, %2, %3};"
                     : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                     : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
    }
#endif
}
