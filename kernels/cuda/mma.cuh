// Rows of X8 times a matrix of blocks by int8 tensor cores: for more rows than a lane has sums for.
// Columns ascend in a warp, so the order is that of matmul.cuh, and of kernels/reference.
#pragma once
#include "matmul.cuh"

// A warp multiplies one or both halves of a tile by N_TOKENS rows of X8, 16 by 8 at a time. Its
// block of threads has a ring of stages in shared memory, each of a few blocks of columns.
template <class T, int TOKENS_, int N_WARPS>
struct Mma {
    static constexpr int N_TOKENS = TOKENS_;
    static constexpr int N_THREADS = 32 * N_WARPS;
    static constexpr int HALVES = N_TOKENS <= 16 ? 1 : 2;
    static constexpr int N_TILES = N_WARPS * HALVES / 2;
    static constexpr int N_BLOCKS = N_TOKENS <= 16 ? 8 : 2;
    static constexpr int WORDS = (T::LOW_BITS + T::HIGH_BITS) * TILE;  // of a block of a tile

    struct Stage {
        alignas(16) unsigned codes[N_TILES][N_BLOCKS][WORDS];
        alignas(16) int8_t q[N_TOKENS][BLOCK * N_BLOCKS + 16];  // rows begin in different banks
        alignas(16) float2 d[N_BLOCKS][N_TOKENS];
        alignas(8) short2 sums[N_BLOCKS][N_TOKENS];
    };

    // Of a warp's rows, for a chunk of columns.
    struct Scales {
        float scale[CHUNK][16 * HALVES];
        float low[T::HAS_LOW ? CHUNK : 1][16 * HALVES];
        short2 parts[T::HAS_PARTS ? CHUNK : 1][16 * HALVES];
        short2 mins[T::HAS_MINS ? CHUNK : 1][16 * HALVES];
    };

    static constexpr int FREE = (48 << 10) - N_WARPS * (int)sizeof(Scales);
    static constexpr int N_STAGES = FREE / (int)sizeof(Stage) < 4 ? FREE / (int)sizeof(Stage) : 4;
    static_assert(N_STAGES >= 2, "too much shared memory");
    static_assert(N_WARPS * HALVES % 2 == 0, "a block of threads takes whole tiles");
};

// Scales of two rows, g and g + 8.
struct RowScales {
    float scale[2];
    float low[2];
    short2 parts[2];
    short2 mins[2];
};

// What a block of threads multiplies.
template <class T>
struct Operands {
    const uint8_t* w;
    Layout<T> at;
    const uint8_t* x;
    int k;
    int first_tile, first_row, n_rows;
};

// What a thread copies of each stage: where it is for the first one, and of which block.
template <class M, class T>
struct Copies {
    static constexpr int PIECES = M::WORDS / 4;  // of 16 bytes
    static constexpr int LOW_PIECES = T::LOW_BITS * TILE / 4;
    static constexpr int N_PIECES = M::N_TILES * M::N_BLOCKS * PIECES;
    static constexpr int N_CODES = (N_PIECES + M::N_THREADS - 1) / M::N_THREADS;
    static constexpr int HALVES = 2 * M::N_BLOCKS;  // of 16 columns
    static constexpr int N_ROWS = (HALVES * M::N_TOKENS + M::N_THREADS - 1) / M::N_THREADS;
    static_assert(M::N_THREADS % HALVES == 0, "a thread copies one half of several rows");

    const uint8_t* codes[N_CODES];
    int block[N_CODES];
    const uint8_t* rows[N_ROWS];
};

template <class M, class T>
EI_DEV Copies<M, T> copies_of(const Operands<T>& of) {
    using C = Copies<M, T>;
    C copies;
#pragma unroll
    for (int i = 0; i < C::N_CODES; ++i) {
        const int number = threadIdx.x + M::N_THREADS * i;
        const int tile = number / (M::N_BLOCKS * C::PIECES);
        const int piece = number % C::PIECES;
        const bool is_there = tile < M::N_TILES && of.first_tile + tile < of.at.n_tiles;
        copies.block[i] = is_there ? number / C::PIECES % M::N_BLOCKS : of.at.n_blocks;
        const size_t unit = (size_t)(of.first_tile + tile) * of.at.n_blocks + copies.block[i];
        copies.codes[i] = of.w + (unit * C::LOW_PIECES + piece) * 16;
        if (T::HIGH_BITS > 0 && piece >= C::LOW_PIECES) {
            const int high = piece - C::LOW_PIECES;
            copies.codes[i] = of.w + of.at.high + (unit * (T::HIGH_BITS * TILE / 4) + high) * 16;
        }
    }
#pragma unroll
    for (int i = 0; i < C::N_ROWS; ++i) {
        const int token = (threadIdx.x + M::N_THREADS * i) / C::HALVES;
        copies.rows[i] = of.x + min(of.first_row + token, of.n_rows - 1) * x8_bytes(of.k);
    }
    return copies;
}

