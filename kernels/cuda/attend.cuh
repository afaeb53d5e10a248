// What the attention kernels share: scores and values of a page, and folding parts in order.
// A part is attention over some positions: maximum m, sum l of exp(score - m), and those times V,
// o. Folds run from left to right and start from their first member.
#pragma once
#include "kv_types.cuh"
#include "math.cuh"

// How a warp shares out values of a page: 8 of a head a lane, as many lanes beside each other as
// that takes, and sets of such lanes, each with queries of its own.
template <int V_WIDTH, int N_QUERIES>
struct Lanes {
    static constexpr int CHUNKS = (V_WIDTH + 7) / 8;
    static constexpr int WIDTH = CHUNKS < 32 ? CHUNKS : 32;
    static constexpr int ROUNDS = (CHUNKS + WIDTH - 1) / WIDTH;  // chunks of a lane
    static constexpr int SETS = 32 / WIDTH < N_QUERIES ? 32 / WIDTH : N_QUERIES;
    static constexpr int SET_QUERIES = (N_QUERIES + SETS - 1) / SETS;
    static constexpr int PADDED = SETS * SET_QUERIES;  // queries, some of which may not exist

    // Of this lane's set; lanes beyond the last set do as it does.
    EI_DEV int first_query() {
        return min(threadIdx.x % 32 / WIDTH, SETS - 1u) * SET_QUERIES;
    }
};

// Queries in shared memory: floats, or blocks as keys in blocks are multiplied by.
template <int N_QUERIES, int WIDTH>
struct FloatQueries {
    float q[N_QUERIES][(WIDTH + 7) / 8 * 8];
};

template <int N_QUERIES, int WIDTH>
struct __align__(16) BlockQueries {
    static constexpr int BLOCKS = (WIDTH + 31) / 32;
    int8_t codes[N_QUERIES][32 * BLOCKS];
    float d[N_QUERIES][BLOCKS];
    int sums[N_QUERIES][BLOCKS];
};

template <bool IS_BLOCKS, int N_QUERIES, int WIDTH>
struct QueriesOf {
    typedef FloatQueries<N_QUERIES, WIDTH> Type;
};
template <int N_QUERIES, int WIDTH>
struct QueriesOf<true, N_QUERIES, WIDTH> {
    typedef BlockQueries<N_QUERIES, WIDTH> Type;
};

// A warp quantises a block of a query, of which each lane has a value: as x8.cuh does.
template <class T, int N_QUERIES, int WIDTH>
EI_DEV void load_block(
    BlockQueries<N_QUERIES, WIDTH>& queries, int query, int block, float x) {
    int bits = __float_as_int(fabsf(x));
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        bits = max(bits, __shfl_xor_sync(EI_ALL_LANES, bits, lanes));
    }
    const float largest = __int_as_float(bits);
    const bool is_small = largest < 1e-36f;
    const bool is_usual = !is_small && largest < EI_INFINITY;
    const int code = is_usual ? __float2int_rn(x * ei_div(127.0f, largest)) : 0;
    const int sum = ei_sum32(code);
    const int lane = threadIdx.x % 32;
    queries.codes[query][32 * block + T::place_of(lane)] = (int8_t)code;
    if (lane == 0) {
        queries.d[query][block] = is_small ? 0.0f : ei_div(largest, 127.0f);
        queries.sums[query][block] = sum;
    }
}

// A warp loads a query, or zeros where q is null.
template <class T, bool TRANSFORMS, int N_QUERIES, int WIDTH>
EI_DEV void load_query(BlockQueries<N_QUERIES, WIDTH>& queries, int query, const float* q) {
    for (int first = 0; first < WIDTH; first += 64) {
        const int i = first + threadIdx.x % 32;
        float x0 = q && i < WIDTH ? q[i] : 0.0f;
        float x1 = q && i + 32 < WIDTH ? q[i + 32] : 0.0f;
        if (TRANSFORMS) {
            hadamard64(x0, x1);
        }
        load_block<T>(queries, query, first / 32, x0);
        if (first + 32 < WIDTH) {
            load_block<T>(queries, query, first / 32 + 1, x1);
        }
    }
}

template <bool HAS_CAP, int N_QUERIES>
EI_DEV void scale_scores(float scale, float soft_cap, float (&scores)[N_QUERIES]) {
#pragma unroll
    for (int g = 0; g < N_QUERIES; ++g) {
        scores[g] = scores[g] * scale;
        if (HAS_CAP) {
            scores[g] = ei_soft_cap(scores[g], soft_cap);
        }
    }
}

