"""What every backend must do, chains of them included: the bits of the reference, however asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer.batch import Batch, PageTable, StepRequest
from edgeinfer.draft import rows_layer
from edgeinfer.errors import ClosedError, InvalidRequestError, UnsupportedModelError
from edgeinfer.gguf import GGUFFile
from edgeinfer.graph import KV, KVType, Linear, Op, RmsNorm, Rotate, Segment
from edgeinfer.kernels.reference import ReferenceBackend
from edgeinfer.model import Model
from edgeinfer.sampling.params import SampleTable, SamplingParams

from .backends import BACKENDS, FAST, IDS, LIMITS, TYPES, WHOLE, backend, batch_of
from .golden_models import GOLDENS
from .models_for_tests import tiny_model
from .random_graphs import RandomGraph

SLID = PageTable(np.array([2, 5, 0, 7], np.int32), 1, 2)  # page 0 is pinned, two of the others seen


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Model]]:
    """Small random models by what `tiny_model` is asked for, each written once."""
    folder, files = tmp_path_factory.mktemp("backends"), dict[str, GGUFFile]()

    def model(**options: Any) -> Model:
        key = repr(options)
        if key not in files:
            (at := folder / str(len(files))).mkdir()
            files[key] = GGUFFile.open(tiny_model(at, **options))
        return Model.load(files[key])

    yield model
    for file in files.values():
        file.close()


@pytest.fixture(scope="module")
def small(models: Callable[..., Model]) -> Segment:
    return models(arch="qwen3", quant="Q4_0", qk_norm=True).graph.segment()


def run(program: Any, batch: Batch) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = program.submit(batch).wait().logits.copy()
    return logits


@pytest.fixture(scope="module")
def expected(small: Segment) -> NDArray[np.float32]:
    """Logits after each of IDS, by the law."""
    with backend("reference").compile(small, LIMITS) as program:
        return run(program, batch_of(IDS))


@pytest.fixture(params=BACKENDS)
def program(request: pytest.FixtureRequest, small: Segment) -> Iterator[Any]:
    with backend(request.param).compile(small, LIMITS) as program:
        yield program


@pytest.fixture(scope="module", params=TYPES)
def typed(
    request: pytest.FixtureRequest, models: Callable[..., Model]
) -> tuple[Segment, NDArray[np.float32]]:
    """A model of four layers of a type, and its logits by the law, which are near the truth."""
    segment = models(
        quant=request.param, n_layers=4, dim=512, n_heads=8, n_kv_heads=2, ffn_dim=1024
    ).graph.segment()
    with backend("reference").compile(segment, LIMITS) as law:
        expected = run(law, batch_of(IDS))
    with ReferenceBackend().compile(segment, LIMITS, mode="exact") as program:
        truth = run(program, batch_of(IDS))
    assert np.abs(expected - truth).max() <= 0.02 * np.abs(truth).max()
    return segment, expected


@pytest.mark.parametrize("name", FAST)
def test_logits_are_the_references(typed: tuple[Segment, NDArray[np.float32]], name: str) -> None:
    segment, expected = typed
    with backend(name).compile(segment, LIMITS) as program:
        np.testing.assert_array_equal(run(program, batch_of(IDS)), expected)


@pytest.mark.parametrize("chunk", [1, 3, 7, len(IDS)])
def test_bits_do_not_depend_on_chunks(
    program: Any, expected: NDArray[np.float32], chunk: int
) -> None:
    rows = [run(program, batch_of(IDS[i : i + chunk], i)) for i in range(0, len(IDS), chunk)]
    np.testing.assert_array_equal(np.concatenate(rows), expected)


def test_bits_do_not_depend_on_company(program: Any, expected: NDArray[np.float32]) -> None:
    """Prompts of several sequences in one step, then a token of each."""
    cuts = (4, 1, 7)
    tables = [(PageTable(np.array([page], np.int32), 0, 1),) for page in (6, 1, 3)]
    for firsts, lasts in (((0,) * 3, cuts), (cuts, [n + 1 for n in cuts])):
        spans = [range(a, b) for a, b in zip(firsts, lasts, strict=True)]
        pos = np.concatenate([np.array(span) for span in spans])
        seq = np.repeat(np.arange(3), [len(span) for span in spans]).astype(np.int32)
        ids, wanted = np.array(IDS, np.int32)[pos], np.arange(len(pos), dtype=np.int32)
        batch = Batch(ids, pos, seq, tables, wanted)
        np.testing.assert_array_equal(run(program, batch), expected[pos])


@pytest.mark.parametrize("name", BACKENDS)
def test_bits_of_a_table_that_has_slid(small: Segment, name: str) -> None:
    """Positions far beyond what is held: pinned pages are seen from another distance."""
    rows = []
    for each in (name, "reference"):
        with backend(each).compile(small, LIMITS) as program:
            rows.append(slid_rows(program, 13))
    np.testing.assert_array_equal(*rows)


KV_TYPES: list[tuple[KVType, KVType]] = [("q8_0", "q4_0"), ("f16", "q8_0")]


@pytest.fixture(scope="module", params=KV_TYPES, ids="/".join)
def in_blocks(
    request: pytest.FixtureRequest, models: Callable[..., Model]
) -> tuple[Segment, NDArray[np.float32]]:
    """A model whose caches keep blocks, of heads that are transformed, and its slid rows."""
    model = models(arch="qwen3", quant="Q4_0", qk_norm=True, head_dim=64)
    segment = model.graph.segment(kv_types=request.param)
    with backend("reference").compile(segment, LIMITS) as law:
        return segment, slid_rows(law, 16)


def slid_rows(program: Any, chunk: int) -> NDArray[np.float32]:
    """Logits of positions far beyond what is held, of which the oldest are pinned."""
    parts, ids = [], [(7 * i) % 300 for i in range(5 * 32)]
    for start in range(0, len(ids), chunk):
        batch = batch_of(ids[start : start + chunk], start)
        batch.tables = [(SLID,)]
        parts.append(run(program, batch))
    return np.concatenate(parts)


@pytest.mark.parametrize("name", [*WHOLE, "cpu+cpu", "cpu+shim"])
def test_bits_of_caches_in_blocks(
    in_blocks: tuple[Segment, NDArray[np.float32]], name: str
) -> None:
    segment, expected = in_blocks
    with backend(name).compile(segment, LIMITS) as program:
        np.testing.assert_array_equal(slid_rows(program, 13), expected)
        batch = batch_of(IDS, 5 * 32)
        batch.tables = [(SLID,)]
        went_on, copies = run(program, batch), np.array([1, 3, 4, 6], np.int32)
        program.copy_pages(0, SLID.pages.tolist(), copies.tolist())
        batch.tables = [(SLID._replace(pages=copies),)]
        np.testing.assert_array_equal(run(program, batch), went_on)


def test_caches_in_blocks_take_what_they_say(models: Callable[..., Model]) -> None:
    """8.5 and 4.5 bits a value: of heads of 64, of which no block is filled up."""
    graph, taken = models(arch="qwen3", quant="Q4_0", qk_norm=True, head_dim=64).graph, {}
    for types in product(get_args(KVType), repeat=2):
        demand = backend("cpu").demand(graph.segment(kv_types=types), StepRequest(64, 1, 2))
        taken[types] = demand.memories["host"]["KV cache"] / demand.limits.n_pages[0]
    page = 2 * 2 * 64 * 32  # layers, heads, values, positions: of K, and of V
    bits = {"f16": 16, "q8_0": 8.5, "q4_0": 4.5}
    assert taken == {(k, v): page * (bits[k] + bits[v]) / 8 for k, v in taken}


def test_a_cache_of_keys_that_serve_as_values_has_one_type() -> None:
    g = RandomGraph(1, dim=64)
    x = g.embed()
    for blk in g.layers():
        q, k = (g.linear(x, f"{blk}.{name}", 72) for name in "qk")
        x = g.layer_output(x + g.attention(q, k, cache=KV(1, 72, 64, k_is_v=True)))
    g.head(g.select_rows(x))
    with pytest.raises(InvalidRequestError, match="layer 0 K serves as V") as caught:
        g.segment(kv_types=("q8_0", "f16"))
    assert caught.value.param == "kv_type"
    segment = g.segment(kv_types=("q4_0", "q4_0"))
    with backend("reference").compile(segment, LIMITS) as law:
        expected = run(law, batch_of([3, 1, 39, 7]))
    with backend("cpu").compile(segment, LIMITS) as program:
        np.testing.assert_array_equal(run(program, batch_of([3, 1, 39, 7])), expected)


def test_only_wanted_rows_come_back(program: Any, expected: NDArray[np.float32]) -> None:
    for wanted in ([2, 9], [10], []):
        batch = batch_of(IDS)
        batch.wanted = np.array(wanted, np.int32)
        np.testing.assert_array_equal(run(program, batch), expected[wanted])


def test_the_first_logits_are_those_of_all(program: Any, expected: NDArray[np.float32]) -> None:
    n_vocab = expected.shape[1]
    for n in (1, 8, 37, n_vocab - 1, n_vocab, n_vocab + 9):
        batch = batch_of(IDS)
        batch.n_logits = n
        found = run(program, batch)
        assert found.shape[1] == min(n, n_vocab)
        np.testing.assert_array_equal(found, expected[:, :n])
        np.testing.assert_array_equal(run(program, batch_of(IDS)), expected)
    with pytest.raises(AssertionError, match="of logits"):
        program.submit(replace(batch_of(IDS, output="hidden"), n_logits=8))


def test_hidden_rows_are_what_the_head_reads(program: Any, small: Segment) -> None:
    batch = batch_of(IDS, output="hidden")
    batch.wanted = np.array([2, 9], np.int32)
    found = program.submit(batch).wait().hidden.copy()
    with backend("reference").compile(small, LIMITS) as law:
        np.testing.assert_array_equal(found, law.submit(batch).wait().hidden)


@pytest.mark.parametrize("name", WHOLE)
def test_segments_joined_by_hidden_rows_equal_the_whole(
    models: Callable[..., Model], expected: NDArray[np.float32], name: str
) -> None:
    graph = models(arch="qwen3", quant="Q4_0", qk_norm=True).graph
    machine = backend(name)
    with (
        machine.compile(graph.segment(0, 1), LIMITS) as first,
        machine.compile(graph.segment(1, 2), LIMITS) as second,
    ):
        batch = batch_of(IDS)
        batch.hidden = first.submit(batch_of(IDS, output="hidden")).wait().hidden
        np.testing.assert_array_equal(run(second, batch), expected)


def samples_of(params: SamplingParams, n: int) -> SampleTable:
    table = SampleTable(n)
    for i in range(n):
        table.set_row(i, params, seed=5, index=i, history=np.array(IDS[: i + 1], np.int32))
    return table


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_tokens_are_the_samplers(program: Any, small: Segment, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=5, repeat_penalty=1.2, logprobs=3)
    found, law = samples_of(params, len(IDS)), samples_of(params, len(IDS))
    batch = batch_of(IDS, output="ids")
    batch.samples = found
    outputs = program.submit(batch).wait()
    batch.samples = law
    with backend("reference").compile(small, LIMITS) as reference:
        ids = reference.submit(batch).wait().ids
    assert outputs.ids.tolist() == found.ids.tolist() == ids.tolist()
    for i in range(len(IDS)):
        assert [each.tolist() for each in found.top(i)] == [each.tolist() for each in law.top(i)]
    np.testing.assert_array_equal(found.logprobs, law.logprobs)


@pytest.mark.parametrize("output", ["ids", "logits"])
def test_tokens_and_nothing_else_come_with_samples(program: Any, output: str) -> None:
    batch = batch_of(IDS, output=output)
    batch.samples = None if output == "ids" else samples_of(SamplingParams(), len(IDS))
    with pytest.raises(AssertionError, match="samples"):
        program.submit(batch)


def test_an_aborted_step_says_so_and_the_next_one_is_right(
    program: Any, expected: NDArray[np.float32]
) -> None:
    ticket = program.submit(batch_of(IDS))
    ticket.abort()
    assert ticket.wait().aborted
    again = program.submit(batch_of(IDS)).wait()
    assert not again.aborted
    np.testing.assert_array_equal(again.logits, expected)


def test_arrays_may_change_once_a_step_was_submitted(
    program: Any, expected: NDArray[np.float32]
) -> None:
    """Those of the batch, and those of page tables that are given anew."""
    pages = np.array([4, 5, 6], np.int32)
    batch = batch_of(IDS)
    batch.tables = [(PageTable(pages, 0, 3),)]
    ticket = program.submit(batch)
    pages[:] = -1
    batch.ids[:], batch.pos[:], batch.seq[:], batch.wanted[:] = 1, 77, 3, 0
    batch.tables.clear()
    np.testing.assert_array_equal(ticket.wait().logits, expected)
    pages[:] = 4, 5, 6
    more = batch_of(IDS[:1], len(IDS))
    more.tables = [(PageTable(pages, 0, 3),)]
    ticket = program.submit(more)
    pages[:] = 1 << 30
    after = ticket.wait().logits.copy()
    whole = batch_of([*IDS, IDS[0]])
    np.testing.assert_array_equal(after[0], run(program, whole)[-1])


def test_a_closed_program_takes_no_step(small: Segment) -> None:
    for name in ("cpu", "reference", "cpu+reference"):
        program = backend(name).compile(small, LIMITS)
        program.close()
        program.close()
        with pytest.raises(ClosedError):
            program.submit(batch_of(IDS))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_says_what_it_takes_and_what_it_is(small: Segment, name: str) -> None:
    machine = backend(name)
    demand = machine.demand(small, StepRequest(64, 1, 2))
    free = machine.memories(1 << 30)
    assert 0 < free["host"] <= 1 << 30 and set(demand.memories) <= set(free)
    assert demand.limits.n_pages == {0: 2} and 0 < demand.limits.shared_rows
    assert demand.limits.shared_rows <= demand.limits.max_rows and demand.limits.row_cost >= 0
    purposes = {purpose for rows in demand.memories.values() for purpose in rows}
    assert "KV cache" in purposes and any(each.startswith("weights") for each in purposes)
    few = machine.demand(small, StepRequest(64, 1, 2, most_rows=3)).limits
    assert few.max_rows == 3 and few.shared_rows <= 3
    with machine.compile(small, demand.limits) as program:
        assert program.step_weight_bytes > 0
        assert list(program.describe())[0] == "device"
        assert run(program, batch_of(IDS)).shape == (len(IDS), small.output.dim)


# -- several outputs of a step, and logits that were edited ----------------------------------------


@pytest.fixture(scope="module")
def watched(models: Callable[..., Model]) -> Segment:
    """A model whose steps may yield the streams that enter every layer, and the head."""
    graph = models(arch="qwen3", quant="Q4_0", qk_norm=True, n_layers=3).graph
    return graph.segment(residuals=range(4))


@pytest.fixture(params=BACKENDS)
def watched_program(request: pytest.FixtureRequest, watched: Segment) -> Iterator[Any]:
    with backend(request.param).compile(watched, LIMITS) as program:
        yield program


def greedy_table(n_rows: int) -> SampleTable:
    table, params = SampleTable(16), SamplingParams(temperature=0.0, logprobs=2)
    for i in range(n_rows):
        table.set_row(i, params, 0, i)
    return table


def test_a_step_yields_tokens_hidden_rows_and_residuals(
    watched_program: Any, watched: Segment
) -> None:
    """All at once, as the law does; so does a step of one row. Who asks for none gets none."""
    batch = batch_of(IDS)
    batch.wanted = np.array([2, 9], np.int32)
    with backend("reference").compile(watched, LIMITS) as law:
        batch.with_hidden, batch.residuals = True, (0, 1, 2, 3)
        expected = law.submit(batch).wait()
    batch.output, batch.samples = "ids", greedy_table(2)
    found = watched_program.submit(batch).wait()
    assert found.ids.tolist() == expected.logits.argmax(1).tolist()
    np.testing.assert_array_equal(found.hidden, expected.hidden)
    assert sorted(found.residuals) == [0, 1, 2, 3]
    for layer, rows in expected.residuals.items():
        np.testing.assert_array_equal(found.residuals[layer], rows)
    later = batch_of(IDS[9:10], 9)
    later.residuals = (3,)
    last = watched_program.submit(later).wait()
    np.testing.assert_array_equal(last.residuals[3], expected.residuals[3][9:10])
    plain = watched_program.submit(batch_of(IDS)).wait()
    assert not plain.residuals and not len(plain.hidden)
    np.testing.assert_array_equal(plain.logits[[2, 9]], expected.logits)


def test_what_enters_the_head_is_normed_by_it(watched: Segment) -> None:
    """The last of the streams is what the model file names so: its norm is the hidden row."""
    with backend("reference").compile(watched, LIMITS) as law:
        batch = batch_of(IDS)
        batch.with_hidden, batch.residuals = True, (3,)
        found = law.submit(batch).wait()
    x = found.residuals[3].astype(np.float64)
    ratio = found.hidden / (x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-6))
    np.testing.assert_allclose(ratio, ratio[:1].repeat(len(IDS), 0), rtol=1e-4)


def test_logits_are_sampled_as_they_are_left(watched_program: Any, watched: Segment) -> None:
    """Untouched they give the step's own tokens; edited, those of the edit."""
    params, table = SamplingParams(temperature=0.9, seed=3, logprobs=3), SampleTable(16)
    for i in range(len(IDS)):
        table.set_row(i, params, 3, i)
    batch = batch_of(IDS, output="ids")
    batch.samples = table
    ids = watched_program.submit(batch).wait().ids.copy()
    logprobs = table.logprobs[: len(IDS)].copy()
    logits = watched_program.submit(batch_of(IDS)).wait().logits
    watched_program.sample(logits, table)
    np.testing.assert_array_equal(table.ids[: len(IDS)], ids)
    np.testing.assert_array_equal(table.logprobs[: len(IDS)], logprobs)
    logits[:] = -np.inf
    logits[:, 7] = 0
    watched_program.sample(logits, table)
    assert table.ids[: len(IDS)].tolist() == [7] * len(IDS)


