// X8: rows of activations as matrices of blocks read them, 32 values as int8 and a scale.
// kernels/reference/blocks.py `quantise` is their arithmetic.
//
// A row of k values, k a multiple of 32, has room for c, the next multiple of 256: int8 [c], then
// float2 (d, d * float(sum)) [c / 32], then short2 (sum of the first 16, of the last 16) [c / 32],
// and 32 bytes: 256 columns can be read from anywhere in the row. What is behind k is anything.
#pragma once
#include "dev.cuh"

struct X8 {
    int8_t* q;
    float2* d;
    short2* sums;
};

EI_DEV size_t x8_bytes(int k) {
    return (size_t)((k + 255) / 256) * 352 + 32;
}

EI_DEV X8 x8_row(const uint8_t* rows, int row, int k) {
    const int n_columns = (k + 255) / 256 * 256;
    int8_t* q = (int8_t*)(rows + row * x8_bytes(k));
    float2* d = (float2*)(q + n_columns);
    short2* sums = (short2*)(d + n_columns / 32);
    return {q, d, sums};
}

EI_DEV X8 x8_from(const X8& row, int block) {
    return {row.q + 32 * block, row.d + block, row.sums + block};
}

// A warp quantises 128 columns from `first` on, four of them in each lane. What is past the last of
// k is not written. Where a value of a block is infinite or no number, so is d: 0 * d makes every
// sum that it enters NaN, as the reference has it.
EI_DEV void quantise_columns(const X8& row, int k, int first, const float (&values)[4]) {
    int bits = 0;  // as integers, floats without a sign are in order, and NaN above all
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        bits = max(bits, __float_as_int(fabsf(values[i])));
    }
    for (int lanes = 4; lanes > 0; lanes /= 2) {
        bits = max(bits, __shfl_xor_sync(EI_ALL_LANES, bits, lanes));
    }
    const float largest = __int_as_float(bits);
    const bool is_small = largest < 1e-36f;
    const bool is_finite = largest < __int_as_float(0x7f800000);
    const float inverse = ei_div(127.0f, largest);
    unsigned word = 0;
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int q = is_finite && !is_small ? __float2int_rn(values[i] * inverse) : 0;
        word |= (unsigned)(q & 255) << (8 * i);
        sum += q;
    }
    sum += __shfl_xor_sync(EI_ALL_LANES, sum, 1);
    sum += __shfl_xor_sync(EI_ALL_LANES, sum, 2);
    const int other = __shfl_xor_sync(EI_ALL_LANES, sum, 4);
    const int column = first + 4 * (threadIdx.x & 31);
    if (column >= k) {
        return;
    }
    *(unsigned*)(row.q + column) = word;
    if (column % 32 == 0) {
        const float d = is_small ? 0.0f : ei_div(largest, 127.0f);
        row.d[column / 32] = make_float2(d, d * ei_to_float(sum + other));
        row.sums[column / 32] = make_short2((short)sum, (short)other);
    }
}

// A warp quantises block `block` of a row, one value of it in each lane.
EI_DEV void quantise_block(const X8& row, int block, float value) {
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        values[i] = __shfl_sync(EI_ALL_LANES, value, 4 * (threadIdx.x & 7) + i);
    }
    quantise_columns(row, 32 * block + 32, 32 * block, values);
}
