"""Lowers rotation and attention: what is stored, and who sees what."""

from __future__ import annotations

from edgeinfer.fused_ops import PinnedAttention, PinnedRotate, RotatedAttention
from edgeinfer.graph import KV, Rope, Rotate
from edgeinfer.kernels.buffers import Buffer
from edgeinfer.kernels.cuda import joined
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
from edgeinfer.kernels.cuda.tiles import row_stride


class AttentionLowering(LoweringBase):
    """The steps of attention."""

    def _rotate(self, op: Rotate | PinnedRotate) -> None:
        """By position, or by that for pinned pages."""
        tables = self._tables.get(op.layer) if isinstance(op, PinnedRotate) else None
        self._emit(
            Kernel.of("rotate", NEOX=int(op.rope.kind == "neox")), ALL_ROWS, op.n_heads, 128,
            x=self._floats[op.x], x_stride=row_stride(op.x.dim), n_pairs=op.rope.n_dims // 2,
            angles=self._angles_of(op.rope, tables)[0], head_dim=op.x.dim // op.n_heads,
            out=self._float_buffer(op.out, "rotated"), out_stride=row_stride(op.out.dim),
        )  # fmt: skip

    def _rotated_attention(self, op: RotatedAttention) -> None:
        """Norms, rotations and stores in one launch, then what reads them; of one row in one."""
        kv, cache, step = op.cache, self._cache_of(op), self._step
        q, pinned_q = (self._rows_buffer(op.q, name) for name in ("q", "pinned q"))
        heads = self._heads(op)
        k_stride, v_stride = (0 if x is None else row_stride(x.dim) for x in (op.k, op.v))
        n_kv_heads = 0 if op.k is None else kv.n_heads
        n_warps = 4 if 4 * _bytes_of_head(kv) <= SHARED_BYTES else 1
        makes_heads = AttendLaunch.of(*self._shape_of(op), mma=self._is_mma(op)).makes_heads
        with self._from_rows(2 if makes_heads else 1):
            self._emit(
                Kernel.of("rotate_store", NEOX=int(op.rope.kind == "neox")), ALL_ROWS,
                -(-(op.n_heads + n_kv_heads) // n_warps), 32 * n_warps,
                LaunchShape(shared_bytes=n_warps * _bytes_of_head(kv)), **heads,
                q=self._floats[op.q], q_stride=row_stride(op.q.dim), k_stride=k_stride,
                v_stride=v_stride, pos=step.pos, seq=step.seq, tables=cache.tables,
                pages=step.pages, out=q, pinned_out=pinned_q, k_cache=cache.k, v_cache=cache.v,
                n_heads=op.n_heads, n_kv_heads=n_kv_heads, k_dim=kv.k_dim,
                v_dim=kv.v_dim if op.v is not None else 0, **_types_of(kv),
            )  # fmt: skip
        self._attend(op, q, pinned_q, heads if makes_heads else None)

    def _heads(self, op: RotatedAttention) -> dict[str, Arg]:
        """What makes heads of products, but for q."""
        angles, pinned_angles = self._angles_of(op.rope, None, self._cache_of(op).tables)
        return {
            "k": self._floats[op.k] if op.k is not None else 0,
            "v": self._floats[op.v] if op.v is not None else 0,
            "q_norm": self._weights.vector(op.q_norm) if op.q_norm else 0,
            "k_norm": self._weights.vector(op.k_norm) if op.k_norm else 0, "eps": op.eps,
            "angles": angles, "pinned_angles": pinned_angles, "n_pairs": op.rope.n_dims // 2,
        }  # fmt: skip

    def _pinned_attention(self, op: PinnedAttention) -> None:
        if op.k is not None:
            self._store(op, self._floats[op.k])
        self._attend(op, self._floats[op.q], self._floats[op.pinned_q])

    def _shape_of(self, op: RotatedAttention | PinnedAttention) -> tuple[KV, int, bool]:
        return op.cache, op.n_heads, op.soft_cap > 0

    def _is_mma(self, op: RotatedAttention | PinnedAttention) -> bool:
        return self._is_fast and fits_mma(op.cache)

    def _cache_of(self, op: RotatedAttention | PinnedAttention) -> LayerCache:
        return self._caches[op.layer if op.source is None else op.source]

    def _angles_of(self, rope: Rope, *tables: Buffer | None) -> list[Buffer]:
        """The step's cosines and sines, made once for all layers that rotate alike.

        By rows' own positions, for None, or by those for pinned pages of `tables`; at most both.
        """
        n_pairs = rope.n_dims // 2
        missing = [each for each in tables if (rope, each) not in self._angles]
        for each in missing:
            n_bytes = 8 * max(1, n_pairs) * self._limits.max_rows
            self._angles[rope, each] = Buffer("angles", n_bytes)
        if missing:
            # One buffer for all of a rope's: its frequencies are the same at both positions.
            if rope not in self._frequencies:
                tables_of_rope = rope.frequencies(), rope.magnitudes()
                self._frequencies[rope] = tuple(map(self._weights.doubles, tables_of_rope))
            frequencies, magnitudes = self._frequencies[rope]
            pinned = next((each for each in missing if each is not None), None)
            self._emit(
                Kernel.of("angles"), ALL_ROWS, (max(1, -(-n_pairs // 32)), len(missing)), 32,
                pos=self._step.pos, seq=self._step.seq, tables=pinned or 0,
                frequencies=frequencies, n_pairs=n_pairs, magnitudes=magnitudes,
                n_magnitudes=magnitudes.n_bytes // 8,
                span=rope.growth.n_ctx if rope.growth else 1,
                angles=self._angles[rope, None] if None in missing else 0,
                pinned_angles=self._angles[rope, pinned] if pinned is not None else 0,
            )  # fmt: skip
        return [self._angles[rope, each] for each in tables]

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

    def _attend(
        self,
        op: RotatedAttention | PinnedAttention,
        q: Buffer,
        pinned_q: Buffer,
        heads: dict[str, Arg] | None = None,
    ) -> None:
        """Of few rows each by itself, in parts; of many by blocks that walk all that they see.

        Of one row from products whose `heads` are still to be made, where these are given.
        """
        kv, cache = op.cache, self._cache_of(op)
        out, x8 = self._results(op.out, "attention", can_quantise=kv.v_dim % 32 == 0)
        common: dict[str, Arg] = {
            "q": q, "pinned_q": pinned_q, "q_stride": row_stride(op.q.dim), "k_cache": cache.k,
            "v_cache": cache.v, "pages": self._step.pages, "n_heads": op.n_heads,
            "n_kv_heads": kv.n_heads, "scale": op.scale, "soft_cap": op.soft_cap,
            "pos": self._step.pos, "seq": self._step.seq, "tables": cache.tables,
            "window": kv.window,
            "sinks": self._weights.vector(op.sinks) if op.sinks else 0,
            "out": out, "out_stride": row_stride(op.out.dim), "x8": x8,
        }  # fmt: skip
        of_heads, mma = self._shape_of(op), self._is_mma(op)
        most_warps = joined.WARPS if self._joins else 16
        few = AttendLaunch.of(*of_heads, mma=mma, most_warps=most_warps)
        n_parts = FEW_ROWS * op.n_heads * self._max_segments
        of_few: dict[str, Arg] = {
            **_READY_HEADS, **common, "counters": self._step.counters,
            "parts": Buffer("attention parts", 4 * n_parts * part_floats(kv.v_dim)),
        }  # fmt: skip
        grid, least = (few.n_tiles, Segments.OF_STEP), 1
        if heads is not None:
            assert isinstance(op, RotatedAttention)
            of_one = {**of_few, **heads, "q": self._floats[op.q], "pinned_q": 0}
            of_one["is_neox"] = int(op.rope.kind == "neox")
            shape, least = LaunchShape(most_rows=1), 2
            self._emit(few.kernel, ALL_ROWS, grid, few.threads, shape, **of_one)
        shape = LaunchShape(least_rows=least, most_rows=FEW_ROWS)
        self._emit(few.kernel, ALL_ROWS, grid, few.threads, shape, **of_few)
        many = AttendRowsLaunch.by_mma(*of_heads) if mma else AttendRowsLaunch.of(*of_heads)
        shape = LaunchShape(rows_per_block=many.n_rows, least_rows=FEW_ROWS + 1)
        self._emit(many.kernel, ALL_ROWS, many.n_tiles, many.threads, shape, **common)


# What `attend` is given where queries are ready and keys are stored.
_READY_HEADS: dict[str, Arg] = {
    "k": 0, "v": 0, "q_norm": 0, "k_norm": 0, "eps": 0.0, "angles": 0, "pinned_angles": 0,
    "n_pairs": 0, "is_neox": 0,
}  # fmt: skip


def _types_of(kv: KV) -> dict[str, Arg]:
    """How what is stored of a head is to be kept."""
    return {
        "k_type": KV_TYPES[kv.k_type], "transforms_k": int(kv.transforms_k),
        "v_type": KV_TYPES[kv.v_type], "transforms_v": int(kv.transforms_v),
    }  # fmt: skip


def _bytes_of_head(kv: KV) -> int:
    """Of shared memory that `rotate_store` has a head in."""
    return 4 * kv.k_dim
