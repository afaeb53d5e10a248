"""Lowers products of rows and matrices, of experts too: which kernel takes how many rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from edgeinfer.fused_ops import Matmul
from edgeinfer.graph import ExpertLinear, ExpertSum, Route, Value
from edgeinfer.kernels.buffers import Buffer, reads_blocks
from edgeinfer.kernels.cuda import tiles
from edgeinfer.kernels.cuda.commands import ALL_ROWS, ANY_NUMBER, Arg
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.cuda.lower_base import LaunchShape, LoweringBase
from edgeinfer.kernels.cuda.tiles import row_stride
from edgeinfer.quant import QuantType

_WARPS = 4  # that share a tile of a matrix, or take neighbouring rows of one of floats
_FEW_TILES = 256  # of a matrix: more warps share one, so that enough of them are loading
_LEAST_MMA_ARCH = 75
_ORIN_ARCH = 87  # where tensor cores are faster from 3 rows on, elsewhere from 5
_MMA = ((8, 2), (16, 2), (64, 4))  # tokens and warps of a block
# In "fast" numerics. F32 stays: it is what chooses experts, and what is small.
_HALVED = ("F16", "BF16")


class _Way(NamedTuple):
    """A kernel for steps of some numbers of rows: all have the same bits."""

    kernel: Kernel
    matrix_rows: int  # of a block of threads
    threads: int
    shape: LaunchShape


def _ways(kind: QuantType, arch: int, *, shares: bool) -> Iterator[_Way]:
    """Of a matrix in blocks: by the number of rows that multiply it.

    Of one row more warps share a tile where it `shares`.
    """
    has_mma, least = arch >= _LEAST_MMA_ARCH, 1
    sizes = [(1, 1), (2, 2)] if arch == _ORIN_ARCH else [(1, 1), (2, 2), (4, 4)]
    if not has_mma:
        sizes[-1] = (sizes[-1][0], ANY_NUMBER)
    for n_rows, most in sizes:
        wanted = 2 if n_rows > 1 else 2 * _WARPS if shares else _WARPS
        warps = min(wanted, tiles.most_warps(kind, n_rows))
        kernel = Kernel.of("matmul", TYPE=kind.name, WARPS=warps, ROWS=n_rows)
        shape = LaunchShape(rows_per_block=n_rows, least_rows=least, most_rows=most)
        yield _Way(kernel, tiles.TILE, 32 * warps, shape)
        least = most + 1
    if has_mma:
        yield from _mma_ways("matmul_mma", kind, least)


def _mma_ways(name: str, kind: QuantType, least: int) -> Iterator[_Way]:
    """By tensor cores, from so many rows on."""
    for n_tokens, warps in _MMA:
        kernel = Kernel.of(name, TYPE=kind.name, TOKENS=n_tokens, WARPS=warps)
        most = n_tokens if n_tokens <= 16 else ANY_NUMBER
        shape = LaunchShape(rows_per_block=n_tokens, least_rows=least, most_rows=most)
        yield _Way(kernel, tiles.mma_rows(n_tokens, warps), 32 * warps, shape)
        least = most + 1


def _float_ways(kind: QuantType) -> Iterator[_Way]:
    for n_rows, least, most in ((1, 1, 1), (4, 2, ANY_NUMBER)):
        kernel = Kernel.of("matmul_float", TYPE=kind.name, WARPS=_WARPS, ROWS=n_rows)
        shape = LaunchShape(rows_per_block=n_rows, least_rows=least, most_rows=most)
        yield _Way(kernel, 8 * _WARPS, 32 * _WARPS, shape)


class ProductLowering(LoweringBase):
    """The steps that read matrices."""

    def _matmul(self, op: Matmul, i: int) -> None:
        n_rows, n_cols = op.weight.shape
        rows, kind = self._rows_of(op.x), op.weight.type
        residual, out = self._residual(op, i)
        common: dict[str, Arg] = {
            "rows": rows, "w": self._weights.matrix(op.weight), "n": n_rows, "k": n_cols,
            "bias": self._weights.vector(op.bias) if op.bias else 0,
            "residual": residual or 0, "y": out,
        }  # fmt: skip
        if reads_blocks(op):
            shares = self._joins or n_rows <= _FEW_TILES * tiles.TILE
            x, ways = self._x8(op.x), _ways(kind, self._arch, shares=shares)
        elif self._is_fast and kind.name in _HALVED:
            x, ways = self._halves(op.x), _mma_ways("matmul_half", kind, 1)
        else:
            x, ways = self._floats[op.x], _float_ways(kind)
        for way in ways:
            blocks = -(-n_rows // way.matrix_rows)
            shape = way.shape._replace(values_per_block=way.matrix_rows)
            self._emit(way.kernel, rows, blocks, way.threads, shape, x=x, **common)

    def _residual(self, op: Matmul, i: int) -> tuple[Buffer | None, Buffer]:
        """The rows to add to this matmul's result and the rows it leaves: often the same."""
        if op.residual is None:
            return None, self._float_buffer(op.out, "linear")
        residual = self._floats[op.residual]
        if op.residual is self._segment.input or not self._reads.is_last(op.residual, i):
            return residual, self._float_buffer(op.out, "residual")
        self._floats[op.out] = residual
        return residual, residual

    def _x8(self, x: Value) -> Buffer:
        """A value's rows quantised; the first who reads them quantises them."""
        if x not in self._quantised:
            n_bytes = tiles.x8_bytes(x.dim) * self._n_rows(x)
            rows, out = self._rows_of(x), Buffer("quantised", n_bytes)
            self._quantised[x] = out
            blocks = -(-x.dim // tiles.CHUNK)
            self._emit(
                Kernel.of("quantise"), rows, blocks, 256, rows=rows, x=self._floats[x], x8=out,
                k=x.dim,
            )  # fmt: skip
        return self._quantised[x]

    def _halves(self, x: Value) -> Buffer:
        """A value's rows as halves; the first who reads them makes them."""
        if x not in self._halved:
            n_bytes = tiles.half_row_bytes(x.dim) * self._n_rows(x)
            rows, out = self._rows_of(x), Buffer("halves", n_bytes)
            self._halved[x] = out
            self._emit(
                Kernel.of("halve"), rows, 1, 256, rows=rows, x=self._floats[x], out=out, k=x.dim
            )
        return self._halved[x]

    def _route(self, op: Route) -> None:
        self._emit(
            Kernel.of("route", GATING=op.gating), ALL_ROWS, 1, 32,
            LaunchShape(shared_bytes=4 * (3 * op.x.dim + op.n_groups)),
            x=self._floats[op.x], x_stride=row_stride(op.x.dim), n_experts=op.x.dim,
            n_used=op.n_used, bias=self._weights.vector(op.bias) if op.bias else 0,
            n_groups=op.n_groups, n_groups_used=op.n_groups_used, norm=int(op.norm),
            scale=op.scale, out=self._float_buffer(op.out, "route"),
            out_stride=row_stride(op.out.dim),
        )  # fmt: skip

    def _expert_matmul(self, op: ExpertLinear) -> None:
        _, n_rows, n_cols = op.weight.shape
        in_blocks = reads_blocks(op)
        tile_rows = tiles.TILE if in_blocks else 8 * _WARPS
        self._emit(
            Kernel.of("expert_matmul", TYPE=op.weight.type.name, WARPS=_WARPS), ALL_ROWS,
            (-(-n_rows // tile_rows), op.n_used), 32 * _WARPS,
            rows=ALL_ROWS, route=self._floats[op.route],
            x=self._x8(op.x) if in_blocks else self._floats[op.x],
            w=self._weights.matrix(op.weight),
            scale=self._weights.vector(op.scale) if op.scale else 0,
            bias=self._weights.vector(op.bias) if op.bias else 0,
            y=self._float_buffer(op.out, "experts"), n=n_rows, k=n_cols,
            n_parts=op.x.dim // n_cols,
        )  # fmt: skip

    def _expert_sum(self, op: ExpertSum) -> None:
        self._emit(
            Kernel.of("expert_sum"), ALL_ROWS, -(-op.out.dim // 256), 256,
            x=self._floats[op.x], x_stride=row_stride(op.x.dim), route=self._floats[op.route],
            route_stride=row_stride(op.route.dim), n_used=op.route.dim // 2, dim=op.out.dim,
            out=self._float_buffer(op.out, "experts"), out_stride=row_stride(op.out.dim),
        )  # fmt: skip
