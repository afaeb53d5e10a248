"""Models of any shape: the CPU has the reference's bits, or a width is refused by name."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeinfer.batch import Batch, PageTable, StepLimits
from edgeinfer.errors import UnsupportedModelError
from edgeinfer.graph import (
    KV,
    Add,
    Attention,
    Embed,
    Graph,
    Hparams,
    Linear,
    Op,
    RmsNorm,
    Rope,
    Rotate,
    Segment,
)
from edgeinfer.kernels.cpu.backend import CpuBackend
from edgeinfer.kernels.cpu.program import CpuProgram
from edgeinfer.kernels.reference import ReferenceBackend
from edgeinfer.platform import Memory
from edgeinfer.quant import QUANT_TYPES, Weight
from tests.bench.blocks import quantize

from .native import cache_root
from .random_graphs import Given

FLOATS, BLOCKS_OF_32 = ("F32", "F16", "BF16"), ("Q4_0", "Q8_0")
TYPES = {kind.name: kind for kind in QUANT_TYPES.values()}
LIMITS = StepLimits(n_pages={0: 3}, max_rows=8, max_outputs=8, max_sequences=2, n_threads=2)
PAGES = np.array([2, 0], np.int32)


@dataclass(frozen=True)
class Shape:
    """A model of one layer; `seed` draws its weights and, where they may differ, their types."""

    dim: int = 64
    n_kv_heads: int = 1
    group: int = 2  # query heads of a key/value head
    k_dim: int = 100
    v_dim: int = 100
    rope_dims: int = 100
    ffn_dim: int = 96
    vocab: int = 320
    rope: Literal["norm", "neox"] = "norm"
    qk_norm: bool = False
    bias: bool = False
    tied: bool = False
    factors: bool = False
    types: tuple[str, ...] = ("F32",)
    n_prompt: int = 5
    seed: int = 0


class Weights(dict[str, Weight]):
    """Makes a random tensor of whatever shape is asked for."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self._shape, self._rng = shape, np.random.default_rng(shape.seed)

    def add(self, name: str, *dims: int) -> None:
        values = self._rng.standard_normal(dims, np.float32)
        if len(dims) == 1:
            kind, rows = "F32", (1 + values / 4).astype(np.float32)
        else:
            fitting = [t for t in self._shape.types if dims[1] % TYPES[t].block == 0]
            kind = str(self._rng.choice(fitting or ["F32"]))
            rows = quantize(values / np.float32(dims[1] ** 0.5), kind)
        self[name] = Weight(name, dims, TYPES[kind], memoryview(rows.tobytes()))


