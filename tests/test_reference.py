"""The reference backend: against itself cut in every way, hand-written arithmetic and real data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer.batch import PAGE, Batch, Outputs, PageTable, StepLimits
from edgeinfer.dequantize import dequantize
from edgeinfer.errors import ClosedError
from edgeinfer.gguf import GGUFFile
from edgeinfer.graph import Segment
from edgeinfer.kernels.reference import Mode, ReferenceBackend, ReferenceProgram
from edgeinfer.kernels.reference.blocks import quantise
from edgeinfer.kernels.reference.caches import BLOCK, hadamard, to_blocks
from edgeinfer.kernels.reference.exact import Exact
from edgeinfer.kernels.reference.functions import exp, fma
from edgeinfer.kernels.reference.quantised import Quantised
from edgeinfer.model import Model
from edgeinfer.quant import QUANT_TYPES, RUNNABLE, Weight
from edgeinfer.sampling.params import Sampled, SampleTable, SamplingParams
from edgeinfer.sampling.sampler import ReferenceSampler

from .bench.blocks import quantize
from .models_for_tests import tiny_model

Floats = NDArray[np.float32]

MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(arch="llama"),
    "llama-tied-factors": dict(arch="llama", tied=True, rope_freqs=True, quant="Q8_0"),
    "llama-wide-heads": dict(arch="llama", head_dim=32, quant="F16"),
    "llama-k-quants": dict(arch="llama", quant="Q4_K_M"),
    "qwen2": dict(arch="qwen2", quant="Q5_1"),
    "qwen3": dict(arch="qwen3", head_dim=32, quant="Q4_1"),
}
MODES: tuple[Mode, ...] = ("exact", "quantised")
N_TOKENS = 70  # three pages


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Model]]:
    folder = tmp_path_factory.mktemp("models")
    files = {}
    for name, options in MODELS.items():
        (folder / name).mkdir()
        files[name] = GGUFFile.open(tiny_model(folder / name, **options))
    yield {name: Model.load(file) for name, file in files.items()}
    for file in files.values():
        file.close()


def open_program(segment: Segment, mode: Mode, n_pages: int = 8) -> ReferenceProgram:
    limits = StepLimits({0: n_pages}, max_rows=256, max_outputs=256, max_sequences=4, n_threads=1)
    return ReferenceBackend().compile(segment, limits, mode=mode)


def flat_table(pages: list[int]) -> PageTable:
    """A sequence that sees every page up to its own."""
    return PageTable(np.array(pages, np.int32), 0, len(pages))


def tokens(n: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, 256, n).astype(np.int32)


def step(
    program: ReferenceProgram, ids: NDArray[np.int32], first: int, table: PageTable, **fields: Any
) -> Outputs:
    """Rows of one sequence, all of them wanted."""
    rows = np.arange(len(ids))
    batch = Batch(
        ids, rows + first, np.zeros(len(ids), np.int32), [(table,)], rows.astype(np.int32), **fields
    )
    return program.submit(batch).wait()


def logits(
    segment: Segment, mode: Mode, ids: NDArray[np.int32], table: PageTable, chunk: int
) -> Floats:
    with open_program(segment, mode) as program:
        parts = [
            step(program, ids[at : at + chunk], at, table).logits
            for at in range(0, len(ids), chunk)
        ]
    return np.concatenate(parts)


def assert_same(a: Floats, b: Floats, mode: Mode) -> None:
    """Bit for bit; in exact mode BLAS may add in another order."""
    if mode == "quantised":
        assert np.array_equal(a, b)
    else:
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0)


# -- one model, cut in every way -----------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", MODES)
def test_cached_steps_equal_one_full_pass(models: dict[str, Model], name: str, mode: Mode) -> None:
    ids, segment = tokens(N_TOKENS), models[name].graph.segment()
    whole = logits(segment, mode, ids, flat_table([0, 1, 2]), N_TOKENS)
    for chunk in (1, 3, 7):
        cut = logits(segment, mode, ids, flat_table([5, 2, 7]), chunk)
        assert_same(cut, whole, mode)


@pytest.mark.parametrize("name", MODELS)
def test_modes_agree_to_the_activations_noise(models: dict[str, Model], name: str) -> None:
    ids, segment = tokens(24), models[name].graph.segment()
    exact, quantised = (logits(segment, mode, ids, flat_table([0]), 24) for mode in MODES)
    assert np.abs(quantised - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("mode", MODES)
def test_sequences_in_one_step_equal_alone(models: dict[str, Model], mode: Mode) -> None:
    first, second = tokens(40), tokens(33, seed=1)
    segment = models["qwen3"].graph.segment()
    alone = [logits(segment, mode, ids, flat_table([0, 1]), 40) for ids in (first, second)]
    with open_program(segment, mode) as program:
        batch = Batch(
            np.concatenate([first, second]),
            np.concatenate([np.arange(40), np.arange(33)]),
            np.array([0] * 40 + [1] * 33, np.int32),
            [(flat_table([3, 0]),), (flat_table([1, 6]),)],
            np.array([39, 72], np.int32),
        )
        both = program.submit(batch).wait().logits
    expected = np.stack([alone[0][-1], alone[1][-1]])
    assert_same(both, expected, mode)


@pytest.mark.parametrize("mode", MODES)
def test_slid_tables_do_not_depend_on_chunks(models: dict[str, Model], mode: Mode) -> None:
    ids, segment = tokens(200), models["llama-tied-factors"].graph.segment()
    # One pinned page, two visible ones and one being written.
    table = PageTable(np.array([6, 0, 3, 1], np.int32), 1, 2)
    assert table.visible(199) == [0, 5, 6]
    whole = logits(segment, mode, ids, table, PAGE)
    for chunk in (1, 16):
        cut = logits(segment, mode, ids, table, chunk)
        assert_same(cut, whole, mode)


def test_a_slid_query_counts_distances_inside_the_cache(tmp_path: Path) -> None:
    """With one layer, K and V depend on nothing before: the visible tokens by themselves agree."""
    with GGUFFile.open(tiny_model(tmp_path, n_layers=1)) as file:
        segment = Model.load(file).graph.segment()
        ids = tokens(200)
        table = PageTable(np.array([6, 0, 3, 1], np.int32), 1, 2)
        slid = logits(segment, "exact", ids, table, PAGE)[-1]
        kept = np.concatenate([ids[:PAGE], ids[5 * PAGE :]])
        short = logits(segment, "exact", kept, flat_table([0, 1, 2]), len(kept))[-1]
    assert_same(slid, short, "exact")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_segments_equal_the_whole(models: dict[str, Model], name: str, mode: Mode) -> None:
    graph, ids, table = models[name].graph, tokens(40), flat_table([0, 1])
    with open_program(graph.segment(), mode) as program:
        whole = step(program, ids, 0, table).logits
    wanted = np.array([3, 39], np.int32)
    rows = np.arange(40), np.zeros(40, np.int32), [(table,)], wanted
    with open_program(graph.segment(0, 1), mode) as program:
        first = program.submit(Batch(ids, *rows)).wait()
    assert first.hidden.shape == (40, graph.hparams.dim)
    assert first.logits.shape == (0, graph.hparams.vocab_size)
    with open_program(graph.segment(1, 2), mode) as program:
        second = program.submit(Batch(ids, *rows, hidden=first.hidden)).wait().logits
    assert_same(second, whole[wanted], mode)


# -- what a step yields --------------------------------------------------------------------------


def test_outputs(models: dict[str, Model]) -> None:
    model = models["llama"]
    table, ids, hp = flat_table([0, 1]), tokens(5), model.hparams
    with open_program(model.graph.segment(), "exact") as program:
        scores = step(program, ids, 0, table).logits
        assert scores.shape == (5, hp.vocab_size)
        hidden = step(program, ids, 0, table, output="hidden").hidden
        head = model.file.tensors["output.weight"]
        np.testing.assert_allclose(hidden @ dequantize(head).T, scores, atol=1e-5)
        empty = Batch(
            ids, np.arange(5), np.zeros(5, np.int32), [(table,)], np.zeros(0, np.int32)
        )  # fmt: skip
        assert program.submit(empty).wait().logits.shape == (0, hp.vocab_size)


def test_sampled_ids_come_from_the_given_sampler(models: dict[str, Model]) -> None:
    class Least(ReferenceSampler):
        def sample(self, logits: Floats, table: SampleTable) -> None:
            nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
            for i, row in enumerate(logits):
                id = int(row.argmin()) + table.row(i).index
                table.store(i, Sampled(id, 0.0, nothing, 0.0, 0))

    backend, segment = ReferenceBackend(Least()), models["llama"].graph.segment()
    table = SampleTable(4)
    table.set_row(0, SamplingParams(), seed=1, index=1)
    table.set_row(1, SamplingParams(), seed=1, index=0)
    ids = tokens(2)
    with backend.compile(segment, StepLimits({0: 4}, 8, 8, 1, 1)) as program:
        scores = step(program, ids, 0, flat_table([0])).logits
        picked = step(program, ids, 0, flat_table([0]), output="ids", samples=table)
    assert picked.logits.size == 0
    assert picked.ids.tolist() == (scores.argmin(axis=1) + [1, 0]).tolist()
    assert table.ids[:2].tolist() == picked.ids.tolist()


def test_steps_run_in_order_abort_and_close(models: dict[str, Model]) -> None:
    segment, ids, table = models["qwen2"].graph.segment(), tokens(6), flat_table([0])
    with open_program(segment, "exact") as program:
        whole = step(program, ids, 0, table).logits
        parts = [
            Batch(ids[a:b], np.arange(a, b), np.zeros(b - a, np.int32), [(table,)],
                  np.arange(b - a, dtype=np.int32))
            for a, b in ((0, 4), (4, 6))
        ]  # fmt: skip
        program.submit(parts[0])
        np.testing.assert_allclose(program.submit(parts[1]).wait().logits, whole[4:], atol=1e-5)
        ticket = program.submit(parts[1])
        ticket.abort()
        assert ticket.wait().aborted
    with pytest.raises(ClosedError):
        program.submit(parts[0])


# -- the arithmetic ------------------------------------------------------------------------------


def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((3, 2000)).astype(np.float32)
    # Just above a tie of float32 by less than float64 holds: rounding twice would go down.
    a[0], b[0], c[0] = 1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60
    a[1], b[1], c[1] = 1 + 2.0**-12, 1 + 2.0**-12, -(2.0**-60)
    a[2], b[2], c[2] = 1 + 2.0**-12, 1 + 2.0**-12, 0
    out = fma(a, b, c)
    for x, y, z, got in zip(a, b, c, out, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        near = [np.nextafter(got, np.float32(end)) for end in (-np.inf, np.inf)]
        error = abs(exact - Fraction(float(got)))
        for other in near:
            assert error <= abs(exact - Fraction(float(other)))
    assert out[0] > out[2]


def test_exp() -> None:
    x = np.linspace(-100, 88.2, 20_001, dtype=np.float32)
    out = exp(x)
    assert (out[x < -87.3] == 0).all()
    inside = x > -87.3
    np.testing.assert_allclose(out[inside], np.exp(x[inside].astype(np.float64)), rtol=2e-7)
    assert exp(np.zeros(1, np.float32))[0] == 1


@pytest.mark.parametrize("kind", [t.name for t in RUNNABLE])
def test_matmul_of_every_type(kind: str) -> None:
    """Close to the float product, equal where the activations are exact integers times a scale."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((24, 512), dtype=np.float32)
    type = next(t for t in QUANT_TYPES.values() if t.name == kind)
    weight = Weight("w", (24, 512), type, memoryview(quantize(values, kind).tobytes()))
    quantised = Quantised()
    # Each block of 32 has its largest at 127: quantisation changes nothing.
    x = rng.integers(-126, 127, (5, 512)).astype(np.float32)
    x[:, ::32] = 127
    truth = x.astype(np.float64) @ dequantize(weight).astype(np.float64).T
    out = quantised.matmul(x, quantised.load(weight))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, truth, atol=2e-6 * np.abs(truth).max() * 8)
    x = rng.standard_normal((5, 512), dtype=np.float32)
    truth = x.astype(np.float64) @ dequantize(weight).astype(np.float64).T
    out = quantised.matmul(x, quantised.load(weight))
    np.testing.assert_allclose(out, truth, atol=0.02 * np.abs(truth).max())