// Rows of x that are not there are copies of the last one.
template <class M, class T>
EI_DEV void copy_stage(
    typename M::Stage& stage, Copies<M, T>& copies, const Operands<T>& of, int first_block) {
    using C = Copies<M, T>;
#pragma unroll
    for (int i = 0; i < C::N_CODES; ++i) {
        const int number = threadIdx.x + M::N_THREADS * i;
        const bool is_high = number % C::PIECES >= C::LOW_PIECES;
        if (first_block + copies.block[i] < of.at.n_blocks) {
            ei_copy_async<16>(&stage.codes[0][0][0] + 4 * number, copies.codes[i]);
        }
        copies.codes[i] += M::N_BLOCKS * TILE * 4 * (is_high ? T::HIGH_BITS : T::LOW_BITS);
    }
    const int half = threadIdx.x % C::HALVES;
    const int block = first_block + half / 2;
#pragma unroll
    for (int i = 0; i < C::N_ROWS; ++i) {
        const int token = (threadIdx.x + M::N_THREADS * i) / C::HALVES;
        const uint8_t* row = copies.rows[i];
        if (block < of.at.n_blocks && token < M::N_TOKENS) {
            const X8 x = x8_from(x8_row(row, 0, of.k), block);
            ei_copy_async<16>(&stage.q[token][16 * half], x.q + 16 * (half % 2));
            if (half % 2 == 0) {
                ei_copy_async<8>(&stage.d[half / 2][token], x.d);
            } else if (T::HAS_MINS) {
                ei_copy_async<4>(&stage.sums[half / 2][token], x.sums);
            }
        }
    }
    ei_copy_group();
}

template <class M, class T>
EI_DEV void put_scales(typename M::Scales& scales, const Head<T>& head, int row) {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
        scales.scale[i][row] = T::scale(head, i);
        if constexpr (T::HAS_LOW) {
            scales.low[i][row] = T::low(head, i);
        }
        if constexpr (T::HAS_PARTS) {
            scales.parts[i][row] = make_short2(T::part(head, 2 * i), T::part(head, 2 * i + 1));
        }
        if constexpr (T::HAS_MINS) {
            scales.mins[i][row] = make_short2(T::min(head, 2 * i), T::min(head, 2 * i + 1));
        }
    }
}

template <class M, class T>
EI_DEV RowScales get_scales(const typename M::Scales& scales, int i, int row) {
    RowScales rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        rows.scale[r] = scales.scale[i][row + 8 * r];
        if constexpr (T::HAS_LOW) {
            rows.low[r] = scales.low[i][row + 8 * r];
        }
        if constexpr (T::HAS_PARTS) {
            rows.parts[r] = scales.parts[i][row + 8 * r];
        }
        if constexpr (T::HAS_MINS) {
            rows.mins[r] = scales.mins[i][row + 8 * r];
        }
    }
    return rows;
}

// Codes less their zero point: bytes up to 127 less one of up to 128.
template <class T>
EI_DEV unsigned signed_codes(unsigned word) {
    if constexpr (T::ZERO == 0) {
        return word;
    } else {
        return ((word | 0x80808080u) - 0x01010101u * T::ZERO) ^ 0x80808080u;
    }
}

// The codes of rows g and g + 8 that a lane has of 16 x 32: columns 4 t ... and 16 + 4 t ...
template <class T>
EI_DEV void get_codes(unsigned (&a)[4], const unsigned* codes, int row) {
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int j = t + i / 2 * 4;
        const int at = row + i % 2 * 8;
        const unsigned low = codes[word_at<T::LOW_BITS>(0, at, j % T::LOW_BITS)];
        unsigned high = 0;
        if constexpr (T::HIGH_BITS > 0) {
            const unsigned* highs = codes + T::LOW_BITS * TILE;
            high = highs[word_at<T::HIGH_BITS>(0, at, j % T::HIGH_BITS)];
        }
        a[i] = signed_codes<T>(code_word<T>(low, high, j));
    }
}

// Adds 32 columns to 16 x 8 sums: sum i is that of row g + i / 2 * 8 and token 2 t + i % 2.
template <class T>
EI_DEV void add_columns(
    float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2], const RowScales& rows,
    const float2 (&d)[2], const short2 (&x_sums)[2]) {
    const int from = T::HAS_PARTS ? 0 : FROM;
    int first[4] = {from, from, from, from};
    int second[4] = {};
    if constexpr (T::HAS_PARTS) {
        const unsigned left[2] = {a[0], a[1]};
        const unsigned right[2] = {a[2], a[3]};
        ei_mma_m16n8k16(first, left, b[0]);
        ei_mma_m16n8k16(second, right, b[1]);
    } else {
        ei_mma_m16n8k32(first, a, b);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = i / 2;
        const float2 scale = d[i % 2];
        Term term;
        term.scale = rows.scale[row];
        if constexpr (T::HAS_LOW) {
            term.low = rows.low[row];
        }
        if constexpr (T::HAS_PARTS) {
            const short2 parts = rows.parts[row];
            term.dot = ei_to_float(parts.x * first[i] + parts.y * second[i]);
        } else {
            term.dot = added_to_float(first[i]);
        }
        if constexpr (T::HAS_MINS) {
            const short2 mins = rows.mins[row];
            term.min_dot = ei_to_float(add_sums(x_sums[i % 2], mins.x, mins.y, 0));
        }
        sums[i] = add<T>(sums[i], scale.x * term.scale, term, scale);
    }
}

