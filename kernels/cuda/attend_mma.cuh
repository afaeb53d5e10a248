// Attention by tensor cores, of "fast" numerics: 16 queries at a time, and they, keys, weights and
// values are halves. Pages have maxima and sums of their own and are folded as attend.cuh says.
//
// Lane 4 g + t has, of each product, what PTX gives it: queries g and g + 8.
#pragma once
#include "attend.cuh"
#include "halves.cuh"

constexpr int TILE_QUERIES = 16;

// Queries in shared memory, each divided by a power of two. Rows have an odd number of 64 bytes:
// so loads of eight lanes beside each other meet in no bank.
template <int N_QUERIES, int WIDTH>
struct __align__(16) HalfQueries {
    static constexpr int BLOCKS = (WIDTH + 31) / 32;
    uint16_t q[N_QUERIES][32 * (BLOCKS | 1)];
    float size[N_QUERIES];
};

template <bool ARE_HALVES, bool ARE_BLOCKS, int N_QUERIES, int WIDTH>
struct PageQueries : QueriesOf<ARE_BLOCKS, N_QUERIES, WIDTH> {
};
template <bool ARE_BLOCKS, int N_QUERIES, int WIDTH>
struct PageQueries<true, ARE_BLOCKS, N_QUERIES, WIDTH> {
    typedef HalfQueries<N_QUERIES, WIDTH> Type;
};

// A warp loads a query, or zeros where q is null.
template <class T, bool TRANSFORMS, int N_QUERIES, int WIDTH>
EI_DEV void load_query(HalfQueries<N_QUERIES, WIDTH>& queries, int query, const float* q) {
    constexpr int BLOCKS = HalfQueries<N_QUERIES, WIDTH>::BLOCKS;
    const int lane = threadIdx.x % 32;
    float x[BLOCKS + 1];
    float largest = 0.0f;
#pragma unroll
    for (int block = 0; block < BLOCKS; block += 2) {
        const int i = 32 * block + lane;
        x[block] = q && i < WIDTH ? q[i] : 0.0f;
        x[block + 1] = q && i + 32 < WIDTH ? q[i + 32] : 0.0f;
        if (TRANSFORMS) {
            hadamard64(x[block], x[block + 1]);
        }
        largest = fmaxf(largest, fmaxf(fabsf(x[block]), fabsf(x[block + 1])));
    }
    const float size = size_of(ei_max32(largest));
    const float inverse = ei_div(1.0f, size);
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
        queries.q[query][32 * block + lane] = ei_to_half(x[block] * inverse);
    }
    if (lane == 0) {
        queries.size[query] = size;
    }
}

// 8 values of a position as halves, of which those behind the last of DIM are zeros.
template <int DIM, class T>
EI_DEV uint4 halves_of(const PageView<T>& view, int chunk, int position) {
    if constexpr (T::IS_BLOCKS) {
        const float d = ei_from_half(view.scale(chunk, position));
        float x[8];
        T::unpack(*view.chunk(chunk, position), x);
        return make_uint4(
            ei_to_halves(x[0] * d, x[1] * d), ei_to_halves(x[2] * d, x[3] * d),
            ei_to_halves(x[4] * d, x[5] * d), ei_to_halves(x[6] * d, x[7] * d));
    } else {
        uint4 x = *view.chunk(chunk, position);
        const int n = DIM - 8 * chunk;
        if (DIM % 8 && n < 8) {
            x.x &= n > 1 ? 0xffffffffu : 0xffffu;
            x.y &= n > 3 ? 0xffffffffu : n > 2 ? 0xffffu : 0u;
            x.z &= n > 5 ? 0xffffffffu : n > 4 ? 0xffffu : 0u;
            x.w &= n > 7 ? 0xffffffffu : n > 6 ? 0xffffu : 0u;
        }
        return x;
    }
}

// Scores of a page: [j][i] is that of query g + i / 2 * 8 at position 8 j + 2 t + i % 2. Columns of
// 32 are taken in such an order that lanes load 16 bytes at once.
template <class T, bool HAS_CAP, int N_QUERIES, int K_WIDTH>
EI_DEV void score_page(
    const HalfQueries<N_QUERIES, K_WIDTH>& queries, const PageView<T>& keys, float scale,
    float soft_cap, float (&scores)[4][4]) {
    const int g = threadIdx.x % 32 / 4;
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        scores[j / 4][j % 4] = 0.0f;
    }
