"""Fast numerics on the shim: by halves, within a bound of the truth, and the same in all steps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer import LLM, DeviceError, InvalidRequestError, SessionError, quant
from edgeinfer.batch import Numerics
from edgeinfer.dequantize import dequantize
from edgeinfer.device import has_fast_numerics
from edgeinfer.gguf import GGUFFile
from edgeinfer.graph import KV, KVType
from edgeinfer.kernels.cuda import tiles
from edgeinfer.kernels.cuda.attention import AttendLaunch, AttendRowsLaunch, fits_mma
from edgeinfer.kernels.cuda.backend import LEAST_FAST_ARCH, CudaBackend
from edgeinfer.kernels.cuda.kernel import Kernel, Sources
from edgeinfer.kernels.cuda.shim import ShimDevice
from edgeinfer.kernels.reference import ReferenceBackend
from edgeinfer.kernels.reference.caches import BLOCK
from edgeinfer.model import Model
from edgeinfer.platform import Gpu
from edgeinfer.quant import QuantType
from edgeinfer.replay import Recording
from edgeinfer.sampling.sampler import ReferenceSampler
from edgeinfer.selftest.fast import divergence

from .backends import LIMITS, batch_of
from .models_for_tests import tiny_model
from .shim import SEEDS, put, put_step, shim
from .test_cuda_attend import IN_BLOCKS, TWIN, Case, Rows, case_of, for_usual_heads
from .test_cuda_matmul import GUARD, Out, launch, padded, put_weight, rows_of, up, weight

Floats = NDArray[np.float32]
HALF = 2.0**-11  # how far rounding to a half moves a value, of itself
KERNELS = ("attend by mma", "rows by mma")


# -- attention -----------------------------------------------------------------------------------


def truth(case: Case, row: int) -> tuple[NDArray[np.float64], float]:
    """Attention of a row in float64, and how far fast numerics may be from it.

    Rounding q, and keys in blocks, moves a score by `moved` at most, so each weight by a factor of
    exp(2 * moved) at most; weights, and values in blocks, are rounded once more.
    """
    table, pos, window = case.tables[case.seq[row]], int(case.pos[row]), case.cache.window
    pages = np.array(table.visible(pos, window))
    slots = [table.pages[table.slot(page)] for page in pages]
    sees = np.array([table.sees(pos, int(page), window) for page in pages]).reshape(-1)
    is_pinned = np.repeat((pages < table.n_pinned) & case.has_slid(row), 32)
    q = np.where(is_pinned[:, None, None], case.pinned_q[row], case.q[row]).astype(np.float64)
    k, v = (
        _floats(x[slots], n) for x, n in ((case.k, case.cache.k_dim), (case.v, case.cache.v_dim))
    )
    q, k, v = (x[sees].astype(np.float64) for x in (_turned(q, case.cache.transforms_k), k, v))
    k, v = (x.repeat(case.group, axis=1) for x in (k, v))
    n_rounded = 1 + (case.cache.k_type != "f16")
    moved = case.scale * (np.abs(q) * np.abs(k)).sum(2).max() * n_rounded * HALF * 1.01
    scores = (q * k).sum(2) * case.scale
    if case.cap:
        scores = case.cap * np.tanh(scores / case.cap)
    weights = np.exp(scores - scores.max(0))
    below = weights.sum(0)
    if case.sinks is not None:
        below = below + np.exp(case.sinks.astype(np.float64) - scores.max(0))
    out = np.einsum("ph,phd->hd", weights / below, v)
    n_rounded = 1 + (case.cache.v_type != "f16")
    most = np.abs(v).max() * np.sqrt(64 if case.cache.transforms_v else 1)
    bound = (np.expm1(2 * moved) + n_rounded * HALF + 1e-5) * most
    return _turned(out, case.cache.transforms_v).reshape(-1), float(bound)


def _floats(pages: NDArray[Any], dim: int) -> NDArray[np.float64]:
    """Positions of pages, (P * 32, kv heads, dim)."""
    if pages.dtype == BLOCK:
        pages = (pages["d"].astype(np.float64)[..., None] * pages["q"]).reshape(
            *pages.shape[:3], -1
        )
    return pages[..., :dim].swapaxes(1, 2).reshape(-1, pages.shape[1], dim)


def _turned(x: NDArray[Any], is_turned: bool) -> NDArray[Any]:
    return TWIN.hadamard(x.astype(np.float32)).astype(np.float64) if is_turned else x


def check(case: Case, **options: Any) -> Floats:
    """Both kernels have the same bits, which are within the bound and usually far nearer."""
    found, again = (case.run(kernel=kernel, **options) for kernel in KERNELS)
    assert np.array_equal(found, again)
    for row in range(len(case.pos)):
        expected, bound = truth(case, row)
        errors = np.abs(found[row] - expected)
        assert errors.max() <= bound and np.sqrt((errors**2).mean()) < HALF, row
    return found


def slid(n: int = 3) -> Rows:
    return Rows(640, n, n_pinned=3, n_visible=5, n_ring=8)


def test_tensor_cores_of_halves_follow_the_fragments_of_ptx(tmp_path: Path) -> None:
    """A 16 x 16 row after row, B 16 x 8 column after column: PTX ISA, mma.m16n8k16."""
    (tmp_path / "k.cu").write_text("""#include "dev.cuh"
