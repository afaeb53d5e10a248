// Rows of halves times a matrix of floats by tensor cores: y = residual + (x W^T + bias). Of "fast"
// numerics: weights of BF16 are rounded to halves, which those above 65,504 don't fit.
#include "halves.cuh"
#include "matmul.cuh"

// A warp takes 16 rows of the matrix, or 32 where TOKENS is more than 16, and TOKENS rows of x,
// columns ascending: how many there are changes no sum. WARPS: of a block. Needs sm_75.
// Variants: TYPE = F16 BF16; TOKENS = 8 16; WARPS = 2
// Variants: TYPE = F16 BF16; TOKENS = 64; WARPS = 4
constexpr int SIXTEENS = TOKENS > 16 ? 2 : 1;
constexpr int EIGHTS = 2 * SIXTEENS;  // of rows of the matrix, as tiles have them
constexpr int N = TOKENS / 8;
// Blocks a processor should have, 0: as the compiler likes, which spills on sm_100 to sm_103 to
// have 3.
#if __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ <= 1030
constexpr int LEAST_BLOCKS = TOKENS > 16 ? 1 : 0;
#else
constexpr int LEAST_BLOCKS = 0;
#endif
constexpr int AHEAD = SIXTEENS == 1 ? 8 : 2;  // loads of a lane in flight, of each eight rows

EI_DEV uint4 halves_of(uint4 words, F16) {
    return words;
}

EI_DEV uint4 halves_of(uint4 words, BF16) {
    unsigned halves[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float low = value_of<BF16>(words, 2 * i);
        halves[i] = ei_to_halves(low, value_of<BF16>(words, 2 * i + 1));
    }
    return make_uint4(halves[0], halves[1], halves[2], halves[3]);
}

// 32 columns of each eight rows of the matrix, from `w` on: a lane has those of its k % 4.
EI_DEV void load_unit(uint4 (&a)[EIGHTS], const uint4* w, int n_units, int unit) {
#pragma unroll
    for (int e = 0; e < EIGHTS; ++e) {
        a[e] = ei_stream(w + ((size_t)e * n_units + unit) * 32);
    }
}

EI_DEV void add_unit(
    float (&sums)[SIXTEENS][N][4], const uint4 (&a)[EIGHTS], const uint4* const (&x)[N], int unit) {
    uint4 b[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        b[i] = x[i][4 * unit];
    }
#pragma unroll
    for (int s = 0; s < SIXTEENS; ++s) {
        const uint4 low = halves_of(a[2 * s], TYPE());
        const uint4 high = halves_of(a[2 * s + 1], TYPE());
#pragma unroll
        for (int i = 0; i < N; ++i) {
            ei_mma_halves(sums[s][i], {low.x, high.x, low.y, high.y}, {b[i].x, b[i].y});
            ei_mma_halves(sums[s][i], {low.z, high.z, low.w, high.w}, {b[i].z, b[i].w});
        }
    }
}

// Sums of 16 rows of the matrix, from `first` on, by 8 of x.
EI_DEV void store_sums(
    const Output& out, const float (&sums)[4], const uint8_t* x, int first, int n, int k,
    int first_row, int n_rows) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int at = first + lane / 4 + i / 2 * 8;
        const int row = first_row + lane % 4 * 2 + i % 2;
        if (at < n && row < n_rows) {
            store(out, row, at, sums[i] * *half_row_size(x + row * half_row_bytes(k), k));
        }
    }
}

// Grid: (n / (16 * SIXTEENS * WARPS), rows / TOKENS, both rounded up). x is rows of halves.cuh, w
// (n, k) tiles; bias and residual may be null, the residual may be y.
EI_KERNEL(32 * WARPS, LEAST_BLOCKS) matmul_half(
    const Step* step, int rows, const uint8_t* x, const uint8_t* w, const float* bias,
    const float* residual, float* y, int n, int k) {
    const int n_rows = ei_rows(step, rows);
    const int first_row = blockIdx.y * TOKENS;
    const int first = (blockIdx.x * WARPS + threadIdx.x / 32) * 16 * SIXTEENS;
    if (ei_aborted(step) || first_row >= n_rows || first >= n) {
        return;
    }
    const int lane = threadIdx.x & 31;
    const int n_units = (k + UNIT<TYPE> - 1) / UNIT<TYPE>;
    const uint4* units = (const uint4*)w + (size_t)(first / 8) * n_units * 32 + lane;
    const uint4* row[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int at = min(first_row + 8 * i + lane / 4, n_rows - 1);
        row[i] = (const uint4*)(x + at * half_row_bytes(k)) + lane % 4;
    }
    uint4 ahead[AHEAD][EIGHTS];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        load_unit(ahead[i], units, n_units, min(i, n_units - 1));
    }
    float sums[SIXTEENS][N][4] = {};
    for (int unit = 0; unit < n_units; unit += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (unit + i < n_units) {
                add_unit(sums, ahead[i], row, unit + i);
                load_unit(ahead[i], units, n_units, min(unit + i + AHEAD, n_units - 1));
            }
        }
    }
    const Output out = {y, residual, bias, nullptr, (size_t)row_stride(n)};
#pragma unroll
    for (int i = 0; i < SIXTEENS * N; ++i) {
        const int s = i % SIXTEENS;
        const int at = first_row + i / SIXTEENS * 8;
        store_sums(out, sums[s][i / SIXTEENS], x, first + 16 * s, n, k, at, n_rows);
    }
}
