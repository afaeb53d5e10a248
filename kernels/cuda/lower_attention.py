"""Lowers rotation and attention: what is stored, and who sees what."""

from __future__ import annotations

from edgeinfer.fused_ops import PinnedAttention, PinnedRotate, RotatedAttention
from edgeinfer.graph import KV, Rope, Rotate, Value
from edgeinfer.kernels.buffers import Buffer
from edgeinfer.kernels.cuda.attention import (
    SHARED_BYTES,
    AttendLaunch,
    AttendRowsLaunch,
    fits_mma,
    part_floats,
)
from edgeinfer.kernels.cuda.commands import ALL_ROWS, Arg, Segments
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.cuda.layout import KV_TYPES
from edgeinfer.kernels.cuda.lower_base import (
    FEW_ROWS,
    PLAIN,
    LaunchShape,
    LayerCache,
    LoweringBase,
)
from edgeinfer.kernels.cuda.tiles import row_stride, x8_bytes
from edgeinfer.quant import Weight


class AttentionLowering(LoweringBase):
    """The steps of attention."""

    def _rotate(self, op: Rotate | PinnedRotate) -> None:
        """By position, or by that for pinned pages."""
        tables = self._tables.get(op.layer) if isinstance(op, PinnedRotate) else None
        self._emit(
            Kernel.of("rotate", NEOX=int(op.rope.kind == "neox")), ALL_ROWS, op.n_heads, 128,
            x=self._floats[op.x], x_stride=row_stride(op.x.dim), n_pairs=op.rope.n_dims // 2,
            angles=self._angles_of(op.rope, tables), head_dim=op.x.dim // op.n_heads,
            out=self._float_buffer(op.out, "rotated"), out_stride=row_stride(op.out.dim),
        )  # fmt: skip

    def _rotated_attention(self, op: RotatedAttention) -> None:
        """Norms, rotations and stores in one launch, then what reads them."""
        kv, cache, step = op.cache, self._cache_of(op), self._step
        q, pinned_q = (self._rows_buffer(op.q, name) for name in ("q", "pinned q"))
        stored = (op.k, op.v) if op.k is not None else (None, None)
        k, v = (0 if value is None else self._floats[value] for value in stored)
        k_stride, v_stride = (0 if value is None else row_stride(value.dim) for value in stored)
        angles, pinned_angles = (self._angles_of(op.rope, t) for t in (None, cache.tables))
        n_kv_heads = 0 if op.k is None else kv.n_heads
        n_warps = 4 if 4 * _bytes_of_head(kv) <= SHARED_BYTES else 1
        self._emit(
            Kernel.of("rotate_store", NEOX=int(op.rope.kind == "neox")), ALL_ROWS,
            -(-(op.n_heads + n_kv_heads) // n_warps), 32 * n_warps,
            LaunchShape(shared_bytes=n_warps * _bytes_of_head(kv)),
            q=self._floats[op.q], q_stride=row_stride(op.q.dim), k=k, k_stride=k_stride,
            v=v, v_stride=v_stride, q_norm=self._weights.vector(op.q_norm) if op.q_norm else 0,
            k_norm=self._weights.vector(op.k_norm) if op.k_norm else 0, eps=op.eps,
            angles=angles, pinned_angles=pinned_angles, n_pairs=op.rope.n_dims // 2,
            pos=step.pos, seq=step.seq, tables=cache.tables, pages=step.pages,
            out=q, pinned_out=pinned_q, k_cache=cache.k, v_cache=cache.v, n_heads=op.n_heads,
            n_kv_heads=n_kv_heads, k_dim=kv.k_dim, v_dim=kv.v_dim if op.v is not None else 0,
            **_types_of(kv),
        )  # fmt: skip
        self._attend(op, q, pinned_q)

    def _pinned_attention(self, op: PinnedAttention) -> None:
        if op.k is not None:
            self._store(op, self._floats[op.k])
        self._attend(op, self._floats[op.q], self._floats[op.pinned_q])

    def _cache_of(self, op: RotatedAttention | PinnedAttention) -> LayerCache:
        return self._caches[op.layer if op.source is None else op.source]

    def _norm_rows(
        self,
        rows: int,
        x: Value,
        out: Buffer,
        weight: Weight | None,
        eps: float,
        n_heads: int = 1,
        gather: Buffer | int = 0,
    ) -> None:
        """The norm of each of `n_heads` parts of rows of x."""
        n_warps = 8 if n_heads == 1 else 1
        self._emit(
            Kernel.of("rms_norm", WARPS=n_warps), rows, n_heads, 32 * n_warps,
            rows=rows, gather=gather, x=self._floats[x],
            weight=self._weights.vector(weight) if weight else 0, y=out, x8=0,
            width=x.dim // n_heads, eps=eps,
        )  # fmt: skip

    def _angles_of(self, rope: Rope, tables: Buffer | None) -> Buffer:
        """The step's cosines and sines, made once for all layers that rotate alike."""
        key, n_pairs = (rope, tables), rope.n_dims // 2
        if key not in self._angles:
            # One buffer for all of a rope's: its frequencies are the same at both positions.
            if rope not in self._frequencies:
                tables_of_rope = rope.frequencies(), rope.magnitudes()
                self._frequencies[rope] = tuple(map(self._weights.doubles, tables_of_rope))
            frequencies, magnitudes = self._frequencies[rope]
            out = self._angles[key] = Buffer("angles", 8 * max(1, n_pairs) * self._limits.max_rows)
            self._emit(
                Kernel.of("angles"), ALL_ROWS, max(1, -(-n_pairs // 32)), 32,
                pos=self._step.pos, seq=self._step.seq, tables=tables or 0,
                pinned=int(tables is not None), frequencies=frequencies, n_pairs=n_pairs,
                magnitudes=magnitudes, n_magnitudes=magnitudes.n_bytes // 8,
                span=rope.growth.n_ctx if rope.growth else 1, angles=out,
            )  # fmt: skip
        return self._angles[key]

    def _store(self, op: RotatedAttention | PinnedAttention, k: Buffer) -> None:
        kv, cache = op.cache, self._cache_of(op)
        assert op.k is not None
        has_v = op.v is not None
        self._emit(
            Kernel.of("store"), ALL_ROWS, kv.n_heads, 128, PLAIN,
            k=k, k_stride=row_stride(op.k.dim), v=self._floats[op.v] if op.v is not None else 0,
            v_stride=row_stride(op.v.dim) if op.v is not None else 0, pos=self._step.pos,
            seq=self._step.seq, tables=cache.tables, pages=self._step.pages,
            k_cache=cache.k, v_cache=cache.v, k_dim=kv.k_dim, v_dim=kv.v_dim if has_v else 0,
            **_types_of(kv),
        )  # fmt: skip

    def _attend(self, op: RotatedAttention | PinnedAttention, q: Buffer, pinned_q: Buffer) -> None:
        """Of few rows each by itself, in parts; of many by blocks that walk all that they see."""
        kv, cache = op.cache, self._cache_of(op)
        common: dict[str, Arg] = {
            "q": q, "pinned_q": pinned_q, "q_stride": row_stride(op.q.dim), "k_cache": cache.k,
            "v_cache": cache.v, "pages": self._step.pages, "n_heads": op.n_heads,
            "n_kv_heads": kv.n_heads, "scale": op.scale, "soft_cap": op.soft_cap,
            "pos": self._step.pos, "seq": self._step.seq, "tables": cache.tables,
            "window": kv.window,
            "sinks": self._weights.vector(op.sinks) if op.sinks else 0,
            "out_stride": row_stride(op.out.dim), **self._results(op),
        }  # fmt: skip
        heads, mma = (kv, op.n_heads, op.soft_cap > 0), self._is_fast and fits_mma(kv)
        few = AttendLaunch.of(*heads, mma=mma)
        n_parts = FEW_ROWS * op.n_heads * self._max_segments
        self._emit(
            few.kernel, ALL_ROWS, (few.n_tiles, Segments.OF_STEP), few.threads,
            LaunchShape(most_rows=FEW_ROWS), counters=self._step.counters,
            parts=Buffer("attention parts", 4 * n_parts * part_floats(kv.v_dim)), **common,
        )  # fmt: skip
        many = AttendRowsLaunch.by_mma(*heads) if mma else AttendRowsLaunch.of(*heads)
        shape = LaunchShape(rows_per_block=many.n_rows, least_rows=FEW_ROWS + 1)
        self._emit(many.kernel, ALL_ROWS, many.n_tiles, many.threads, shape, **common)

    def _results(self, op: RotatedAttention | PinnedAttention) -> dict[str, Arg]:
        """What attention leaves: floats, rows for matrices in blocks, or both."""
        value, rows = op.out, dict[str, Arg](out=0, x8=0)
        has_x8 = self._reads.is_quantised(value) and op.cache.v_dim % 32 == 0
        if has_x8:
            n_bytes = x8_bytes(value.dim) * self._n_rows(value)
            rows["x8"] = self._quantised[value] = Buffer("quantised attention", n_bytes)
        if not has_x8 or not self._reads.is_quantised_only(value):
            rows["out"] = self._float_buffer(value, "attention")
        return rows


def _types_of(kv: KV) -> dict[str, Arg]:
    """How what is stored of a head is to be kept."""
    return {
        "k_type": KV_TYPES[kv.k_type], "transforms_k": int(kv.transforms_k),
        "v_type": KV_TYPES[kv.v_type], "transforms_v": int(kv.transforms_v),
    }  # fmt: skip


def _bytes_of_head(kv: KV) -> int:
    """Of shared memory that `rotate_store` has a head in."""
    return 4 * kv.k_dim
