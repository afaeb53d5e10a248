// Rows of activations times a matrix in tiles, in the order of kernels/reference: a lane takes
// whole rows of the matrix and columns ascend in it, so no block type is summed across lanes.
#pragma once
#include "await.cuh"
#include "tiles.cuh"
#include "x8.cuh"

// What becomes of the sums of a row: residual + (sum * scale + bias), where these are not null.
struct Output {
    float* y;
    const float* residual;
    const float* bias;
    const float* scale;  // one for all
    size_t stride;       // floats from a row of y, and of the residual, to the next
};

EI_DEV void store(const Output& out, int row, int n, float sum) {
    const size_t at = row * out.stride + n;
    float value = sum;
    if (out.scale) {
        value = value * *out.scale;
    }
    if (out.bias) {
        value = value + out.bias[n];
    }
    if (out.residual) {
        value = out.residual[at] + value;
    }
    out.y[at] = value;
}

// -- blocks --------------------------------------------------------------------------------------

// What 32 columns of a row add to its sum.
struct Term {
    float scale;
    float dot;
    float low;
    float min_dot;  // where there are mins
};

// An integer below 2^22 that is added up from here, the bits of 1.5 * 2^23, becomes a float exactly
// and by one subtraction.
constexpr int FROM = 0x4B400000;

EI_DEV float added_to_float(int bits) {
    return __int_as_float(bits) - 12582912.0f;
}

// total + sums.x * first + sums.y * second, two factors of 8 bits.
EI_DEV int add_sums(short2 sums, int first, int second, int total) {
    const int packed = (unsigned short)sums.x | (int)((unsigned)(unsigned short)sums.y << 16);
    return __dp2a_lo(packed, (first & 255) | (second & 255) << 8, total);
}

// Block i of a chunk times that of x.
template <class T>
EI_DEV Term term_of(const Codes<T>& codes, const Head<T>& head, int i, const X8& x) {
    const int4* words = (const int4*)(x.q + BLOCK * i);
    const int4 a = words[0];
    const int4 b = words[1];
    const int left[4] = {a.x, a.y, a.z, a.w};
    const int right[4] = {b.x, b.y, b.z, b.w};
    const short2 sums = x.sums[i];
    int first = add_sums(sums, -T::ZERO, T::HAS_PARTS ? 0 : -T::ZERO, T::HAS_PARTS ? 0 : FROM);
    int second = T::HAS_PARTS ? add_sums(sums, 0, -T::ZERO, 0) : 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        first = __dp4a((int)code_word(codes, j), left[j], first);
        second = __dp4a((int)code_word(codes, 4 + j), right[j], second);
    }
    Term term;
    term.scale = T::scale(head, i);
    if constexpr (T::HAS_PARTS) {
        term.dot = ei_to_float(T::part(head, 2 * i) * first + T::part(head, 2 * i + 1) * second);
    } else {
        term.dot = added_to_float(first + second);
    }
    if constexpr (T::HAS_LOW) {
        term.low = T::low(head, i);
    }
    if constexpr (T::HAS_MINS) {
        const int dot = add_sums(sums, T::min(head, 2 * i), T::min(head, 2 * i + 1), 0);
        term.min_dot = ei_to_float(dot);
    }
    return term;
}

// Adds 32 columns, of which d is that of `X8`; `scaled` is d.x * term.scale.
template <class T>
EI_DEV float add(float sum, float scaled, const Term& term, float2 d) {
    sum = ei_fma(scaled, term.dot, sum);
    if constexpr (T::HAS_MINS) {
        sum = ei_fma(term.low * d.x, term.min_dot, sum);
    } else if constexpr (T::HAS_LOW) {
        sum = ei_fma(term.low, d.y, sum);
    }
    return sum;
}

// What the warps of a tile leave for the one that adds up: of each row of X8 two or three values,
// and low, which is that of all of them; [value][warp][block of its chunk][row of the tile].
template <class T, int N_WARPS, int N_ROWS>
struct Left {
    static constexpr int OF_ROW = T::HAS_MINS ? 3 : 2;
    float values[OF_ROW * N_ROWS + T::HAS_LOW][N_WARPS][CHUNK][TILE];

    __device__ __forceinline__ void put(int i, int r, float scaled, const Term& term) {
        const int warp = threadIdx.x / 32;
        const int lane = threadIdx.x & 31;
        values[OF_ROW * r][warp][i][lane] = scaled;
        values[OF_ROW * r + 1][warp][i][lane] = term.dot;
        if constexpr (T::HAS_MINS) {
            values[OF_ROW * r + 2][warp][i][lane] = term.min_dot;
        }
        if constexpr (T::HAS_LOW) {
            values[OF_ROW * N_ROWS][warp][i][lane] = term.low;
        }
    }

