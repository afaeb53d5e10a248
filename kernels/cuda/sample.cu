// Picks the next token of every wanted row: edgeinfer/sampling/sampler.py, id for id, bit for bit.
// All but DRY and log probabilities; typical_p of few candidates only. See samples.py.
#include "candidates.cuh"
#include "sample_row.cuh"

constexpr double SMALLEST_TEMPERATURE = 1e-30;

// -- logits that are changed one by one --

// Changes a logit, unless it is no candidate's; a finite one stays finite.
EI_DEV void set_logit(float* logits, int token, double x) {
    if (clean_logit(logits[token]) > -EI_INFINITY) {
        x = x < EI_LARGEST ? x : EI_LARGEST;
        x = x > -EI_LARGEST ? x : -EI_LARGEST;
        logits[token] = (float)x;
    }
}

// Tokens of a row differ.
EI_DEV void add_bias(const SampleRow* p, const int* words, float* logits, int n_vocab) {
    for (int i = threadIdx.x; i < p->n_bias; i += SAMPLE_THREADS) {
        const int token = words[p->bias_ids + i];
        const float bias = __int_as_float(words[p->bias_values + i]);
        if (token < n_vocab) {
            set_logit(logits, token, (double)clean_logit(logits[token]) + (double)bias);
            if (bias == -EI_INFINITY) {
                logits[token] = bias;
            }
        }
    }
    __syncthreads();
}

// The latest tokens before this one: the newest is the one that the step before has picked, if this
// step was begun before anybody knew which.
struct History {
    const int* tokens;
    int n;
    bool is_newest_picked;
    int picked;
};

// Those that penalties are for.
EI_DEV History history_of(const SampleRow* p, const int* words, bool goes_on, int picked) {
    const long long most = p->repeat_last_n < 0 ? p->n_history : p->repeat_last_n;
    const int n = (int)min(most, p->n_history);
    return {words + p->history + (p->n_history - n), n, goes_on, picked};
}

EI_DEV int history_at(const History& history, int i) {
    return history.is_newest_picked && i == history.n - 1 ? history.picked : history.tokens[i];
}

// How often the token at i is there, 0 where it is there before i.
EI_DEV int count_at(const History& history, int i) {
    const int token = history_at(history, i);
    int n = 0;
    for (int j = 0; j < history.n; ++j) {
        const bool is_same = history_at(history, j) == token;
        if (is_same && j < i) {
            return 0;
        }
        n += is_same;
    }
    return n;
}

EI_DEV void penalise(const SampleRow* p, const History& history, float* logits, int n_vocab) {
    for (int i = threadIdx.x; i < history.n; i += SAMPLE_THREADS) {
        const int token = history_at(history, i);
        const int n = token >= 0 && token < n_vocab ? count_at(history, i) : 0;
        if (n > 0) {
            double x = (double)clean_logit(logits[token]);
            x = x <= 0.0 ? x * p->repeat_penalty : ei_div(x, p->repeat_penalty);
            x = x - ((double)n * p->frequency_penalty + p->presence_penalty);
            set_logit(logits, token, x);
        }
    }
    __syncthreads();
}

// -- the chain --

EI_DEV double inverse_temperature(double x) {
    return ei_div(1.0, x > SMALLEST_TEMPERATURE ? x : SMALLEST_TEMPERATURE);
}

// exp((logit - largest) / temperature).
struct Weight {
    double largest;
    double inverse;

    __device__ __forceinline__ double operator()(double logit) const {
        return exp_double((logit - largest) * inverse);
    }
};

EI_DEV double total_weight(Candidates& c, double inverse) {
    return sum_candidates(c, Weight{c.largest, inverse});
}

EI_DEV void top_n_sigma(Candidates& c, double n_sigma) {
    const double n = (double)c.n;
    const double mean = ei_div(sum_vocabulary(c, [](double x) { return x; }), n);
    const double squares =
        sum_vocabulary(c, [&](double x) { return (x - mean) * (x - mean); });
    const double limit = c.largest - n_sigma * ei_sqrt(ei_div(squares, n));
    keep(c, count_first(c, [&](double x) { return x >= limit; }));
}

EI_DEV void top_p(Candidates& c, double p, long long min_keep) {
    const double target = p * total_weight(c, 1.0);
    const Walk w = walk(c, Weight{c.largest, 1.0}, at_least, target, min_keep);
    keep(c, w.reached < 0 ? c.n : w.reached + 1);
}

