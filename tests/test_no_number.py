"""What is no number stays none, wherever it stands: a damaged model says so on every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeinfer import LLM, EdgeInferError
from edgeinfer.batch import PAGE
from edgeinfer.gguf import GGUFFile, TensorBytes
from edgeinfer.graph import KV, KVType
from edgeinfer.kernels.cpu import attention_layout, layout, page_layout
from edgeinfer.kernels.reference import ReferenceBackend
from edgeinfer.kernels.reference.caches import BLOCK
from edgeinfer.kernels.reference.quantised import Quantised
from edgeinfer.model import Model
from tests import native

from .backends import FAST, IDS, LIMITS, backend, batch_of
from .golden_models import GOLDENS, PROMPT
from .kv_pages import k_pages, v_pages
from .models_for_tests import tiny_model
from .test_cpu_ops import Positions, Sinks, rows_of

LAW = Quantised()
ODD = [np.nan, -np.nan, np.inf, -np.inf]
Places: TypeAlias = list[tuple[int, int, float]]  # row, column, and what stands there


@pytest.mark.parametrize("family", [None, "avx2", "generic"])
@pytest.mark.parametrize("odd", ODD, ids=str)
def test_a_block_of_activations_has_no_scale(odd: float, family: str | None) -> None:
    x = rows_of(32, 64)
    np.fill_diagonal(x[:, 32:], odd)  # in each of 32 places
    sinks = Sinks(32, 64)
    args = [x.ctypes.data, x[0].nbytes, 64, layout.ALL_ROWS, *sinks.words]
    native.run("quantise", native.header(H_ROWS=32), args, range(32), family)
    assert sinks.a32 is not None
    blocks = sinks.a32.reshape(2, 32, layout.A32_BYTES)  # a tile: block by block, row by row
    d = np.ascontiguousarray(blocks[:, :, layout.A32_D : layout.A32_DSUM]).view(np.float32)
    assert np.isfinite(d[0]).all()
    np.testing.assert_array_equal(d[1], np.full((32, 1), abs(odd), np.float32))


ODD_VALUES = st.sampled_from([*ODD, 0.0, -0.0, 1e8, -3e38, 1e-42, 1e-7])
ODD_PLACES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 127), ODD_VALUES), max_size=12)


@settings(max_examples=60, deadline=None)
@given(ODD_PLACES, ODD_PLACES, st.sampled_from([("q8_0", "q4_0"), ("q4_0", "q8_0")]))
def test_caches_hold_what_the_law_says(
    in_k: Places, in_v: Places, types: tuple[KVType, KVType]
) -> None:
    """Keys and values of two heads, with and without a transform; some are what no code is for."""
    both = rows_of(7, 128), rows_of(7, 128, 1)
    for x, places in zip(both, (in_k, in_v), strict=True):
        for row, i, value in places:
            x[row, i] = value
    for dim in (64, 20):
        rows = [np.ascontiguousarray(x[:, : 2 * dim]) for x in both]
        check_stored(*rows, KV(2, dim, dim, k_type=types[0], v_type=types[1]))


def check_stored(k: NDArray[np.float32], v: NDArray[np.float32], kv: KV) -> None:
    positions, caches, expected = Positions(), [], []
    k_bytes = page_layout.k_bytes(kv.k_dim, kv.k_type)
    v_bytes = page_layout.v_bytes(kv.v_dim, kv.v_type)
    for x, kind, transforms, pack in (
        (k, kv.k_type, kv.transforms_k, k_pages),
        (v, kv.v_type, kv.transforms_v, v_pages),
    ):
        heads = x.reshape(7, 2, -1)
        with np.errstate(all="ignore"):
            blocks = LAW.stored(LAW.hadamard(heads) if transforms else heads, kind)
        pages = np.full((12, PAGE, *blocks.shape[1:]), np.array((0.5, 3), BLOCK))
        caches.append(pack(pages, kind).copy())
        for row, (pos, seq) in enumerate(zip(positions.pos.tolist(), positions.seq, strict=True)):
            table = positions.tables[seq]
            pages[table.pages[table.slot(pos // PAGE)], pos % PAGE] = blocks[row]
        expected.append(pack(pages, kind))
    args = attention_layout.ROTATE.pack(
        q=0, q_stride=0, k=k.ctypes.data, k_stride=k[0].nbytes, v=v.ctypes.data,
        v_stride=v[0].nbytes, pinned_q=0, n_heads=0, n_kv_heads=2, k_dim=kv.k_dim, v_dim=kv.v_dim,
        n_pairs=0, angles=0, pinned_angles=0, q_norm=0, k_norm=0, eps=0,
        k_base=caches[0].ctypes.data, k_page_bytes=caches[0][0].nbytes,
        v_base=caches[1].ctypes.data, v_page_bytes=caches[1][0].nbytes, tables=0,
        k_head_bytes=k_bytes, v_head_bytes=v_bytes, transforms_k=int(kv.transforms_k),
        transforms_v=int(kv.transforms_v),
    )  # fmt: skip
    native.run(f"rotate.norm.{kv.k_type}.{kv.v_type}", positions.header, args, range(7))
    for found, law in zip(caches, expected, strict=True):
        differ = found != law
        # Of what is no number the bits may be others, those of a scale of 0 its sign.
        assert not differ.any() or _scales_alike(found, law, differ)


def _scales_alike(found: Any, law: Any, differ: Any) -> bool:
    """Whether all that differs is halves that are both no number, or both 0."""
    ours, theirs = (x.view(np.float16).ravel() for x in (found, law))
    places = np.flatnonzero(differ.ravel().reshape(-1, 2).any(axis=1))
    both = ours[places], theirs[places]
    nans = np.isnan(both[0]) & np.isnan(both[1])
    return bool((nans | ((both[0] == 0) & (both[1] == 0))).all())


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A model of one weight that is no number, behind a norm."""
    path = tiny_model(tmp_path)
    with GGUFFile.open(path) as file:
        data = file.tensors["blk.1.ffn_norm.weight"].data
        assert isinstance(data, TensorBytes)
        at = data._start + 4 * 5
    with path.open("r+b") as raw:
        raw.seek(at)
        raw.write(np.float32(np.nan).tobytes())
    return path