def test_quantise() -> None:
    x = np.zeros((2, 64), np.float32)
    x[0, 3], x[0, 4], x[0, 5] = -2, 1, 0.5 / 127 * 2
    q, d = quantise(x)
    assert q[0, 0, 3:6].tolist() == [-127, 64, 0]  # 63.5 and 0.5 go to the even neighbour
    assert d[0, 0] == np.float32(2) / np.float32(127)
    assert not q[1].any() and not d[1].any()


def test_attention_folds_equal_one_softmax() -> None:
    """Twenty pages, so two segments, the last page seen in part, a gap after the first."""
    rng = np.random.default_rng(0)
    pages = np.array([0, *range(9, 28)], np.int64)
    q = np.repeat(rng.standard_normal((1, 3, 16), dtype=np.float32), len(pages), axis=0)
    k, v = rng.standard_normal((2, len(pages), 3, PAGE, 16)).astype(np.float16).astype(np.float32)
    v[-1, :, 20:] = np.nan  # never written
    is_visible = pages[:, None] * PAGE + np.arange(PAGE) <= 27 * PAGE + 19
    for cap, sinks in ((0.0, None), (1.5, np.array([-2, 0.5, 3], np.float32))):
        exact, folded = (
            numerics.attend(q, k, v, pages, is_visible, 0.25, cap, sinks)
            for numerics in (Exact(), Quantised())
        )
        np.testing.assert_allclose(folded, exact, atol=2e-6)