def record(shape: Shape) -> Segment:
    """The graph of a model file, with key and value heads of widths of their own."""
    s, n_heads = shape, shape.n_kv_heads * shape.group
    weights = Weights(shape)
    q_dim, k_dim, v_dim = n_heads * s.k_dim, s.n_kv_heads * s.k_dim, s.n_kv_heads * s.v_dim
    rows = {"attn_q": q_dim, "attn_k": k_dim, "attn_v": v_dim}
    weights.add("token_embd.weight", s.vocab, s.dim)
    for name, n in (*rows.items(), ("ffn_gate", s.ffn_dim), ("ffn_up", s.ffn_dim)):
        weights.add(f"blk.0.{name}.weight", n, s.dim)
        if s.bias:
            weights.add(f"blk.0.{name}.bias", n)
    weights.add("blk.0.attn_output.weight", s.dim, n_heads * s.v_dim)
    weights.add("blk.0.ffn_down.weight", s.dim, s.ffn_dim)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        weights.add(f"{name}.weight", s.dim)
    if s.factors:
        weights.add("rope_freqs.weight", s.rope_dims // 2)
    if not s.tied:
        weights.add("output.weight", s.vocab, s.dim)
    for name in ("attn_q_norm", "attn_k_norm") if s.qk_norm else ():
        weights.add(f"blk.0.{name}.weight", s.k_dim)
    g = Graph(Hparams("llama", 1, s.dim, s.vocab, 64), Given(), weights)
    forward(g, s, rows)
    return g.segment()


def forward(g: Graph, s: Shape, rows: dict[str, int]) -> None:
    n_heads = s.n_kv_heads * s.group
    factors = g._weight("rope_freqs.weight", s.rope_dims // 2) if s.factors else None
    rope = Rope(s.rope, s.rope_dims, 10000.0, 1.0, factors)
    x = g.embed()
    for blk in g.layers():
        h = g.rms_norm(x, f"{blk}.attn_norm")
        q, k, v = (g.linear(h, f"{blk}.{name}", n) for name, n in rows.items())
        if s.qk_norm:
            q = g.rms_norm(q, f"{blk}.attn_q_norm", n_heads)
            k = g.rms_norm(k, f"{blk}.attn_k_norm", s.n_kv_heads)
        q, k = g.rotate(q, n_heads, rope), g.rotate(k, s.n_kv_heads, rope)
        cache = KV(s.n_kv_heads, s.k_dim, s.v_dim)
        a = g.attention(q, k, v, cache=cache)
        x = x + g.linear(a, f"{blk}.attn_output", s.dim)
        h = g.rms_norm(x, f"{blk}.ffn_norm")
        gate, up = (g.linear(h, f"{blk}.ffn_{name}", s.ffn_dim) for name in ("gate", "up"))
        x = g.layer_output(x + g.linear(g.silu(gate) * up, f"{blk}.ffn_down", s.dim))
    g.head(g.rms_norm(g.select_rows(x), "output_norm"))


def steps(shape: Shape) -> list[Batch]:
    """A prompt, and a token behind it."""
    n = shape.n_prompt
    ids = np.random.default_rng(shape.seed).integers(0, shape.vocab, n + 1).astype(np.int32)
    return [
        Batch(
            ids=ids[first:last],
            pos=np.arange(first, last, dtype=np.int64),
            seq=np.zeros(last - first, np.int32),
            tables=[(PageTable(PAGES, 0, 2),)],
            wanted=np.arange(last - first, dtype=np.int32),
            output="logits",
        )
        for first, last in ((0, n), (n, n + 1))
    ]


def logits(program: Any, shape: Shape) -> NDArray[np.float32]:
    return np.concatenate([program.submit(b).wait().logits.copy() for b in steps(shape)])


_GUARD = 64  # bytes behind a memory that nothing may write


def spoil(memory: Memory) -> None:
    """Whoever reads what was never written gets NaN."""
    ctypes.memset(memory.address, 0xFF, memory.n_bytes + _GUARD)


def is_kept_within(memory: Memory) -> bool:
    return ctypes.string_at(memory.address + memory.n_bytes, _GUARD) == b"\xff" * _GUARD


def check(shape: Shape, isa: str | None = None) -> None:
    segment = record(shape)
    with ReferenceBackend().compile(segment, LIMITS, mode="quantised") as reference:
        expected = logits(reference, shape)
    with CpuBackend(cache_root(), isa=isa).compile(segment, LIMITS) as program:
        assert isinstance(program, CpuProgram)
        memories = program._kv, program._scratch
        for memory in memories:
            spoil(memory)
        np.testing.assert_array_equal(logits(program, shape), expected)
        assert all(map(is_kept_within, memories))


# Each pair is a kernel to be built, which takes 2 s.
HEADS_IN_CI = ((100, 100), (6, 20))


@st.composite
def shapes(draw: st.DrawFn, heads: st.SearchStrategy[tuple[int, int]]) -> Shape:
    """Widths of 1 to 80, some of them whole blocks of 32."""
    width = st.one_of(st.integers(1, 80), st.sampled_from([32, 64]))
    k_dim, v_dim = draw(heads)
    flag = st.booleans()
    return Shape(
        dim=draw(width),
        n_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 5)),
        k_dim=k_dim,
        v_dim=v_dim,
        rope_dims=2 * draw(st.integers(1, k_dim // 2)),
        ffn_dim=draw(width),
        vocab=draw(width),
        rope=draw(st.sampled_from(["norm", "neox"])),
        qk_norm=draw(flag),
        bias=draw(flag),
        tied=draw(flag),
        factors=draw(flag),
        types=tuple(draw(st.lists(st.sampled_from(FLOATS + BLOCKS_OF_32), min_size=1, max_size=3))),
        n_prompt=draw(st.integers(1, LIMITS.max_rows)),
        seed=draw(st.integers(0, 99)),
    )


ANY_TIME = [HealthCheck.too_slow]


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=ANY_TIME)
@example(Shape())
@example(Shape(dim=1, group=1, ffn_dim=1, vocab=1, k_dim=6, v_dim=20, rope_dims=2))
@given(shapes(st.sampled_from(HEADS_IN_CI)))
def test_every_width_gives_the_references_bits(shape: Shape) -> None:
    check(shape)


@pytest.mark.slow
@pytest.mark.parametrize("isa", [None, "avx2", "generic"])
@settings(max_examples=1500, deadline=None, suppress_health_check=ANY_TIME)
@given(shapes(st.sampled_from([*HEADS_IN_CI, (2, 2), (4, 9), (12, 12), (36, 8), (72, 71)])))
def test_thousands_of_shapes_on_every_vocabulary(isa: str | None, shape: Shape) -> None:
    check(shape, isa)


# -- what no kernel takes ------------------------------------------------------------------------


def replaced(segment: Segment, kind: type[Op], **fields: Any) -> Segment:
    """A segment whose first op of a kind claims something else."""
    ops = list(segment.ops)
    i = next(i for i, op in enumerate(ops) if isinstance(op, kind))
    ops[i] = ops[i]._replace(**fields)
    return segment._replace(ops=tuple(ops))


def claims() -> Iterator[tuple[Segment, str]]:
    """Segments that no kernel may be given, and what the error must name."""
    segment = record(Shape(dim=64, factors=True, bias=True))
    norm, linear, rotation, attention, add = (
        next(op for op in segment.ops if isinstance(op, kind))
        for kind in (RmsNorm, Linear, Rotate, Attention, Add)
    )
    assert isinstance(norm, RmsNorm) and isinstance(linear, Linear) and isinstance(add, Add)
    assert isinstance(rotation, Rotate) and isinstance(attention, Attention)
    weight, rope, kv = linear.weight, rotation.rope, attention.cache
    yield replaced(segment, Embed, weight=replace(weight, shape=(320, 60))), r"\(320, 60\)"
    yield replaced(segment, Linear, weight=replace(weight, shape=(200, 63))), "attn_q.*63"
    yield replaced(segment, Linear, weight=replace(weight, type=TYPES["Q4_K"])), "64.*256"
    yield replaced(segment, Linear, weight=replace(weight, type=TYPES["IQ2_XS"])), "IQ2_XS.*Q4_0"
    yield replaced(segment, Linear, bias=replace(weight, shape=(8,))), r"\(8,\).*\(200,\)"
    yield replaced(segment, RmsNorm, weight=replace(norm.weight, shape=(65,))), "attn_norm.*65"
    yield replaced(segment, RmsNorm, n_heads=3), "64.*multiples of 3"
    for n_dims in (7, 102):
        yield replaced(segment, Rotate, rope=rope._replace(n_dims=n_dims)), f"{n_dims} wide.*100"
    yield replaced(segment, Rotate, rope=rope._replace(n_dims=98)), r"rope_freqs.*\(50,\).*\(49,\)"
    yield replaced(segment, Rotate, n_heads=3), "200.*multiples of 3"
    yield replaced(segment, Attention, cache=kv._replace(n_heads=3)), "2.*multiples of 3"
    yield replaced(segment, Attention, cache=kv._replace(k_dim=99)), "query.*200 wide.*198"
    yield replaced(segment, Attention, cache=kv._replace(v_dim=99)), "value.*100 wide.*99"
    yield replaced(segment, Add, b=linear.out), "Add.*200"


@pytest.mark.parametrize("number", range(15))
def test_a_shape_that_no_kernel_takes_is_refused_by_name(number: int) -> None:
    segment, named = list(claims())[number]
    with pytest.raises(UnsupportedModelError, match=named):
        CpuBackend(cache_root()).compile(segment, LIMITS)