    __device__ __forceinline__ float add_to(float sum, int warp, int i, int r, float2 d) const {
        const int lane = threadIdx.x & 31;
        Term term;
        term.dot = values[OF_ROW * r + 1][warp][i][lane];
        if constexpr (T::HAS_MINS) {
            term.min_dot = values[OF_ROW * r + 2][warp][i][lane];
        }
        if constexpr (T::HAS_LOW) {
            term.low = values[OF_ROW * N_ROWS][warp][i][lane];
        }
        return add<T>(sum, values[OF_ROW * r][warp][i][lane], term, d);
    }
};

// One matrix, or two of one shape, and the rows of X8 that they are multiplied by: rows first ...
// of a step of n_rows.
template <class T>
struct Factors {
    const uint8_t* w;
    const uint8_t* second;
    Layout<T> at;
    X8 x;  // of the first row
    int k;
    int first, n_rows;
};

// Row `first + r` from a chunk on; of rows that are not there the last one.
template <class T>
EI_DEV X8 x8_of(const Factors<T>& f, int r, int chunk) {
    const size_t bytes = min(r, f.n_rows - 1 - f.first) * x8_bytes(f.k);
    const X8 x = {
        f.x.q + bytes, (float2*)((uint8_t*)f.x.d + bytes), (short2*)((uint8_t*)f.x.sums + bytes)};
    return x8_from(x, CHUNK * chunk);
}

// A chunk of a lane's row of the matrix.
template <class T>
struct Chunk {
    Codes<T> codes[CHUNK];
    Head<T> head;
};

template <class T>
EI_DEV int blocks_of(const Layout<T>& at, int chunk) {
    return min(CHUNK, at.n_blocks - CHUNK * chunk);
}

template <class T>
EI_DEV Chunk<T> load_chunk(const uint8_t* w, const Layout<T>& at, int tile, int chunk) {
    const int lane = threadIdx.x & 31;
    const int n_blocks = blocks_of(at, chunk);
    const size_t unit = (size_t)tile * at.n_blocks + CHUNK * chunk;
    Chunk<T> loaded = {};
    loaded.head = load_head(w, at, tile, chunk, lane);
    if (n_blocks == CHUNK) {
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            loaded.codes[i] = load_codes(w, at, unit + i, lane);
        }
    } else {
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            if (i < n_blocks) {
                loaded.codes[i] = load_codes(w, at, unit + i, lane);
            }
        }
    }
    return loaded;
}

// One warp and one row: there is nothing to leave. Blocks past the last column are not added.
template <class T>
EI_DEV float add_chunk(float sum, const Chunk<T>& weights, const Factors<T>& f, int chunk) {
    const int n_blocks = blocks_of(f.at, chunk);
    const X8 x = x8_of(f, 0, chunk);
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
        const float2 d = x.d[i];
        const Term term = term_of(weights.codes[i], weights.head, i, x);
        const float next = add<T>(sum, d.x * term.scale, term, d);
        sum = i < n_blocks ? next : sum;
    }
    return sum;
}

// Row by row, so that registers are enough for any number of them.
template <class T, int N_WARPS, int N_ROWS>
EI_DEV void leave_chunk(
    Left<T, N_WARPS, N_ROWS>& left, const Chunk<T>& weights, const Factors<T>& f, int chunk) {
#pragma unroll 1
    for (int r = 0; r < N_ROWS; ++r) {
        const X8 x = x8_of(f, r, chunk);
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            const Term term = term_of(weights.codes[i], weights.head, i, x);
            left.put(i, r, x.d[i].x * term.scale, term);
        }
    }
}

// Adds what the warps have left of chunks `first` and following.
template <class T, int N_WARPS, int N_ROWS>
EI_DEV void add_left(
    float (&sums)[N_ROWS], const Left<T, N_WARPS, N_ROWS>& left, const Factors<T>& f, int first) {
#pragma unroll 1
    for (int warp = 0; warp < N_WARPS && first + warp < f.at.n_chunks; ++warp) {
        const int n_blocks = blocks_of(f.at, first + warp);
#pragma unroll
        for (int r = 0; r < N_ROWS; ++r) {
            const X8 x = x8_of(f, r, first + warp);
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) {
                const float sum = left.add_to(sums[r], warp, i, r, x.d[i]);
                sums[r] = i < n_blocks ? sum : sums[r];
            }
        }
    }
}

