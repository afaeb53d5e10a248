"""Lowers what one kernel does of several steps, for a step of one row: a norm and its products.

For more rows the steps are lowered one by one: their kernels leave the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from edgeinfer.fused_ops import Matmul, Matmuls, SwiGlu, WholeNorm
from edgeinfer.graph import RmsNorm, Value
from edgeinfer.kernels.buffers import reads_blocks
from edgeinfer.kernels.cuda import joined, tiles
from edgeinfer.kernels.cuda.commands import Arg
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.cuda.lower_attention import AttentionLowering
from edgeinfer.kernels.cuda.lower_base import PLAIN, LaunchShape
from edgeinfer.kernels.cuda.lower_products import ProductLowering
from edgeinfer.quant import QuantType

_WARPS, _SHARED_BYTES = 4, 48 << 10  # of a block of threads, on any GPU
# Where memory is so fast that more must be on its way, and blocks may have more for it.
_FAST_ARCHS = (90, 100, 103)
_MORE_WARPS, _MORE_SHARED_BYTES = joined.WARPS, joined.MOST_SHARED_BYTES
_MOST_ROWS = 1
_MOST_PARTS = 3
# Each block of threads makes the rows that it multiplies anew: worth it for few blocks only.
_MOST_BLOCKS = 1024
_MOST_UNNORMED_ROWS = 512 * tiles.TILE  # of a matrix: quantising apart costs less from there on


class _Products(NamedTuple):
    """Products of x in blocks, or of its norm, which nobody else reads."""

    x: Value
    norm: RmsNorm | WholeNorm | None
    parts: tuple[Matmul, ...]
    n_warps: int

    @property
    def kinds(self) -> list[QuantType]:
        return [part.weight.type for part in self.parts]

    @property
    def shared_bytes(self) -> int:
        return tiles.normed_bytes(self.kinds, self.x.dim, self.n_warps, _MOST_ROWS)


class FusedLowering(AttentionLowering, ProductLowering):
    """Runs of steps that have a kernel of their own."""

    def _fused(self, i: int) -> int:
        """Lower the steps from i on that few kernels can do; how many these are, maybe none."""
        found = self._normed_products(i) or self._products(i)
        if not found:
            return 0
        norm, parts = found[0].norm, [part for each in found for part in each.parts]
        at = i + 1 if norm else i  # of the products
        swiglu = self._swiglu(at + 1, parts) if norm and len(found) == 1 else None
        with self._from_rows(_MOST_ROWS + 1):
            if norm is not None:
                self._norm(norm)
            for part in parts:
                self._matmul(part, at)
            if swiglu is not None:
                self._pointwise("swiglu", swiglu.out, swiglu.gate, swiglu.up)
        if swiglu is None:
            for each in found:
                self._emit_products(each)
            return at + 1 - i
        self._emit_swiglu(found[0], swiglu)
        return at + 2 - i

    def _normed_products(self, i: int) -> list[_Products]:
        """Step i is the norm of whole rows, and the next one its products."""
        norm, products = self._steps[i], self._steps[i + 1] if i + 1 < len(self._steps) else None
        if not isinstance(products, Matmuls):
            return []
        if not isinstance(norm, (RmsNorm, WholeNorm)) or not self._reads.is_only(norm.out, i + 1):
            return []
        if isinstance(norm, RmsNorm) and norm.n_heads != 1:
            return []
        # What is added may lie where x does, which other blocks of threads still read.
        if any(part.residual is not None or not reads_blocks(part) for part in products.parts):
            return []
        return self._that_fit(norm.x, norm, _of_one_kernel(products.parts))

    def _products(self, i: int) -> list[_Products]:
        """Step i is a product that quantises what nobody has quantised, for itself alone."""
        products = self._steps[i]
        if not isinstance(products, Matmuls) or len(products.parts) > 1:
            return []
        (part,) = products.parts
        if part.x in self._quantised or not self._reads.is_only(part.x, i):
            return []
        if part.residual is part.x or not reads_blocks(part):
            return []
        if part.weight.shape[0] > _MOST_UNNORMED_ROWS:
            return []
        return self._that_fit(part.x, None, [products.parts])

    def _that_fit(
        self, x: Value, norm: RmsNorm | WholeNorm | None, groups: Sequence[tuple[Matmul, ...]]
    ) -> list[_Products]:
        """Products, a kernel each, if a block of threads has room for the row; else none."""
        is_fast = self._joins or self._arch in _FAST_ARCHS
        n_warps = _MORE_WARPS if is_fast else _WARPS
        found = [_Products(x, norm, parts, n_warps) for parts in groups]
        most = max(each.shared_bytes for each in found)
        return found if most <= (_MORE_SHARED_BYTES if is_fast else _SHARED_BYTES) else []

    def _swiglu(self, i: int, parts: Sequence[Matmul]) -> SwiGlu | None:
        """Step i, if it is made of these two products and nobody else reads them."""
        step = self._steps[i] if i < len(self._steps) else None
        if not isinstance(step, SwiGlu) or len(parts) != 2:
            return None
        is_of_them = {part.out for part in parts} == {step.gate, step.up}
        is_alone = all(self._reads.is_only(part.out, i) for part in parts)
        return step if is_of_them and is_alone else None

    def _emit_products(self, found: _Products) -> None:
        args, blocks = self._row_args(found), [0] * _MOST_PARTS
        for n in range(_MOST_PARTS):
            args |= {f"w_{n}": 0, f"bias_{n}": 0, f"y_{n}": 0, f"n_{n}": 0}
        for n, part in enumerate(found.parts):
            n_rows = part.weight.shape[0]
            blocks[n] = _blocks(n_rows)
            args |= {
                f"w_{n}": self._weights.matrix(part.weight), f"n_{n}": n_rows,
                f"bias_{n}": self._weights.vector(part.bias) if part.bias else 0,
                f"y_{n}": self._floats[part.out],
            }  # fmt: skip
        residual = found.parts[0].residual
        args |= {
            "is_normed": int(found.norm is not None), "blocks_0": blocks[0],
            "blocks_1": blocks[1], "residual": self._floats[residual] if residual else 0,
        }  # fmt: skip
        first, last = found.kinds[0].name, found.kinds[-1].name
        kernel = Kernel.of(
            "norm_matmul", TYPE=first, LAST=last, WARPS=found.n_warps, ROWS=_MOST_ROWS
        )
        self._emit_fused(kernel, found, sum(blocks), args)

    def _emit_swiglu(self, found: _Products, swiglu: SwiGlu) -> None:
        gate, up = sorted(found.parts, key=lambda part: part.out is not swiglu.gate)
        n_rows, kind = gate.weight.shape[0], gate.weight.type
        args = self._row_args(found) | {
            "gate": self._weights.matrix(gate.weight), "up": self._weights.matrix(up.weight),
            "gate_bias": self._weights.vector(gate.bias) if gate.bias else 0,
            "up_bias": self._weights.vector(up.bias) if up.bias else 0, "n": n_rows,
            "y": 0 if self._reads.is_quantised_only(swiglu.out) else self._floats[swiglu.out],
            "x8": self._quantised.get(swiglu.out, 0),
        }  # fmt: skip
        kernel = Kernel.of("norm_swiglu", TYPE=kind.name, WARPS=found.n_warps, ROWS=_MOST_ROWS)
        self._emit_fused(kernel, found, _blocks(n_rows), args)

    def _row_args(self, found: _Products) -> dict[str, Arg]:
        norm = found.norm
        rows = self._rows_of(norm.out if norm else found.x)
        gathers = rows != self._rows_of(found.x)
        return {
            "rows": rows, "gather": self._step.wanted if gathers else 0,
            "x": self._floats[found.x], "k": found.x.dim, "eps": norm.eps if norm else 0.0,
            "norm": self._weights.vector(norm.weight) if norm and norm.weight else 0,
        }  # fmt: skip

    def _emit_fused(
        self, kernel: Kernel, found: _Products, blocks: int, args: dict[str, Arg]
    ) -> None:
        shape = LaunchShape(shared_bytes=found.shared_bytes, most_rows=_MOST_ROWS)
        rows = self._rows_of(found.parts[0].x)
        self._emit(kernel, rows, blocks, 32 * found.n_warps, shape, **args)

    def _norm(self, op: RmsNorm | WholeNorm) -> None:
        """Of every row of x; or of its wanted rows, where the result has only those."""
        rows, n_heads = self._rows_of(op.out), op.n_heads if isinstance(op, RmsNorm) else 1
        floats, x8 = self._results(op.out, "norm", can_quantise=n_heads == 1)
        n_warps = 8 if n_heads == 1 else 1
        self._emit(
            Kernel.of("rms_norm", WARPS=n_warps), rows, n_heads, 32 * n_warps, PLAIN,
            rows=rows, gather=self._step.wanted if rows != self._rows_of(op.x) else 0,
            x=self._floats[op.x], weight=self._weights.vector(op.weight) if op.weight else 0,
            y=floats, x8=x8, width=op.x.dim // n_heads, eps=op.eps,
        )  # fmt: skip


def _of_one_kernel(parts: Sequence[Matmul]) -> list[tuple[Matmul, ...]]:
    """Products in groups that are a kernel's: three of a type, or two and one of any."""
    by_type: dict[str, list[Matmul]] = {}
    for part in parts:
        by_type.setdefault(part.weight.type.name, []).append(part)
    groups = [
        alike[first : first + _MOST_PARTS]
        for alike in by_type.values()
        for first in range(0, len(alike), _MOST_PARTS)
    ]
    alone = [group for group in groups if len(group) == 1]
    for pair in (group for group in groups if len(group) == _MOST_PARTS - 1):
        if alone:
            pair += alone.pop()
    joined = [group for group in groups if len(group) > 1]
    return [tuple(group) for group in (*joined, *alone)]


def _blocks(n_rows: int) -> int:
    """Of threads for a matrix: all take as many tiles, but the last ones one less."""
    n_tiles = -(-n_rows // tiles.TILE)
    return -(-n_tiles // -(-n_tiles // _MOST_BLOCKS))
