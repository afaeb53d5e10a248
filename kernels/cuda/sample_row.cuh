// How a token is picked: a row of the table in edgeinfer/sampling/params.py, field by field.
// On the device `history`, `bias_ids` and `bias_values` are indices into the step's words.
#pragma once
#include "dev.cuh"

struct SampleRow {
    double temperature;
    long long top_k;
    double top_p;
    double min_p;
    double typical_p;
    double top_n_sigma;
    double xtc_probability;
    double xtc_threshold;
    long long repeat_last_n;
    double repeat_penalty;
    double presence_penalty;
    double frequency_penalty;
    double dry_multiplier;
    double dry_base;
    long long dry_allowed_length;
    long long dry_penalty_last_n;
    double dynatemp_range;
    double dynatemp_exponent;
    long long mirostat;
    double mirostat_tau;
    double mirostat_eta;
    long long min_keep;
    long long breakers;
    long long n_breakers;
    long long bias_ids;
    long long bias_values;
    long long n_bias;
    long long n_logprobs;
    long long seed;
    long long index;
    long long history;
    long long n_history;
    double mu;
};