def test_the_transform_is_orthogonal_and_its_own_inverse() -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, 128), np.float32)
    matrix = hadamard(np.eye(64, dtype=np.float32))
    assert np.array_equal(matrix, matrix.T) and (np.abs(matrix) == 0.125).all()
    assert np.array_equal(matrix @ matrix, np.eye(64))
    assert matrix[3, :4].tolist() == [0.125, -0.125, -0.125, 0.125]
    expected = (x.reshape(-1, 64).astype(np.float64) @ matrix).reshape(x.shape)
    np.testing.assert_allclose(hadamard(x), expected, atol=1e-6)
    np.testing.assert_allclose(hadamard(hadamard(x)), x, atol=1e-6)


def test_blocks_of_a_cache() -> None:
    """By hand; then no value is further off than half a step, or one at the end with a 7."""
    x = np.zeros((1, 2, 40), np.float32)
    x[0, 0, :4] = -2, 1, 3 * 2.0**-7, 0
    x[0, 1, 36:] = 6, -6, -1, 0.1
    eights, fours = to_blocks(x, "q8_0"), to_blocks(x, "q4_0")
    assert eights.shape == fours.shape == (1, 2, 2)
    d = np.float16(2 / 127)
    assert eights["d"][0].tolist() == [[d, 0], [0, np.float16(6 / 127)]]
    assert eights["q"][0, 0, 0, :4].tolist() == [-127, 64, 1, 0]  # 63.5 where d was not rounded
    assert fours["d"][0].tolist() == [[0.25, 0], [0, 0.75]]
    assert fours["q"][0, 0, 0, :4].tolist() == [-8, 4, 0, 0]
    assert fours["q"][0, 1, 1, 4:8].tolist() == [7, -8, -1, 0]
    x = np.random.default_rng(0).standard_normal((50, 2, 64), np.float32)
    x[1], x[2], x[3] = x[1] * 1e-2, x[2] * 1e5, 0
    for kind, ends in (("q8_0", (-127, 127)), ("q4_0", (-8, 7))):
        blocks = to_blocks(x, kind)
        off = np.abs(x.reshape(50, 2, 2, 32) - values_of(blocks).reshape(50, 2, 2, 32))
        assert ends[0] == blocks["q"].min() and blocks["q"].max() == ends[1]
        steps = np.abs(blocks["d"].astype(np.float32))[..., None] * np.ones(32, np.float32)
        assert (off <= steps * np.where(blocks["q"] == 7, 1.0, 0.51)).all()
        assert not blocks["q"][3].any()


