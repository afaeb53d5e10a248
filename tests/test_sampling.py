"""Sampling parameters, random numbers, the table, and what the NumPy chain does to logits."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest

from edgeinfer.errors import InvalidModelError, InvalidRequestError
from edgeinfer.parameters import SAMPLING, checked
from edgeinfer.sampling import sampler
from edgeinfer.sampling.params import (
    NO_CANDIDATE,
    OK,
    ROW,
    Sampled,
    SampleRow,
    SampleTable,
    SamplingParams,
    breaker_tokens,
    mask_words,
)
from edgeinfer.sampling.philox import philox, uniforms
from edgeinfer.sampling.sampler import sample_reference

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}  # nothing but the draw


def sample(
    logits: object, index: int = 0, history: object = (), mu: float = 10.0, **params: object
) -> Sampled:
    row = SampleRow(SamplingParams(**params), 7, index, np.array(history, np.int32), mu)
    return sample_reference(np.array(logits, np.float32), row)


def survivors(logits: object, n: int = 300, **params: object) -> set[int]:
    return {sample(logits, i, **params).id for i in range(n)}


def log_probabilities(*p: float) -> list[float]:
    return [math.log(x) for x in p]


# -- parameters ----------------------------------------------------------------------------------


def resolve(given: dict[str, object], model_defaults: dict[str, object]) -> SamplingParams:
    return SamplingParams.resolve(checked("answer", given, SAMPLING), model_defaults)


def test_unset_means_the_file_then_the_default():
    params = resolve(
        {"top_p": 0.5, "top_k": None},
        {"general.sampling.top_k": 20, "temp": 0.6, "penalty_repeat": 1.05, "top_p": 0.8},
    )
    assert (params.top_p, params.top_k, params.temperature) == (0.5, 20, 0.6)
    assert (params.repeat_penalty, params.min_p) == (1.05, 0.05)
    assert params.seed is not None


def test_an_unknown_keyword_names_the_nearest():
    with pytest.raises(TypeError, match="'temprature'; did you mean 'temperature'"):
        SamplingParams(temprature=1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", math.nan), ("temperature", "hot"), ("top_k", 1.5), ("top_k", True),
        ("top_p", 1.1), ("min_p", -0.1), ("repeat_penalty", 0.0), ("repeat_last_n", -2),
        ("mirostat", 3), ("seed", -1), ("seed", 2**64), ("logprobs", 129),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {1: math.nan}), ("dry_base", -1.0), ("dry_sequence_breakers", "abc"),
        ("min_keep", 2**31),
    ],
)  # fmt: skip
def test_an_invalid_value_names_its_parameter(name, value):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert repr(value) in str(caught.value)


def test_an_invalid_value_in_the_file_names_its_field():
    with pytest.raises(InvalidModelError) as caught:
        SamplingParams.resolve({}, {"temp": "warm"})
    assert caught.value.field == "general.sampling.temp"


@pytest.mark.parametrize("bad", [float("nan"), -1.0, "high", True])
def test_a_value_in_the_file_that_the_user_replaces_is_not_checked(bad):
    assert resolve({"top_p": 0.5}, {"top_p": bad}).top_p == 0.5
    with pytest.raises(InvalidModelError):
        resolve({"top_p": None}, {"top_p": bad})


def test_what_was_checked_is_not_checked_again():
    given = checked("answer", {"logit_bias": {3: 1}}, SAMPLING)
    params = SamplingParams.resolve(given)
    with_breakers = params.with_breakers(((1,),))
    assert params.logit_bias is given["logit_bias"] is with_breakers.logit_bias
    assert with_breakers.dry_breaker_tokens == ((1,),) != params.dry_breaker_tokens
    assert (
        params
        != with_breakers
        == SamplingParams(**given, seed=params.seed, dry_breaker_tokens=((1,),))
    )


def test_a_parameter_is_declared_as_the_table_has_it():
    for field in fields(SamplingParams):
        if field.name in SAMPLING and SAMPLING[field.name].kind in (int, float):
            assert field.type.removesuffix(" | None") == SAMPLING[field.name].kind.__name__


def test_a_bias_beyond_the_vocabulary_is_refused():
    SamplingParams(logit_bias={9: 1.0}).check_vocabulary(10)
    with pytest.raises(InvalidRequestError, match="10"):
        SamplingParams(logit_bias={10: 1.0}).check_vocabulary(10)


def test_only_the_history_that_is_looked_at_is_asked_for():
    assert SamplingParams().n_history == 0
    both = SamplingParams(repeat_penalty=1.1, dry_multiplier=1, dry_penalty_last_n=9)
    assert both.n_history == 64
    assert SamplingParams(presence_penalty=1, repeat_last_n=-1).n_history == -1
    assert SamplingParams(presence_penalty=1, mirostat=2).n_history == 0


# -- random numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's known answers for philox4x32-10
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert philox(counter, key) == words


def test_uniforms_are_uniform_and_differ_by_seed_and_index():
    pairs = np.array([uniforms(seed, i) for seed in (1, 2, 2**64 - 1) for i in range(2000)])
    assert len(np.unique(pairs)) == pairs.size
    assert 0 <= pairs.min() and pairs.max() < 1
    counts = np.histogram(pairs, 20, (0, 1))[0]
    assert ((counts - 600) ** 2 / 600).sum() < 50  # chi-square, 19 degrees: p < 1e-4
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.05


# -- arithmetic ----------------------------------------------------------------------------------


def test_exp_and_log_are_close_to_exact():
    x = np.linspace(-699, 699, 100_001)
    assert np.max(np.abs(sampler.exp(x) / np.exp(x) - 1)) < 1e-11
    assert sampler.exp(np.array([0.0, -700.1, -np.inf, -1e300])).tolist() == [1.0, 0.0, 0.0, 0.0]
    for v in np.random.default_rng(0).lognormal(0, 20, 1000):
        assert sampler.log(v) == pytest.approx(math.log(v), rel=1e-14, abs=1e-15)


VOCABULARIES = [1, 7, 4095, 4096, 4097, 8193, 151_936]


def sum_by_hand(x):
    """As the sampler's docstring says."""
    total = 0.0
    for start in range(0, len(x), 4096):
        lanes = [0.0] * 8
        for i, value in enumerate(x[start : start + 4096].tolist()):
            lanes[i % 8] += value
        for n in (4, 2, 1):
            lanes = [lanes[i] + lanes[i + n] for i in range(n)]
        total += lanes[0]
    return total