EI_DEV void min_p(Candidates& c, double p, long long min_keep) {
    const double limit = c.largest + log_double(p);
    const int n = count_first(c, [&](double x) { return x >= limit; });
    keep(c, (int)max((long long)n, max(min((long long)c.n, min_keep), 1LL)));
}

EI_DEV void xtc(Candidates& c, double threshold, long long min_keep) {
    const Weight weight = {c.largest, 1.0};
    const double limit = threshold * sum_candidates(c, weight);
    const int last = count_first(c, [&](double x) { return weight(x) >= limit; }) - 1;
    if (last > 0 && c.n - last >= min_keep) {
        drop(c, last);
    }
}

struct Entropy {
    double mean;
    double total;  // of weights
};

EI_DEV Entropy entropy_of(Candidates& c) {
    const Weight weight = {c.largest, 1.0};
    const double total = sum_candidates(c, weight);
    const double products =
        sum_candidates(c, [&](double x) { return weight(x) * (x - weight.largest); });
    return {log_double(total) - ei_div(products, total), total};
}

// Locally typical sampling (Meister et al. 2022), of no more than WEIGHTS candidates.
EI_DEV void typical(Candidates& c, double p, long long min_keep) {
    const Entropy entropy = entropy_of(c);
    const double log_total = log_double(entropy.total);
    SampleRoom* room = c.room;
    sort_to(c, c.n);
    long long* distances = room->keys;  // ordered as the doubles are, which are 0 or more
    long long* ranks = room->keys + WEIGHTS;
    for (int i = threadIdx.x; i < c.n; i += SAMPLE_THREADS) {
        const double off = (log_total - scaled_at(c, i, 1.0)) - entropy.mean;
        distances[i] = __double_as_longlong(off < 0.0 ? -off : off + 0.0);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < c.n; i += SAMPLE_THREADS) {
        int rank = 0;
        for (int j = 0; j < c.n; ++j) {
            rank += distances[j] < distances[i] || (distances[j] == distances[i] && j < i);
        }
        ranks[i] = rank;
        room->weights[rank] = exp_double(scaled_at(c, i, 1.0));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        const double limit = p * entropy.total;
        double sum = 0.0;
        int n = 0;
        while (n < c.n && !(sum > limit && n >= min_keep)) {
            sum = sum + room->weights[n];
            ++n;
        }
        int n_kept = 0;
        for (int i = 0; i < c.n; ++i) {
            if (ranks[i] < n) {
                c.order[n_kept] = c.order[i];
                ++n_kept;
            }
        }
        room->found = n_kept;
    }
    __syncthreads();
    keep(c, room->found);
    c.largest = logit_at(c, 0);
    __syncthreads();
}

EI_DEV double dynamic_temperature(Candidates& c, const SampleRow* p) {
    const double share = ei_div(entropy_of(c).mean, log_double((double)c.n));
    const double below = p->temperature - p->dynatemp_range;
    const double lowest = below > 0.0 ? below : 0.0;
    const double highest = p->temperature + p->dynatemp_range;
    double power = p->dynatemp_exponent == 0.0 ? 1.0 : 0.0;
    if (share > 0.0) {
        power = exp_double(p->dynatemp_exponent * log_double(share));
    }
    return lowest + (highest - lowest) * power;
}

// The first whose running sum exceeds draw * total; the last with any weight if none does.
EI_DEV int draw_from(Candidates& c, double inverse, double total, double draw) {
    const Walk w = walk(c, Weight{c.largest, inverse}, above, draw * total, 0);
    return w.reached < 0 ? w.positive : w.reached;
}