@pytest.mark.parametrize("machine", FAST)
def test_logits_of_a_damaged_model_are_none(damaged: Path, machine: str) -> None:
    with GGUFFile.open(damaged) as file:
        segment = Model.load(file).graph.segment()
        with ReferenceBackend().compile(segment, LIMITS, mode="quantised") as program:
            assert np.isnan(program.submit(batch_of(IDS)).wait().logits).all()
        with backend(machine).compile(segment, LIMITS) as program:
            assert np.isnan(program.submit(batch_of(IDS)).wait().logits).all()


def test_an_answer_of_a_damaged_model_is_an_error(damaged: Path) -> None:
    with LLM(damaged) as llm, pytest.raises(EdgeInferError, match="yields no number to choose a"):
        llm.generate([1, 2, 3], max_tokens=2)


@pytest.mark.parametrize("name", ["lfm2", "qwen35"])
@pytest.mark.parametrize("machine", FAST)
def test_a_tap_that_is_no_number_meets_the_zeros_before_a_sequence(
    name: str, machine: str, tmp_path: Path
) -> None:
    draft = GOLDENS[name].draft()
    taps = next(x for name, x in draft.tensors.items() if "conv" in name and x.shape[-1] < 5)
    taps[7, 0] = np.nan
    with draft.loaded(tmp_path) as model:
        segment = model.graph.segment(n_ctx=64)
        batch, room = batch_of(PROMPT[:6]), LIMITS._replace(n_states=2)
        with ReferenceBackend().compile(segment, room, mode="quantised") as program:
            assert np.isnan(program.submit(batch).wait().logits).all()
        with backend(machine).compile(segment, room) as program:
            assert np.isnan(program.submit(batch).wait().logits).all()
