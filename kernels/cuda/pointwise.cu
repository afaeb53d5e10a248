// Ops that make each value of a row of one or two others in the same place.
#include "await.cuh"
#include "math.cuh"
#include "x8.cuh"

// Variants: KIND = add mul swiglu scale soft_cap clamp silu gelu sigmoid softplus relu2
enum Kind { add, mul, swiglu, scale, soft_cap, clamp, silu, gelu, sigmoid, softplus, relu2 };

// NaN stays, and so does what is equal to a bound, with the sign of a zero.
EI_DEV float clamped(float x, float low, float high) {
    const float raised = x < low ? low : x;
    return raised > high ? high : raised;
}

// Only kinds of two operands read b.
EI_DEV float apply(float a, const float* b, float first, float second) {
    switch (KIND) {
        case add:
            return a + *b;
        case mul:
            return a * *b;
        case swiglu:
            return ei_silu(a) * *b;
        case scale:
            return a * first;
        case soft_cap:
            return ei_soft_cap(a, first);
        case clamp:
            return clamped(a, first, second);
        case silu:
            return ei_silu(a);
        case gelu:
            return ei_gelu(a);
        case sigmoid:
            return ei_sigmoid(a);
        case softplus:
            return ei_softplus(a);
        default:
            return ei_relu2(a);
    }
}

constexpr int THREADS = 256;
constexpr int EACH = 4;  // values of a thread

// Grid: (dim / 1024, rows), 256 threads. rows: as ei_rows counts them.
// a, b, out: float (row, dim), rows so many floats apart; b_stride 0: a vector for all rows; out
// may be a or b. Kinds of one operand take any b, a itself for one. x8: the same quantised, of a dim
// that is a multiple of 32. out and x8 may each be null.
// first: factor of scale, cap of soft_cap, low bound of clamp, whose high one is second.
EI_KERNEL(256) pointwise(
    const Step* step, const float* a, int a_stride, const float* b, int b_stride, float* out,
    int out_stride, uint8_t* x8, int dim, int rows, float first, float second) {
    EI_AWAIT_INPUT();
    const int row = blockIdx.y;
    if (row >= ei_rows(step, rows) || ei_aborted(step)) {
        return;
    }
    a += (size_t)row * a_stride;
    b += (size_t)row * b_stride;
    const X8 blocks = x8_row(x8, row, dim);
#pragma unroll
    for (int each = 0; each < EACH; ++each) {
        const int i = (blockIdx.x * EACH + each) * THREADS + threadIdx.x;
        if (i < dim) {
            const float value = apply(a[i], b + i, first, second);
            if (out) {
                out[(size_t)row * out_stride + i] = value;
            }
            if (x8) {  // then a warp is one block of 32
                quantise_block(blocks, i / 32, value);
            }
        }
    }
}
