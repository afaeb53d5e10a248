"""How fast a GPU copies, multiplies and decodes, by its own clock and by that of the host.

Knows nothing of what is computed: weights are random, and large ones repeat themselves.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from statistics import median
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeinfer import quant
from edgeinfer.backend import Program, RunsOnGpu
from edgeinfer.batch import PAGE, Batch, OutputKind, PageTable, StepLimits
from edgeinfer.graph import KV, Hparams, Segment
from edgeinfer.models import llama
from edgeinfer.quant import QuantType
from edgeinfer.sampling.params import SampleTable, SamplingParams
from edgeinfer.selftest.made_up import MadeUp

if TYPE_CHECKING:
    from edgeinfer.selftest.run import Run

_TYPES = (quant.Q4_0, quant.Q4_K, quant.Q6_K, quant.Q8_0, quant.F16)
_WARM_UP = 4  # steps before any is measured: the second of a kind becomes a graph
_GREEDY = SamplingParams(temperature=0.0, seed=5)


class Shape(NamedTuple):
    """A model, and of how many rows its steps are: of sequences side by side, and of prompts."""

    layers: int
    dim: int
    ffn_dim: int
    heads: int
    rows: tuple[int, ...]
    prompts: tuple[int, ...]


class Sizes(NamedTuple):
    """What is measured; smaller in tests, where nobody looks at the figures."""

    copied: int = 1 << 30  # bytes
    uploaded: int = 256 << 20
    matrices: int = 400 << 20  # bytes of weights, at least: more than caches hold
    dim: int = 4096
    ffn_dim: int = 14336
    contexts: tuple[int, ...] = (512, 4096, 32768)
    vocab: int = 32000
    steps: int = 64
    # Shapes of Llama 3.2 1B and 3.1 8B, with a smaller vocabulary.
    models: Mapping[str, Shape] = MappingProxyType({
        "1B": Shape(16, 2048, 8192, 32, (1, 2, 4, 8, 16), (512, 2048)),
        "8B": Shape(32, 4096, 14336, 32, (1, 8), (512, 2048)),
    })  # fmt: skip


FULL = Sizes()


def measure(run: Run, end: float, sizes: Sizes = FULL) -> dict[str, Any]:
    """Everything, part by part while there is time; GB are 10^9 bytes."""
    backend = run.backend
    assert isinstance(backend, RunsOnGpu)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "copy": partial(_copy, backend, sizes),
        "upload": partial(_upload, backend, sizes),
        **{f"matrices {kind.name}": partial(_matrices, backend, sizes, kind) for kind in _TYPES},
        **{f"attention {n}": partial(_attention, backend, n) for n in sizes.contexts},
        **{f"model {name}": partial(_model, backend, sizes, name) for name in sizes.models},
    }
    found: dict[str, Any] = {"left_out": []}
    for name, part in parts.items():
        if time.monotonic() >= end:
            found["left_out"].append(name)
            continue
        found[name] = run.attempt(name, part)
        run.tell(f"{name}: {found[name]}")
    has_failed = any("state" in found[name] for name in parts.keys() & found.keys())
    return {**found, "state": "failed" if has_failed else "cut" if found["left_out"] else "ok"}


# -- parts ---------------------------------------------------------------------------------------


def _copy(backend: RunsOnGpu, sizes: Sizes) -> dict[str, Any]:
    """Bytes read and written a second, copying memory: close to the most that can be read."""
    device, n = backend.device, sizes.copied
    first = device.reserve(2 * n)
    try:
        device.fill(first, 2 * n)
        graph = device.record(lambda: device.copy(first + n, first, n))
        seconds = median(_device_seconds(backend, graph.replay) for _ in range(_WARM_UP + 5))
    finally:
        device.free(first)
    return {"gb_s": _rounded(2 * n / seconds / 1e9)}


def _upload(backend: RunsOnGpu, sizes: Sizes) -> dict[str, Any]:
    """Bytes a second from the host's memory to the device's."""
    device, data = backend.device, np.zeros(sizes.uploaded, np.uint8)
    address = device.reserve(data.nbytes)
    try:
        device.write(address, data)  # which makes the buffers that it goes through
        seconds = median(
            _device_seconds(backend, lambda: device.write(address, data)) for _ in range(3)
        )
    finally:
        device.free(address)
    return {"gb_s": _rounded(data.nbytes / seconds / 1e9)}


def _matrices(backend: RunsOnGpu, sizes: Sizes, kind: QuantType) -> dict[str, Any]:
    """Weights read a second by a step of one row that is a chain of products."""
    per_layer = 2 * kind.row_bytes(sizes.dim * sizes.ffn_dim)
    n_layers = max(1, -(-sizes.matrices // per_layer))
    hparams = Hparams("chain", n_layers, sizes.dim, 64, 4096)
    graph = MadeUp(hparams, {}, lambda name: kind, is_large=True)
    x = graph.embed()
    for blk in graph.layers():
        inner = graph.linear(x, f"{blk}.up", sizes.ffn_dim)
        x = graph.layer_output(graph.rms_norm(graph.linear(inner, f"{blk}.down", sizes.dim), None))
    graph.head(graph.select_rows(x))
    segment = graph.segment()
    steps = _Steps(segment, 1)
    with closing(backend.compile(segment, _limits(segment, 1, 1))) as program:
        seconds = _step_seconds(backend, program, lambda i: steps.decode(0, "hidden"))
        n_bytes = program.step_weight_bytes
    return {
        "gb_s": _rounded(n_bytes / seconds / 1e9),
        "step_us": _rounded(1e6 * seconds),
        "products": 2 * n_layers,
    }


_ATTENTION_LAYERS, _KV = 4, KV(8, 128, 128)


def _attention(backend: RunsOnGpu, n_ctx: int) -> dict[str, Any]:
    """Bytes of K and V read a second by a row that sees nearly `n_ctx` positions."""
    hparams = Hparams("attention", _ATTENTION_LAYERS, 64, 64, n_ctx)
    graph = MadeUp(hparams, {}, lambda name: quant.F16)
    x = graph.embed()
    for blk in graph.layers():
        q = graph.linear(x, f"{blk}.attn_q", 4 * _KV.n_heads * _KV.k_dim)
        k, v = (graph.linear(x, f"{blk}.attn_{n}", _KV.n_heads * _KV.k_dim) for n in "kv")
        read = graph.attention(q, k, v, cache=_KV)
        x = graph.layer_output(graph.linear(read, f"{blk}.attn_output", 64))
    graph.head(graph.select_rows(x))
    segment = graph.segment()
    steps = _Steps(segment, 1, n_ctx, n_ctx - PAGE)  # one page for the steps that are measured
    with closing(backend.compile(segment, _limits(segment, 1, 1, n_ctx))) as program:
        seconds = _step_seconds(backend, program, lambda i: steps.decode(i, "hidden"))
    n_bytes = _ATTENTION_LAYERS * 2 * 2 * _KV.n_heads * _KV.k_dim * n_ctx
    return {"gb_s": _rounded(n_bytes / seconds / 1e9), "step_us": _rounded(1e6 * seconds)}


def _model(backend: RunsOnGpu, sizes: Sizes, name: str) -> dict[str, Any]:
    """A Llama of a Q4_K_M file's types: loading, prompts, and decoding some sequences."""
    shape = sizes.models[name]
    segment, n_sequences = _llama(shape, sizes.vocab), max(shape.rows)
    limits = _limits(segment, max(shape.prompts), n_sequences)
    backend.prepare([(segment, limits)])
    begin = time.perf_counter()
    try:
        made = backend.compile(segment, limits)
    except MemoryError as error:  # of a GPU that is smaller
        return {"why": str(error)}
    with closing(made) as program:
        backend.device.mark().wait()
        load, n_bytes = time.perf_counter() - begin, program.step_weight_bytes
        steps = _Steps(segment, 1, max(_N_CTX, *shape.prompts))
        prompts = {
            f"prompt_{n}_tok_s": _rounded(
                n / _step_seconds(backend, program, partial(steps.prompt, n), 5)
            )
            for n in shape.prompts
        }
        decoded = {
            str(n): _decode(backend, program, _Steps(segment, n), sizes.steps, n_bytes)
            for n in shape.rows
        }
    return {
        "weights_gb": _rounded(n_bytes / 1e9),
        "load_gb_s": _rounded(n_bytes / load / 1e9),
        **prompts,
        "decode": decoded,
    }