// Tiles first, first + step ... times N_ROWS rows, each of N_PARTS matrices. N_WARPS warps take
// chunks of a tile in turns. Loads of a warp's next chunk, be it of the next tile, are issued
// before products of this one. One warp adds up what all have left, while the others begin the
// next round.
//
// `begin()` is called once, behind the first loads: it may make x. `finish(tile, part, sums)` is
// called by the warp that adds up. `left` is two in shared memory, if there are several warps or
// rows.
template <int N_PARTS, class T, int N_WARPS, int N_ROWS, class Begin, class Finish>
EI_DEV void multiply(
    const Factors<T>& f, Left<T, N_WARPS, N_ROWS>* left, int first, int step, const Begin& begin,
    Finish& finish) {
    const int warp = threadIdx.x / 32;
    int turn = 0;
    Chunk<T> weights = {};
    if (first < f.at.n_tiles && warp < f.at.n_chunks) {
        weights = load_chunk(f.w, f.at, first, warp);
    }
    begin();
    for (int tile = first, part = 0; tile < f.at.n_tiles;) {
        const bool is_last_part = part == N_PARTS - 1;
        const int next_tile = is_last_part ? tile + step : tile;
        const int next_part = is_last_part ? 0 : part + 1;
        float sums[N_ROWS] = {};
        for (int round = 0; round < f.at.n_chunks; round += N_WARPS) {
            const int chunk = round + warp;
            if (chunk < f.at.n_chunks) {
                const bool is_last = chunk + N_WARPS >= f.at.n_chunks;
                const int from_tile = is_last ? next_tile : tile;
                const int from_part = is_last ? next_part : part;
                Chunk<T> next = {};
                if (from_tile < f.at.n_tiles) {
                    const uint8_t* from = from_part == 0 ? f.w : f.second;
                    next = load_chunk(from, f.at, from_tile, is_last ? warp : chunk + N_WARPS);
                }
                if constexpr (N_WARPS * N_ROWS > 1) {
                    leave_chunk(left[turn], weights, f, chunk);
                } else {
                    sums[0] = add_chunk(sums[0], weights, f, chunk);
                }
                weights = next;
            }
            if constexpr (N_WARPS * N_ROWS > 1) {
                __syncthreads();
                if (warp == 0) {
                    add_left(sums, left[turn], f, round);
                }
                turn ^= 1;
            }
        }
        if (warp == 0) {
            finish(tile, part, sums);
        }
        tile = next_tile;
        part = next_part;
    }
}

// For a multiply of what is there already.
struct NothingToBegin {
    __device__ __forceinline__ void operator()() const {
        EI_AWAIT_INPUT();
    }
};

// For a multiply of one matrix, of n rows.
struct Stores {
    Output out;
    int n, first_row, n_rows;

    template <int N_ROWS>
    __device__ __forceinline__ void operator()(
        int tile, int part, const float (&sums)[N_ROWS]) const {
        const int at = TILE * tile + (threadIdx.x & 31);
#pragma unroll
        for (int r = 0; r < N_ROWS; ++r) {
            if (at < n && first_row + r < n_rows) {
                store(out, first_row + r, at, sums[r]);
            }
        }
    }
};

// -- floats --------------------------------------------------------------------------------------

// IS_WHOLE: none of its columns are past the last one, k - 1.
template <bool IS_WHOLE, class T, int N_ROWS>
EI_DEV void add_unit(
    float (&sums)[N_ROWS], uint4 words, const float* const (&x)[N_ROWS], int first, int k) {
    const int chain = threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < UNIT<T> / 4; ++i) {
        const int column = first + 4 * i;
        if (IS_WHOLE || column < k) {
#pragma unroll
            for (int r = 0; r < N_ROWS; ++r) {
                const bool is_there = IS_WHOLE || column + chain < k;
                const float value = is_there ? x[r][column + chain] : 0.0f;
                sums[r] = ei_fma(value_of<T>(words, i), value, sums[r]);
            }
        }
    }
}

// Rows of floats times a matrix of floats: four sums of a row of the matrix, of columns k % 4.
// A warp takes 8 rows, those of number blockIdx.x * N_WARPS + its own.
template <class T, int N_WARPS, int N_ROWS>
EI_DEV void multiply_floats(
    const uint8_t* w, const float* const (&x)[N_ROWS], const Output& out, int n, int k,
    int first_row, int n_rows) {
    const int lane = threadIdx.x & 31;
    const int eight = blockIdx.x * N_WARPS + threadIdx.x / 32;
    const int row = 8 * eight + lane / 4;
    if (8 * eight >= n) {
        return;
    }
    const int n_units = (k + UNIT<T> - 1) / UNIT<T>;
    const uint4* units = (const uint4*)w + (size_t)eight * n_units * 32 + lane;
    uint4 ahead[CHUNK] = {};
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
        if (i < n_units) {
            ahead[i] = ei_stream(units + 32 * i);
        }
    }
    float sums[N_ROWS] = {};
    for (int first = 0; first < n_units; first += CHUNK) {
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            const uint4 words = ahead[i];
            const int column = UNIT<T> * (first + i);
            if (first + i + CHUNK < n_units) {
                ahead[i] = ei_stream(units + 32 * (first + i + CHUNK));
            }
            if (column + UNIT<T> <= k) {
                add_unit<true, T>(sums, words, x, column, k);
            } else {
                add_unit<false, T>(sums, words, x, column, k);
            }
        }
    }
    for (int r = 0; r < N_ROWS && first_row + r < n_rows; ++r) {
        const float pair = sums[r] + __shfl_xor_sync(EI_ALL_LANES, sums[r], 1);
        const float sum = pair + __shfl_xor_sync(EI_ALL_LANES, pair, 2);
        if ((lane & 3) == 0 && row < n) {
            store(out, first_row + r, row, sum);
        }
    }
}