@pytest.mark.parametrize("n", VOCABULARIES)
def test_a_sum_over_the_vocabulary_is_one_of_sums_over_its_chunks(n):
    x = np.random.default_rng(n).lognormal(0, 3, n)
    assert sampler.sum_vocabulary(x) == sum_by_hand(x) == pytest.approx(math.fsum(x), rel=1e-13)


def test_sums_are_the_vocabularys_until_something_is_cut_off():
    random = np.random.default_rng(1)
    logits = random.normal(0, 3, 5000).astype(np.float32)
    logits[random.random(5000) < 0.1] = -np.inf
    candidates, is_real = sampler._Candidates(logits), logits > -np.inf
    by_id = np.where(is_real, logits.astype(np.float64), 0.0) - float(logits.max())
    weights = np.where(is_real, sampler.exp(by_id), 0.0)
    total = sum_by_hand(weights)
    mean = sampler.log(total) - sum_by_hand(weights * by_id) / total
    assert (candidates.total(), sampler._entropy(candidates)[0]) == (total, mean)
    candidates.keep(candidates.ids)
    assert candidates.total() == sum(sorted(weights.tolist(), reverse=True)) != total


# -- the chain -----------------------------------------------------------------------------------


def test_draws_follow_the_distribution():
    logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5])
    for temperature in (0.5, 1.0, 2.0):
        n = 4000
        picked = [sample(logits, i, **OFF | {"temperature": temperature}).id for i in range(n)]
        expected = np.exp(logits / temperature)
        expected *= n / expected.sum()
        counts = np.bincount(picked, minlength=5)
        assert ((counts - expected) ** 2 / expected).sum() < 24  # 4 degrees: p < 1e-4


def test_the_same_seed_and_index_give_the_same_token():
    logits = np.random.default_rng(0).normal(size=100)
    assert sample(logits, 3, **OFF).id == sample(logits, 3, **OFF).id


def test_greedy_takes_the_lower_id_and_ignores_nan():
    assert sample([1, 3, math.nan, 3, 2], temperature=0).id == 1
    assert sample([math.nan, -math.inf, -5], temperature=-1).id == 2
    assert sample([0, math.inf, 1], temperature=0).id == 1
    assert sample([2, 1], temperature=0, repeat_penalty=4.0, history=[0]).id == 1


def test_no_candidate_is_reported():
    for logits in ([math.nan] * 3, [-math.inf], [math.nan, -math.inf]):
        for temperature in (0.0, 0.8):
            assert sample(logits, temperature=temperature).status == NO_CANDIDATE
    banned = sample([1.0], logit_bias={0: -math.inf}, logprobs=2)
    assert (banned.status, banned.id) == (NO_CANDIDATE, 0)
    assert banned.top[0].tolist() == [0, -1]


