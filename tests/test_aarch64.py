"""Kernels built for AArch64 give the bits that this machine's own give, under qemu's emulation."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from edgeinfer.graph import KV, KVType
from edgeinfer.kernels.cpu import attention_layout, layout
from edgeinfer.kernels.cpu.builders import build_objects
from edgeinfer.kernels.cpu.formats import FORMATS, packed_bytes
from edgeinfer.kernels.cpu.kept_objects import symbol
from edgeinfer.kernels.cpu.lower_attention import attend_kernel, fold_kernel
from edgeinfer.kernels.cpu.targets import Target
from edgeinfer.kernels.reference.quantised import Quantised
from tests import native
from tests.kv_pages import k_pages, v_pages
from tests.test_cpu_matmul import random_rows

GCC, OBJDUMP, QEMU = "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-objdump", "qemu-aarch64"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(GCC) and shutil.which(QEMU)), reason=f"needs {GCC} and {QEMU}"
    ),
]
FAMILIES = ("neon", "generic")
TYPES = tuple(FORMATS)
KERNELS = [
    *(f"{op}.{name}" for op in ("pack", "matmul") for name in TYPES),
    *("quantise", "norm", "swiglu", "plan_attention", "attend.64.64", "fold"),
    *("attend.64.64.k_q8_0.v_q4_0.hadamard", "fold.hadamard"),
    *("route.softmax", "dispatch", "gather.a32", "experts.q4_k", "expert_sum"),
]
N_ROWS, N_COLS, N_TOKENS = 40, 512, 13
NAMES = vars(layout) | vars(attention_layout)
BOUNDS = (0, layout.PANEL_GROUPS, N_ROWS // 8)  # of the matmuls' chunks

# Reads an arena and the calls to make in it, as `Arena` writes them; writes the arena back.
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
  char *arena = aligned_alloc(64, size);
  int64_t *at = malloc(8 * n_addresses);
  if (fread(arena, 1, size, stdin) != size) return 2;
  for (int64_t i = 0; i < n_addresses; i++) at[i] = word();
  for (int64_t i = 0; i < n_addresses; i++) *(int64_t *)(arena + at[i]) += (int64_t)arena;
  for (int64_t i = 0; i < n_calls; i++) {
    int64_t which = word(), header = word(), args = word(), n_chunks = word();
    for (int64_t c = 0; c < n_chunks; c++)
      kernels[which]((int64_t)arena + header, (int64_t)arena + args, c, 0);
  }
  for (int64_t i = 0; i < n_addresses; i++) *(int64_t *)(arena + at[i]) -= (int64_t)arena;
  return fwrite(arena, 1, size, stdout) != size;
}
"""


@dataclass
class At:
    """An address in the arena."""

    offset: int


