// What the attention kernels share: scores and values of a page, and folding parts in order.
// A part is attention over some positions: maximum m, sum l of exp(score - m), and those times V,
// o. Folds run from left to right and start from their first member.
#pragma once
#include "math.cuh"
#include "pages.cuh"

// Floats of a part in memory: o, then m and l.
#define EI_PART(v_dim) (((v_dim) + 3) / 4 * 4 + 4)

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
};

// 8 halves as they lie in memory.
EI_DEV void unpack(uint4 halves, float (&x)[8]) {
    const unsigned words[4] = {halves.x, halves.y, halves.z, halves.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = ei_from_half((uint16_t)(words[i] & 0xffffu));
        x[2 * i + 1] = ei_from_half((uint16_t)(words[i] >> 16));
    }
}

// Scores of a page, a position a lane, each a chain over the values of its key.
// q: (N_QUERIES, STRIDE); k: halves (ceil(K_WIDTH / 8), 32 positions, 8).
template <int K_WIDTH, bool HAS_CAP, int N_QUERIES, int STRIDE>
EI_DEV void score_page(
    const float (&q)[N_QUERIES][STRIDE], const uint16_t* k, float scale, float soft_cap,
    float (&scores)[N_QUERIES]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int g = 0; g < N_QUERIES; ++g) {
        scores[g] = 0.0f;
    }
#pragma unroll 4
    for (int j = 0; j < K_WIDTH; j += 8) {
        float key[8];
        unpack(*(const uint4*)(k + (j / 8 * EI_PAGE + lane) * 8), key);
#pragma unroll
        for (int g = 0; g < N_QUERIES; ++g) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (j + i < K_WIDTH) {
                    scores[g] = ei_fma(q[g][j + i], key[i], scores[g]);
                }
            }
        }
    }
#pragma unroll
    for (int g = 0; g < N_QUERIES; ++g) {
        scores[g] = scores[g] * scale;
        if (HAS_CAP) {
            scores[g] = ei_soft_cap(scores[g], soft_cap);
        }
    }
}

// A score to p, where its position is seen, and m and l of the page.
EI_DEV float soften(float score, bool is_seen, float* m, float* l) {
    *m = ei_max32(is_seen ? score : -EI_INFINITY);
    const float p = is_seen ? ei_exp(score - *m) : 0.0f;
    *l = ei_sum32(p);
    return p;
}

// p times the values of a page, positions ascending: those from first to end - 1, and of them only
// the ones that sees(query of the lane's set, position) says.
// p: (32 positions, PADDED); v: the halves of chunk c of position i lie at c * chunk + i * position.
template <int V_WIDTH, int N_QUERIES, typename Sees>
EI_DEV void add_values(
    const float (&p)[EI_PAGE][Lanes<V_WIDTH, N_QUERIES>::PADDED], const uint16_t* v, int chunk_stride,
    int position_stride, int first, int end, Sees sees,
    float (&o)[Lanes<V_WIDTH, N_QUERIES>::ROUNDS][Lanes<V_WIDTH, N_QUERIES>::SET_QUERIES][8]) {
    typedef Lanes<V_WIDTH, N_QUERIES> L;
    const int lane = threadIdx.x % 32;
    // Lanes beyond the last set do as the last one.
    const int first_query = min(lane / L::WIDTH, L::SETS - 1) * L::SET_QUERIES;
#pragma unroll
    for (int round = 0; round < L::ROUNDS; ++round) {
        const int chunk = min(lane % L::WIDTH + round * L::WIDTH, L::CHUNKS - 1);
        float(&sums)[L::SET_QUERIES][8] = o[round];
#pragma unroll
        for (int g = 0; g < L::SET_QUERIES; ++g) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                sums[g][e] = 0.0f;
            }
        }
#pragma unroll 4
        for (int i = first; i < end; ++i) {
            float value[8];
            unpack(*(const uint4*)(v + chunk * chunk_stride + i * position_stride), value);
#pragma unroll
            for (int g = 0; g < L::SET_QUERIES; ++g) {
                if (!sees(g, i)) {
                    continue;
                }
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    sums[g][e] = ei_fma(p[i][first_query + g], value[e], sums[g][e]);
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

// Up to N parts of each of G queries, in shared memory, and what their folds give so far.
template <int N, int G>
struct Folding {
    float m[N][G];
    float l[N][G];
    float state_scale[N][G];  // of what is folded when part i comes
    float part_scale[N][G];
    float top[G];  // m and l of what is folded
    float sum[G];
};

// What the first n parts and what is folded are scaled by. All threads; barriers around it.
template <int N, int G>
EI_DEV void fold_scales(Folding<N, G>& fold, int n, bool starts) {
    for (int i = threadIdx.x; i < n * G; i += blockDim.x) {
        const int part = i / G;
        const int g = i % G;
        float before = starts ? fold.m[0][g] : fold.top[g];
        for (int earlier = 0; earlier < part; ++earlier) {
            before = fmaxf(before, fold.m[earlier][g]);
        }
        const float top = fmaxf(before, fold.m[part][g]);
        fold.state_scale[part][g] = ei_exp(before - top);
        fold.part_scale[part][g] = ei_exp(fold.m[part][g] - top);
    }
}

// m and l of the first n parts folded into what is folded. All threads; behind a barrier.
template <int N, int G>
EI_DEV void fold_sums(Folding<N, G>& fold, int n, bool starts) {
    for (int g = threadIdx.x; g < G; g += blockDim.x) {
        float top = starts ? fold.m[0][g] : fold.top[g];
        float sum = starts ? fold.l[0][g] : fold.sum[g];
        for (int part = starts; part < n; ++part) {
            top = fmaxf(top, fold.m[part][g]);
            const float added = fold.l[part][g] * fold.part_scale[part][g];
            sum = ei_fma(sum, fold.state_scale[part][g], added);
        }
        fold.top[g] = top;
        fold.sum[g] = sum;
    }
}

// A value of part `part` folded into that of what is folded.
template <int N, int G>
EI_DEV float fold_value(
    const Folding<N, G>& fold, int part, int g, bool starts, float o, float x) {
    if (starts && part == 0) {
        return x;
    }
    return ei_fma(o, fold.state_scale[part][g], x * fold.part_scale[part][g]);
}
