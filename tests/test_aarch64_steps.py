"""Whole steps of models by AArch64's kernels, under qemu: every bit that this machine leaves."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer.batch import Batch
from edgeinfer.gguf import GGUFFile
from edgeinfer.kernels.buffers import Buffer
from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.cpu.backend import CpuBackend
from edgeinfer.kernels.cpu.builders import build_objects
from edgeinfer.kernels.cpu.commands import KernelPart
from edgeinfer.kernels.cpu.kept_objects import cache_folder, read_object, symbol
from edgeinfer.kernels.cpu.program import CpuProgram
from edgeinfer.kernels.cpu.targets import Target
from edgeinfer.model import Model
from edgeinfer.sampling.params import SampleTable, SamplingParams

from .backends import LIMITS, batch_of
from .models_for_tests import tiny_model
from .native import cache_root
from .test_aarch64 import GCC, QEMU, pytestmark  # noqa: F401

# Reads memory, where in it addresses lie, and calls; makes them, and writes the memory back.
DRIVER = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
typedef void kernel(int64_t, int64_t, int64_t, int64_t);
%(declarations)s
static kernel *const kernels[] = {%(kernels)s};
static int64_t word(void) { int64_t v; if (fread(&v, 8, 1, stdin) != 1) exit(2); return v; }
int main(void) {
  int64_t size = word(), n_addresses = word(), n_calls = word();
  char *memory = aligned_alloc(4096, size);
  int64_t *at = malloc(8 * n_addresses);
  if (fread(memory, 1, size, stdin) != size) return 2;
  for (int64_t i = 0; i < n_addresses; i++) at[i] = word();
  for (int64_t i = 0; i < n_addresses; i++) *(int64_t *)(memory + at[i]) += (int64_t)memory;
  for (int64_t i = 0; i < n_calls; i++) {
    int64_t which = word(), h = (int64_t)memory + word(), a = (int64_t)memory + word(), n = word();
    int64_t *header = (int64_t *)h, *args = (int64_t *)a;
    if (n == %(COUNT_ROWS)d) n = header[%(H_ROWS)d / 8];
    else if (n == %(COUNT_WANTED)d) n = header[%(H_WANTED_ROWS)d / 8];
    else if (n < 0) n = *(int64_t *)args[0] * args[1];
    for (int64_t c = 0; c < n; c++) kernels[which](h, a, c, 0);
  }
  for (int64_t i = 0; i < n_addresses; i++) *(int64_t *)(memory + at[i]) -= (int64_t)memory;
  return fwrite(memory, 1, size, stdout) != size;
}
"""
GAP = 8192  # behind every piece: prefetches and tails
PICKED = ("ids", "status", "logprobs", "mu", "top_ids", "top_logprobs")  # of a sample table


class Piece(NamedTuple):
    """Memory of this process, and where it lies in the image of it."""

    address: int
    n_bytes: int
    offset: int
    has_addresses: bool


