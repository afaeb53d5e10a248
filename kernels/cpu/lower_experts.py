"""Lowers routes to experts and what runs along them: the part of `lower.Lowering` that models
without experts don't need.

What a step chooses decides how long its later ops are: `dispatch` says it to all along one route.
"""

from __future__ import annotations

from edgeinfer.fused_ops import ExpertMatmuls
from edgeinfer.graph import ExpertLinear, ExpertSum, Route, Value
from edgeinfer.kernels.buffers import Buffer
from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.cpu.commands import Args, KernelOp, KernelPart
from edgeinfer.kernels.cpu.formats import Format, packed_bytes
from edgeinfer.kernels.cpu.lower_base import (
    LoweringBase,
    float_bits,
    format_of,
    row_bytes,
    type_name,
)

# Weight bytes of a chunk, and how many a thread finds: starting one takes 1 us, and the last ones
# must even out the end. Measured in tests/bench/TUNING.md, "Experts".
_MOST_CHUNK, _LEAST_CHUNK, _CHUNKS = 512 << 10, 32 << 10, 12


class ExpertLowering(LoweringBase):
    """The steps of routes to experts and along them."""

    def _route(self, op: Route) -> None:
        n_experts = op.x.dim
        n_bytes = self._limits.n_threads * layout.route_scratch_bytes(n_experts)
        args = layout.ROUTE.pack(
            *self._sinks(op.out, "route"), x=self._floats[op.x],
            stride=layout.row_stride(op.x.dim), n_experts=n_experts, n_used=op.n_used,
            bias=self._weights.vector(op.bias) if op.bias else 0, n_groups=op.n_groups,
            n_groups_used=op.n_groups_used, norm=int(op.norm),
            scale=float_bits(op.scale), scratch=Buffer("route", n_bytes),
        )  # fmt: skip
        self._emit("route", f"route.{op.gating}", args)

    def _expert_matmuls(self, step: ExpertMatmuls) -> None:
        n_bytes = sum(op.n_used * _matrix_bytes(op) for op in step.parts)
        share = n_bytes // (self._limits.n_threads * _CHUNKS)
        chunk = max(_LEAST_CHUNK, min(share, _MOST_CHUNK))
        parts = [self._expert_matmul(op, chunk) for op in step.parts]
        names = [op.weight.name.split(".")[2] for op in step.parts]
        self._out.ops.append(KernelOp("+".join(names), parts))

    def _expert_matmul(self, op: ExpertLinear, chunk: int) -> KernelPart:
        """A part in chunks of so many bytes."""
        n_experts, n_rows, n_cols = op.weight.shape
        fmt, n_groups, n_bytes = format_of(op.weight), -(-n_rows // 8), _matrix_bytes(op)
        n_panels = -(-n_groups // layout.PANEL_GROUPS)
        n_chunks = max(1, min(n_panels, round(n_bytes / chunk)))
        args = self._planned(op.route, n_experts, n_chunks) + layout.EXPERTS.pack(
            w=self._weights.matrix(op.weight), bytes=n_bytes, n_blocks=fmt.n_blocks(n_cols),
            n_groups=n_groups, dim=n_rows, x=self._gather(op, fmt),
            x_row_bytes=row_bytes(fmt, n_cols), out=self._float_buffer(op.out, "experts"),
            stride=layout.row_stride(op.out.dim),
            scale=self._weights.vector(op.scale) if op.scale else 0,
            bias=self._weights.vector(op.bias) if op.bias else 0, n_used=op.n_used,
            scratch=self._matmul_scratch,
        )  # fmt: skip
        macs = op.n_used * n_rows * n_cols
        rule = layout.COUNT_PLANNED
        kernel = f"experts.{type_name(op.weight)}"
        return KernelPart(kernel, args, rule, op.n_used * n_bytes, macs)

    def _gather(self, op: ExpertLinear, fmt: Format) -> Buffer:
        """The rows of x that an op reads, sorted by expert."""
        n_experts, _, n_cols = op.weight.shape
        key = op.x, op.route, n_cols, fmt.activation
        if key not in self._gathered:
            if fmt.activation == "a32" and op.x not in self._quantised:
                self._quantise(op.x)
            source = (self._quantised if fmt.activation == "a32" else self._floats)[op.x]
            n_records = self._limits.max_rows * op.n_used
            out = Buffer("gathered", n_records * row_bytes(fmt, n_cols))
            args = self._planned(op.route, n_experts, 1) + layout.GATHER.pack(
                x=source, stride=layout.row_stride(op.x.dim), dim=n_cols,
                n_parts=op.x.dim // n_cols, out=out,
            )  # fmt: skip
            self._emit("gather", f"gather.{fmt.activation}", args, layout.COUNT_PLANNED)
            self._gathered[key] = out
        return self._gathered[key]

    def _planned(self, route: Value, n_experts: int, per_item: int) -> Args:
        """The words that all ops along a route begin with."""
        if route not in self._dispatched:
            n_used = route.dim // 2
            n_records = self._limits.max_rows * n_used
            out = Buffer("dispatch", layout.dispatch_bytes(n_experts, n_records))
            stride = layout.row_stride(route.dim)
            args = layout.DISPATCH.pack(
                out=out, route=self._floats[route], stride=stride, n_used=n_used,
                n_experts=n_experts,
            )  # fmt: skip
            self._emit("dispatch", "dispatch", args, 1)
            self._dispatched[route] = out
        return layout.PLANNED.pack(
            at=self._dispatched[route], per_item=per_item, n_experts=n_experts
        )

    def _expert_sum(self, op: ExpertSum) -> None:
        args = layout.SUM.pack(
            *self._sinks(op.out, "experts"), x=self._floats[op.x],
            stride=layout.row_stride(op.x.dim), route=self._floats[op.route],
            route_stride=layout.row_stride(op.route.dim), n_used=op.route.dim // 2,
            dim=op.out.dim,
        )  # fmt: skip
        self._emit("expert_sum", "expert_sum", args)


def _matrix_bytes(op: ExpertLinear) -> int:
    """Of one expert."""
    return packed_bytes(type_name(op.weight), *op.weight.shape[1:])
