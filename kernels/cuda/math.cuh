// Functions of float32 values: kernels/reference/functions.py, bit for bit.
// The order of every operation is part of the numerics. Knows no kernel.
#pragma once
#include "dev.cuh"

#define EI_INFINITY __int_as_float(0x7f800000)
#define EI_LARGEST __int_as_float(0x7f7fffff)  // float below infinity
#define EI_NOTHING ((int)0x80000000u)

// e^x with x clamped to [-87.3, 88.3], 0 below; NaN stays NaN.
EI_DEV float ei_exp(float x) {
    const float lowest = -87.3f;
    const float highest = 88.3f;
    float clamped = x < lowest ? lowest : x;  // both comparisons are false for NaN
    clamped = clamped > highest ? highest : clamped;
    // Added to 1.5 * 2^23 a small float is rounded to an integer, which the low bits then hold.
    const float shifted = clamped * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    float r = ei_fma(n, -0.693359375f, clamped);
    r = ei_fma(n, 2.12194440e-4f, r);
    float p = ei_fma(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = ei_fma(p, r, 8.3334519073e-3f);
    p = ei_fma(p, r, 4.1665795894e-2f);
    p = ei_fma(p, r, 1.6666665459e-1f);
    p = ei_fma(p, r, 5.0000001201e-1f);
    p = ei_fma(p, r * r, r) + 1.0f;
    const unsigned power = ((unsigned)__float_as_int(shifted) << 23) + 0x3f800000u;
    return x < lowest ? 0.0f : p * __int_as_float((int)power);
}

// A polynomial below 0.625, else 1 - 2 / (e^2|x| + 1) with the sign of x.
EI_DEV float ei_tanh(float x) {
    const float z = x * x;
    const float size = x < 0.0f ? -x : x;
    if (size < 0.625f) {
        float p = ei_fma(-5.70498872745e-3f, z, 2.06390887954e-2f);
        p = ei_fma(p, z, -5.37397155531e-2f);
        p = ei_fma(p, z, 1.33314422036e-1f);
        p = ei_fma(p, z, -3.33332819422e-1f);
        return ei_fma(p * z, x, x);
    }
    const float large = 1.0f - ei_div(2.0f, ei_exp(size + size) + 1.0f);
    return x < 0.0f ? -large : large;
}

EI_DEV float ei_sigmoid(float x) {
    return ei_div(1.0f, ei_exp(-x) + 1.0f);
}

EI_DEV float ei_silu(float x) {
    return ei_div(x, ei_exp(-x) + 1.0f);
}

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))).
EI_DEV float ei_gelu(float x) {
    const float w = ei_fma(x * x, 0.044715f, 1.0f);
    return (x * 0.5f) * (ei_tanh((x * 0.79788456f) * w) + 1.0f);
}

// log(1 + e^x) as max(x, 0) + 2 atanh(u / (2 + u)), u = e^-|x|.
EI_DEV float ei_softplus(float x) {
    const float u = ei_exp(x < 0.0f ? x : -x);
    const float s = ei_div(u, u + 2.0f);
    const float z = s * s;
    float p = ei_fma((float)(1.0 / 15), z, (float)(1.0 / 13));
    p = ei_fma(p, z, (float)(1.0 / 11));
    p = ei_fma(p, z, (float)(1.0 / 9));
    p = ei_fma(p, z, (float)(1.0 / 7));
    p = ei_fma(p, z, (float)(1.0 / 5));
    p = ei_fma(p, z, (float)(1.0 / 3));
    p = ei_fma(p, z, 1.0f);
    return (x > 0.0f ? x : 0.0f) + (s + s) * p;
}

// The square of what is above 0.
EI_DEV float ei_relu2(float x) {
    const float y = x > 0.0f ? x : 0.0f;
    return y * y;
}

// cap * tanh(x / cap).
EI_DEV float ei_soft_cap(float x, float cap) {
    return ei_tanh(ei_div(x, cap)) * cap;
}

// Sine and cosine of a double, |x| up to 1e13: kernels/cpu/native/math.py, where it is explained.
EI_DEV void ei_sincos(double x, double* sine, double* cosine) {
    const double p1 = 1.5707963267948966;
    const double p2 = 6.123233995736766e-17;
    const double p3 = -1.4973849048591833e-33;
    const double n = ei_rint(x * 0.6366197723675814);
    const double r = ei_fma(-n, p1, x);
    const double t = n * p2;
    const double high = r - t;
    const double back = high - r;
    double low = (r - (high - back)) - (t + back);
    low = low - ei_fma(n, p2, -t) - n * p3;
    const double y = high + low;
    const double tail = (high - y) + low;
    const double z = y * y;
    const double cube = z * y;
    double s = 2.75573137070700676789e-06
        + z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10);
    s = 8.33333333332248946124e-03 + z * (-1.98412698298579493134e-04 + z * s);
    s = y - ((z * (0.5 * tail - cube * s) - tail) - cube * -1.66666666666666324348e-01);
    const double w = z * z;
    double c = -1.38888888888741095749e-03 + z * 2.48015872894767294178e-05;
    c = z * (4.16666666666666019037e-02 + z * c)
        + w * w * (-2.75573143513906633035e-07
            + z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11));
    const double half = 0.5 * z;
    const double whole = 1.0 - half;
    c = whole + (((1.0 - whole) - half) + (z * c - y * tail));
    const int quadrant = (int)((long long)n & 3);
    const bool is_odd = quadrant & 1;
    *sine = quadrant & 2 ? -(is_odd ? c : s) : (is_odd ? c : s);
    *cosine = (quadrant + 1) & 2 ? -(is_odd ? s : c) : (is_odd ? s : c);
}

// An int that is ordered as the float is; NaN as -inf, -0 as 0. All are above EI_NOTHING.
EI_DEV int ei_order(float x) {
    const int bits = __float_as_int(x == x ? x + 0.0f : -EI_INFINITY);
    return bits < 0 ? (int)(0x80000000u - (unsigned)bits) : bits;
}