EI_KERNEL(32) k(const Step* step, float* out, const uint16_t* a, const uint16_t* b) {
    const int lane = threadIdx.x;
    unsigned left[4] = {};
    unsigned right[2] = {};
    float sum[4] = {1, 2, 3, 4};
    for (int i = 0; i < 8; ++i) {
        const int row = lane / 4 + i / 2 % 2 * 8;
        const int column = lane % 4 * 2 + i % 2 + i / 4 * 8;
        left[i / 2] |= (unsigned)a[row * 16 + column] << 16 * (i % 2);
    }
    for (int i = 0; i < 4; ++i) {
        const int row = lane % 4 * 2 + i % 2 + i / 2 * 8;
        right[i / 2] |= (unsigned)b[lane / 4 * 16 + row] << 16 * (i % 2);
    }
    ei_mma_halves(sum, left, right);
    for (int i = 0; i < 4; ++i) {
        out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i] - i - 1;
    }
}
""")
    device = shim(tmp_path / "cache", sources=(tmp_path,))
    rng = np.random.default_rng(3)
    a, b = (rng.integers(-50, 50, shape).astype(np.float16) for shape in ((16, 16), (8, 16)))
    a[3, 5], b[2, 7] = 2.0**-24, 0.125  # the smallest half
    out = put(device, np.zeros((16, 8), np.float32))
    kernel, found = Kernel.of("k"), np.zeros((16, 8), np.float32)
    device.load([kernel])
    args = {"step": put_step(device, 1), "out": out, "a": put(device, a), "b": put(device, b)}
    for device.seed in SEEDS:
        device.launch(kernel, (1, 1, 1), 32, 0, args)
        device.read(out, found)
        np.testing.assert_allclose(found, a.astype(np.float64) @ b.astype(np.float64).T, atol=1e-3)
    device.close()


@pytest.mark.parametrize(
    ("k_dim", "v_dim", "group"), [(64, 64, 3), (80, 72, 1), (33, 20, 9), (256, 256, 2)]
)
def test_attention_is_near_the_truth(k_dim: int, v_dim: int, group: int) -> None:
    """Odd widths, over pages and segments, tails of pages, and a gap."""
    sequences = [Rows(530, 2), slid(), Rows(2), Rows(31, 19)]
    check(case_of(sequences, group, k_dim=k_dim, v_dim=v_dim))


@pytest.mark.parametrize(("cap", "window", "k_is_v"), [(2.0, 40, False), (0.0, 33, True)])
def test_caps_sinks_windows_and_keys_that_serve_as_values(
    cap: float, window: int, k_is_v: bool
) -> None:
    options: dict[str, Any] = dict(cap=cap, has_sinks=True, window=window, k_is_v=k_is_v)
    check(case_of([Rows(600, 5), Rows(3), slid(20)], 2, v_dim=48, **options))


@pytest.mark.parametrize(("k_dim", "v_dim", "group", "k_type", "v_type"), IN_BLOCKS[::2])
def test_caches_in_blocks(
    k_dim: int, v_dim: int, group: int, k_type: KVType, v_type: KVType
) -> None:
    heads = dict(k_dim=k_dim, v_dim=v_dim, k_type=k_type, v_type=v_type)
    check(case_of([Rows(530, 2), slid(), Rows(31, 19)], group, **heads))


def test_a_row_is_the_same_whatever_shares_its_tile() -> None:
    case = case_of([Rows(700), Rows(0, 40), Rows(1300, 3), Rows(31, 2), Rows(512)], 3)
    together = check(case, spare=2)
    for seed, chosen in zip(SEEDS, ([20], [3, 4, 5, 41, 42, 46], [0, 40, 41, 43]), strict=True):
        for kernel in KERNELS:
            alone = case.run(seed, rows=chosen, kernel=kernel)
            assert np.array_equal(alone, together[chosen])


def test_queries_of_any_size_fit_halves() -> None:
    """Large ones, with scores that are not; none; and no numbers, which stay in their rows."""
    case = case_of([Rows(100, 6)])
    usual = check(case)
    case.q *= np.float32(2.0**40)
    case.scale *= 2.0**-40
    assert np.array_equal(case.run(kernel="rows by mma"), usual)
    case.q[1], case.q[2], case.q[3, 0, 5] = 0, 1e-42, np.nan
    case.q[4, 1, 0] = np.inf
    with np.errstate(all="ignore"):
        found = [case.run(kernel=kernel) for kernel in KERNELS]
    assert np.array_equal(*found, equal_nan=True) and np.isnan(found[0]).any(1).tolist() == [
        False, False, False, True, True, False,
    ]  # fmt: skip
    assert np.array_equal(found[0][[0, 5]], usual[[0, 5]])


def test_an_aborted_step_writes_nothing() -> None:
    for kernel in KERNELS:
        assert np.isnan(case_of([Rows(40)]).run(abort=1, kernel=kernel)).all()


@for_usual_heads
def test_what_usual_models_need_is_compiled_ahead(
    n_heads: int, n_kv_heads: int, dim: int, has_cap: bool
) -> None:
    sources, heads = Sources(), (KV(n_kv_heads, dim, dim), n_heads, has_cap)
    few, many = AttendLaunch.of(*heads, mma=True), AttendRowsLaunch.by_mma(*heads)
    for launched in (few, many):
        assert launched.kernel in sources.variants(launched.kernel.name)
    assert few.n_tiles == many.n_tiles == n_kv_heads
    assert fits_mma(heads[0]) and not fits_mma(KV(1, 576, 512, 0, True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_any_heads_over_any_sequences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    k_dim, v_dim = (int(rng.choice([rng.integers(1, 257), 64, 128])) for _ in range(2))
    n_visible = int(rng.choice([3, 20, 1 << 30]))
    ring = 0 if n_visible == 1 << 30 else n_visible + 3
    sequences = [
        Rows(int(rng.integers(0, 1500)), int(rng.integers(1, 40)), int(rng.choice([0, 1, 17])),
             n_visible, ring)
        for _ in range(rng.integers(1, 4))
    ]  # fmt: skip
    k_is_v = bool(v_dim <= k_dim and rng.integers(0, 2))
    k_type = str(rng.choice(["f16", "q8_0", "q4_0"]))
    check(
        case_of(
            sequences, int(rng.integers(1, 20)), seed, k_dim=k_dim, v_dim=v_dim, k_is_v=k_is_v,
            k_type=k_type, v_type=k_type if k_is_v else str(rng.choice(["f16", "q8_0", "q4_0"])),
            window=int(rng.choice([0, 0, 1, 33, 700])), cap=float(rng.choice([0.0, 20.0])),
            has_sinks=bool(rng.integers(0, 2)),
        ),
        seed=int(rng.choice(SEEDS)), spare=int(rng.integers(0, 3)),
    )  # fmt: skip


# -- products ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def device() -> Iterator[ShimDevice]:
    device = shim()
    yield device
    device.close()


def product(device: ShimDevice, kind: QuantType, x: Floats, n: int) -> list[Floats]:
    """x times a matrix, plus a bias and what is there, by each kernel."""
    (n_rows, k), w = x.shape, weight(kind, n, x.shape[1])
    halves = device.reserve(n_rows * tiles.half_row_bytes(k))
    args = {"rows": 0, "x": put(device, padded(x)), "out": halves, "k": k}
    device.load([Kernel.of("halve")])
    grid = (1, n_rows + 1, 1)
    device.launch(Kernel.of("halve"), grid, 256, 0, {"step": put_step(device, n_rows), **args})
    bias, at = put(device, rows_of(1, n, 1)), put_weight(device, w)
    found = []
    for kernel, seed in zip(_products(kind), SEEDS, strict=True):
        tokens, warps = (int(dict(kernel.defines)[name]) for name in ("TOKENS", "WARPS"))
        rows = tiles.mma_rows(tokens, warps)
        y, device.seed = Out.of(device, n_rows, n), seed
        device.write(y.address, padded(rows_of(n_rows, n, 2)))
        launch(
            device, kernel, (up(n, rows), up(n_rows, tokens) + 1, 1), y=y.address, n=n, k=k,
            step=put_step(device, n_rows), rows=0, x=halves, w=at, bias=bias, residual=y.address,
        )  # fmt: skip
        memory = np.empty(n_rows * tiles.row_stride(n) + GUARD, np.float32)
        device.read(y.address, memory)
        assert (memory[-GUARD:].view(np.uint32) == 0xFFFFFFFF).all(), "written past the end"
        found.append(memory[:-GUARD].reshape(n_rows, -1)[:, :n])
    return found


def _products(kind: QuantType) -> list[Kernel]:
    variants = Sources().variants("matmul_half")
    return [each for each in variants if dict(each.defines)["TYPE"] == kind.name]


@pytest.mark.parametrize("kind", [quant.F16, quant.BF16], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("n", "k", "n_rows"), [(5, 3, 1), (70, 136, 9), (33, 1000, 70)])
def test_products_are_near_the_truth(
    device: ShimDevice, kind: QuantType, n: int, k: int, n_rows: int
) -> None:
    """x is rounded once, its sums in floats as often as there are columns; sizes of rows differ."""
    x = rows_of(n_rows, k)
    x[::2] *= np.float32(2.0**60)
    w = dequantize(weight(kind, n, k)).astype(np.float64)
    expected = x @ w.T + (rows_of(1, n, 1) + rows_of(n_rows, n, 2))
    size = np.abs(x).max(axis=1, keepdims=True)
    bound = np.abs(x) @ np.abs(w).T * (HALF + k * 2.0**-23) + size * np.abs(w).sum(1) * 2.0**-24
    found = product(device, kind, x, n)
    for y in found:
        assert (np.abs(y - expected) <= bound + np.abs(expected) * 2.0**-22 + 1e-6).all()
        np.testing.assert_array_equal(y, found[0])


# -- models --------------------------------------------------------------------------------------


@cache
def machine(numerics: Numerics, arch: int = 90) -> CudaBackend:
    device = shim(arch=arch, runs_at_once=False)
    make = lambda n_vocab, n_threads: ReferenceSampler()  # noqa: E731
    return CudaBackend(device, "shim:0", make, numerics=numerics)


def logits(numerics: Numerics, segment: Any, chunks: tuple[int, ...], arch: int = 90) -> Floats:
    limits = LIMITS._replace(max_rows=64, max_outputs=64)
    ids, at, found = [7 * i % 300 for i in range(sum(chunks))], 0, []
    with machine(numerics, arch).compile(segment, limits) as program:
        for chunk in chunks:
            found.append(program.submit(batch_of(ids[at : at + chunk], at)).wait().logits.copy())
            at += chunk
    return np.concatenate(found)


MODELS = [
    dict(arch="qwen3", quant="F16", qk_norm=True), dict(quant="Q4_0"), dict(quant="BF16", seed=3),
]  # fmt: skip


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["quant"])
def test_a_models_logits_are_near_the_truth_and_the_same_in_all_steps(
    model: dict[str, Any], tmp_path: Path
) -> None:
    with GGUFFile.open(tiny_model(tmp_path, **model)) as file:
        segment = Model.load(file).graph.segment()
        limits = LIMITS._replace(max_rows=64, max_outputs=64)
        ids = [7 * i % 300 for i in range(60)]
        with ReferenceBackend().compile(segment, limits, mode="exact") as reference:
            truth = reference.submit(batch_of(ids)).wait().logits
        whole, exact = (logits(n, segment, (60,)) for n in ("fast", "exact"))
        for chunks in ((1, 7, 40, 12), (16, 17, 1, 1, 25)):
            np.testing.assert_array_equal(logits("fast", segment, chunks), whole)
        assert not np.array_equal(whole, exact)
        # Rounding activations to 8 bits, as for matrices in blocks, makes as much of any change.
        bound = 1e-6 + 2 * divergence(truth, exact)
        assert divergence(exact, whole) < bound and divergence(truth, whole) < bound < 1e-3
        np.testing.assert_array_equal(logits("fast", segment, (60,), arch=75), whole)
        np.testing.assert_array_equal(logits("fast", segment, (60,), arch=70), exact)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("fast"), quant="F16")


FAST: dict[str, Any] = dict(device="shim", numerics="fast", n_ctx=128, threads=1)


def test_answers_do_not_depend_on_who_else_runs(path: Path) -> None:
    """Nor on what is cached, or computed ahead; and they say what they are."""
    shim()
    prompts = ["hello there", "a b c d e f g h i j k l m n o p", "x"]
    with LLM(path, slots=4, **FAST) as llm:
        assert llm.runtime.runs_on.endswith(", fast numerics") and "fast" in repr(llm)
        assert llm.runtime.program.cache_layout.startswith("cuda 1 fast sm_90; ")
        options = dict(max_tokens=12, temperature=0.8, seed=3)
        alone = [str(llm.generate(prompt, **options)) for prompt in prompts]
        streams = [llm.stream(prompt + "", **options) for prompt in prompts]
        assert ["".join(each.text for each in stream) for stream in streams] == alone


def test_sessions_and_recordings_are_of_their_numerics(path: Path, tmp_path: Path) -> None:
    shim()
    file = tmp_path / "session"
    with LLM(path, **FAST) as llm:
        stream = llm.stream("one two three", max_tokens=5, temperature=0.0)
        list(stream)
        llm.save_session(file, [*stream.request.ids])
        recording = Recording.of(llm, stream)
        assert recording.numerics == recording.as_json()["replay"]["numerics"] == "fast"
        assert recording.replay(llm).is_equal and llm.load_session(file)
    with LLM(path, **{**FAST, "numerics": "exact"}) as llm:
        assert "numerics" not in llm.runtime.program.describe()
        with pytest.raises(SessionError, match="kv_type or numerics; use what it was saved with"):
            llm.load_session(file)
        with pytest.raises(InvalidRequestError, match="numerics was fast when .* numerics='fast'"):
            recording.check(llm)


@pytest.mark.parametrize("capability", ["6.1", "7.2", "7.5", "12.0"])
def test_the_doctor_knows_which_gpus_have_them(capability: str) -> None:
    gpu = Gpu("any", capability, 1 << 30, False)
    arch = int(capability.replace(".", ""))
    assert has_fast_numerics(gpu) == (arch >= LEAST_FAST_ARCH)


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"device": "law"}, {"gpu_layers": 0}])
def test_a_device_without_them_is_refused(path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(DeviceError, match="numerics is 'fast', which GPUs have, and the device is"):
        LLM(path, **{**FAST, **options})


def test_a_gpu_without_tensor_cores_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shim()
    monkeypatch.setattr("edgeinfer.kernels.cuda.backend.LEAST_FAST_ARCH", 1000)
    with LLM(path, **FAST) as llm:
        said = "numerics on shim:0 are exact: .* lacks the tensor cores for others"
        assert re.fullmatch(said, llm.runtime.device_note)
        assert not llm.runtime.runs_on.endswith("numerics")
