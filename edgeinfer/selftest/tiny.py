"""Tiny models of a few families, and the steps that an engine may ask of them.

Knows nothing of single kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeinfer import quant
from edgeinfer.backend import Program
from edgeinfer.graph import Graph, Hparams, Segment
from edgeinfer.models import gemma, lfm2, llama, qwen3, qwen35
from edgeinfer.quant import QuantType
from edgeinfer.sampling.params import SampleTable, SamplingParams
from edgeinfer.selftest.cases import Case, Results, Rows, Sequences, logits
from edgeinfer.selftest.made_up import MadeUp

_N_STEPS = 6  # in which tokens are picked, one after the other
_N_VOCAB = 150
_TYPES = (quant.Q4_0, quant.Q4_K, quant.Q6_K, quant.Q8_0, quant.F16)


class Family(NamedTuple):
    """How a family records its models, and what its file would say."""

    architecture: str
    forward: Callable[[Graph], None]
    numbers: dict[str, Any]
    has_more: str = "output.weight"
    types: tuple[QuantType, ...] = _TYPES


_HEADS = {"attention.head_count": 4, "attention.head_count_kv": 2}
_FAMILIES = (
    Family("llama", llama.forward, {**_HEADS, "attention.key_length": 32}),
    Family(
        "qwen3", qwen3.forward, {**_HEADS, "attention.key_length": 48},
        types=(quant.Q4_0,),
    ),
    Family(
        "gemma3",
        gemma.forward,
        {
            **_HEADS,
            "attention.key_length": 64,
            "attention.sliding_window": 33,
            "attention.sliding_window_pattern": (True, False),
        },
        has_more="",
        types=(quant.Q8_0, quant.Q4_K),
    ),
    Family(
        "qwen3moe",
        qwen3.forward,
        {
            **_HEADS,
            "attention.key_length": 32,
            "expert_count": 6,
            "expert_used_count": 2,
            "expert_feed_forward_length": 256,
        },
        types=(quant.Q4_K, quant.F16),
    ),
    Family(
        "qwen35",
        qwen35.forward,
        {
            **_HEADS,
            "attention.key_length": 32,
            "attention.recurrent_layers": (True, False),
            "ssm.conv_kernel": 4,
            "ssm.group_count": 2,
            "ssm.time_step_rank": 4,
            "ssm.state_size": 64,
            "ssm.inner_size": 256,
        },
        has_more=r"output\.weight|.*\.attn_qkv\.weight",
        types=(quant.Q4_0, quant.Q4_K),
    ),
    Family(
        "lfm2",
        lfm2.forward,
        {
            **_HEADS,
            "attention.head_count_kv": (0, 2),
            "attention.key_length": 48,
            "shortconv.l_cache": 3,
        },
        has_more="",
        types=(quant.Q8_0,),
    ),
)  # fmt: skip
# Matrices that files have in floats, whatever the others are.
_IN_FLOATS = ("ffn_gate_inp.weight", "ssm_conv1d.weight", "shortconv.conv.weight")


def cases() -> list[Case]:
    """Each family with each of its types."""
    return [
        Case(f"{family.architecture} {kind.name}", partial(_segment, family, kind), _results)
        for family in _FAMILIES
        for kind in family.types
    ]


def _segment(family: Family, kind: QuantType) -> Segment:
    """Two layers as wide as the type can be cut, no power of two where it can."""
    dim, ffn_dim = (256, 256) if kind.block == 256 else (96, 160)

    def kind_of(name: str) -> QuantType:
        return quant.F32 if name.endswith(_IN_FLOATS) else kind

    # Heads side by side are what attn_output reads: a row of whole blocks, too.
    numbers = {**family.numbers, "feed_forward_length": ffn_dim}
    if kind.block == 256:
        numbers["attention.key_length"] = 64
    graph = MadeUp(
        Hparams(family.architecture, 2, dim, _N_VOCAB, 4096), numbers, kind_of, family.has_more
    )
    family.forward(graph)
    return graph.segment()


def _results(program: Program, segment: Segment) -> Results:
    """Logits and tokens, whatever steps they come from."""
    sequences = Sequences(segment)
    step, slid = sequences.step, Sequences.SLID
    chunks = (Rows(0, 0, 1), Rows(0, 1, 7), Rows(0, 8, 40))
    results = {f"{rows.n} rows from {rows.first}": logits(program, step(rows)) for rows in chunks}
    results["two sequences"] = logits(
        program, step(Rows(0, 48, 1), Rows(1, 0, 5)), step(Rows(1, 5, 3), Rows(0, 49, 20))
    )
    first, *others = (Rows(slid, at, n) for at, n in ((0, 18), (84, 18), (102, 18), (120, 1)))
    logits(program, step(first))
    results["slid"] = logits(program, *map(step, others))
    for name, params in _PICKED.items():
        results[name] = np.array(list(_picked(program, sequences, params)), np.int32)
    results["an abort"] = _after_abort(program, sequences)
    return results


_PICKED = {
    "tokens, the likeliest": SamplingParams(temperature=0.0, seed=5),
    "tokens, drawn": SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=5),
}


def _picked(
    program: Program, sequences: Sequences, params: SamplingParams
) -> Iterator[NDArray[np.int32]]:
    """Tokens of two sequences, step after step: a device may begin the next one by itself."""
    table, ids = SampleTable(2), np.array([3, 4], np.int32)
    for i in range(_N_STEPS):
        for row in range(2):
            table.set_row(row, params, seed=5 + row, index=i)
        rows = Rows(0, 68 + i, 1), Rows(1, 8 + i, 1)
        batch = sequences.step(*rows, output="ids", ids=ids)
        batch.samples = table
        ids = program.submit(batch).wait().ids.copy()
        yield ids


def _after_abort(program: Program, sequences: Sequences) -> NDArray[np.float32]:
    """Logits of a step that was cut short before, and NaN if it did not say so."""
    step = sequences.step(Rows(0, 8, 9))
    ticket = program.submit(step)
    ticket.abort()
    was_aborted = ticket.wait().aborted
    rows = logits(program, step)
    return rows if was_aborted else rows + np.float32("nan")