// Adds block `b` of a stage, block `i` of its chunk, to the sums of the warp: `half` is its first.
template <class M, class T, int N_HALVES, int N_EIGHTS>
EI_DEV void add_block(
    float (&sums)[N_HALVES][N_EIGHTS][4], const typename M::Stage& stage,
    const typename M::Scales& scales, int tile, int half, int b, int i) {
    const int g = (threadIdx.x & 31) / 4;
    const int t = threadIdx.x & 3;
    unsigned a[N_HALVES][4];
    RowScales rows[N_HALVES];
#pragma unroll
    for (int h = 0; h < N_HALVES; ++h) {
        get_codes<T>(a[h], stage.codes[tile][b], 16 * (half + h) + g);
        rows[h] = get_scales<M, T>(scales, i, 16 * h + g);
    }
#pragma unroll
    for (int eight = 0; eight < N_EIGHTS; ++eight) {
        const int token = 8 * eight + 2 * t;
        const unsigned* q = (const unsigned*)&stage.q[8 * eight + g][BLOCK * b];
        const unsigned codes[2] = {q[t], q[4 + t]};
        const float4 both = *(const float4*)&stage.d[b][token];
        const float2 d[2] = {make_float2(both.x, both.y), make_float2(both.z, both.w)};
        short2 x_sums[2] = {};
        if constexpr (T::HAS_MINS) {
            const short4 sums_of = *(const short4*)&stage.sums[b][token];
            x_sums[0] = make_short2(sums_of.x, sums_of.y);
            x_sums[1] = make_short2(sums_of.z, sums_of.w);
        }
#pragma unroll
        for (int h = 0; h < N_HALVES; ++h) {
            add_columns<T>(sums[h][eight], a[h], codes, rows[h], d, x_sums);
        }
    }
}

// Sums of 16 rows, half a tile, by 8 tokens.
EI_DEV void store_sums(
    const Output& out, const float (&sums)[4], int first, int first_row, int n, int n_rows) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int at = first + lane / 4 + i / 2 * 8;
        const int row = first_row + lane % 4 * 2 + i % 2;
        if (at < n && row < n_rows) {
            store(out, row, at, sums[i]);
        }
    }
}

// A block of threads multiplies N_TILES tiles by N_TOKENS rows of X8, from first_tile and
// first_row on.
template <class T, int N_TOKENS, int N_WARPS>
EI_DEV void multiply_mma(const Operands<T>& of, const Output& out, int n) {
    using M = Mma<T, N_TOKENS, N_WARPS>;
    using Stage = typename M::Stage;
    using Scales = typename M::Scales;
    EI_SHARED(Stage, stages, [M::N_STAGES]);
    EI_SHARED(Scales, scales, [N_WARPS]);
    const int warp = threadIdx.x / 32;
    const int place = warp * M::HALVES / 2;
    const int half = warp * M::HALVES % 2;
    const int tile = min(of.first_tile + place, of.at.n_tiles - 1);
    const int row = threadIdx.x % (16 * M::HALVES);
    Head<T> head = load_head(of.w, of.at, tile, 0, 16 * half + row);
    Copies<M, T> copies = copies_of<M>(of);
    for (int s = 0; s < M::N_STAGES - 1; ++s) {
        copy_stage<M>(stages[s], copies, of, M::N_BLOCKS * s);
    }
    float sums[M::HALVES][N_TOKENS / 8][4] = {};
    for (int first = 0; first < of.at.n_blocks; first += M::N_BLOCKS) {
        const int s = first / M::N_BLOCKS;
        ei_copy_wait<M::N_STAGES - 2>();
        __syncthreads();
        const int ahead = s + M::N_STAGES - 1;
        copy_stage<M>(stages[ahead % M::N_STAGES], copies, of, M::N_BLOCKS * ahead);
        if (first % CHUNK == 0) {
            __syncwarp();
            put_scales<M, T>(scales[warp], head, row);
            __syncwarp();
            const int chunk = min(first / CHUNK + 1, of.at.n_chunks - 1);
            head = load_head(of.w, of.at, tile, chunk, 16 * half + row);
        }
#pragma unroll
        for (int b = 0; b < M::N_BLOCKS; ++b) {
            if (first + b < of.at.n_blocks) {
                const int i = first % CHUNK + b;
                add_block<M, T>(sums, stages[s % M::N_STAGES], scales[warp], place, half, b, i);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < M::HALVES * N_TOKENS / 8; ++i) {
        const int h = i % M::HALVES;
        const int eight = i / M::HALVES;
        const int at = TILE * (of.first_tile + place) + 16 * (half + h);
        store_sums(out, sums[h][eight], at, of.first_row + 8 * eight, n, of.n_rows);
    }
}
