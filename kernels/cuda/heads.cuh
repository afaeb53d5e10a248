// Heads of q and k as attention reads them: normed, and turned by the angles of a position.
#pragma once
#include "dev.cuh"

// Cosine and sine of each pair of a head's values.
struct Angles {
    const float2* of_pairs;
    int n_pairs;
    bool is_neox;  // values i and i + n_pairs are a pair; else 2i and 2i + 1
};

// A warp's head of x, times its norm's weights where there are any, into shared memory.
EI_DEV void load_head(float* head, const float* x, const float* weight, float eps, int dim) {
    const int lane = threadIdx.x % 32;
    float sum = 0.0f;
    for (int i = lane; i < dim; i += 32) {
        head[i] = x[i];
        sum = ei_fma(x[i], x[i], sum);
    }
    sum = ei_sum32(sum);
    if (weight) {
        const float scale = ei_div(1.0f, ei_sqrt(ei_div(sum, ei_to_float(dim)) + eps));
        for (int i = lane; i < dim; i += 32) {
            head[i] = (head[i] * scale) * weight[i];
        }
    }
    __syncwarp();
}

// A warp's head turned: write(i, value) takes it, a pair once both were read.
template <typename Write>
EI_DEV void turn_head(const float* head, const Angles& angles, int dim, Write write) {
    const int lane = threadIdx.x % 32;
    for (int i = lane; i < angles.n_pairs; i += 32) {
        const int first = angles.is_neox ? i : 2 * i;
        const int second = angles.is_neox ? i + angles.n_pairs : 2 * i + 1;
        const float2 angle = angles.of_pairs[i];
        const float x0 = head[first];
        const float x1 = head[second];
        write(first, ei_fma(x0, angle.x, -(x1 * angle.y)));
        write(second, ei_fma(x0, angle.y, x1 * angle.x));
    }
    for (int i = 2 * angles.n_pairs + lane; i < dim; i += 32) {
        write(i, head[i]);
    }
}
