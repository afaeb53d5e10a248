// Numbers of the sampler, bit for bit: edgeinfer/sampling/sampler.py, where they are explained.
// Of float64; knows no candidates.
#pragma once
#include "math.cuh"

#define EI_DOUBLE_INFINITY __longlong_as_double(0x7ff0000000000000LL)

constexpr double LN2_HIGH = 6.93147180369123816490e-01;
constexpr double LN2_LOW = 1.90821492927058770002e-10;
constexpr double LN2 = 0.6931471805599453;
constexpr double LOG2_E = 1.4426950408889634;

// e^x to 1e-11; 0 below -700, and no larger than at 700.
EI_DEV double exp_double(double x) {
    const double round = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
    double inside = x > -708.0 ? x : -708.0;
    inside = inside < 700.0 ? inside : 700.0;
    const double t = inside * LOG2_E + round;
    const double n = t - round;
    const double r = (inside - n * LN2_HIGH) - n * LN2_LOW;
    double p = 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 1.0 / 2.0;
    p = p * r + 1.0;
    p = p * r + 1.0;
    const uint64_t power = ((uint64_t)__double_as_longlong(t) << 52) + (1023ULL << 52);
    return x < -700.0 ? 0.0 : p * __longlong_as_double((long long)power);
}

// The natural logarithm of a positive number.
EI_DEV double log_double(double x) {
    const long long bits = __double_as_longlong(x);
    double e = (double)((bits >> 52) - 1023);
    double m = __longlong_as_double((bits & 0xfffffffffffffLL) | (1023LL << 52));
    if (m > 1.4142135623730951) {
        m = m * 0.5;
        e = e + 1.0;
    }
    const double s = ei_div(m - 1.0, m + 1.0);
    const double z = s * s;
    double p = 1.0 / 19.0;
    p = p * z + 1.0 / 17.0;
    p = p * z + 1.0 / 15.0;
    p = p * z + 1.0 / 13.0;
    p = p * z + 1.0 / 11.0;
    p = p * z + 1.0 / 9.0;
    p = p * z + 1.0 / 7.0;
    p = p * z + 1.0 / 5.0;
    p = p * z + 1.0 / 3.0;
    p = p * z + 1.0;
    return e * LN2_HIGH + (2.0 * s * p + e * LN2_LOW);
}

struct Uniforms {
    double draw;
    double chance;  // of XTC
};

EI_DEV double uniform_of(uint32_t a, uint32_t b) {
    return ((double)(a >> 5) * 67108864.0 + (double)(b >> 6)) * 0x1p-53;
}

// Two numbers in [0, 1) for the token at `index`: Philox4x32-10 (Salmon et al. 2011).
EI_DEV Uniforms uniforms_of(uint64_t seed, uint64_t index) {
    uint32_t c0 = (uint32_t)index;
    uint32_t c1 = (uint32_t)(index >> 32);
    uint32_t c2 = 0;
    uint32_t c3 = 0;
    uint32_t k0 = (uint32_t)seed;
    uint32_t k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = (uint64_t)c0 * 0xD2511F53u;
        const uint64_t b = (uint64_t)c2 * 0xCD9E8D57u;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {uniform_of(c0, c1), uniform_of(c2, c3)};
}

// A logit without NaN, +inf and -0: what is no candidate is -inf.
EI_DEV float clean_logit(float x) {
    x = x == x ? x + 0.0f : -EI_INFINITY;
    return x > EI_LARGEST ? EI_LARGEST : x;
}
