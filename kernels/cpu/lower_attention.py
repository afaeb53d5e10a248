"""Lowers rotation and attention: what is stored, who sees what, and the plan of a step's work."""

from __future__ import annotations

from typing import NamedTuple

from edgeinfer.fused_ops import PinnedAttention, PinnedRotate, RotatedAttention
from edgeinfer.graph import KV, RopeKind, Rotate
from edgeinfer.kernels.buffers import Buffer
from edgeinfer.kernels.cpu import attention_layout, layout, page_layout
from edgeinfer.kernels.cpu.commands import KernelPart
from edgeinfer.kernels.cpu.layout import row_stride
from edgeinfer.kernels.cpu.lower_base import (
    LayerCache,
    LoweringBase,
    float_bits,
)
from edgeinfer.quant import Weight


class _Heads(NamedTuple):
    """Heads of rows of floats, and the norm that is to be taken of each."""

    rows: Buffer | int
    stride: int
    n: int
    dim: int
    norm: Weight | None = None


_NO_HEADS = _Heads(0, 0, 0, 0)
_NO_BUFFER = Buffer("none", 0, is_kept=True)
_NO_KV = KV(0, 0, 0)
_NO_CACHE = LayerCache(_NO_BUFFER, _NO_BUFFER, 0, 0, 0)


