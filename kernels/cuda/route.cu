// Which experts a row goes to, and with which weights: kernels/reference/experts.py `choose`.
#include "math.cuh"

// Variants: GATING = softmax sigmoid sqrt_softplus raw
enum Gating { softmax, sigmoid, sqrt_softplus, raw };

constexpr float SMALLEST_SUM = 0x1p-14f;  // of weights that are divided by it: edgeinfer/ops.py

// A row is a warp's: value i is lane i % 32's.
EI_DEV void to_softmax(float* x, int n) {
    const int lane = threadIdx.x;
    float most = -EI_INFINITY;
    for (int i = lane; i < n; i += 32) {
        most = fmaxf(most, x[i]);
    }
    most = ei_max32(most);
    float sum = 0.0f;
    for (int i = lane; i < n; i += 32) {
        x[i] = ei_exp(x[i] - most);
        sum = sum + x[i];
    }
    sum = ei_sum32(sum);
    for (int i = lane; i < n; i += 32) {
        x[i] = ei_div(x[i], sum);
    }
}

EI_DEV void gate(float* x, int n) {
    if (GATING == softmax) {
        to_softmax(x, n);
    }
    for (int i = threadIdx.x; i < n; i += 32) {
        if (GATING == sigmoid) {
            x[i] = ei_sigmoid(x[i]);
        } else if (GATING == sqrt_softplus) {
            x[i] = ei_sqrt(ei_softplus(x[i]));
        }
    }
}

// Takes the place of the largest of n keys, the lowest of equals: its key is then EI_NOTHING.
EI_DEV int take_largest(int* keys, int n) {
    int best = EI_NOTHING;
    int place = n;
    for (int i = threadIdx.x; i < n; i += 32) {
        if (keys[i] > best) {
            best = keys[i];
            place = i;
        }
    }
    for (int step = 16; step > 0; step >>= 1) {
        const int other = __shfl_xor_sync(EI_ALL_LANES, best, step);
        const int other_place = __shfl_xor_sync(EI_ALL_LANES, place, step);
        if (other > best || (other == best && other_place < place)) {
            best = other;
            place = other_place;
        }
    }
    __syncwarp();
    if (threadIdx.x == 0) {
        keys[place] = EI_NOTHING;
    }
    __syncwarp();
    return place;
}

// A group's key: of the sum of its two largest scores, of which none is NaN.
EI_DEV int group_key(const float* scores, int size) {
    float first = -EI_INFINITY;
    float second = -EI_INFINITY;
    for (int i = 0; i < size; ++i) {
        if (scores[i] > first) {
            second = first;
            first = scores[i];
        } else if (scores[i] > second) {
            second = scores[i];
        }
    }
    return ei_order(first + second);
}

// Leaves keys only to the experts of the groups that are used.
EI_DEV void keep_groups(
    const float* scores, int* keys, int* group_keys, int n_experts, int n_groups, int n_used) {
    const int size = n_experts / n_groups;
    for (int group = threadIdx.x; group < n_groups; group += 32) {
        group_keys[group] = group_key(scores + group * size, size);
    }
    __syncwarp();
    for (int i = 0; i < n_used; ++i) {
        take_largest(group_keys, n_groups);
    }
    for (int i = threadIdx.x; i < n_experts; i += 32) {
        if (group_keys[i / size] != EI_NOTHING) {
            keys[i] = EI_NOTHING;
        }
    }
    __syncwarp();
}

// Grid: (1, rows), 32 threads, 4 * (3 * n_experts + n_groups) bytes of shared memory.
// x: float (row, n_experts); bias: float (n_experts,) or null; out: float (row, 2 * n_used), the
// numbers of the chosen, then their weights. The groups that are used hold n_used experts or more,
// each two or more; n_groups 1: none. norm 1: weights are divided by their sum.
EI_KERNEL(32) route(
    const Step* step, const float* x, int x_stride, const float* bias, float* out, int out_stride,
    int n_experts, int n_used, int n_groups, int n_groups_used, int norm, float scale) {
    EI_DYN_SHARED(float, p);
    float* scores = p + n_experts;
    int* keys = (int*)(scores + n_experts);
    const int row = blockIdx.y;
    const int lane = threadIdx.x;
    if (row >= ei_rows(step, 0) || ei_aborted(step)) {
        return;
    }
    for (int i = lane; i < n_experts; i += 32) {
        p[i] = x[(size_t)row * x_stride + i];
    }
    gate(p, n_experts);
    for (int i = lane; i < n_experts; i += 32) {
        scores[i] = bias ? p[i] + bias[i] : p[i];
        keys[i] = ei_order(scores[i]);
    }
    __syncwarp();
    if (n_groups > 1) {
        keep_groups(scores, keys, keys + n_experts, n_experts, n_groups, n_groups_used);
    }
    out += (size_t)row * out_stride;
    float* weights = scores;  // which are done with
    for (int i = 0; i < n_used; ++i) {
        const int expert = take_largest(keys, n_experts);
        if (lane == 0) {
            out[i] = (float)expert;
            weights[i] = p[expert];
        }
    }
    __syncwarp();
    if (GATING == raw) {
        to_softmax(weights, n_used);
        __syncwarp();
    }
    float total = 1.0f;
    if (norm) {
        total = weights[0];
        for (int i = 1; i < n_used; ++i) {
            total = total + weights[i];
        }
        total = total < SMALLEST_SUM ? SMALLEST_SUM : total;  // NaN stays
    }
    for (int i = lane; i < n_used; i += 32) {
        out[n_used + i] = ei_div(weights[i], total) * scale;
    }
}