@pytest.mark.parametrize("dim", [64, 40])
def test_attention_of_blocks_is_that_of_their_values(dim: int) -> None:
    """Queries that are whole steps lose nothing; unseen blocks that are no numbers do nothing."""
    rng, law = np.random.default_rng(0), Quantised()
    q = rng.integers(-126, 127, (2, 3, dim)).astype(np.float32)
    q[..., ::32] = 127
    pages, is_visible = np.array([4, 5]), np.arange(64).reshape(2, 32) < 50
    for types in (("q8_0", "q4_0"), ("q4_0", "q8_0"), ("f16", "q8_0"), ("q8_0", "f16")):
        stored = [law.stored(rng.standard_normal((64, 3, dim), np.float32), t) for t in types]
        stored[1][50:].view(np.uint8)[:] = 0xFF
        k, v = (each.reshape(2, 32, 3, -1).swapaxes(1, 2) for each in stored)
        with np.errstate(invalid="ignore"):
            out = law.attend(q, k, v, pages, is_visible, 0.005)[:, :dim]
            truth = Exact().attend(
                q, values_of(k)[..., :dim], values_of(v)[..., :dim], pages, is_visible, 0.005
            )
        np.testing.assert_allclose(out, truth, atol=2e-5)


def values_of(stored: NDArray[Any]) -> Floats:
    """What a cache holds, as floats."""
    if stored.dtype != BLOCK:
        return stored.astype(np.float32)
    values = stored["d"][..., None].astype(np.float32) * stored["q"]
    return np.asarray(values.reshape(*stored.shape[:-1], -1), np.float32)