// Scores of a page, a position a lane, each a chain over the values of its key. BATCH: 16-byte
// loads of a lane in flight.
template <class T, int BATCH, bool HAS_CAP, int N_QUERIES, int K_WIDTH>
EI_DEV void score_page(
    const FloatQueries<N_QUERIES, K_WIDTH>& queries, const uint8_t* k, float scale, float soft_cap,
    float (&scores)[N_QUERIES]) {
    const uint4* keys = (const uint4*)k + threadIdx.x % 32;
    constexpr int CHUNKS = (K_WIDTH + 7) / 8;
    constexpr int N = BATCH < CHUNKS ? BATCH : CHUNKS;
    constexpr bool ARE_WHOLE = K_WIDTH % (8 * N) == 0;
#pragma unroll
    for (int g = 0; g < N_QUERIES; ++g) {
        scores[g] = 0.0f;
    }
#pragma unroll 1
    for (int first = 0; first < CHUNKS; first += N) {
        uint4 loaded[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            loaded[i] = keys[min(first + i, CHUNKS - 1) * EI_PAGE];
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            float key[8];
            f16::unpack(loaded[i], key);
#pragma unroll
            for (int j = 0; j < 8 * N_QUERIES; ++j) {
                const int at = 8 * (first + i) + j % 8;
                if (ARE_WHOLE || at < K_WIDTH) {
                    scores[j / 8] = ei_fma(queries.q[j / 8][at], key[j % 8], scores[j / 8]);
                }
            }
        }
    }
    scale_scores<HAS_CAP>(scale, soft_cap, scores);
}

// The same of keys in blocks, each a chain over its blocks.
template <class T, int BATCH, bool HAS_CAP, int N_QUERIES, int K_WIDTH>
EI_DEV void score_page(
    const BlockQueries<N_QUERIES, K_WIDTH>& queries, const uint8_t* k, float scale, float soft_cap,
    float (&scores)[N_QUERIES]) {
    const int lane = threadIdx.x % 32;
    const uint4* keys = (const uint4*)k + lane;
    const uint16_t* scales = (const uint16_t*)(k + PageOf<T, K_WIDTH>::CODE_BYTES) + lane;
    constexpr int BLOCKS = PageOf<T, K_WIDTH>::BLOCKS;
    constexpr int MOST = BATCH / T::UNITS;
    constexpr int N = MOST < BLOCKS ? MOST : BLOCKS;
#pragma unroll
    for (int g = 0; g < N_QUERIES; ++g) {
        scores[g] = 0.0f;
    }
#pragma unroll 1
    for (int first = 0; first < BLOCKS; first += N) {
        uint4 loaded[N][T::UNITS];
        float d[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int block = min(first + i, BLOCKS - 1);
#pragma unroll
            for (int unit = 0; unit < T::UNITS; ++unit) {
                loaded[i][unit] = keys[(block * T::UNITS + unit) * EI_PAGE];
            }
            d[i] = ei_from_half(scales[block * EI_PAGE]);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int block = min(first + i, BLOCKS - 1);
#pragma unroll
            for (int g = 0; g < N_QUERIES; ++g) {
                const uint4* codes = (const uint4*)(queries.codes[g] + 32 * block);
                const int dot = T::dot(loaded[i], codes, queries.sums[g][block]);
                const float factor = queries.d[g][block] * d[i];
                if (BLOCKS % N == 0 || first + i < BLOCKS) {
                    scores[g] = ei_fma(factor, ei_to_float(dot), scores[g]);
                }
            }
        }
    }
    scale_scores<HAS_CAP>(scale, soft_cap, scores);
}

// A score to p, where its position is seen, and m and l of the page.
EI_DEV float soften(float score, bool is_seen, float* m, float* l) {
    *m = ei_max32(is_seen ? score : -EI_INFINITY);
    const float p = is_seen ? ei_exp(score - *m) : 0.0f;
    *l = ei_sum32(p);
    return p;
}

