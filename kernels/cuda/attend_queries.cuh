// The heads of one row as its attention takes them: as they are, or normed and turned first.
#pragma once
#include "attend_mma.cuh"
#include "heads.cuh"

// Those of q as they are to be read, one for pinned pages too. Or, where there are angles, products
// whose norms and rotation are still to be made, and what is to be stored.
struct Row {
    const float* q;  // from the block's first query head on
    const float* pinned_q;
    const float* k;  // of its kv head; null: nothing is stored
    const float* v;
    const float* q_norm;  // null: none
    const float* k_norm;
    float eps;
    const float2* angles;
    const float2* pinned_angles;
    int n_pairs;
    bool is_neox;

    __device__ __forceinline__ bool is_ready() const { return angles == nullptr; }

    // From the block's first query head on, for pages that are pinned or not.
    __device__ __forceinline__ const float* queries(bool is_pinned) const {
        return is_pinned && is_ready() ? pinned_q : q;
    }
};

// A warp has a head of x ready in shared memory.
EI_DEV void make_head(
    float* head, const float* x, const float* weight, int dim, const Row& row, bool is_pinned) {
    const float2* of_pairs = is_pinned ? row.pinned_angles : row.angles;
    const Angles angles = {of_pairs, row.n_pairs, row.is_neox};
    load_head(head, x, weight, row.eps, dim);
    turn_head(head, angles, dim, [&](int i, float value) { head[i] = value; });
    __syncwarp();
}

// The queries of a block of N_WARPS, of which the first n have heads; the others are zeros.
template <int N_WARPS, int N, int WIDTH, class T, bool TRANSFORMS>
EI_DEV void load_queries(
    FloatQueries<N, WIDTH>& queries, int n, float*, const Row& row, bool is_pinned) {
    const float* q = row.queries(is_pinned);
    if (row.is_ready()) {
        for (int i = threadIdx.x; i < N * WIDTH; i += 32 * N_WARPS) {
            const int g = i / WIDTH;
            queries.q[g][i % WIDTH] = g < n ? q[i] : 0.0f;
        }
        return;
    }
    for (int g = threadIdx.x / 32; g < N; g += N_WARPS) {
        if (g < n) {
            make_head(queries.q[g], q + g * WIDTH, row.q_norm, WIDTH, row, is_pinned);
        } else {
            for (int i = threadIdx.x % 32; i < WIDTH; i += 32) {
                queries.q[g][i] = 0.0f;
            }
        }
    }
}

// Likewise for keys of type T. `room`: a warp's own, for a head.
template <int N_WARPS, int N, int WIDTH, class T, bool TRANSFORMS, class Queries>
EI_DEV void load_queries(Queries& queries, int n, float* room, const Row& row, bool is_pinned) {
    for (int g = threadIdx.x / 32; g < N; g += N_WARPS) {
        const float* q = row.queries(is_pinned) + g * WIDTH;
        if (!row.is_ready() && g < n) {
            make_head(room, q, row.q_norm, WIDTH, row, is_pinned);
            q = room;
        }
        load_query<T, TRANSFORMS>(queries, g, g < n ? q : nullptr);
    }
}