def _decode(
    backend: RunsOnGpu, program: Program, steps: _Steps, n_steps: int, n_bytes: int
) -> dict[str, Any]:
    """Tokens a second by the host's clock, and how long a step takes by that of the GPU."""
    for i in range(_WARM_UP):
        program.submit(steps.decode(i, "ids")).wait()
    begin = time.perf_counter()
    for i in range(_WARM_UP, _WARM_UP + n_steps):
        program.submit(steps.decode(i, "ids")).wait()
    seconds = (time.perf_counter() - begin) / n_steps
    # No step follows from the one before where positions jump: none is begun ahead.
    alone = _step_seconds(backend, program, lambda i: steps.decode(2 * (i % n_steps), "ids"))
    return {
        "tok_s": _rounded(steps.n / seconds),
        "step_us": _rounded(1e6 * seconds),
        "gpu_us": _rounded(1e6 * alone),
        "gap_us": _rounded(1e6 * (seconds - alone)),
        "gb_s": _rounded(n_bytes / seconds / 1e9),
    }


# -- models --------------------------------------------------------------------------------------


def _llama(shape: Shape, n_vocab: int) -> Segment:
    def kind_of(name: str) -> QuantType:
        is_larger = re.fullmatch(r"output.*|blk\.\d*[02468]\.(attn_v|ffn_down)\..*", name)
        return quant.Q6_K if is_larger else quant.Q4_K

    graph = MadeUp(
        Hparams("llama", shape.layers, shape.dim, n_vocab, 4096),
        {
            "attention.head_count": shape.heads,
            "attention.head_count_kv": max(1, shape.heads // 4),
            "feed_forward_length": shape.ffn_dim,
        },
        kind_of,
        is_large=True,
    )
    llama.forward(graph)
    return graph.segment()


# -- steps ---------------------------------------------------------------------------------------

_N_CTX = 1024  # of each sequence


def _limits(segment: Segment, max_rows: int, n_sequences: int, n_ctx: int = _N_CTX) -> StepLimits:
    n_tokens = max(n_sequences * n_ctx, max_rows)
    n_pages = {window: -(-n_tokens // PAGE) for window in segment.groups}
    most = max(max_rows, n_sequences)
    return StepLimits(n_pages, most, n_sequences, n_sequences, n_threads=1)


class _Steps:
    """Steps of n sequences, which decode from position `at` on, by default 256."""

    def __init__(
        self, segment: Segment, n: int, n_ctx: int = _N_CTX, at: int = _N_CTX // 4
    ) -> None:
        self.n, self._at = n, at
        n_pages = n_ctx // PAGE
        every = [np.arange(i * n_pages, (i + 1) * n_pages, dtype=np.int32) for i in range(n)]
        n_groups = len(segment.groups)
        self._tables = [(PageTable(pages, 0, n_pages),) * n_groups for pages in every]
        self._samples = SampleTable(n)

    def decode(self, i: int, output: OutputKind) -> Batch:
        """A row of each sequence, the i-th behind what was there.

        It reads the tokens that the last such step has picked.
        """
        rows, at = np.arange(self.n, dtype=np.int32), self._at + i
        ids = self._samples.ids.copy()
        return self._batch(ids, np.full(self.n, at, np.int64), rows, rows, output)

    def prompt(self, n_rows: int, _: int = 0) -> Batch:
        """The first rows of a sequence; the token that follows is wanted."""
        ids, pos = np.arange(n_rows, dtype=np.int32), np.arange(n_rows, dtype=np.int64)
        wanted = np.array([n_rows - 1], np.int32)
        return self._batch(ids, pos, np.zeros(n_rows, np.int32), wanted, "ids")

    def _batch(
        self,
        ids: NDArray[np.int32],
        pos: NDArray[np.int64],
        seq: NDArray[np.int32],
        wanted: NDArray[np.int32],
        output: OutputKind,
    ) -> Batch:
        samples = None
        if output == "ids":
            samples = self._samples
            for row in range(len(wanted)):
                samples.set_row(row, _GREEDY, seed=5, index=int(pos[wanted[row]]))
        tables = self._tables[: int(seq[-1]) + 1]
        return Batch(ids, pos, seq, tables, wanted, output, samples=samples)


def _step_seconds(
    backend: RunsOnGpu, program: Program, batch: Callable[[int], Batch], n: int = 15
) -> float:
    """Of the GPU's time, the median of some steps, each by itself."""

    def step(i: int) -> float:
        begin = backend.device.mark()
        ticket = program.submit(batch(i))
        end = backend.device.mark()
        ticket.wait()
        end.wait()
        return end.seconds_since(begin)

    return median([step(i) for i in range(_WARM_UP + n)][_WARM_UP:])


def _device_seconds(backend: RunsOnGpu, action: Callable[[], None]) -> float:
    begin = backend.device.mark()
    action()
    end = backend.device.mark()
    end.wait()
    return end.seconds_since(begin)


def _rounded(x: float) -> float:
    return float(f"{x:.4g}")