def test_rms_norm_and_silu() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((4, 72), dtype=np.float32), rng.random(72, dtype=np.float32)
    exact, quantised = Exact(), Quantised()
    np.testing.assert_allclose(
        quantised.rms_norm(x, w, 1e-5), exact.rms_norm(x, w, 1e-5), rtol=1e-6
    )
    ours, truth = (numerics.activation("silu", 30 * x) for numerics in (quantised, exact))
    np.testing.assert_allclose(ours, truth, rtol=1e-6, atol=1e-30)


# -- real data -----------------------------------------------------------------------------------


def log_softmax(x: Floats) -> NDArray[np.float64]:
    wide = x.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    out: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return out


def test_the_real_model_agrees_with_the_truth(data_file: Callable[[str], Path]) -> None:
    golden = np.load(data_file("golden/smollm2-text1.npz"))
    n, n_quantised = 64, 16
    ids, table = golden["ids"][:n].astype(np.int32), flat_table([0, 1])
    with GGUFFile.open(data_file("models/SmolLM2-135M-Instruct.Q4_1.gguf")) as file:
        segment = Model.load(file).graph.segment()
        exact = log_softmax(logits(segment, "exact", ids, table, n))
        quantised = log_softmax(logits(segment, "quantised", ids[:n_quantised], table, n))
    top = np.take_along_axis(exact, golden["top_ids"][:n].astype(np.int64), axis=1)
    assert np.abs(top - golden["top_logprobs"][:n]).max() < 2e-4
    assert exact.argmax(axis=1).tolist() == golden["top_ids"][:n, 0].tolist()
    truth = exact[:n_quantised]
    kl = (np.exp(truth) * (truth - quantised)).sum(axis=1).mean()
    assert kl < 1.5 * golden["llamacpp_kl"][:n_quantised].mean()