// p times the values of a page, positions ascending, of them only the ones that sees(query of the
// lane's set, position) says. BATCH: loads of a lane in flight. p: (32 positions, PADDED).
template <int V_WIDTH, int N_QUERIES, int BATCH, class T, typename Sees>
EI_DEV void add_values(
    const float (&p)[EI_PAGE][Lanes<V_WIDTH, N_QUERIES>::PADDED], const PageView<T>& v, Sees sees,
    float (&o)[Lanes<V_WIDTH, N_QUERIES>::ROUNDS][Lanes<V_WIDTH, N_QUERIES>::SET_QUERIES][8]) {
    typedef Lanes<V_WIDTH, N_QUERIES> L;
    const int first_query = L::first_query();
#pragma unroll
    for (int round = 0; round < L::ROUNDS; ++round) {
        const int chunk = min(threadIdx.x % 32 % L::WIDTH + round * L::WIDTH, L::CHUNKS - 1u);
#pragma unroll
        for (int j = 0; j < 8 * L::SET_QUERIES; ++j) {
            o[round][j / 8][j % 8] = 0.0f;
        }
#pragma unroll 1
        for (int first = 0; first < EI_PAGE; first += BATCH) {
            typename T::Chunk loaded[BATCH];
            float d[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                loaded[i] = *v.chunk(chunk, first + i);
                d[i] = T::IS_BLOCKS ? ei_from_half(v.scale(chunk, first + i)) : 1.0f;
            }
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                float value[8];
                T::unpack(loaded[i], value);
#pragma unroll
                for (int g = 0; g < L::SET_QUERIES; ++g) {
                    if (!sees(g, first + i)) {
                        continue;
                    }
                    float weight = p[first + i][first_query + g];
                    weight = T::IS_BLOCKS ? weight * d[i] : weight;
#pragma unroll
                    for (int e = 0; e < 8; ++e) {
                        o[round][g][e] = ei_fma(weight, value[e], o[round][g][e]);
                    }
                }
            }
        }
    }
}

// visit(query, value, round, g, e) for every value of a head that a lane has in o[round][g][e].
template <int V_WIDTH, int N_QUERIES, typename Visit>
EI_DEV void for_values(Visit visit) {
    typedef Lanes<V_WIDTH, N_QUERIES> L;
    const int lane = threadIdx.x % 32;
    const int first_query = lane / L::WIDTH * L::SET_QUERIES;
#pragma unroll
    for (int round = 0; round < L::ROUNDS; ++round) {
        const int first_value = 8 * (lane % L::WIDTH + round * L::WIDTH);
#pragma unroll
        for (int g = 0; g < L::SET_QUERIES; ++g) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                if (first_query + g < N_QUERIES && first_value + e < V_WIDTH) {
                    visit(first_query + g, first_value + e, round, g, e);
                }
            }
        }
    }
}

// Up to N parts of each of G queries, in shared memory, and m and l of what is folded so far.
template <int N, int G>
struct Folding {
    float m[N][G];
    float l[N][G];
    float state_scale[N][G];  // of what is folded when part i comes
    float part_scale[N][G];
    float top[G];
    float sum[G];
};

// Folds n parts, whose m and l are there, into what is folded; where that starts, it is the first
// part. part(i, item): value `item` of part i, of query g = item / V_WIDTH; a thread has those of
// o[j] for item = threadIdx.x + j * blockDim.x. All threads; with barriers.
template <int V_WIDTH, int N, int G, int ITEMS, typename Part>
EI_DEV void fold_parts(
    Folding<N, G>& fold, int n, bool starts, Part part, float (&o)[ITEMS]) {
    __syncthreads();
    for (int i = threadIdx.x; i < n * G; i += blockDim.x) {
        const int g = i % G;
        float before = starts ? fold.m[0][g] : fold.top[g];
        for (int earlier = 0; earlier < i / G; ++earlier) {
            before = fmaxf(before, fold.m[earlier][g]);
        }
        const float top = fmaxf(before, fold.m[i / G][g]);
        fold.state_scale[i / G][g] = ei_exp(before - top);
        fold.part_scale[i / G][g] = ei_exp(fold.m[i / G][g] - top);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) {
        const int item = threadIdx.x + j * blockDim.x;
        const int g = item / V_WIDTH;
        if (item < G * V_WIDTH) {
            o[j] = starts ? part(0, item) : o[j];
            for (int i = starts; i < n; ++i) {
                const float scaled = part(i, item) * fold.part_scale[i][g];
                o[j] = ei_fma(o[j], fold.state_scale[i][g], scaled);
            }
        }
    }
    for (int g = threadIdx.x; g < G; g += blockDim.x) {
        float top = starts ? fold.m[0][g] : fold.top[g];
        float sum = starts ? fold.l[0][g] : fold.sum[g];
        for (int i = starts; i < n; ++i) {
            top = fmaxf(top, fold.m[i][g]);
            sum = ei_fma(sum, fold.state_scale[i][g], fold.l[i][g] * fold.part_scale[i][g]);
        }
        fold.top[g] = top;
        fold.sum[g] = sum;
    }
    __syncthreads();
}

// What values are multiplied by at last: a sink's scale, then 1 / l.
struct Scales {
    float factor;
    float inverse;
};

// sink: a score that has no value, or null.
EI_DEV Scales last_scales(float m, float l, const float* sink) {
    Scales scales = {1.0f, 0.0f};
    if (sink) {
        const float top = fmaxf(m, *sink);
        scales.factor = ei_exp(m - top);
        l = ei_fma(l, scales.factor, ei_exp(*sink - top));
    }
    scales.inverse = ei_div(1.0f, l);
    return scales;
}