def test_residuals_of_layers_that_are_not_there_are_refused(small: Segment) -> None:
    with pytest.raises(ValueError, match="not within"):
        small.graph.segment(residuals=[3])
    with pytest.raises(ValueError, match="not within"):
        small.graph.segment(1, 2, residuals=[0])


@pytest.mark.parametrize("name", FAST)
def test_residuals_that_nobody_asks_for_cost_nothing(small: Segment, name: str) -> None:
    """A segment that declares none takes the memory that it took."""
    graph, request = small.graph, StepRequest(64, 1, 2)
    plain = backend(name).demand(graph.segment(), request).memories
    kept = backend(name).demand(graph.segment(residuals=range(3)), request).memories
    assert plain == backend(name).demand(small, request).memories
    more = sum(sum(rows.values()) for rows in kept.values())
    assert more > sum(sum(rows.values()) for rows in plain.values())


# -- what guesses tokens ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Segment]:
    """A model whose file holds a block that guesses, of heads, norms and products of its own."""
    draft = GOLDENS["qwen35"].draft()
    with draft.loaded(tmp_path_factory.mktemp("drafted")) as model:
        yield model.graph.segment(n_ctx=64, drafts=True)


def guesses(name: str, segment: Segment, chunk: int) -> list[NDArray[np.float32]]:
    """Logits and hidden rows of a draft, of rows that the model has computed in chunks."""
    limits = LIMITS._replace(n_pages=dict.fromkeys(segment.groups, 2), n_states=4)
    rows, layer = list[Any](), rows_layer(segment)
    ids = [id % 96 for id in IDS]
    with backend(name).compile(segment, limits) as program:
        assert program.draft is not None
        for i, start in enumerate(range(0, len(ids) - 1, chunk)):
            batch = batch_of(ids[start : start + chunk], start, (0, 1))
            batch.residuals = (layer,)
            batch.states = np.array([i % 2 if i else -1], np.int32)
            batch.kept = np.full(len(batch.ids), -1, np.int32)
            batch.kept[-1] = (i + 1) % 2
            read = program.submit(batch).wait().residuals[layer].copy()
            # A row of the draft has the token after that of the row of the model that it is of.
            after = batch_of(ids[start + 1 : start + chunk + 1], start + 1, (0, 1))
            after.hidden, after.with_hidden = read[: len(after.ids)], True
            after.wanted = after.wanted[-1:]
            found = program.draft.submit(after).wait()
            rows.append((found.logits.copy(), found.hidden.copy()))
    return [np.concatenate(each) for each in zip(*rows, strict=True)]


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_a_draft_runs_on_the_weights_and_pages_of_its_model(
    drafted: Segment, name: str, chunk: int
) -> None:
    expected = guesses("reference", drafted, 1)
    n_steps = -(-(len(IDS) - 1) // chunk)
    for found, right in zip(guesses(name, drafted, chunk), expected, strict=True):
        assert len(found) == n_steps and len(right) == len(IDS) - 1
        lasts = [min((i + 1) * chunk, len(right)) - 1 for i in range(n_steps)]
        np.testing.assert_array_equal(found, right[lasts])


def test_a_draft_takes_its_own_weights_only(drafted: Segment) -> None:
    """What the model has packed is not packed again; who asks for no draft has the old plan."""
    request = StepRequest(64, 1, 2)
    cpu, graph = backend("cpu"), drafted.graph
    with_draft = cpu.demand(drafted, request).memories["host"]
    plain = cpu.demand(graph.segment(n_ctx=64), request).memories["host"]  # type: ignore[attr-defined]
    n_embedding = 4 * 96 * 64
    more = {name: n_bytes - plain.get(name, 0) for name, n_bytes in with_draft.items()}
    assert 0 < more["weights F32"] and more["KV cache"] > 0
    assert drafted.draft is not None and graph.segment(n_ctx=64).draft is None  # type: ignore[attr-defined]
    names = {op.weight.name for op in drafted.draft.ops if isinstance(op, Linear)}
    own = sum(4 * op.weight.n_elements for op in drafted.draft.ops
              if isinstance(op, Linear) and op.weight.name.startswith("blk."))  # fmt: skip
    assert "token_embd.weight" in names or "output.weight" in names
    assert more["weights F32"] < own + n_embedding // 2


@pytest.mark.parametrize("name", WHOLE)
def test_what_a_machine_lacks_is_refused_in_a_draft_too(drafted: Segment, name: str) -> None:
    def changed(op: Op) -> Op:
        if isinstance(op, Rotate):
            return op._replace(rope=op.rope._replace(kind="made up"))  # type: ignore[arg-type]
        return op

    assert drafted.draft is not None
    block = drafted.draft._replace(ops=tuple(map(changed, drafted.draft.ops)))
    with pytest.raises(UnsupportedModelError, match="does not know kind 'made up' of Rope"):
        backend(name).demand(drafted._replace(draft=block), StepRequest(64, 1, 2))


@pytest.mark.parametrize("name", FAST)
def test_a_shape_that_no_kernel_takes_is_refused_in_a_draft_too(
    drafted: Segment, name: str
) -> None:
    assert drafted.draft is not None
    ops = [op._replace(n_heads=3) if isinstance(op, RmsNorm) else op for op in drafted.draft.ops]
    block = drafted.draft._replace(ops=tuple(ops))
    with pytest.raises(UnsupportedModelError, match="64; kernels run multiples of 3"):
        backend(name).demand(drafted._replace(draft=block), StepRequest(64, 1, 2))
