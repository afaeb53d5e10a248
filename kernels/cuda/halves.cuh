// Rows of activations as halves, for products of tensor cores ("fast" numerics): each divided by a
// power of two, so that its largest value lies between 1 and 2 and no row is too large for halves.
//
// A row of k values has room for c, the next multiple of 32: half [c], of each 32 columns those of
// k % 4 = 0, then 1, 2 and 3, zeros behind k; then a float, what the row was divided by, in 16
// bytes. So lanes have the columns that they have of a matrix of floats: see tiles.cuh.
#pragma once
#include "dev.cuh"

EI_DEV size_t half_row_bytes(int k) {
    return (size_t)((k + 31) / 32) * 64 + 16;
}

EI_DEV float* half_row_size(const uint8_t* row, int k) {
    return (float*)(row + half_row_bytes(k) - 16);
}

// The power of two that is not above |x|, within what can be divided by.
EI_DEV float size_of(float x) {
    const int exponent = __float_as_int(x) >> 23 & 255;
    return __int_as_float(min(max(exponent, 1), 253) << 23);
}