EI_DEV int pick(Candidates& c, const SampleRow* p) {
    const Uniforms random = uniforms_of((uint64_t)p->seed, (uint64_t)p->index);
    if (p->top_n_sigma > 0.0 && c.n > 1) {
        top_n_sigma(c, p->top_n_sigma);
    }
    if (p->top_k > 0 && p->top_k < c.n_vocab) {
        keep(c, (int)p->top_k);
    }
    if (p->typical_p < 1.0) {
        typical(c, p->typical_p, p->min_keep);
    }
    if (p->top_p < 1.0) {
        top_p(c, p->top_p, p->min_keep);
    }
    if (p->min_p > 0.0) {
        min_p(c, p->min_p, p->min_keep);
    }
    const bool excludes = p->xtc_probability > 0.0 && random.chance <= p->xtc_probability;
    if (excludes && p->xtc_threshold <= 0.5) {
        xtc(c, p->xtc_threshold, p->min_keep);
    }
    double temperature = p->temperature;
    if (p->dynatemp_range > 0.0 && c.n > 1) {
        temperature = dynamic_temperature(c, p);
    }
    int i = 0;
    if (temperature > 0.0) {
        const double inverse = inverse_temperature(temperature);
        i = draw_from(c, inverse, total_weight(c, inverse), random.draw);
    }
    sort_to(c, i + 1);
    return c.order[i];
}

// -- mirostat 1 and 2 (Basu et al. 2021) --

// How many candidates to keep, from Zipf's exponent estimated on the first 100.
EI_DEV int zipf_count(Candidates& c, double inverse, double mu) {
    sort_to(c, 100);
    double products = 0.0;
    double squares = 0.0;
    for (int i = 0; i < min(99, c.n - 1); ++i) {
        const double t = log_double(ei_div((double)i + 2.0, (double)i + 1.0));
        products = products + t * (scaled_at(c, i, inverse) - scaled_at(c, i + 1, inverse));
        squares = squares + t * t;
    }
    if (!(products > 0.0)) {
        return c.n;
    }
    const double s = ei_div(products, squares);
    const double epsilon = s - 1.0;
    const double wanted = epsilon * exp_double(mu * LN2);
    const double below = 1.0 - exp_double(-epsilon * log_double((double)c.n_vocab));
    const double ratio = ei_div(wanted, below);
    if (below == 0.0 || !(ratio > 0.0 && ratio < 1e300)) {
        return c.n;
    }
    const double k = exp_double(ei_div(log_double(ratio), s));
    return k >= (double)c.n ? c.n : max(1, (int)k);
}

EI_DEV int mirostat(Candidates& c, const SampleRow* p, double* mu) {
    const double inverse = inverse_temperature(p->temperature);
    int n = 0;
    if (p->mirostat == 1) {
        n = zipf_count(c, inverse, *mu);
    } else {
        const double log_total = log_double(total_weight(c, inverse));
        n = count_first(c, [&](double x) {
            return (log_total - (x - c.largest) * inverse) * LOG2_E <= *mu;
        });
    }
    keep(c, max(1, n));
    const double total = total_weight(c, inverse);
    const Uniforms random = uniforms_of((uint64_t)p->seed, (uint64_t)p->index);
    const int i = draw_from(c, inverse, total, random.draw);
    const double surprise = (log_double(total) - scaled_at(c, i, inverse)) * LOG2_E;
    *mu = *mu - p->mirostat_eta * (surprise - p->mirostat_tau);
    return c.order[i];
}

// Grid: (1, wanted rows), 512 threads. logits: float (wanted row, n_vocab), which are changed.
// rows: how each token is picked; words: what they refer to. Where *goes_on is set, the newest
// token before a row's and its mu are those in ids and mu, which the step before has left there.
// order: int (wanted row, n_vocab), of no content before or after. status: see argmax.cu.
EI_KERNEL(512, 1) sample(
    const Step* step, float* logits, int logits_stride, int n_vocab, const SampleRow* rows,
    const int* words, const int* goes_on, int* order, int* ids, int* status, double* mu) {
    EI_SHARED(SampleRoom, room, [1]);
    const int row = blockIdx.y;
    if (row >= ei_rows(step, 1) || ei_aborted(step)) {
        return;
    }
    logits += (size_t)row * logits_stride;
    const SampleRow* p = rows + row;
    add_bias(p, words, logits, n_vocab);
    penalise(p, history_of(p, words, *goes_on != 0, ids[row]), logits, n_vocab);
    double next_mu = *goes_on != 0 ? mu[row] : p->mu;
    Candidates c = open_candidates(logits, n_vocab, order + (size_t)row * n_vocab, room);
    int token = token_of(c.last - 1);
    if (c.n > 0 && p->temperature > 0.0) {
        token = p->mirostat != 0 ? mirostat(c, p, &next_mu) : pick(c, p);
    }
    if (threadIdx.x == 0) {
        ids[row] = c.n > 0 ? token : 0;
        status[row] = c.n == 0;
        mu[row] = next_mu;
    }
}