def test_top_k_keeps_k_with_ties_to_the_lower_id():
    assert survivors([1, 2, 2, 2, 0], **OFF | {"top_k": 2}) == {1, 2}


def test_top_p_stops_once_reached():
    logits = log_probabilities(0.4, 0.3, 0.2, 0.1)
    assert survivors(logits, **OFF | {"top_p": 0.6}) == {0, 1}
    assert survivors(logits, **OFF | {"top_p": 0.0}) == {0}
    assert survivors(logits, **OFF | {"top_p": 0.0, "min_keep": 3}) == {0, 1, 2}


def test_min_p_is_relative_to_the_likeliest():
    logits = log_probabilities(0.5, 0.3, 0.15, 0.05)
    assert survivors(logits, **OFF | {"min_p": 0.29}) == {0, 1, 2}
    assert survivors(logits, **OFF | {"min_p": 1.0}) == {0}
    assert survivors(logits, **OFF | {"min_p": 1.0, "min_keep": 2}) == {0, 1}


def test_typical_can_drop_the_likeliest():
    logits = log_probabilities(0.5, *[0.05] * 10)  # entropy 1.84; surprises 0.69 and 3.0
    assert survivors(logits, **OFF | {"typical_p": 0.4}) == {0}
    logits = log_probabilities(0.2, *[0.02] * 40)  # entropy 3.45; surprises 1.6 and 3.9
    assert 0 not in survivors(logits, **OFF | {"typical_p": 0.5})


def test_top_n_sigma():
    logits = np.r_[np.zeros(98), 10.0, 9.5]  # mean 0.195, sigma 1.36
    assert survivors(logits, **OFF | {"top_n_sigma": 1.0}) == {98, 99}
    assert survivors(logits, **OFF | {"top_n_sigma": 0.1}) == {98}


def test_xtc_keeps_the_last_of_the_likely():
    logits = log_probabilities(0.4, 0.3, 0.2, 0.1)
    on = OFF | {"xtc_probability": 1.0, "xtc_threshold": 0.15}
    assert survivors(logits, **on) == {2, 3}
    assert survivors(logits, **on | {"min_keep": 3}) == {0, 1, 2, 3}
    assert survivors(logits, **on | {"xtc_threshold": 0.35}) == {0, 1, 2, 3}
    n_top = sum(sample(logits, i, **on | {"xtc_probability": 0.5}).id < 2 for i in range(2000))
    assert 600 < n_top < 800  # half of the time 70 % of the draws


def test_logit_bias():
    assert survivors([0, 0, 0], **OFF, logit_bias={0: -math.inf, 2: -1e9}) == {1}
    assert survivors([0, 50, 0], **OFF, logit_bias={0: 100.0}) == {0}
    assert survivors([-math.inf, 0], **OFF, logit_bias={0: 100.0}) == {1}


def test_penalties_lower_what_was_said():
    row = SampleRow(
        SamplingParams(repeat_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25),
        1, 0, np.array([1, 1, 2, 2, 2], np.int32), 0.0,
    )  # fmt: skip
    changed = sampler._changed(np.array([4, 4, -4], np.float32), row)
    assert changed.tolist() == [4.0, 2 - 1.25, -8 - 1.75]
    short = SampleRow(SamplingParams(presence_penalty=1.0, repeat_last_n=1), 1, 0, row.history, 0.0)
    assert sampler._changed(np.zeros(3, np.float32), short).tolist() == [0.0, 0.0, -1.0]


def dry(history: list[int], breakers: tuple[tuple[int, ...], ...] = (), **params: float):
    chosen = SamplingParams(dry_multiplier=1.0, dry_base=2.0, dry_breaker_tokens=breakers, **params)
    row = SampleRow(chosen, 1, 0, np.array(history, np.int32), 0.0)
    return (-sampler._changed(np.zeros(10, np.float32), row)).tolist()


def test_dry_penalises_what_would_continue_a_repeat():
    history = [1, 2, 3, 4, 0, 1, 2, 3]  # 4 would continue "1 2 3"
    assert dry(history)[4] == 2.0 ** (3 - 2)
    assert sum(dry(history)) == 2.0
    assert dry(history, dry_allowed_length=4) == [0] * 10
    assert dry(history, dry_penalty_last_n=4) == [0] * 10