class Image:
    """Memory of a program, and of a step that has been submitted to it."""

    def __init__(
        self, program: CpuProgram, parts: Sequence[KernelPart], samples: SampleTable | None
    ) -> None:
        self._pieces, self._end = list[Piece](), 0
        for memory in (*program._memories, program._weights._memory):
            if memory is not None:
                self._put(memory.address, memory.n_bytes)
        for array in (program._header, program._tables):
            self._put(array.ctypes.data, array.nbytes, has_addresses=True)
        for name in ("pos", "seq", "ids", "wanted", "states", "kept", "pages"):
            array = getattr(program, f"_{name}")
            self._put(array.ctypes.data, array.nbytes)
        if samples is not None:
            self._put_samples(samples)
        self.header = self.offset(program._header.ctypes.data)
        words = [
            [arg.address if isinstance(arg, Buffer) else arg for arg in part.args] for part in parts
        ]
        starts = np.cumsum([0, *map(len, words)])
        self._words = np.array(sum(words, []), np.int64)
        self._put(self._words.ctypes.data, self._words.nbytes, has_addresses=True)
        first = self.offset(self._words.ctypes.data)
        self.args = [first + 8 * int(start) for start in starts[:-1]]

    def _put_samples(self, table: SampleTable) -> None:
        for array in (table._arguments, table.rows):
            self._put(array.ctypes.data, array.nbytes, has_addresses=True)
        rows = [table.row(i) for i in range(table.n_rows)]
        inputs = [array for row in rows for array in (row.history, *row.params.bias_arrays)]
        picked = (getattr(table, name) for name in PICKED)
        for array in (*inputs, table._mask_addresses, *picked):
            if array.nbytes:
                self._put(array.ctypes.data, array.nbytes)

    def _put(self, address: int, n_bytes: int, *, has_addresses: bool = False) -> None:
        self._pieces.append(Piece(address, n_bytes, self._end, has_addresses))
        self._end += -(-n_bytes // 4096) * 4096 + GAP

    def offset(self, address: int) -> int:
        """Where an address is in the image, -1 for what is none of ours."""
        for piece in self._pieces:
            if piece.address <= address < piece.address + max(1, piece.n_bytes):
                return piece.offset + address - piece.address
        return -1

    def read(self) -> tuple[NDArray[np.uint8], list[int]]:
        """What is there, and where addresses lie: these count from the image's beginning."""
        image, addresses = np.zeros(self._end, np.uint8), list[int]()
        for address, n_bytes, offset, has_addresses in self._pieces:
            part = image[offset : offset + n_bytes]
            part[:] = np.frombuffer(ctypes.string_at(address, n_bytes), np.uint8)
            if has_addresses:
                words = part.view(np.int64)
                for i, value in enumerate(words.tolist()):
                    if (to := self.offset(value)) >= 0:
                        words[i] = to
                        addresses.append(offset + 8 * i)
        return image, addresses


def objects(names: Sequence[str], folder: Path) -> list[Path]:
    """Plain files of kernels, which are built once and kept where ours are."""
    target = Target.any("neon", "aarch64")
    kept = cache_folder(cache_root(), target)
    if missing := [name for name in names if read_object(kept, name) is None]:
        kept.mkdir(parents=True, exist_ok=True)
        build_objects(kept, missing, target, None)
    paths = []
    for name in names:
        data = read_object(kept, name)
        assert data is not None
        paths.append(folder / f"{name}.o")
        paths[-1].write_bytes(data)
    return paths


class Emulator:
    """Runs parts of a step under qemu."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self._names, self._program = list(names), folder / "driver"
        text = DRIVER % {
            "declarations": "\n".join(f"kernel {symbol(name)};" for name in names),
            "kernels": ", ".join(map(symbol, names)),
            **{name: getattr(layout, name) for name in ("COUNT_ROWS", "COUNT_WANTED", "H_ROWS")},
            "H_WANTED_ROWS": layout.H_WANTED_ROWS,
        }
        (folder / "driver.c").write_text(text)
        files = [str(path) for path in objects(names, folder)]
        command = [GCC, "-O1", "-static", "-o", str(self._program), str(folder / "driver.c")]
        subprocess.run([*command, *files], check=True, timeout=300)

    def run(self, image: Image, parts: Sequence[KernelPart], n_first: int) -> NDArray[np.uint8]:
        """The memory behind them; the first ones are run once each, whatever their rule."""
        memory, addresses = image.read()
        calls = [
            [self._names.index(part.kernel), image.header, at, 1 if i < n_first else part.rule]
            for i, (part, at) in enumerate(zip(parts, image.args, strict=True))
        ]
        head = np.array([len(memory), len(addresses), len(calls)], np.int64)
        given = [head, memory, np.array(addresses, np.int64), np.array(calls, np.int64)]
        done = subprocess.run(
            [QEMU, "-cpu", "max", str(self._program)],
            input=b"".join(each.tobytes() for each in given),
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return np.frombuffer(done.stdout, np.uint8)


@contextmanager
def programs(
    folder: Path, options: dict[str, Any], kv: tuple[Any, Any], first: int = 0
) -> Iterator[CpuProgram]:
    """A model from a layer on, and its cache."""
    with GGUFFile.open(tiny_model(folder, **options)) as file:
        segment = Model.load(file).graph.segment(first, kv_types=kv)
        limits = LIMITS._replace(
            n_pages={window: 8 for window in segment.groups}, n_states=4, max_rows=32,
            max_outputs=32, n_threads=1,
        )  # fmt: skip
        with CpuBackend(cache_root()).compile(segment, limits) as program:
            yield program


MODELS: list[tuple[dict[str, Any], tuple[str, str]]] = [
    (dict(quant="Q4_K_M"), ("f16", "f16")),
    (dict(arch="qwen3", quant="Q4_0", qk_norm=True), ("q8_0", "q4_0")),
    (dict(arch="qwen2", quant="F16", bias=True), ("q4_0", "q8_0")),
    (dict(arch="qwen35", quant="Q8_0", n_layers=4), ("f16", "f16")),
]


def steps(program: CpuProgram) -> Iterator[Batch]:
    """A prompt, a token behind it, and some more."""
    n_groups, rng, pos = len(program.segment.groups), np.random.default_rng(0), 0
    for i, n in enumerate((19, 1, 5)):
        ids = rng.integers(0, 300, n).tolist()
        slots = (i - 1, i) if program.segment.states else (-1, -1)
        yield batch_of(ids, pos, n_groups=n_groups, states=slots)
        pos += n


class Twins:
    """A program here, and its kernels for the other machine."""

    def __init__(self, program: CpuProgram, folder: Path) -> None:
        self._program, lowered = program, program._lowered
        self._n_first = len(lowered.prologue)
        ops = [*lowered.ops, program._drawn.sample]
        self._parts = [*lowered.prologue, *(part for op in ops if op for part in op.parts)]
        names = sorted({part.kernel for part in self._parts})
        self._emulator = Emulator(names, folder)

    def check(self, batch: Batch, *, has_bits_of_cache: bool = True) -> NDArray[np.float32]:
        """A step's logits are the same there, and what is then in the cache."""
        ticket = self._program.submit(batch)
        image = Image(self._program, self._parts, batch.samples)
        there = self._emulator.run(image, self._parts, self._n_first)
        here = ticket.wait().logits
        if (table := batch.samples) is not None:
            for name in PICKED:
                ours = getattr(table, name)
                at = image.offset(ours.ctypes.data)
                theirs = there[at : at + ours.nbytes].view(ours.dtype).reshape(ours.shape)
                np.testing.assert_array_equal(theirs, ours)
            return here
        at = image.offset(here.ctypes.data)
        rows = there[at : at + here.strides[0] * len(here)].view(np.float32)
        np.testing.assert_array_equal(rows.reshape(len(here), -1)[:, : here.shape[1]], here)
        if has_bits_of_cache:
            memory = self._program._kv
            ours = np.frombuffer(ctypes.string_at(memory.address, memory.n_bytes), np.uint8)
            at = image.offset(memory.address)
            assert np.array_equal(there[at : at + memory.n_bytes], ours)
        return here


@pytest.mark.parametrize(("options", "kv"), MODELS, ids=str)
def test_steps_have_our_bits(tmp_path: Path, options: dict[str, Any], kv: Any) -> None:
    with programs(tmp_path, options, kv) as program:
        twins = Twins(program, tmp_path)
        for batch in steps(program):
            logits = twins.check(batch)
            assert np.isfinite(logits).all() and np.unique(logits).size > logits.size // 2


CHAINS: list[dict[str, Any]] = [
    dict(temperature=0.0), dict(top_k=40, top_p=0.9, min_p=0.01), dict(top_n_sigma=1.0),
    dict(typical_p=0.7), dict(xtc_probability=1.0), dict(mirostat=1), dict(mirostat=2),
    dict(temperature=1.3, repeat_penalty=1.2, frequency_penalty=0.3, repeat_last_n=-1),
    dict(dynatemp_range=0.5, logit_bias={3: 2.0, 5: -1e9}), dict(top_k=0, top_p=1.0, min_p=0.0),
]  # fmt: skip


def test_tokens_are_those_that_we_pick(tmp_path: Path) -> None:
    with programs(tmp_path, *MODELS[0]) as program:
        n, ids = len(CHAINS), np.arange(20, 60, dtype=np.int32)
        table = SampleTable(n)
        for i, chain in enumerate(CHAINS):
            table.set_row(i, SamplingParams(**chain, logprobs=5), seed=i, index=i, history=ids)
        batch = batch_of(ids[:n].tolist(), output="ids")
        batch.samples = table
        Twins(program, tmp_path).check(batch)
        assert len(set(table.ids.tolist())) > 3 and not table.status.any()


@pytest.mark.parametrize(("options", "kv"), MODELS[1:3], ids=str)
def test_what_is_no_number_is_none_there(tmp_path: Path, options: dict[str, Any], kv: Any) -> None:
    """Nor infinite, nor rounded to zero. Which NaN it is differs, and so may the cache's bits."""
    with programs(tmp_path, options, kv, first=1) as program:
        twins, pos = Twins(program, tmp_path), 0
        for seed, n in enumerate((8, 1, 20)):
            batch = batch_of([0] * n, pos, n_groups=len(program.segment.groups))
            batch.hidden = strange(n, program.segment.hidden.dim, seed)
            logits = twins.check(batch, has_bits_of_cache=False)
            pos += n
            assert not np.isfinite(logits).all() and np.isfinite(logits).any() == (pos == 8)


def strange(n: int, dim: int, seed: int) -> NDArray[np.float32]:
    """Rows of any size: ordinary ones, then with values that are no number, infinite or tiny."""
    rng, few = np.random.default_rng(seed), [np.nan, np.inf, -np.inf, 1e-42, 3e38]
    x = rng.standard_normal((n, dim)).astype(np.float32)
    for i in range(n // 2, n):
        x[i] *= np.float32(10.0) ** rng.integers(-44, 30)
        x[i, rng.integers(0, dim, 3)] = rng.choice(few)
    return x
