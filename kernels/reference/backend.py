"""Makes segments of a model runnable with NumPy, in either mode."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from edgeinfer.batch import (
    HOST,
    PAGE,
    STATE_ROW,
    Demand,
    Sampler,
    StepLimits,
    StepRequest,
    cache_row,
)
from edgeinfer.graph import (
    KV,
    Activation,
    ActivationKind,
    Add,
    Attention,
    Bias,
    Clamp,
    Conv,
    DeltaNet,
    Embed,
    ExpertLinear,
    ExpertSum,
    Gain,
    GatingKind,
    Growth,
    KVType,
    Linear,
    Mul,
    MulParts,
    Pairing,
    RmsNorm,
    Rope,
    Rotate,
    Route,
    Scale,
    Segment,
    SelectRows,
    SoftCap,
    Yarn,
)
from edgeinfer.kernels.reference.exact import Exact
from edgeinfer.kernels.reference.program import ReferenceProgram
from edgeinfer.kernels.reference.quantised import Quantised
from edgeinfer.known import Known, check, fields

Mode: TypeAlias = Literal["exact", "quantised"]

_MAX_ROWS = 256  # of a step


KNOWN: Known = {
    Embed: fields("weight"),
    RmsNorm: fields("x weight eps n_heads"),
    Linear: fields("x weight bias"),
    Rotate: fields("x n_heads rope"),
    Rope: fields("kind n_dims base scale factors yarn magnitude growth", kind=("norm", "neox")),
    Growth: fields("factor n_ctx"),
    Yarn: fields("n_ctx beta_fast beta_slow"),
    Attention: fields("q k v n_heads cache scale soft_cap sinks source"),
    KV: fields(
        "n_heads k_dim v_dim window k_is_v k_type v_type",
        k_type=get_args(KVType),
        v_type=get_args(KVType),
    ),
    Add: fields("a b"),
    Mul: fields("a b"),
    Bias: fields("x weight"),
    Gain: fields("x weight"),
    Scale: fields("x factor"),
    SoftCap: fields("x cap"),
    Activation: fields("x kind", kind=get_args(ActivationKind)),
    Clamp: fields("x low high"),
    MulParts: fields("x factors"),
    Route: fields(
        "x gating n_used bias n_groups n_groups_used norm scale", gating=get_args(GatingKind)
    ),
    ExpertLinear: fields("x route weight scale bias"),
    ExpertSum: fields("x route"),
    Conv: fields("x weight bias"),
    DeltaNet: fields("q k v decay beta n_k_heads n_v_heads dim pairing", pairing=get_args(Pairing)),
    SelectRows: fields("x"),
}


class ReferenceBackend:
    """Compiles a segment for this process, at NumPy's pace.

    Without a `sampler` no token can be asked for.
    """

    def __init__(self, sampler: Sampler | None = None, mode: Mode = "exact") -> None:
        self._sampler, self._mode = sampler, mode

    def memories(self, host: int) -> dict[str, int]:
        """All is in the host's memory."""
        return {HOST: host}

    def demand(self, segment: Segment, request: StepRequest) -> Demand:
        """What an exact program keeps, and the values of a step."""
        check(segment, KNOWN, "reference")
        vocab_size = segment.graph.hparams.vocab_size
        # Row by row: more rows are never cheaper here.
        limits = StepLimits.of(request, vocab_size, segment.windows, _MAX_ROWS, row_cost=1.0)
        ops = (*segment.ops, *(segment.draft.ops if segment.draft else ()))
        matmuls = [op for op in ops if isinstance(op, (Linear, ExpertLinear))]
        weights = {op.weight.name: op.weight for op in matmuls}
        state_bytes = sum(each.n_bytes for of_layer in segment.states.values() for each in of_layer)
        rows = {
            "weights F32": 4 * sum(weight.n_elements for weight in weights.values()),
            **{
                cache_row(window): 4
                * PAGE
                * limits.n_pages[window]
                * sum(kv.n_heads * (kv.k_dim + kv.v_dim * (not kv.k_is_v)) for kv in group.values())
                for window, group in segment.groups.items()
            },
            **({STATE_ROW: limits.n_states * state_bytes} if state_bytes else {}),
            "scratch": 4 * limits.max_rows * sum(op.out.dim for op in ops),
        }
        return Demand(limits, {HOST: rows})

    def compile(
        self, segment: Segment, limits: StepLimits, *, mode: Mode | None = None
    ) -> ReferenceProgram:
        check(segment, KNOWN, "reference")
        numerics = Exact() if (mode or self._mode) == "exact" else Quantised()
        return ReferenceProgram(segment, limits, numerics, self._sampler)