@dataclass
class Arena:
    """Memory that kernels work on, wherever it lies, and the calls to make in it."""

    data: bytearray = field(default_factory=bytearray)
    addresses: list[int] = field(default_factory=list)  # where the data holds addresses
    scratch: list[slice] = field(default_factory=list)  # what kernels may leave as they like
    # Kernel, header, args, chunks.
    calls: list[tuple[str, int, int, int]] = field(default_factory=list)

    def put(self, array: np.ndarray) -> At:
        at = At(len(self.data))
        self.data += array.tobytes()
        self.data += bytes(-len(self.data) % 64 + 4096)  # prefetches and tails
        return at

    def room(self, n_bytes: int) -> At:
        return self.put(np.zeros(n_bytes, np.uint8))

    def scratch_room(self, n_bytes: int) -> At:
        at = self.room(n_bytes)
        self.scratch.append(slice(at.offset, at.offset + n_bytes))
        return at

    def words(self, prefix: str, n: int, **values: int | At) -> At:
        """Argument words by their names in the layout."""
        words = np.zeros(n, np.int64)
        places = {NAMES[f"{prefix}_{name}"] // 8: v for name, v in values.items()}
        for i, value in places.items():
            words[i] = value.offset if isinstance(value, At) else value
        at = self.put(words)
        self.addresses += [at.offset + 8 * i for i, v in places.items() if isinstance(v, At)]
        return at

    def call(self, name: str, header: At, args: At, n_chunks: int) -> None:
        self.calls.append((name, header.offset, args.offset, n_chunks))

    def run_here(self) -> np.ndarray:
        memory = native.huge(len(self.data))
        memory[:] = np.frombuffer(self.data, np.uint8)
        base = memory.ctypes.data
        for at in self.addresses:
            memory[at : at + 8].view(np.int64)[0] += base
        for name, header, args, n_chunks in self.calls:
            kernel = ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * 4)(native.address(name))
            for chunk in range(n_chunks):
                kernel(base + header, base + args, chunk, 0)
        for at in self.addresses:
            memory[at : at + 8].view(np.int64)[0] -= base
        return memory

    def run_emulated(self, driver: Path) -> np.ndarray:
        parts = [[len(self.data), len(self.addresses), len(self.calls)], self.addresses]
        calls = [[KERNELS.index(name), *rest] for name, *rest in self.calls]
        head, addresses, steps = (np.array(part, np.int64).tobytes() for part in (*parts, calls))
        done = subprocess.run(
            [QEMU, "-cpu", "max", driver],
            input=head + self.data + addresses + steps,
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return np.frombuffer(done.stdout, np.uint8)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of plain object files, by family."""
    folders = {}
    for family in FAMILIES:
        folder = folders[family] = tmp_path_factory.mktemp(family)
        target = Target.any(family, "aarch64")
        for name, data in build_objects(folder / "cache", KERNELS, target, None).items():
            (folder / f"{name}.o").write_bytes(data)
    return folders


@pytest.fixture(scope="module")
def drivers(objects: dict[str, Path]) -> dict[str, Path]:
    """Programs that run calls on an arena, by family."""
    text = DRIVER % {
        "declarations": "\n".join(f"kernel {symbol(name)};" for name in KERNELS),
        "kernels": ", ".join(symbol(name) for name in KERNELS),
    }
    for folder in objects.values():
        (folder / "driver.c").write_text(text)
        files = [str(path) for path in folder.glob("*.o")]
        command = [GCC, "-O1", "-static", "-o", str(folder / "driver"), str(folder / "driver.c")]
        subprocess.run([*command, *files], check=True, timeout=120)
    return {family: folder / "driver" for family, folder in objects.items()}


@pytest.fixture(params=FAMILIES)
def driver(request: pytest.FixtureRequest, drivers: dict[str, Path]) -> Path:
    return drivers[request.param]


def same_here_and_emulated(arena: Arena, driver: Path) -> np.ndarray:
    here, there = arena.run_here(), arena.run_emulated(driver).copy()
    for part in arena.scratch:
        here[part], there[part] = 0, 0
    assert np.array_equal(here, there)
    return here


@pytest.mark.parametrize("name", [n for n in TYPES if FORMATS[n].activation != "f32"])
def test_neon_multiplies_with_sdot(objects: dict[str, Path], name: str) -> None:
    command = [OBJDUMP, "-d", str(objects["neon"] / f"matmul.{name}.o")]
    assert subprocess.run(command, capture_output=True, text=True).stdout.count("sdot\t") >= 16


@pytest.mark.parametrize("n", [1, 2, 3, 4, N_TOKENS])
@pytest.mark.parametrize("name", TYPES)
def test_matmul(driver: Path, name: str, n: int) -> None:
    rng = np.random.default_rng(1)
    arena, form = Arena(), FORMATS[name]
    header = arena.words("H", layout.HEADER_WORDS, ROWS=n, WANTED_ROWS=n)
    source = arena.put(random_rows(name, N_ROWS, N_COLS))
    n_blocks = N_COLS // form.block
    packed = arena.room(packed_bytes(name, N_ROWS, N_COLS))
    pack = arena.words(
        "PACK", 5, SRC=source, DST=packed, N_ROWS=N_ROWS, N_BLOCKS=n_blocks, PER_CHUNK=2
    )
    arena.call(f"pack.{name}", header, pack, -(-N_ROWS // 16))
    floats = arena.put(rng.standard_normal((n, N_COLS), np.float32))
    x, x_row_bytes = floats, 4 * N_COLS
    if form.activation != "f32":
        kind = form.activation.upper()
        block_bytes = getattr(layout, f"{kind}_BYTES")
        x_row_bytes = N_COLS // int(kind[1:]) * block_bytes
        x = arena.room(n * x_row_bytes)
        quantise = arena.words("QUANTISE", 12, X=floats, STRIDE=4 * N_COLS, DIM=N_COLS)
        place = quantise.offset + layout.QUANTISE_SINK + getattr(layout, f"SINK_{kind}")
        arena.data[place : place + 8] = np.int64(x.offset).tobytes()
        arena.addresses.append(place)
        arena.call("quantise", header, quantise, n)
    out = arena.room(n * 4 * N_ROWS)
    matmul = arena.words(
        "MATMUL", layout.MATMUL_BOUNDS // layout.WORD + len(BOUNDS), W=packed,
        N_BLOCKS=n_blocks, X=x, OUT=out,
        STRIDE=4 * N_ROWS, X_ROW_BYTES=x_row_bytes,
        BIAS=arena.put(rng.standard_normal(N_ROWS, np.float32)),
        RESIDUAL=arena.put(rng.standard_normal((n, N_ROWS), np.float32)),
        SCRATCH=arena.scratch_room(layout.MATMUL_SCRATCH_BYTES),
    )  # fmt: skip
    at = matmul.offset + layout.MATMUL_BOUNDS
    arena.data[at : at + 8 * len(BOUNDS)] = np.array(BOUNDS, np.int64).tobytes()
    arena.call(f"matmul.{name}", header, matmul, len(BOUNDS) - 1)
    memory = same_here_and_emulated(arena, driver)
    y = memory[out.offset : out.offset + 4 * n * N_ROWS].view(np.float32)
    assert np.isfinite(y).all() and np.unique(y).size > y.size // 2


def left_in(arena: Arena, args: At, sink: int, out: At, stride: int) -> None:
    """Set a sink's words: float rows."""
    for place, value in ((layout.SINK_F32, out.offset), (layout.SINK_STRIDE, stride)):
        at = args.offset + sink + place
        arena.data[at : at + 8] = np.int64(value).tobytes()
    arena.addresses.append(args.offset + sink + layout.SINK_F32)


def test_norm_and_swiglu(driver: Path) -> None:
    rng = np.random.default_rng(2)
    arena, dim = Arena(), 576
    row = 4 * dim
    header = arena.words("H", layout.HEADER_WORDS, ROWS=N_TOKENS)
    x, up = (arena.put(3 * rng.standard_normal((N_TOKENS, dim), np.float32)) for _ in "xu")
    weight, out = arena.put(rng.standard_normal(dim, np.float32)), arena.room(N_TOKENS * row)
    eps = native.float_bits(1e-5)
    norm = arena.words("NORM", 16, X=x, STRIDE=row, WEIGHT=weight, EPS=eps, DIM=dim)
    left_in(arena, norm, layout.NORM_SINK, out, row)
    arena.call("norm", header, norm, N_TOKENS)
    swiglu = arena.words("SWIGLU", 16, GATE=out, UP=up, STRIDE=row, DIM=dim)
    left_in(arena, swiglu, layout.SWIGLU_SINK, arena.room(N_TOKENS * row), row)
    arena.call("swiglu", header, swiglu, N_TOKENS)
    same_here_and_emulated(arena, driver)


@pytest.mark.parametrize(("k_type", "v_type"), [("f16", "f16"), ("q8_0", "q4_0")])
def test_attention(driver: Path, k_type: KVType, v_type: KVType) -> None:
    """9 tokens behind 600 others, 6 heads over 2: two segments, masked and unmasked pages."""
    rng = np.random.default_rng(3)
    arena, n, n_heads, n_kv, dim, first = Arena(), 9, 6, 2, 64, 600
    n_pages = -(-(first + n) // layout.PAGE)
    cache = KV(n_kv, dim, dim, k_type=k_type, v_type=v_type)
    rows = rng.standard_normal((2, n_pages * layout.PAGE, n_kv, dim)).astype(np.float32)
    stored = [Quantised().stored(x, t) for x, t in zip(rows, (k_type, v_type), strict=True)]
    k_rows, v_rows = (each.reshape(n_pages, layout.PAGE, n_kv, -1) for each in stored)
    k_bytes, v_bytes = k_pages(k_rows, k_type), v_pages(v_rows, v_type)
    k, v = arena.put(k_bytes), arena.put(v_bytes)
    pages = arena.put(rng.permutation(n_pages).astype(np.int32))
    table = arena.words(
        "TABLE", layout.TABLE_BYTES // 8, PAGES=pages, SLOTS=n_pages, VISIBLE=1 << 20
    )
    n_segments = first // 512 + 1
    header = arena.words(
        "H", layout.HEADER_WORDS, ROWS=n, POS=arena.put(np.arange(first, first + n)),
        SEQ=arena.put(np.zeros(n, np.int32)), TABLES=table,
    )  # fmt: skip
    items = arena.room(attention_layout.items_bytes(n, n_segments))
    items_args = arena.words("ITEMS", 4, AT=items, MAX_SEGMENTS=n_segments)
    q = arena.put(rng.standard_normal((n, n_heads, dim), np.float32))
    row, out = 4 * n_heads * dim, arena.room(4 * n * n_heads * dim)
    args = arena.words(
        "ATTEND", 24, ITEMS=items, Q=q, Q_STRIDE=row, PINNED_Q=q, N_HEADS=n_heads, N_KV_HEADS=n_kv,
        SCALE=native.float_bits(0.125), K_BASE=k, K_PAGE_BYTES=k_bytes[0].nbytes, V_BASE=v,
        V_PAGE_BYTES=v_bytes[0].nbytes, K_ROOM=dim, V_ROOM=dim, V_DIM=dim,
        PARTS=arena.room(attention_layout.parts_bytes(n, n_heads, dim, dim, n_segments) + 4096),
    )  # fmt: skip
    left_in(arena, args, attention_layout.FOLD_SINK, out, row)
    arena.call("plan_attention", header, items_args, 1)
    n_items = 4  # two runs of rows in blocks of 16 positions, by two segments
    arena.call(attend_kernel(cache, has_cap=False), header, args, n_items * n_kv)
    arena.call(fold_kernel(cache, has_sinks=False), header, args, n)
    memory = same_here_and_emulated(arena, driver)
    assert memory[items.offset : items.offset + 8].view(np.int64) == n_items
    y = memory[out.offset : out.offset + n * row].view(np.float32)
    assert np.isfinite(y).all() and np.unique(y).size > y.size // 2


def test_experts(driver: Path) -> None:
    """5 rows, each to 2 of 4 experts."""
    rng = np.random.default_rng(4)
    arena, n, n_experts, n_used, dim, n_cols = Arena(), 5, 4, 2, 24, 256
    header = arena.words("H", layout.HEADER_WORDS, ROWS=n)
    routed, route_row = arena.room(32 * n), 32
    route = arena.words(
        "ROUTE", 14, X=arena.put(rng.standard_normal((n, 8), np.float32)), STRIDE=32,
        N_EXPERTS=n_experts, N_USED=n_used, N_GROUPS=1, N_GROUPS_USED=1, NORM=1,
        SCALE=native.float_bits(2.5), SCRATCH=arena.scratch_room(512),
    )  # fmt: skip
    left_in(arena, route, layout.ROUTE_SINK, routed, route_row)
    arena.call("route.softmax", header, route, n)
    found = arena.room(layout.dispatch_bytes(n_experts, n * n_used))
    dispatch = arena.words(
        "DISPATCH", 5, OUT=found, ROUTE=routed, STRIDE=route_row, N_USED=n_used,
        N_EXPERTS=n_experts,
    )  # fmt: skip
    arena.call("dispatch", header, dispatch, 1)

    row_bytes = n_cols // 32 * layout.A32_BYTES
    floats = arena.put(rng.standard_normal((n, n_cols), np.float32))
    x = arena.room(n * row_bytes)
    quantise = arena.words("QUANTISE", 12, X=floats, STRIDE=4 * n_cols, DIM=n_cols)
    place = quantise.offset + layout.QUANTISE_SINK + layout.SINK_A32
    arena.data[place : place + 8] = np.int64(x.offset).tobytes()
    arena.addresses.append(place)
    arena.call("quantise", header, quantise, n)

    def along(args: At) -> None:
        """Its first words: what dispatch left, chunks of an item, experts."""
        words = np.array([found.offset, 1, n_experts], np.int64)
        arena.data[args.offset : args.offset + 24] = words.tobytes()
        arena.addresses.append(args.offset)

    gathered = arena.room(n * n_used * row_bytes)
    gather = arena.words("GATHER", 8, X=x, DIM=n_cols, N_PARTS=1, OUT=gathered)
    along(gather)
    arena.call("gather.a32", header, gather, n_experts)  # all are chosen
    matrix = packed_bytes("q4_k", dim, n_cols)
    packed = arena.room(n_experts * matrix)
    source = arena.put(random_rows("q4_k", n_experts * dim, n_cols))
    pack = arena.words(
        "PACK", 5, SRC=source, DST=packed, N_ROWS=n_experts * dim, N_BLOCKS=1, PER_CHUNK=99
    )
    arena.call("pack.q4_k", header, pack, 1)
    y, row = arena.room(4 * n * n_used * dim), 4 * n_used * dim
    experts = arena.words(
        "EXPERTS", 16, W=packed, BYTES=matrix, N_BLOCKS=1, N_GROUPS=dim // 8, DIM=dim, X=gathered,
        X_ROW_BYTES=row_bytes, OUT=y, STRIDE=row, N_USED=n_used,
        SCRATCH=arena.scratch_room(layout.MATMUL_SCRATCH_BYTES),
    )  # fmt: skip
    along(experts)
    arena.call("experts.q4_k", header, experts, n_experts)
    out = arena.room(4 * n * dim)
    total = arena.words(
        "SUM", 10, X=y, STRIDE=row, ROUTE=routed, ROUTE_STRIDE=route_row, N_USED=n_used, DIM=dim
    )
    left_in(arena, total, layout.SUM_SINK, out, 4 * dim)
    arena.call("expert_sum", header, total, n)
    memory = same_here_and_emulated(arena, driver)
    assert memory[found.offset : found.offset + 8].view(np.int64)[0] == n_experts
    values = memory[out.offset : out.offset + 4 * n * dim].view(np.float32)
    assert np.isfinite(values).all() and np.unique(values).size > values.size // 2