class AttentionLowering(LoweringBase):
    """The steps of attention."""

    def _rotate(self, op: Rotate | PinnedRotate) -> None:
        """The heads of a value in a place of their own."""
        stride = row_stride(op.x.dim)
        out = self._float_buffer(op.out, "rotated")
        self._emit("copy", "copy_rows", self._copy(op.x, layout.ALL_ROWS, [out, stride, 0, 0]))
        angles = self._angles_of(op)[isinstance(op, PinnedRotate)]
        heads = _Heads(out, stride, op.n_heads, op.x.dim // op.n_heads)
        self._heads(op.rope.kind, q=heads, n_pairs=op.rope.n_dims // 2, angles=angles)

    def _rotated_attention(self, op: RotatedAttention) -> None:
        kv, n_pairs = op.cache, op.rope.n_dims // 2
        angles, pinned_angles = self._angles_of(op)
        q = _Heads(self._floats[op.q], row_stride(op.q.dim), op.n_heads, kv.k_dim, op.q_norm)
        k, v = self._stored(op)
        pinned_q = Buffer("pinned q", q.stride * self._limits.max_rows)
        self._heads(
            op.rope.kind, q, pinned_q, k._replace(norm=op.k_norm), v, n_pairs, angles,
            pinned_angles, op.eps, self._cache_of(op), kv,
        )  # fmt: skip
        self._attend(op, pinned_q)

    def _pinned_attention(self, op: PinnedAttention) -> None:
        k, v = self._stored(op)
        if k.n:
            self._heads("norm", k=k, v=v, cache=self._cache_of(op), kv=op.cache)
        self._attend(op, self._floats[op.pinned_q])

    def _stored(self, op: RotatedAttention | PinnedAttention) -> tuple[_Heads, _Heads]:
        """The heads of k and v, none where another layer's are read."""
        kv = op.cache
        if op.k is None:
            return _NO_HEADS, _NO_HEADS
        k = _Heads(self._floats[op.k], row_stride(op.k.dim), kv.n_heads, kv.k_dim)
        if op.v is None:
            return k, _NO_HEADS
        return k, _Heads(self._floats[op.v], row_stride(op.v.dim), kv.n_heads, kv.v_dim)

    def _cache_of(self, op: RotatedAttention | PinnedAttention) -> LayerCache:
        return self._caches[op.layer if op.source is None else op.source]

    def _heads(
        self,
        kind: RopeKind,
        q: _Heads = _NO_HEADS,
        pinned_q: Buffer | int = 0,
        k: _Heads = _NO_HEADS,
        v: _Heads = _NO_HEADS,
        n_pairs: int = 0,
        angles: Buffer | int = 0,
        pinned_angles: Buffer | int = 0,
        eps: float = 0.0,
        cache: LayerCache = _NO_CACHE,
        kv: KV = _NO_KV,
    ) -> None:
        """Norm and rotate heads in place, and store those of k and v."""
        q_norm, k_norm = (self._weights.vector(heads.norm) if heads.norm else 0 for heads in (q, k))
        args = attention_layout.ROTATE.pack(
            q=q.rows, q_stride=q.stride, k=k.rows, k_stride=k.stride, v=v.rows, v_stride=v.stride,
            pinned_q=pinned_q, n_heads=q.n, n_kv_heads=k.n, k_dim=k.dim or q.dim, v_dim=v.dim,
            n_pairs=n_pairs, angles=angles, pinned_angles=pinned_angles, q_norm=q_norm,
            k_norm=k_norm, eps=float_bits(eps), k_base=cache.k_base, k_page_bytes=cache.page_bytes,
            v_base=cache.v_base, v_page_bytes=cache.page_bytes, tables=cache.tables,
            k_head_bytes=page_layout.k_bytes(kv.k_dim, kv.k_type),
            v_head_bytes=page_layout.v_bytes(kv.v_dim, kv.v_type),
            transforms_k=int(kv.transforms_k), transforms_v=int(kv.transforms_v),
        )  # fmt: skip
        self._emit("rotate", rotate_kernel(kind, kv), args)

    def _attend(self, op: RotatedAttention | PinnedAttention, pinned_q: Buffer) -> None:
        limits, kv, cache = self._limits, op.cache, self._cache_of(op)
        rooms = page_layout.rooms(kv.k_dim, kv.v_dim, kv.k_type, kv.v_type)
        parts = Buffer(
            "attention parts",
            attention_layout.parts_bytes(limits.max_rows, op.n_heads, *rooms, cache.max_segments),
        )
        common = attention_layout.ATTEND.pack(
            items=self._items_of(kv.window, cache), n_kv_heads=kv.n_heads,
            q=self._floats[op.q], q_stride=row_stride(op.q.dim), pinned_q=pinned_q,
            n_heads=op.n_heads, scale=float_bits(op.scale), k_base=cache.k_base,
            k_page_bytes=cache.page_bytes, v_base=cache.v_base, v_page_bytes=cache.page_bytes,
            parts=parts, k_room=rooms[0], v_room=rooms[1], v_dim=kv.v_dim, tables=cache.tables,
            window=kv.window, cap=float_bits(op.soft_cap),
            sinks=self._weights.vector(op.sinks) if op.sinks else 0,
            values=self._turned_values(kv) if kv.k_is_v else 0,
        )  # fmt: skip
        self._emit("attend", attend_kernel(kv, op.soft_cap > 0), common, layout.COUNT_ITEMS)
        fold = [*common, *self._sinks(op.out, "attention")]
        self._emit("fold", fold_kernel(kv, op.sinks is not None), fold)

    def _turned_values(self, kv: KV) -> Buffer:
        """Where each thread makes values of a page's keys."""
        kind = "f16" if kv.k_type == "f16" else "q8_0"
        return Buffer("turned", self._limits.n_threads * page_layout.v_bytes(kv.v_dim, kind))

    def _items_of(self, window: int, cache: LayerCache) -> Buffer:
        """The step's attention work, planned once for all layers whose rows see the same pages."""
        if window not in self._items:
            n_bytes = attention_layout.items_bytes(self._limits.max_rows, cache.max_segments)
            items = self._out.scratch.place(Buffer("attention items", n_bytes, is_kept=True))
            self._items[window] = items
            args = attention_layout.ITEMS.pack(
                at=items, max_segments=cache.max_segments, window=window, tables=cache.tables
            )
            self._out.prologue.append(KernelPart("plan_attention", args, 1))
        return self._items[window]

    def _angles_of(
        self, op: Rotate | PinnedRotate | RotatedAttention
    ) -> tuple[Buffer, Buffer | int]:
        """The step's rotation angles, made once for all layers that rotate alike.

        Those for pinned pages depend on the tables of the layer's attention, too; a layer without
        attention has none.
        """
        rope, tables = op.rope, self._tables.get(op.layer)
        if (rope, tables) not in self._angles:
            n_pairs = rope.n_dims // 2
            size = n_pairs * 2 * 4 * self._limits.max_rows
            out = Buffer("angles", size)
            pinned_out = 0 if tables is None else Buffer("pinned angles", size)
            self._angles[rope, tables] = out, pinned_out
            args = attention_layout.ANGLES.pack(
                freqs=self._weights.doubles(rope.frequencies()), n_pairs=n_pairs, out=out,
                pinned_out=pinned_out, tables=tables or 0,
            )  # fmt: skip
            if rope.magnitude == 1 and rope.growth is None:
                self._emit("angles", "angles", args)
            else:
                table, span = rope.magnitudes(), rope.growth.n_ctx if rope.growth else 1
                args += attention_layout.ANGLES_SCALED.pack(
                    magnitudes=self._weights.doubles(table), span=span, n_magnitudes=len(table)
                )
                self._emit("angles", "angles.scaled", args)
        return self._angles[rope, tables]


def rotate_kernel(kind: RopeKind, kv: KV) -> str:
    """The name of the kernel that fills such a cache."""
    types = f".{kv.k_type}.{kv.v_type}" if {kv.k_type, kv.v_type} != {"f16"} else ""
    return f"rotate.{kind}{types}"


def attend_kernel(kv: KV, has_cap: bool) -> str:
    """The name of the kernel that reads it."""
    features = {
        "window": kv.window > 0,
        "cap": has_cap,
        "shared": kv.k_is_v,
        f"k_{kv.k_type}": kv.k_type != "f16",
        f"v_{kv.v_type}": kv.v_type != "f16" and not kv.k_is_v,
        "hadamard": kv.transforms_k,
    }
    names = [name for name, has in features.items() if has]
    return ".".join(["attend", str(kv.k_dim), str(kv.v_dim), *names])


def fold_kernel(kv: KV, has_sinks: bool) -> str:
    """The name of the kernel that ends what that one has begun."""
    return "fold" + ".sinks" * has_sinks + ".hadamard" * kv.transforms_v
