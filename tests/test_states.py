"""States of sequences: kept behind any row, gone on with in any batch, never changed in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer.batch import HOST, STATE_ROW, Batch, PageTable, StepLimits, StepRequest
from edgeinfer.errors import InvalidModelError, UnsupportedModelError
from edgeinfer.graph import DeltaNet, Segment, State

from .backends import BACKENDS, QuantisedReference, backend
from .golden_models import DELTA, DIM, GOLDENS, N_K, N_V, PROMPT, TAPS
from .random_graphs import RandomGraph

LIMITS = StepLimits({0: 8}, max_rows=16, max_outputs=16, max_sequences=4, n_threads=2, n_states=8)


def step(*parts: tuple[int, int, int, int, dict[int, int]]) -> Batch:
    """Of sequences 0, 1 ...: first and last row of the prompt, state, and slots by row.

    Sequence i has pages 2i and 2i + 1, so the second number says which is meant.
    """
    ids, pos, seq, kept = [], [], [], []
    for i, (_, first, last, _, slots) in enumerate(parts):
        ids += PROMPT[first:last]
        pos += range(first, last)
        seq += [i] * (last - first)
        kept += [slots.get(row, -1) for row in range(first, last)]
    tables = [(PageTable(np.array([2 * n, 2 * n + 1], np.int32), 0, 2),) for n, *_ in parts]
    return Batch(
        ids=np.array(ids, np.int32),
        pos=np.array(pos, np.int64),
        seq=np.array(seq, np.int32),
        tables=tables,
        wanted=np.arange(len(ids), dtype=np.int32),
        states=np.array([state for _, _, _, state, _ in parts], np.int32),
        kept=np.array(kept, np.int32),
    )


def logits(program: Any, *parts: tuple[int, int, int, int, dict[int, int]]) -> NDArray[np.float32]:
    rows: NDArray[np.float32] = program.submit(step(*parts)).wait().logits.copy()
    return rows


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_are_the_same_in_any_company_and_from_any_kept_state(
    name: str, tmp_path: Path
) -> None:
    with GOLDENS["qwen35"].draft().loaded(tmp_path, "Q8_0") as model:
        segment = model.graph.segment()
        with QuantisedReference().compile(segment, LIMITS) as program:
            expected = logits(program, (0, 0, 14, -1, {}))
        with backend(name).compile(segment, LIMITS) as program:
            first = logits(program, (0, 0, 5, -1, {1: 0, 4: 1}))
            # Two go on from the state behind row 1, another begins, the first goes on from row 4.
            second = logits(
                program,
                (1, 0, 2, -1, {}), (2, 0, 3, -1, {2: 5, 0: 6}), (0, 5, 9, 1, {6: 2, 8: 3}),
            )  # fmt: skip
            # Its last two rows are given up, and what was read from before is still there.
            third = logits(program, (0, 7, 11, 2, {10: 4}), (2, 3, 4, 5, {}))
            fourth = logits(program, (0, 5, 14, 1, {}), (2, 1, 3, 6, {2: 7}))
            program.write_states([0, 3], program.read_states([7, 2]))
            last = logits(program, (2, 3, 5, 0, {}))
    found = [first, second[:2], second[2:5], second[5:], third[:4], third[4:], fourth[:9]]
    found += [fourth[9:], last]
    rows = [(0, 5), (0, 2), (0, 3), (5, 9), (7, 11), (3, 4), (5, 14), (1, 3), (3, 5)]
    for ours, (i, j) in zip(found, rows, strict=True):
        np.testing.assert_array_equal(ours, expected[i:j])


@pytest.mark.parametrize("machine", ["cpu", "shim"])
@pytest.mark.parametrize("name", ["qwen35moe", "qwen3next"])
def test_a_row_at_a_time_is_the_prompt(name: str, machine: str, tmp_path: Path) -> None:
    with GOLDENS[name].draft().loaded(tmp_path, "Q4_0") as model:
        with backend(machine).compile(model.graph.segment(), LIMITS) as program:
            whole = logits(program, (0, 0, 16, -1, {}))
            for i in range(16):
                state = -1 if i == 0 else i % 2
                row = logits(program, (0, i, i + 1, state, {i: (i + 1) % 2}))
                np.testing.assert_array_equal(row[0], whole[i])


@pytest.mark.parametrize(
    ("states", "kept", "said"),
    [
        ([0, 1], [-1, 1, -1, 2], "reads"),
        ([0, 1], [3, -1, 2, 3], "twice"),
        ([0, 1], None, "kept"),
    ],
)
def test_a_step_writes_a_slot_once_and_none_that_it_reads(
    states: list[int], kept: list[int] | None, said: str
) -> None:
    batch = step((0, 0, 2, -1, {}), (1, 0, 2, -1, {}))
    batch.states = np.array(states, np.int32)
    batch.kept = None if kept is None else np.array(kept, np.int32)
    with pytest.raises(AssertionError, match=said):
        batch.check()
    batch.kept = np.array([-1, 3, -1, 2], np.int32)
    batch.check()
    copy = batch.snapshot()
    batch.states[:], batch.kept[:] = 7, 7
    assert copy.states is not None and copy.kept is not None
    assert copy.states.tolist() == [0, 1] and copy.kept.tolist() == [-1, 3, -1, 2]


@pytest.mark.parametrize("machine", ["cpu", "shim"])
def test_kernels_see_no_slot_that_is_not_there(machine: str, tmp_path: Path) -> None:
    with GOLDENS["qwen35"].draft().loaded(tmp_path) as model:
        with backend(machine).compile(model.graph.segment(), LIMITS) as program:
            for state, slots in ((8, {}), (-2, {}), (-1, {1: 8})):
                with pytest.raises(AssertionError, match="slots"):
                    logits(program, (0, 0, 2, state, slots))
            batch = step((0, 0, 2, -1, {}), (1, 0, 2, -1, {}))
            batch.seq[:] = 0, 1, 0, 1
            with pytest.raises(AssertionError, match="runs"):
                program.submit(batch)
            batch.states = batch.kept = None
            with pytest.raises(AssertionError, match="has states"):
                program.submit(batch)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_the_demand_has_every_slot(name: str, tmp_path: Path) -> None:
    with GOLDENS["qwen35"].draft().loaded(tmp_path) as model:
        segment = model.graph.segment()
        sizes = [
            dict(backend(name).demand(segment, StepRequest(64, 1, 2, n_states=n)).memories[HOST])
            for n in (0, 5)
        ]
    n_channels = (2 * N_K + N_V) * DELTA
    slot = 4 * ((TAPS - 1) * n_channels + N_V * DELTA**2)  # of a layer
    assert [each.pop(STATE_ROW) for each in sizes] == [0, 5 * 2 * slot]
    assert sizes[0] == sizes[1]
    states = {layer: [s.kind for s in of_layer] for layer, of_layer in segment.states.items()}
    assert states == {i: ["conv", "conv", "conv", "delta_net"] for i in (0, 1)}
    first, rest = segment.cut(1)
    assert (list(first.states), list(rest.states)) == ([0], [1])


def test_a_model_without_states_has_no_row_of_them() -> None:
    g = RandomGraph()
    x = g.embed()
    for blk in g.layers():
        x = g.layer_output(g.linear(x, f"{blk}.a", x.dim))
    g.head(g.select_rows(x))
    segment = g.segment()
    for name in ("cpu", "reference"):
        demand = backend(name).demand(segment, StepRequest(64, 1, 2, n_states=3))
        assert STATE_ROW not in demand.memories[HOST]


# -- what a file says ----------------------------------------------------------------------------


def test_blocks_that_guess_are_no_layers(tmp_path: Path) -> None:
    draft = GOLDENS["qwen35"].draft()
    with draft.loaded(tmp_path) as model:
        assert model.hparams.n_layers == 3
        assert not any("blk.3" in str(op) for op in model.graph.ops)
    draft.keys["nextn_predict_layers"] = 0
    with pytest.raises((InvalidModelError, UnsupportedModelError), match="blk.3"):
        with draft.loaded(tmp_path):
            pass
    draft.keys["nextn_predict_layers"] = 4
    with pytest.raises(InvalidModelError) as caught, draft.loaded(tmp_path):
        pass
    assert caught.value.field == "qwen35.nextn_predict_layers"


def test_a_family_that_knows_no_such_blocks_is_refused_by_their_key(tmp_path: Path) -> None:
    draft = GOLDENS["llama"].draft()
    draft.keys["nextn_predict_layers"] = 1
    with pytest.raises(UnsupportedModelError, match="llama.nextn_predict_layers is 1"):
        with draft.loaded(tmp_path):
            pass


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ssm.inner_size", N_V * DELTA + 1),
        ("ssm.time_step_rank", 3),
        ("ssm.group_count", 0),
        ("ssm.conv_kernel", 1),
        ("ssm.state_size", -16),
        ("full_attention_interval", 0),
        ("attention.recurrent_layers", [True]),
    ],
)
def test_a_senseless_number_is_named(key: str, value: Any, tmp_path: Path) -> None:
    draft = GOLDENS["qwen35"].draft()
    draft.keys[key] = value
    with pytest.raises(InvalidModelError) as caught, draft.loaded(tmp_path):
        pass
    assert caught.value.field == f"qwen35.{key}"


def test_layers_are_recurrent_as_the_file_says_or_three_of_four(tmp_path: Path) -> None:
    for name, expected in (("qwen35moe", [0, 2]), ("qwen3next", [0, 1, 2])):
        with GOLDENS[name].draft().loaded(tmp_path) as model:
            deltas = [op for op in model.graph.ops if isinstance(op, DeltaNet)]
            assert [op.layer for op in deltas] == expected
            assert deltas[0].state == State("delta_net", (N_V, DELTA, DELTA))
            heads = [deltas[0].key_head(h) for h in range(N_V)]
            assert heads == ([0, 0, 1, 1] if name == "qwen3next" else [0, 1, 0, 1])


def test_a_file_that_holds_the_parts_apart_says_the_same(tmp_path: Path) -> None:
    """The old files of Qwen 3 Next against the new: the rows of a matrix in another order."""
    draft = GOLDENS["qwen3next-fused"].draft()
    found = [reference_logits(draft, tmp_path)]
    r = N_V // N_K
    for i in range(3):
        whole = draft.tensors.pop(f"blk.{i}.ssm_in.weight").reshape(N_K, -1, DIM)
        bounds = np.cumsum([DELTA, DELTA, r * DELTA])
        parts = [part.reshape(-1, DIM) for part in np.split(whole, bounds, axis=1)]
        draft.tensors[f"blk.{i}.attn_qkv.weight"] = np.concatenate(parts[:3])
        draft.tensors[f"blk.{i}.attn_gate.weight"] = parts[3]
    found.append(reference_logits(draft, tmp_path))
    np.testing.assert_array_equal(*found)


def reference_logits(draft: Any, folder: Path) -> NDArray[np.float32]:
    with draft.loaded(folder) as model:
        segment: Segment = model.graph.segment()
        with QuantisedReference().compile(segment, LIMITS) as program:
            return logits(program, (0, 0, 8, -1, {}))
