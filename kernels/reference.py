"""The oracle: every recorded op in plain NumPy, and the normative text of edgeinfer's arithmetic.

Knows no threads, tapes or packed layouts. Two modes share one walk over the ops:

- "exact": the truth. Dequantised float32 weights, float32 matrix products, everything else in
  float64, K and V kept in float32.
- "quantised": what every kernel computes, bit for bit. All values are float32, every written
  operation rounds once to nearest even, `fma` is fused, no operation is reordered. The functions
  below `_Quantised` say how; where they show a loop, its order is part of the contract.

Rules of the quantised mode that span functions:
- a matmul is followed by the bias, then by the residual: `residual + (acc + bias)`.
- a row of an embedding is `quant.dequantize` of its blocks: d * q + m rounds twice.
- K and V, those of the step itself too, are rounded to float16 (nearest even) when stored and
  before any query reads them.
- a query reads the pages of `PageTable.visible`; for pinned ones it is rotated at
  `PageTable.pinned_pos`, from the unrotated query. K is never rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from edgeinfer.batch import PAGE, SEGMENT_PAGES, Batch, Outputs, StepLimits
from edgeinfer.errors import ClosedError
from edgeinfer.fusion import Uses, pinned_query
from edgeinfer.graph import (
    KV,
    Activation,
    ActivationKind,
    Add,
    Attention,
    Bias,
    Embed,
    Linear,
    Mul,
    Op,
    RmsNorm,
    Rope,
    Rotate,
    Scale,
    Segment,
    SelectRows,
    SoftCap,
    Yarn,
)
from edgeinfer.known import Known, check, fields
from edgeinfer.quant import Weight, dequantize
from edgeinfer.sampling.params import Sampled, SampleRow

Floats: TypeAlias = NDArray[np.float32]
Doubles: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Mode: TypeAlias = Literal["exact", "quantised"]
Sampler: TypeAlias = Callable[[Floats, SampleRow], Sampled]


KNOWN: Known = {
    Embed: fields("weight"),
    RmsNorm: fields("x weight eps n_heads"),
    Linear: fields("x weight bias"),
    Rotate: fields("x n_heads rope"),
    Rope: fields("kind n_dims base scale factors yarn magnitude", kind=("norm", "neox")),
    Yarn: fields("n_ctx beta_fast beta_slow"),
    Attention: fields("q k v n_heads cache scale"),
    KV: fields("n_heads k_dim v_dim"),
    Add: fields("a b"),
    Mul: fields("a b"),
    Bias: fields("x weight"),
    Scale: fields("x factor"),
    SoftCap: fields("x cap"),
    Activation: fields("x kind", kind=get_args(ActivationKind)),
    SelectRows: fields("x"),
}


class ReferenceBackend:
    """Compiles a segment for this process, at NumPy's pace.

    `sampler` picks a token from a row of logits; without one only the likeliest can be asked for.
    """

    def __init__(self, sampler: Sampler | None = None) -> None:
        self._sampler = sampler

    def building_bytes(self, segment: Segment) -> int:
        """Nothing has to be built."""
        return 0

    def compile(
        self, segment: Segment, limits: StepLimits, *, mode: Mode = "exact"
    ) -> ReferenceProgram:
        check(segment, KNOWN, "reference")
        numerics = _Exact() if mode == "exact" else _Quantised()
        return ReferenceProgram(segment, limits, numerics, self._sampler)


class ReferenceProgram:
    """A segment made runnable: its weights, and the KV pages of its layers."""

    def __init__(
        self, segment: Segment, limits: StepLimits, numerics: _Numerics, sampler: Sampler | None
    ) -> None:
        self._segment, self._limits = segment, limits
        self._numerics, self._sampler = numerics, sampler
        self._weights: dict[str, Any] = {}
        for op in segment.ops:
            if isinstance(op, Linear) and op.weight.name not in self._weights:
                self._weights[op.weight.name] = numerics.load(op.weight)
        self._pages = {
            layer: _Pages(
                np.zeros((limits.n_pages, PAGE, kv.n_heads, kv.k_dim), numerics.kv_type),
                np.zeros((limits.n_pages, PAGE, kv.n_heads, kv.v_dim), numerics.kv_type),
            )
            for layer, kv in segment.caches.items()
        }
        uses = Uses(segment)
        self._pinned = {
            op.out.index: pinned_query(op, uses) for op in segment.ops if isinstance(op, Attention)
        }
        self._ticket: ReferenceTicket | None = None
        self._is_closed = False

    def submit(self, batch: Batch) -> ReferenceTicket:
        """Queue a step; it runs when it is waited for, at the latest before the next one."""
        if self._is_closed:
            raise ClosedError("the program was closed")
        assert batch.n_rows <= self._limits.max_rows
        assert len(batch.wanted) <= self._limits.max_outputs
        assert len(batch.tables) <= self._limits.max_sequences
        if self._ticket is not None:
            self._ticket.wait()
        self._ticket = ReferenceTicket(self, batch)
        return self._ticket

    def close(self) -> None:
        self._is_closed, self._ticket = True, None
        self._weights.clear()
        self._pages.clear()

    def __enter__(self) -> ReferenceProgram:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(self, batch: Batch, ticket: ReferenceTicket) -> Outputs:
        """Compute the step that `ticket` stands for."""
        values: dict[int, Floats] = {}
        if self._segment.input is not None:
            assert batch.hidden is not None, "this segment starts from batch.hidden"
            values[self._segment.input.index] = batch.hidden
        # A broken model may overflow: its logits say so, a warning would not help.
        with np.errstate(all="ignore"):
            for op in self._segment.ops:
                if ticket.is_aborted:
                    return self._outputs(aborted=True)
                values[op.out.index] = self._run_op(op, values, batch, batch.pos)
            return self._collect(values, batch)

    def _run_op(self, op: Op, values: Mapping[int, Floats], batch: Batch, pos: Ints) -> Floats:
        """The value that an op makes, of rows at positions `pos`."""
        numerics = self._numerics
        match op:
            case Embed():
                return _embed(op.weight, batch.ids)
            case RmsNorm():
                rows = values[op.x.index].reshape(-1, op.x.dim // op.n_heads)
                weight = None if op.weight is None else dequantize(op.weight)
                return numerics.rms_norm(rows, weight, op.eps).reshape(-1, op.x.dim)
            case Linear():
                out = numerics.matmul(values[op.x.index], self._weights[op.weight.name])
                return out if op.bias is None else out + dequantize(op.bias)
            case Rotate():
                return _rotate(numerics, op, values[op.x.index], pos)
            case Attention():
                return self._attend(op, values, batch)
            case Add():
                return values[op.a.index] + values[op.b.index]
            case Mul():
                return values[op.a.index] * values[op.b.index]
            case Bias():
                return values[op.x.index] + dequantize(op.weight)
            case Scale():
                return _scaled(values[op.x.index], op.factor)
            case SoftCap():
                return numerics.soft_cap(values[op.x.index], op.cap)
            case Activation():
                return numerics.activation(op.kind, values[op.x.index])
            case SelectRows():
                return values[op.x.index][batch.wanted]

    def _attend(self, op: Attention, values: Mapping[int, Floats], batch: Batch) -> Floats:
        """Store this step's K and V, then let every row read the pages that it sees."""
        n_rows, cache, pages = batch.n_rows, op.cache, self._pages[op.layer]
        rows = [
            (batch.tables[i], pos) for i, pos in zip(batch.seq, batch.pos.tolist(), strict=True)
        ]
        k = values[op.k.index].reshape(n_rows, cache.n_heads, cache.k_dim)
        v = values[op.v.index].reshape(n_rows, cache.n_heads, cache.v_dim)
        for row, (table, pos) in enumerate(rows):
            page = table.pages[table.slot(pos // PAGE)]
            pages.k[page, pos % PAGE], pages.v[page, pos % PAGE] = k[row], v[row]

        pinned_pos = np.array([table.pinned_pos(pos) for table, pos in rows], np.int64)
        pinned = dict(values)
        for each in self._pinned[op.out.index]:
            pinned[each.out.index] = self._run_op(each, pinned, batch, pinned_pos)
        q, pinned_q = values[op.q.index], pinned[op.q.index]
        shape = n_rows, op.n_heads, cache.k_dim
        q, pinned_q = q.reshape(shape), pinned_q.reshape(shape)
        kv_head = np.arange(op.n_heads) // (op.n_heads // cache.n_heads)
        out = np.empty((n_rows, op.n_heads, cache.v_dim), np.float32)
        for row, (table, pos) in enumerate(rows):
            absolute = np.array(table.visible(pos), np.int64)
            arena = table.pages[[table.slot(page) for page in absolute.tolist()]]
            is_pinned = (absolute < table.n_pinned)[:, None, None]
            out[row] = self._numerics.attend(
                np.where(is_pinned, pinned_q[row], q[row]),
                pages.k[arena].transpose(0, 2, 1, 3)[:, kv_head].astype(np.float32),
                pages.v[arena].transpose(0, 2, 1, 3)[:, kv_head].astype(np.float32),
                absolute,
                pos,
                op.scale,
            )
        return out.reshape(n_rows, -1)

    def _collect(self, values: Mapping[int, Floats], batch: Batch) -> Outputs:
        """What the batch asked for; "hidden" of the last segment is what enters the head."""
        result = values[self._segment.output.index]
        if not self._segment.is_last:
            return self._outputs(hidden=result)
        if batch.output == "hidden":
            return self._outputs(hidden=values[self._segment.hidden.index])
        if batch.output == "logits":
            return self._outputs(logits=result)
        table = batch.samples
        if table is None:
            # argmax takes the first of equals: ties go to the lower id.
            return self._outputs(ids=result.argmax(axis=1).astype(np.int32))
        assert self._sampler is not None, "this ReferenceBackend was given no sampler"
        for i, logits in enumerate(result):
            table.store(i, self._sampler(logits, table.row(i)))
        return self._outputs(ids=table.ids[: len(result)].copy())

    def _outputs(
        self,
        *,
        logits: Floats | None = None,
        hidden: Floats | None = None,
        ids: NDArray[np.int32] | None = None,
        aborted: bool = False,
    ) -> Outputs:
        hp = self._segment.graph.hparams
        return Outputs(
            np.empty((0, hp.vocab_size), np.float32) if logits is None else logits,
            np.empty((0, hp.dim), np.float32) if hidden is None else hidden,
            np.empty(0, np.int32) if ids is None else ids,
            aborted=aborted,
        )


class ReferenceTicket:
    """One submitted step."""

    def __init__(self, program: ReferenceProgram, batch: Batch) -> None:
        self._program, self._batch = program, batch
        self._outputs: Outputs | None = None
        self.is_aborted = False

    def wait(self) -> Outputs:
        """The outputs of the step; computed on the first call."""
        if self._outputs is None:
            self._outputs = self._program.run(self._batch, self)
        return self._outputs

    def abort(self) -> None:
        """Stop before the next op; from any thread."""
        self.is_aborted = True


@dataclass(frozen=True, slots=True)
class _Pages:
    """The KV arena of one layer: (page, position in page, kv head, head dim)."""

    k: NDArray[np.floating[Any]]
    v: NDArray[np.floating[Any]]


class _Numerics(Protocol):
    """The arithmetic of one mode. Weights pass from `load` to `matmul` unseen."""

    kv_type: type[np.floating[Any]]

    def load(self, weight: Weight) -> Any:
        """What `matmul` needs of a weight matrix."""

    def matmul(self, x: Floats, weight: Any) -> Floats:
        """x W^T, x (T, K)."""

    def rms_norm(self, x: Floats, weight: Floats | None, eps: float) -> Floats:
        """Each row of x divided by its root mean square, times weight."""

    def activation(self, kind: ActivationKind, x: Floats) -> Floats:
        """`graph.Activation` of every value."""

    def soft_cap(self, x: Floats, cap: float) -> Floats:
        """cap * tanh(x / cap)."""

    def rotate(
        self, x0: Floats, x1: Floats, angles: Doubles, magnitude: float
    ) -> tuple[Floats, Floats]:
        """Pairs (x0, x1) turned by their angles, times a magnitude."""

    def attend(
        self, q: Floats, k: Floats, v: Floats, pages: Ints, pos: int, scale: float
    ) -> Floats:
        """softmax(q K^T * scale) V of one row at `pos`: (H, v_dim).

        q (P, H, k_dim), k (P, H, 32, k_dim), v (P, H, 32, v_dim) for the P absolute `pages`.
        """


# -- what both modes share -----------------------------------------------------------------------


def _embed(weight: Weight, ids: NDArray[np.int32]) -> Floats:
    """Rows `ids` of a matrix as `quant.dequantize` gives them."""
    n_rows, dim = weight.shape
    assert ((ids >= 0) & (ids < n_rows)).all()
    size = weight.type.row_bytes(dim)
    out = np.empty((len(ids), dim), np.float32)
    for i, row in enumerate(ids.tolist()):
        out[i] = dequantize(weight.data[row * size : (row + 1) * size], weight.type, (dim,))
    return out


def _scaled(x: Floats, factor: float) -> Floats:
    out: Floats = x * np.float32(factor)
    return out


def _rotate(numerics: _Numerics, op: Rotate, x: Floats, pos: Ints) -> Floats:
    """Rotate the first n_dims of each head by its row's position, the rest stays.

    The angle of pair i is pos * frequencies()[i], in float64. "norm" pairs 2i with 2i + 1, "neox" i
    with i + n_dims / 2.
    """
    rope, out = op.rope, x.copy().reshape(len(x), op.n_heads, -1)
    angles = (pos[:, None] * rope.frequencies())[:, None, :]
    n, half = rope.n_dims, rope.n_dims // 2
    first, second = slice(0, half), slice(half, n)
    if rope.kind == "norm":
        first, second = slice(0, n, 2), slice(1, n, 2)
    turned = numerics.rotate(out[..., first], out[..., second], angles, rope.magnitude)
    out[..., first], out[..., second] = turned
    flat: Floats = out.reshape(x.shape)
    return flat


# -- exact: the truth ----------------------------------------------------------------------------


class _Exact:
    kv_type: type[np.floating[Any]] = np.float32

    def load(self, weight: Weight) -> Floats:
        return dequantize(weight)

    def matmul(self, x: Floats, weight: Floats) -> Floats:
        out: Floats = x @ weight.T
        return out

    def rms_norm(self, x: Floats, weight: Floats | None, eps: float) -> Floats:
        wide = x.astype(np.float64)
        mean: Doubles = (wide * wide).mean(axis=1, keepdims=True)
        return _f32(wide / np.sqrt(mean + eps) * (1 if weight is None else weight))

    def activation(self, kind: ActivationKind, x: Floats) -> Floats:
        return _f32(_EXACT_ACTIVATIONS[kind](x.astype(np.float64)))

    def soft_cap(self, x: Floats, cap: float) -> Floats:
        return _f32(cap * np.tanh(x.astype(np.float64) / cap))

    def rotate(
        self, x0: Floats, x1: Floats, angles: Doubles, magnitude: float
    ) -> tuple[Floats, Floats]:
        c, s = np.cos(angles) * magnitude, np.sin(angles) * magnitude
        return _f32(x0 * c - x1 * s), _f32(x0 * s + x1 * c)

    def attend(
        self, q: Floats, k: Floats, v: Floats, pages: Ints, pos: int, scale: float
    ) -> Floats:
        is_visible = pages[:, None] * PAGE + np.arange(PAGE) <= pos  # (P, 32)
        scores = np.einsum("phd,phsd->hps", q, k, dtype=np.float64) * scale
        scores = np.where(is_visible, scores, -np.inf)
        p = np.exp(scores - scores.max(axis=(1, 2), keepdims=True))
        p /= p.sum(axis=(1, 2), keepdims=True)
        seen = np.where(is_visible[:, None, :, None], v, 0)
        return _f32(np.einsum("hps,phsd->hd", p, seen, dtype=np.float64))


_EXACT_ACTIVATIONS: dict[ActivationKind, Callable[[Doubles], Any]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.logaddexp(0, x),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


# -- quantised: what kernels compute, bit for bit ------------------------------------------------


class _Quantised:
    kv_type: type[np.floating[Any]] = np.float16

    def load(self, weight: Weight) -> Floats | _Blocks:
        return _load_blocks(weight) if weight.type.block > 1 else dequantize(weight)

    def matmul(self, x: Floats, weight: Floats | _Blocks) -> Floats:
        if isinstance(weight, _Blocks):
            return _matmul_blocks(x, weight)
        return _matmul_floats(x, weight)

    def rms_norm(self, x: Floats, weight: Floats | None, eps: float) -> Floats:
        """s = 1 / sqrt(sum(x^2) / n + eps); out = (x * s) * weight, or x * s."""
        mean = _sum_of_squares(x) / np.float32(x.shape[1])
        s = np.float32(1) / np.sqrt(mean + np.float32(eps))
        out: Floats = x * s[:, None]
        return out if weight is None else out * weight

    def activation(self, kind: ActivationKind, x: Floats) -> Floats:
        return _ACTIVATIONS[kind](x)

    def soft_cap(self, x: Floats, cap: float) -> Floats:
        """tanh(x / cap) * cap."""
        return _scaled(tanh(x / np.float32(cap)), cap)

    def rotate(
        self, x0: Floats, x1: Floats, angles: Doubles, magnitude: float
    ) -> tuple[Floats, Floats]:
        """x0' = fma(x0, c, -(x1 * s)), x1' = fma(x0, s, x1 * c).

        c and s are computed in float64, times the magnitude, and rounded to float32.
        """
        c, s = _f32(np.cos(angles) * magnitude), _f32(np.sin(angles) * magnitude)
        return fma(x0, c, -(x1 * s)), fma(x0, s, x1 * c)

    def attend(
        self, q: Floats, k: Floats, v: Floats, pages: Ints, pos: int, scale: float
    ) -> Floats:
        """Each page by itself, pages folded inside segments of 16 pages, segments folded.

        score = (fma(q[j], k[j], acc), j ascending) * scale. In a page, over its visible
        positions: m = max of scores, p = exp(score - m), l = sum of the 32 p (0 where not
        visible) in `_sum_lanes` order, o = fma(p, v, o) ascending; an invisible V is skipped.
        A segment is a range of absolute pages; both folds run in ascending order and start from
        their first member. out = o * (1 / l).
        """
        is_visible = pages[:, None] * PAGE + np.arange(PAGE) <= pos  # (P, 32)
        scores = np.zeros(k.shape[:3], np.float32)  # (P, H, 32)
        for j in range(k.shape[3]):
            scores = fma(q[:, :, j, None], k[:, :, :, j], scores)
        scores = np.where(is_visible[:, None], scores * np.float32(scale), -np.inf)
        m = scores.max(axis=2)  # (P, H)
        p = np.where(is_visible[:, None], exp(scores - m[:, :, None]), np.float32(0))
        l = _sum_lanes(p.reshape(*m.shape, 4, 8))  # noqa: E741
        o = np.zeros((*m.shape, v.shape[3]), np.float32)  # (P, H, v_dim)
        for i in range(PAGE):
            o = np.where(is_visible[:, i, None, None], fma(p[:, :, i, None], v[:, :, i], o), o)
        parts = [_Part(*part) for part in zip(m, l, o, strict=True)]
        members = groupby(zip(pages.tolist(), parts, strict=True), lambda x: x[0] // SEGMENT_PAGES)
        whole = reduce(_fold, [reduce(_fold, [part for _, part in group]) for _, group in members])
        out: Floats = whole.o * (np.float32(1) / whole.l)[:, None]
        return out


@dataclass(frozen=True, slots=True)
class _Part:
    """Attention over some positions: maximum m, sum l of exp(score - m), and those times V."""

    m: Floats  # (H,)
    l: Floats  # noqa: E741
    o: Floats  # (H, v_dim)


def _fold(a: _Part, b: _Part) -> _Part:
    """m = max; l = fma(a.l, exp(a.m - m), b.l * exp(b.m - m)); o likewise."""
    m = np.maximum(a.m, b.m)
    scale_a, scale_b = exp(a.m - m), exp(b.m - m)
    return _Part(
        m,
        fma(a.l, scale_a, b.l * scale_b),
        fma(a.o, scale_a[:, None], b.o * scale_b[:, None]),
    )


@dataclass(frozen=True, slots=True)
class _Blocks:
    """A quantised matrix in blocks of 32 columns, whatever the blocks of its type.

    A weight is scale * code + low. `codes` are integers: quants less their zero point, times the
    sub-block scale where sub-blocks have 16 columns (Q2_K, Q3_K, Q6_K), or what the table of
    IQ4_NL, IQ4_XS and MXFP4 (doubled) holds. `scale` is d, d * float(sub-block scale) for Q4_K,
    Q5_K and IQ4_XS, 2^(e - 128) for MXFP4. `low` is m of Q4_1 and Q5_1 and
    -(dmin * float(min)) of Q4_K and Q5_K; Q2_K has -dmin there, and its mins in `mins`.
    """

    codes: NDArray[np.int16]  # (K / 32, N, 32)
    scale: Floats  # (K / 32, N)
    low: Floats | None = None  # (K / 32, N)
    mins: NDArray[np.int16] | None = None  # (K / 32, N, 2)


_BLOCK, _SUB_BLOCK = 32, 16
# Byte offsets in a block of d and of m or dmin, both float16.
_SCALES: dict[str, tuple[int, int | None]] = {
    "Q4_0": (0, None),
    "Q4_1": (0, 2),
    "Q5_0": (0, None),
    "Q5_1": (0, 2),
    "Q8_0": (0, None),
    "Q2_K": (80, 82),
    "Q3_K": (108, None),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208, None),
}
# What stands before the nibbles when every scale is 1, and a nibble that stands for 1.
_TABLES: dict[str, tuple[bytes, int]] = {
    "IQ4_NL": (b"\x00\x3c", 8),
    "IQ4_XS": (b"\x00\x3c\xaa\xaa\x11\x11\x11\x11", 8),
    "MXFP4": (b"\x80", 1),
}


def _load_blocks(weight: Weight) -> _Blocks:
    """Take a matrix apart by dequantising it with (d, m) = (1, 0) and (0, 1)."""
    n_rows, dim = weight.shape
    kind = weight.type
    blocks = np.frombuffer(weight.data[:], np.uint8).reshape(n_rows, -1, kind.block_bytes)
    if kind.name in _TABLES:
        return _load_table_blocks(weight, blocks)
    at_d, at_m = _SCALES[kind.name]

    def halves(at: int) -> Floats:
        values = np.ascontiguousarray(blocks[:, :, at : at + 2]).view("<f2")[:, :, 0]
        return np.repeat(values.T.astype(np.float32), kind.block // _BLOCK, axis=0)

    def integers(d: float, m: float) -> NDArray[np.int16]:
        copy = blocks.copy()
        copy[:, :, at_d : at_d + 2] = np.array([d], "<f2").view(np.uint8)
        if at_m is not None:
            copy[:, :, at_m : at_m + 2] = np.array([m], "<f2").view(np.uint8)
        values = dequantize(copy, kind, weight.shape).astype(np.int16)
        return np.ascontiguousarray(values.reshape(n_rows, -1, _BLOCK).transpose(1, 0, 2))

    codes, d = integers(1, 0), halves(at_d)
    if at_m is None:
        return _Blocks(codes, d)
    lows, m = integers(0, 1)[:, :, ::_SUB_BLOCK], halves(at_m)
    if kind.block == _BLOCK:
        return _Blocks(codes, d, m)
    if kind.name == "Q2_K":
        return _Blocks(codes, d, -m, -lows)
    # A block of ones has the sub-blocks' scales as its integers.
    at_quants = {"Q4_K": 16, "Q5_K": 48}[kind.name]
    blocks = blocks.copy()
    blocks[:, :, 16:at_quants], blocks[:, :, at_quants:] = 0, 0x11
    scales = integers(1, 0)[:, :, :1]
    codes //= np.maximum(scales, 1)
    return _Blocks(codes, d * scales[:, :, 0], m * lows[:, :, 0])


def _load_table_blocks(weight: Weight, blocks: NDArray[np.uint8]) -> _Blocks:
    """Likewise, with scales of 1 and with nibbles that stand for 1."""
    unit_scales, one = _TABLES[weight.type.name]
    at_quants = len(unit_scales)

    def values(before: NDArray[np.uint8], quants: NDArray[np.uint8] | np.uint8) -> Floats:
        copy = blocks.copy()
        copy[:, :, :at_quants], copy[:, :, at_quants:] = before, quants
        rows = dequantize(copy, weight.type, weight.shape)
        return np.ascontiguousarray(rows.reshape(len(rows), -1, _BLOCK).transpose(1, 0, 2))

    codes = values(np.frombuffer(unit_scales, np.uint8), blocks[:, :, at_quants:])
    scale = values(blocks[:, :, :at_quants], np.uint8(0x11 * one))
    return _Blocks(codes.astype(np.int16), scale[:, :, 0])


def _matmul_blocks(x: Floats, weight: _Blocks) -> Floats:
    """Blocks of 32 ascending, acc from +0, dot = float(dot(codes, q)), s = dx * float(sum of q).

    acc = fma(scale * dx, dot, acc), and where there is a low acc = fma(low, s, acc).

    Q2_K has lows for 16 columns: acc = fma(low * dx, float(dot(mins, sums of 16 q)), acc).

    Dots are exact integers (below 2^25) and round once on their way to float32.
    """
    n_blocks, n_rows, _ = weight.codes.shape
    q, dx = quantise(x)
    sums = q.reshape(len(x), n_blocks, -1, _SUB_BLOCK).sum(axis=3)
    s = dx * _f32(sums.sum(axis=2))
    acc = np.zeros((len(x), n_rows), np.float32)
    for b in range(n_blocks):
        scale, d = weight.scale[b], dx[:, b, None]
        # Integers below 2^53 are exact in float64 whatever order BLAS adds them in.
        dots = _f32(q[:, b] @ weight.codes[b].T.astype(np.float64))
        acc = fma(d * scale, dots, acc)
        if weight.low is None:
            continue
        if weight.mins is None:
            acc = fma(weight.low[b], s[:, b, None], acc)
        else:
            min_dots = _f32(sums[:, b] @ weight.mins[b].T.astype(np.float64))
            acc = fma(weight.low[b] * d, min_dots, acc)
    return acc


def quantise(x: Floats) -> tuple[Doubles, Floats]:
    """Blocks of 32 values of x as integers q in -127 .. 127 and a scale d, x about d * q.

    m = max|x|; d = m / 127; q = roundeven(x * (127 / m)); all zero where m < 1e-36, since 127 / m
    would overflow.
    """
    blocks = x.reshape(len(x), -1, _BLOCK)
    m = np.abs(blocks).max(axis=2)
    m = np.where(m < np.float32(1e-36), np.float32(0), m)
    inverse = np.divide(np.float32(127), m, out=np.zeros_like(m), where=m > 0)
    return np.rint(blocks * inverse[:, :, None]).astype(np.float64), m / np.float32(127)


def _matmul_floats(x: Floats, weight: Floats) -> Floats:
    """F32, F16 and BF16: acc[k % 4] = fma(w[k], x[k], acc[k % 4]), k ascending, from +0.

    The result is (acc[0] + acc[1]) + (acc[2] + acc[3]). x is not quantised.
    """
    x, weight = _pad(x, 4), _pad(weight, 4)
    acc = np.zeros((len(x), len(weight), 4), np.float32)
    for k in range(0, x.shape[1], 4):
        acc = fma(weight[None, :, k : k + 4], x[:, None, k : k + 4], acc)
    return (acc[..., 0] + acc[..., 1]) + (acc[..., 2] + acc[..., 3])


def _sum_of_squares(x: Floats) -> Floats:
    """Per row: vectors of 8 values; vector i is squared into accumulator i % 4, ascending."""
    vectors = _pad(x, 32).reshape(len(x), -1, 4, 8)
    acc = np.zeros((len(x), 4, 8), np.float32)
    for i in range(vectors.shape[1]):
        acc = fma(vectors[:, i], vectors[:, i], acc)
    return _sum_lanes(acc)


def _sum_lanes(acc: Floats) -> Floats:
    """Sum (..., 4, 8): (a0 + a1) + (a2 + a3), then lanes l and l + 4, l + 2, l + 1."""
    v = (acc[..., 0, :] + acc[..., 1, :]) + (acc[..., 2, :] + acc[..., 3, :])
    for width in (4, 2, 1):
        v = v[..., :width] + v[..., width : 2 * width]
    return v[..., 0]


def exp(x: Floats) -> Floats:
    """e^x with x clamped to [-87.3, 88.3], 0 below: a polynomial, the same on every machine."""
    f = np.float32
    clamped = np.clip(x, f(-87.3), f(88.3))
    n = np.rint(clamped * f(1.44269504))
    r = fma(n, f(-0.693359375), clamped)
    r = fma(n, f(2.12194440e-4), r)
    p = np.full_like(r, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(p, r, f(c))
    p = fma(p, r * r, r) + f(1)
    out: Floats = np.where(x < f(-87.3), f(0), np.ldexp(p, n.astype(np.int32)))
    return out


def tanh(x: Floats) -> Floats:
    """A polynomial below 0.625, else 1 - 2 / (e^2|x| + 1) with the sign of x."""
    f, z = np.float32, x * x
    p = np.full_like(x, -5.70498872745e-3)
    for c in (2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
        p = fma(p, z, f(c))
    size = np.abs(x)
    large = f(1) - f(2) / (exp(size + size) + f(1))
    large = np.where(x < 0, -large, large)
    out: Floats = np.where(size < f(0.625), fma(p * z, x, x), large)
    return out


def silu(x: Floats) -> Floats:
    """x / (1 + exp(-x))."""
    out: Floats = x / (np.float32(1) + exp(-x))
    return out


def gelu(x: Floats) -> Floats:
    """w = fma(x * x, 0.044715, 1); (x * 0.5) * (tanh((x * sqrt(2 / pi)) * w) + 1)."""
    f = np.float32
    w = fma(x * x, f(0.044715), f(1))
    out: Floats = (x * f(0.5)) * (tanh((x * f(0.79788456)) * w) + f(1))
    return out


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x))."""
    out: Floats = np.float32(1) / (exp(-x) + np.float32(1))
    return out


def softplus(x: Floats) -> Floats:
    """u = exp(-|x|), s = u / (2 + u), z = s * s: max(x, 0) + (s + s) * (1 + z / 3 + z^2 / 5 ...).

    The series is that of 2 atanh(s) = log(1 + u), up to z^7 / 15, in fma from its end.
    """
    f = np.float32
    u = exp(-np.abs(x))
    s = u / (u + f(2))
    z = s * s
    p = np.full_like(x, 1 / 15)
    for n in (13, 11, 9, 7, 5, 3, 1):
        p = fma(p, z, f(1 / n))
    out: Floats = np.where(x > 0, x, f(0)) + (s + s) * p
    return out


def relu2(x: Floats) -> Floats:
    """The square of what is above 0."""
    y = np.where(x > 0, x, np.float32(0))
    return y * y


_ACTIVATIONS: dict[ActivationKind, Callable[[Floats], Floats]] = {
    "silu": silu,
    "gelu": gelu,
    "sigmoid": sigmoid,
    "softplus": softplus,
    "relu2": relu2,
}


def fma(a: Floats | np.float32, b: Floats | np.float32, c: Floats | np.float32) -> Floats:
    """a * b + c rounded once to float32 (results below 2^-126 may be rounded twice)."""
    product = np.multiply(a, b, dtype=np.float64)  # exact
    total = np.asarray(product + c)
    # Where float64 rounding landed on a tie of float32, its error decides the direction.
    is_tie = total.view(np.int64) & 0x1FFFFFFF == 0x10000000
    if is_tie.any():
        part = total - product
        error = (product - (total - part)) + (c - part)
        moved = np.nextafter(total, np.copysign(np.inf, error))
        total = np.where(is_tie & (error != 0), moved, total)
    return _f32(total)


def _f32(x: NDArray[Any]) -> Floats:
    """Rounded to nearest even."""
    rounded: Floats = x.astype(np.float32)
    return rounded


def _pad(x: Floats, multiple: int) -> Floats:
    """Zeros appended to rows up to a multiple; they change no sum."""
    return np.pad(x, ((0, 0), (0, -x.shape[1] % multiple)))