def test_dry_stops_at_breakers():
    history = [1, 2, 3, 4, 0, 1, 2, 3]
    assert dry(history, ((1,),))[4] == 2.0 ** (2 - 2)  # only "2 3" is left
    assert dry(history, ((2,),)) == [0] * 10
    assert dry(history, ((4,),)) == [0] * 10  # a breaker itself is never penalised
    assert dry(history, ((0, 1, 2),)) == [0] * 10  # only "3" is left
    assert dry(history, ((0, 9),))[4] == 2.0


def test_dry_takes_the_longest_match():
    assert dry([5, 6, 9, 1, 5, 6, 9, 2, 1, 5, 6])[9] == 2.0 ** (3 - 2)


def test_breaker_tokens():
    pieces = [b"a", b"x\n", b"b:", b"::", b"=", b" ="]
    encode = {"=": [4], ":": [3]}.__getitem__
    assert breaker_tokens(["\n"], pieces, encode) == ((1,),)
    assert breaker_tokens([":="], pieces, encode) == ((2, 4), (3, 4))


def test_long_breakers_are_refused_and_short_ones_quick():
    """Each is looked for in all of a vocabulary."""
    pieces = [bytes([97 + i % 26, 97 + i // 26 % 26]) for i in range(30_000)]
    found = breaker_tokens(["ab" * 64] * 32, pieces, lambda text: [len(text)])
    assert {rest for _, rest in found} == {126, 127}
    for wrong in (["x" * 129], ["x"] * 33, [""], "x"):
        with pytest.raises(InvalidRequestError, match="at most 32 texts"):
            SamplingParams(dry_sequence_breakers=wrong)


def test_dynamic_temperature_follows_the_entropy():
    params = SamplingParams(**OFF | {"temperature": 1.0}, dynatemp_range=0.5)
    flat = sampler._Candidates(np.zeros(10, np.float32))
    assert sampler._dynamic_temperature(flat, params) == pytest.approx(1.5)
    sharp = sampler._Candidates(np.array([100.0, 0.0], np.float32))
    assert sampler._dynamic_temperature(sharp, params) == pytest.approx(0.5)


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_holds_the_surprise_near_tau(version):
    random = np.random.default_rng(0)
    mu, surprises = 6.0, []
    for i in range(600):
        logits = random.normal(0, 2, 2000)
        picked = sample(logits, i, mu=mu, mirostat=version, mirostat_tau=3.0, temperature=1.0)
        p = np.exp(logits - logits.max())
        surprises.append(-math.log2(p[picked.id] / p.sum()))
        mu = picked.mu
    # The surprise that mirostat steers is among those kept, so a little below this one.
    assert 3.0 <= np.mean(surprises[100:]) < 6.0


def test_logprobs_are_those_of_the_untouched_logits():
    logits = np.array([1.0, 3.0, 2.0, math.nan])
    picked = sample(logits, temperature=0, logit_bias={1: -100.0}, logprobs=5)
    exact = logits[:3] - np.log(np.exp(logits[:3]).sum())
    assert picked.id == 2
    assert picked.logprob == pytest.approx(exact[2], abs=1e-6)
    assert picked.top[0].tolist() == [1, 2, 0, -1, -1]
    np.testing.assert_allclose(picked.top[1][:3], exact[[1, 2, 0]], atol=1e-6)
    assert math.isnan(sample(logits).logprob)


# -- what a device may do itself -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "is_greedy"),
    [
        ({"temperature": 0}, True),
        ({"temperature": -1.0, "top_k": 3, "mirostat": 2, "dynatemp_range": 1.0}, True),
        ({"temperature": 0, "repeat_penalty": 2.0, "repeat_last_n": 0}, True),
        ({"temperature": 1e-40}, False),
        ({"temperature": 0, "logprobs": 0}, False),
        ({"temperature": 0, "logit_bias": {1: -5.0}}, False),
        ({"temperature": 0, "presence_penalty": 0.5}, False),
        ({"temperature": 0, "dry_multiplier": 0.8}, False),
    ],
)
def test_a_row_says_whether_the_largest_logit_is_all_it_asks_for(params, is_greedy):
    table = SampleTable(1)
    table.set_row(0, SamplingParams(**params), 1, 0, [3, 3, 3], 2.5)
    assert table.is_greedy(1) == is_greedy
    most = np.finfo("f4").max
    for logits in ([1, 5, 2, 5], [math.nan, 1, most, math.inf], [-math.inf] * 3, [math.nan]):
        if is_greedy:
            given = np.array(logits, np.float32)
            row = np.minimum(np.where(np.isnan(given), -np.inf, given), most)
            got = sample_reference(given, table.row(0))
            status = NO_CANDIDATE if np.max(row) == -math.inf else OK
            assert (got.id, got.status, got.mu) == (np.argmax(row), status, 2.5)
            assert math.isnan(got.logprob)


# -- the table -----------------------------------------------------------------------------------


def test_every_number_of_a_request_is_in_its_row():
    not_in_rows = {"dry_sequence_breakers", "dry_breaker_tokens", "logit_bias", "logprobs"}
    assert {f.name for f in fields(SamplingParams)} - set(ROW.names) == not_in_rows
    assert ROW.itemsize == 8 * len(ROW.names)
    params = SamplingParams(top_k=7, min_p=0.25, repeat_penalty=1.5)
    table = SampleTable(1)
    table.set_row(0, params, 5, 6, [1, 2, 3], 4.0)
    for name, value in {
        "top_k": 7,
        "min_p": 0.25,
        "seed": 5,
        "index": 6,
        "n_history": 3,
        "mu": 4,
    }.items():
        assert table.rows[name][0] == value


def test_the_table_gives_back_what_it_was_given():
    table = SampleTable(3)
    params = SamplingParams(repeat_penalty=1.1, repeat_last_n=2, logprobs=1, mirostat_tau=4.0)
    table.set_row(1, params, 2**64 - 1, 5, [1, 2, 3])
    row = table.row(1)
    assert (row.seed, row.index, row.history.tolist(), row.mu) == (2**64 - 1, 5, [2, 3], 8.0)
    assert table.rows["seed"][1] == -1 and table.rows["n_history"][1] == 2
    assert table.n_rows == 2
    picked = sample_reference(np.arange(4, dtype=np.float32), row)
    table.store(1, picked)
    assert table.ids[1] == picked.id
    assert table.top(1)[0].tolist() == [3]
    table.clear()
    assert table.n_rows == 0


# -- masks -----------------------------------------------------------------------------------------


def masked(n_vocab: int, *tokens: int) -> np.ndarray:
    mask = np.zeros(mask_words(n_vocab), np.uint32)
    for token in tokens:
        mask[token // 32] |= np.uint32(1 << token % 32)
    return mask


def test_nothing_makes_a_masked_token_a_candidate():
    logits = np.array([9.0, 8.0, 1.0, 0.0], np.float32)
    for params in (
        {"temperature": 0.0}, OFF, {"top_k": 1}, {"mirostat": 2}, {"mirostat": 1}, {"min_p": 1.0},
        {"logit_bias": {0: math.inf}, "temperature": 0.0}, {"top_p": 0.01, "logprobs": 2},
    ):  # fmt: skip
        row = SampleRow(SamplingParams(**params), 7, 0, np.zeros(0, np.int32), 9.0, masked(4, 2))
        assert sample_reference(logits, row).id == 2
    # Log-probabilities stay those of the model.
    expected = sample(logits, logprobs=2, temperature=0.0)
    row = SampleRow(SamplingParams(logprobs=2), 7, 0, np.zeros(0, np.int32), 9.0, masked(4, 2))
    found = sample_reference(logits, row)
    assert found.top[0].tolist() == expected.top[0].tolist() == [0, 1]
    assert found.logprob < found.top[1][1]


def test_what_allows_nothing_has_no_candidate():
    for mask in (masked(4), masked(4, 3)):
        row = SampleRow(SamplingParams(), 7, 0, np.zeros(0, np.int32), 9.0, mask)
        assert sample_reference(np.array([1, 2, 3, -np.inf], "f4"), row).status == NO_CANDIDATE


def test_a_table_forgets_masks_with_its_rows():
    table = SampleTable(3)
    for i in range(3):
        table.set_row(i, SamplingParams(temperature=0.0), 1, i)
    assert table.is_greedy(3)
    table.masks(1, 2, 40)[:] = masked(40, 39)
    assert table.has_masks and not table.is_greedy(3)
    assert [row.mask is None for row in map(table.row, range(3))] == [True, False, False]
    assert table.row(2).mask[1] == 1 << 7
    table.clear()
    table.set_rows([SamplingParams(temperature=0.0)] * 2, [5, 6], [None, None])
    assert not table.has_masks and table.row(1).mask is None and table.is_greedy(2)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1e308])
def test_no_temperature_makes_the_unlikeliest_certain(exponent: float) -> None:
    """Beyond all numbers, what lay between two temperatures was none."""
    most = {"temperature": 1.7e308, "dynatemp_range": SAMPLING["dynatemp_range"].most}
    logits = np.linspace(3, -3, 50)
    found = survivors(logits, n=20, dynatemp_exponent=exponent, **{**OFF, **most})
    assert found != {49} and len(found) > 5