#pragma unroll 2
    for (int block = 0; block < (K_WIDTH + 31) / 32; ++block) {
        const int chunk = 4 * block + t;
        const bool is_there = K_WIDTH % 32 == 0 || 8 * chunk < K_WIDTH;
        uint4 b[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            b[j] = make_uint4(0, 0, 0, 0);
            if (is_there) {
                b[j] = halves_of<K_WIDTH>(keys, chunk, 8 * j + g);
            }
        }
        uint4 low = make_uint4(0, 0, 0, 0);
        uint4 high = low;
        if (N_QUERIES >= 8 || g < N_QUERIES) {
            low = *(const uint4*)&queries.q[g][8 * chunk];
        }
        if (N_QUERIES > 8 && (N_QUERIES == 16 || g + 8 < N_QUERIES)) {
            high = *(const uint4*)&queries.q[g + 8][8 * chunk];
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            ei_mma_halves(scores[j], {low.x, high.x, low.y, high.y}, {b[j].x, b[j].y});
            ei_mma_halves(scores[j], {low.z, high.z, low.w, high.w}, {b[j].z, b[j].w});
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float size = queries.size[min(g + 8 * i, N_QUERIES - 1)];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float& score = scores[j / 2][2 * i + j % 2];
            score = (score * size) * scale;
            if (HAS_CAP) {
                score = ei_soft_cap(score, soft_cap);
            }
        }
    }
}

// Positions of a page that a query sees: `first` to `end` - 1.
struct Bounds {
    int first;
    int end;

    __device__ __forceinline__ bool has(int position) const {
        return position >= first && position < end;
    }
};

// Scores to weights of the page where they are seen, as halves of a fragment for each 16 positions;
// m and l of a lane's queries.
EI_DEV void soften(
    float (&scores)[4][4], const Bounds (&seen)[2], unsigned (&p)[2][4], float (&m)[2],
    float (&l)[2]) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        m[i] = -EI_INFINITY;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const bool is_seen = seen[i].has(j / 2 * 8 + 2 * t + j % 2);
            m[i] = fmaxf(m[i], is_seen ? scores[j / 2][2 * i + j % 2] : -EI_INFINITY);
        }
        m[i] = fmaxf(m[i], __shfl_xor_sync(EI_ALL_LANES, m[i], 1));
        m[i] = fmaxf(m[i], __shfl_xor_sync(EI_ALL_LANES, m[i], 2));
        l[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float& score = scores[j / 2][2 * i + j % 2];
            const bool is_seen = seen[i].has(j / 2 * 8 + 2 * t + j % 2);
            score = is_seen ? ei_exp(score - m[i]) : 0.0f;
            l[i] += score;
        }
        l[i] += __shfl_xor_sync(EI_ALL_LANES, l[i], 1);
        l[i] += __shfl_xor_sync(EI_ALL_LANES, l[i], 2);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float(&weights)[4] = scores[i / 4 * 2 + i % 4 / 2];
        p[i / 4][i % 4] = ei_to_halves(weights[i % 2 * 2], weights[i % 2 * 2 + 1]);
    }
}

// Half j of two words' places, beside each other.
EI_DEV unsigned pair_of(uint4 x, uint4 y, int j) {
    const unsigned xs[4] = {x.x, x.y, x.z, x.w};
    const unsigned ys[4] = {y.x, y.y, y.z, y.w};
    return __byte_perm(xs[j / 2], ys[j / 2], j % 2 ? 0x7632 : 0x5410);
}

// How many times 64 there are of V_WIDTH values, rounded up.
template <int V_WIDTH>
constexpr int GROUPS = (V_WIDTH + 63) / 64;

// Weights times values 64 * group to 64 * group + 63 of a page: o[j][i] is of query g + i / 2 * 8
// that of number j in chunk 2 t + i % 2 of them. What none of the queries sees is not read.
template <int V_WIDTH, class T>
EI_DEV void add_values(
    const unsigned (&p)[2][4], const PageView<T>& values, int group, Bounds any, float (&o)[8][4]) {
    const int t = threadIdx.x % 4;
    const int chunk = 8 * group + threadIdx.x % 32 / 4;
    const bool is_there = V_WIDTH % 64 == 0 || 8 * chunk < V_WIDTH;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
        o[j / 4][j % 4] = 0.0f;
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        uint4 x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int position = 16 * s + i / 2 * 8 + 2 * t + i % 2;
            x[i] = make_uint4(0, 0, 0, 0);
            if (is_there && any.has(position)) {
                x[i] = halves_of<8>(values, chunk, position);
            }
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            ei_mma_halves(o[j], p[s], {pair_of(x[0], x[1], j), pair_of(x[2], x[3], j)});
        }
    }
}

// Of value o[j][i] of a lane, see add_values: its query, and its place in a head.
EI_DEV int query_of_value(int i) {
    return threadIdx.x % 32 / 4 + i / 2 * 8;
}

EI_DEV int place_of_value(int group, int j, int i) {
    return 64 * group + 16 * (threadIdx.x % 4) + i % 2 * 8 + j;
}
