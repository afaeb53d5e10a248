"""The shim: CUDA C on the CPU, what it refuses, and what it finds that would fail on a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer import platform
from edgeinfer.errors import DeviceError
from edgeinfer.kernels.cuda.device import Bound
from edgeinfer.kernels.cuda.kernel import Kernel, Signature, Sources
from edgeinfer.kernels.cuda.shim import ShimDevice
from tests.shim import CHECKED, SANITIZERS, SEEDS, GuardedMemory, get, put, put_step, shim

ROOT = Path(__file__).resolve().parent.parent

Make = Callable[..., ShimDevice]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A shim with one kernel `k` of this text, loaded."""

    def make(text: str, **options: Any) -> ShimDevice:
        (tmp_path / "k.cu").write_text(f'#include "dev.cuh"\n{text}')
        device = shim(sources=[tmp_path], **options)
        device.load([Kernel.of("k")])
        return device

    return make


def run(
    device: ShimDevice, n_out: int, threads: int = 32, grid: Any = (1, 1, 1), **args: Any
) -> np.ndarray:
    """What kernel `k` leaves in `out`, n_out words."""
    out = put(device, np.zeros(n_out, np.int32))
    step = put_step(device, 1)
    device.launch(Kernel.of("k"), grid, threads, 0, {"step": step, "out": out, **args})
    return get(device, out, n_out, np.int32)


# -- the language --------------------------------------------------------------------------------


def test_threads_and_blocks_know_where_they_are(make: Make) -> None:
    device = make("""
EI_KERNEL(64) k(const Step* step, int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  out[block * blockDim.x + threadIdx.x] = 1000 * block + threadIdx.x;
}
""")
    expected = np.add.outer(1000 * np.arange(2 * 3 * 4), np.arange(64)).ravel()
    for device.seed in SEEDS:
        assert np.array_equal(run(device, 24 * 64, 64, (2, 3, 4)), expected)


def test_shuffles_and_votes(make: Make) -> None:
    device = make("""
EI_KERNEL(64) k(const Step* step, int* out) {
  const int lane = threadIdx.x % 32;
  const int mine = 100 + threadIdx.x;
  int* row = out + threadIdx.x * 10;
  row[0] = __shfl_sync(EI_ALL_LANES, mine, 5);
  row[1] = __shfl_sync(EI_ALL_LANES, mine, lane + 9, 8);
  row[2] = __shfl_up_sync(EI_ALL_LANES, mine, 3);
  row[3] = __shfl_down_sync(EI_ALL_LANES, mine, 3, 16);
  row[4] = __shfl_xor_sync(EI_ALL_LANES, mine, 20);
  row[5] = __shfl_xor_sync(EI_ALL_LANES, mine, 20, 8);
  row[6] = __ballot_sync(EI_ALL_LANES, lane % 3 == 0);
  row[7] = 2 * __any_sync(EI_ALL_LANES, lane == 31) + __all_sync(EI_ALL_LANES, lane < 31);
  row[8] = (int)(__shfl_xor_sync(EI_ALL_LANES, (long long)mine << 40, 1) >> 40);
  row[9] = (int)__shfl_xor_sync(EI_ALL_LANES, 0.5 * mine, 1);
}
""")
    lane, base = np.arange(32), np.array([100, 132])[:, None]
    other = {
        0: 0 * lane + 5,
        1: lane // 8 * 8 + (lane + 9) % 8,
        2: np.where(lane < 3, lane, lane - 3),
        3: np.where(lane % 16 + 3 < 16, lane + 3, lane),
        4: lane ^ 20,
        5: np.where((lane ^ 20) > (lane | 7), lane, lane ^ 20),
        8: lane ^ 1,
    }
    for device.seed in SEEDS:
        out = run(device, 640, 64).reshape(2, 32, 10)
        for i, source in other.items():
            assert np.array_equal(out[:, :, i], base + source), i
        assert (out[:, :, 6].view(np.uint32) == sum(1 << i for i in range(0, 32, 3))).all()
        assert (out[:, :, 7] == 2).all()
        assert np.array_equal(out[:, :, 9], (base + (lane ^ 1)) // 2)


def test_integers(make: Make) -> None:
    device = make("""
EI_KERNEL(32) k(const Step* step, int* out, const int* words) {
  const int a = words[2 * threadIdx.x], b = words[2 * threadIdx.x + 1];
  int* row = out + threadIdx.x * 4;
  row[0] = __dp4a(a, b, a);
  row[1] = __dp4a((unsigned)a, (unsigned)b, 7u);
  row[2] = __byte_perm(a, b, b >> 3);
  row[3] = 100 * __popc(a) + __clz(b);
}
""")
    words = np.random.default_rng(1).integers(-(2**31), 2**31, (32, 2)).astype(np.int32)
    a, b = words.T
    signed = words.view(np.int8).reshape(32, 2, 4).astype(np.int64)
    bytes_ = words.view(np.uint8).reshape(32, 8)
    digits = ((b >> 3)[:, None] >> np.arange(0, 16, 4)) & 7
    counts = [100 * f"{x & 0xFFFFFFFF:b}".count("1") + 32 - len(f"{y & 0xFFFFFFFF:b}")
              for x, y in words.tolist()]  # fmt: skip
    out = run(device, 128, words=put(device, words)).reshape(32, 4)
    assert np.array_equal(out[:, 0], ((signed[:, 0] * signed[:, 1]).sum(1) + a).astype(np.int32))
    unsigned = bytes_.astype(np.int64).reshape(32, 2, 4)
    assert np.array_equal(out[:, 1], (unsigned[:, 0] * unsigned[:, 1]).sum(1) + 7)
    expected = np.take_along_axis(bytes_, digits, 1).copy().view(np.int32).ravel()
    assert np.array_equal(out[:, 2], expected)
    assert np.array_equal(out[:, 3], counts)


def test_every_half_and_many_floats_convert_as_numpy_has_it(make: Make) -> None:
    device = make("""
EI_KERNEL(256) k(const Step* step, int* out, const uint16_t* halves, const float* floats, int n) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i < 65536) {
    out[i] = __float_as_int(ei_from_half(halves[i]));
  }
  out[65536 + i] = ei_to_half(floats[i]);
}
""")
    halves = np.arange(65536, dtype=np.uint16)
    # Every half, its neighbours in float, the middles between halves, and any floats at all.
    with np.errstate(all="ignore"):
        exact = halves.view(np.float16).astype(np.float32)
        middles = (exact[:-1].astype(np.float64) + exact[1:]) / 2
        near = [np.nextafter(exact, np.float32(x)) for x in (-np.inf, np.inf)]
        middles = np.append(middles, 65520).astype(np.float32)
        around = [np.nextafter(middles, np.float32(x)) for x in (-np.inf, np.inf)]
        any_ = np.random.default_rng(2).integers(0, 2**32, 1 << 17, np.uint32).view(np.float32)
        floats = np.concatenate([exact, *near, middles, *around, any_])
        rounded = floats.astype(np.float16)
    n = len(floats)
    assert n % 256 == 0
    args = {"halves": put(device, halves), "floats": put(device, floats), "n": n}
    out = run(device, 65536 + n, 256, (n // 256, 1, 1), **args)
    wide, narrow = out[:65536].view(np.float32), out[65536:].astype(np.uint16).view(np.float16)
    for got, expected, bits in ((wide, exact, np.uint32), (narrow, rounded, np.uint16)):
        is_nan = np.isnan(expected)
        assert np.array_equal(np.isnan(got), is_nan)
        assert np.array_equal(got.view(bits)[~is_nan], expected.view(bits)[~is_nan])


def test_floats_follow_ptx(make: Make) -> None:
    device = make("""
EI_KERNEL(32) k(const Step* step, float* out, const float* x) {
  const float a = x[2 * threadIdx.x], b = x[2 * threadIdx.x + 1];
  float* row = out + threadIdx.x * 5;
  row[0] = fmaxf(a, b);
  row[1] = fminf(a, b);
  row[2] = __int_as_float(__float2int_rn(a));
  row[3] = ei_byte_to_float(0x04fe0200u, threadIdx.x % 4);
  row[4] = ei_fma(a, b, -(a * b));
}
""")
    nan, inf = np.float32(np.nan), np.float32(np.inf)
    pairs = [(0.0, -0.0), (-0.0, 0.0), (nan, 1), (1, nan), (inf, -inf), (2.5, -3.5), (3e9, -3e9),
             (0.1, 0.3)]  # fmt: skip
    x = np.zeros((32, 2), np.float32)
    x[: len(pairs)] = pairs
    out = run(device, 160, x=put(device, x)).view(np.float32).reshape(32, 5)
    assert np.array_equal(
        out[:6, 0].view(np.uint32), np.array([0, 0, 1, 1, inf, 2.5], np.float32).view(np.uint32)
    )
    smaller = np.array([-0.0, -0.0, 1, 1, -inf, -3.5], np.float32)
    assert np.array_equal(out[:6, 1].view(np.uint32), smaller.view(np.uint32))
    assert out[:7, 2].view(np.int32).tolist() == [0, 0, 0, 1, 2**31 - 1, 2, 2**31 - 1]
    assert out[:4, 3].tolist() == [0, 2, 254, 4]
    exact = np.float64(x[7, 0]) * np.float64(x[7, 1])
    assert out[7, 4] == np.float32(exact - np.float64(x[7, 0] * x[7, 1])) != 0


def test_int8_tensor_cores_follow_the_fragments_of_ptx(make: Make) -> None:
    """A 16 x 32 row after row, B 32 x 8 column after column: PTX ISA, mma.m16n8k32."""
    device = make("""
EI_KERNEL(32) k(const Step* step, int* out, const int8_t* a, const int8_t* b) {
  const int lane = threadIdx.x;
  unsigned wide[4], narrow[2];
  int sum[4] = {1, 2, 3, 4}, half_sum[4] = {0, 0, 0, 0};
  for (int i = 0; i < 16; ++i) {
    const int row = lane / 4 + ((i / 4) % 2) * 8, column = lane % 4 * 4 + i % 4 + i / 8 * 16;
    ((int8_t*)wide)[i] = a[row * 32 + column];
  }
  for (int i = 0; i < 8; ++i) {
    const int row = lane % 4 * 4 + i % 4 + i / 4 * 16, column = lane / 4;
    ((int8_t*)narrow)[i] = b[column * 32 + row];
  }
  ei_mma_m16n8k32(sum, wide, narrow);
  const unsigned left[2] = {wide[0], wide[1]};
  ei_mma_m16n8k16(half_sum, left, narrow[0]);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    out[row * 8 + column] = sum[i] - i - 1;
    out[128 + row * 8 + column] = half_sum[i];
  }
}
""")
    rng = np.random.default_rng(3)
    a, b = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((16, 32), (8, 32)))
    for device.seed in SEEDS:
        out = run(device, 256, a=put(device, a), b=put(device, b)).reshape(2, 16, 8)
        assert np.array_equal(out[0], a.astype(np.int32) @ b.astype(np.int32).T)
        assert np.array_equal(out[1], a[:, :16].astype(np.int32) @ b[:, :16].astype(np.int32).T)


def test_atomics_and_dynamic_shared_memory(make: Make) -> None:
    device = make("""
EI_KERNEL(128) k(const Step* step, int* out) {
  EI_DYN_SHARED(int, counts);
  if (threadIdx.x < 4) {
    counts[threadIdx.x] = 0;
  }
  __syncthreads();
  atomicAdd(&counts[threadIdx.x % 4], (int)threadIdx.x);
  atomicMax(&out[4], (int)threadIdx.x);
  atomicMin(&out[5], -(int)threadIdx.x);
  atomicOr(&out[6], 1 << threadIdx.x % 32);
  if (atomicCAS(&out[7], 0, 5) == 0) {
    out[8] = atomicExch(&out[7], 9);
  }
  __syncthreads();
  if (threadIdx.x < 4) {
    out[threadIdx.x] = counts[threadIdx.x];
  }
}
""")
    sums = [sum(range(i, 128, 4)) for i in range(4)]
    for device.seed in SEEDS:
        out, step = put(device, np.zeros(9, np.int32)), put_step(device, 1)
        device.launch(Kernel.of("k"), (1, 1, 1), 128, 16, {"step": step, "out": out})
        assert get(device, out, 9, np.int32).tolist() == [*sums, 127, -127, -1, 9, 5]


def test_shared_memory_begins_as_no_number_in_every_block(make: Make) -> None:
    device = make("""
EI_KERNEL(32) k(const Step* step, float* out) {
  EI_SHARED(float, values, [2][32]);
  out[blockIdx.x * 32 + threadIdx.x] = values[1][threadIdx.x];
  values[1][threadIdx.x] = 1.0f;
}
""")
    assert np.isnan(run(device, 96, grid=(3, 1, 1)).view(np.float32)).all()


def test_an_abort_is_seen_by_all_threads_of_a_block(make: Make) -> None:
    device = make("""
EI_KERNEL(64) k(const Step* step, int* out) {
  if (ei_aborted(step)) {
    return;
  }
  out[threadIdx.x] = ei_rows(step, 0) * 10 + ei_rows(step, 1);
}
""")
    out, step = put(device, np.zeros(64, np.int32)), put_step(device, 3, 2)
    device.launch(Kernel.of("k"), (1, 1, 1), 64, 0, {"step": step, "out": out})
    assert (get(device, out, 64, np.int32) == 32).all()
    device.fill(out, 256)
    device.write_now(step + 12, 1)
    device.launch(Kernel.of("k"), (1, 1, 1), 64, 0, {"step": step, "out": out})
    assert not get(device, out, 64, np.int32).any()


# -- what would fail on a GPU --------------------------------------------------------------------

_REVERSE = """
EI_KERNEL(256) k(const Step* step, int* out) {
  EI_SHARED(int, values, [256]);
  values[threadIdx.x] = threadIdx.x;
  BARRIER
  out[threadIdx.x] = values[255 - threadIdx.x];
}
"""


@pytest.mark.parametrize("barrier", ["__syncthreads();", "__syncwarp();", ""])
def test_a_missing_barrier_is_found(make: Make, barrier: str) -> None:
    device, right = make(_REVERSE.replace("BARRIER", barrier)), np.arange(256)[::-1]
    for device.seed in (1, 7):
        assert np.array_equal(run(device, 256, 256), right) == (barrier == "__syncthreads();")


@pytest.mark.parametrize("wait", ["ei_copy_wait<1>();", "ei_copy_wait<2>();", ""])
def test_a_missing_wait_for_a_copy_is_found(make: Make, wait: str) -> None:
    device = make(f"""
EI_KERNEL(32) k(const Step* step, int* out, const uint4* x) {{
  EI_SHARED(uint4, values, [3][32]);
  for (int i = 0; i < 3; ++i) {{
    ei_copy_async<16>(&values[i][threadIdx.x], x + 32 * i + threadIdx.x);
    ei_copy_group();
  }}
  {wait}
  __syncthreads();
  ((uint4*)out)[threadIdx.x] = values[1][31 - threadIdx.x];
}}
""")
    x = np.arange(3 * 32 * 4, dtype=np.int32).reshape(3, 32, 4)
    out = run(device, 128, x=put(device, x)).reshape(32, 4)
    assert np.array_equal(out, x[1, ::-1] if "<1>" in wait else np.full((32, 4), -1))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "if (threadIdx.x == 5) {\n__syncthreads();\n}\n__syncthreads();",
            r"in block \(2, 0, 0\): thread \d+ waits at k.cu:\d, thread \d+ at k.cu:\d",
        ),
        (
            "if (threadIdx.x == 5) {\nreturn;\n}\n__syncwarp();",
            r"in block \(2, 0, 0\): 31 threads \(0 first\) wait for their warp at k.cu:8, "
            r"33 threads \(5 first\) ended",
        ),
        (
            "if (threadIdx.x < 32) {\n__syncthreads();\n} else {\n"
            "out[0] = __shfl_sync(EI_ALL_LANES, 1, threadIdx.x == 40);\n__syncthreads();\n}",
            r"thread \d+ waits at k.cu:6, thread \d+ at k.cu:9",
        ),
        (
            "out[0] = __shfl_sync(0xffffu, 1, 0);",
            r"a mask of some lanes .* in block \(2, 0, 0\): thread 0 at k.cu:5",
        ),
    ],
)  # fmt: skip
def test_divergence_is_told_by_block_and_thread(make: Make, body: str, said: str) -> None:
    device = make(f"""
EI_KERNEL(64) k(const Step* step, int* out) {{
  if (blockIdx.x == 2) {{
{body}
  }}
}}
""")
    with pytest.raises(DeviceError, match=said):
        run(device, 1, 64, (4, 1, 1))
    with pytest.raises(DeviceError, match=r"kernel k: .* in block \(2, 0, 0\)"):
        device.seed = 1
        run(device, 1, 64, (4, 1, 1))


def test_threads_that_ended_do_not_hold_up_a_barrier(make: Make) -> None:
    device = make("""
EI_KERNEL(64) k(const Step* step, int* out) {
  EI_SHARED(int, sum, [1]);
  if (threadIdx.x >= 32) {
    return;
  }
  sum[0] = 0;
  __syncthreads();
  atomicAdd(&sum[0], 1);
  __syncthreads();
  out[0] = sum[0];
}
""")
    for device.seed in SEEDS:
        assert run(device, 1, 64).tolist() == [32]


def test_shared_memory_has_ends(make: Make) -> None:
    text = """
EI_KERNEL(32) k(const Step* step, int* out) {
  EI_DYN_SHARED(int, values);
  values[threadIdx.x] = 1;
}
"""
    device = make(text)
    step = put_step(device, 1)
    args = {"step": step, "out": 0}
    device.launch(Kernel.of("k"), (1, 1, 1), 32, 128, args)
    with pytest.raises(DeviceError, match="0 bytes behind the 124 that the launch asked for"):
        device.launch(Kernel.of("k"), (1, 1, 1), 32, 124, args)
    with pytest.raises(ValueError, match="of shared memory, 0 to 101376"):
        device.launch(Kernel.of("k"), (1, 1, 1), 32, 101380, args)
    device = make(text.replace("DYN_SHARED(int, values)", "SHARED(int, values, [12289])"))
    with pytest.raises(DeviceError, match="49156 bytes, 49152 is the most, and 0 dynamic"):
        device.launch(Kernel.of("k"), (1, 1, 1), 32, 0, {"step": put_step(device, 1), "out": 0})


# -- arguments, memory, graphs -------------------------------------------------------------------

_TYPES = """
EI_KERNEL(32) k(const Step* step, int* out, long long a, unsigned b, float c, double d) {
  out[0] = (int)(a >> 32) + (int)b + (int)c + (int)d;
}
"""


def test_arguments_are_given_by_name_and_checked(make: Make) -> None:
    device = make(_TYPES)
    args: dict[str, Any] = {"a": 7 << 32, "b": np.uint8(20), "c": 300, "d": np.float32(4000)}
    assert run(device, 1, **args)[0] == 4327
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"a": 1.0}, TypeError, "a of kernel k is long long, not 1.0"),
        ({"b": -1}, ValueError, "b of kernel k is unsigned, not -1: it is out of range"),
        ({"a": 1 << 63}, ValueError, "out of range"),
        ({"c": 1e39}, ValueError, "c of kernel k is float, not 1e.39: it is out of range"),
        ({"c": "1"}, TypeError, "c of kernel k is float, not '1'"),
        ({"d": True}, TypeError, "d of kernel k is double, not True"),
        ({"out": 1.0}, TypeError, r"out of kernel k is int\*, not 1.0"),
        ({"out": 4096}, DeviceError, "0 bytes at 0x1000 are not all reserved"),
        ({"e": 1, "f": 2}, TypeError, "takes step, out, .*; missing: none, unknown: e, f"),
    ]
    for changed, error, said in wrong:
        with pytest.raises(error, match=said):
            run(device, 1, **{**args, **changed})
    del args["c"]
    with pytest.raises(TypeError, match="missing: c, unknown: none"):
        run(device, 1, **args)
    assert np.isinf(Signature.parse("k", _TYPES).pack(
        {"step": 0, "out": 0, "a": 0, "b": 0, "c": -np.inf, "d": 0})[4])  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("EI_KERNEL(32) other(const Step* step) {\n}", "kernels it declares: other"),
        ("__global__ void k(const Step* step) {\n}", "kernels it declares: none"),
        ("// EI_KERNEL(32) k(const Step* step) {\n}", "kernels it declares: none"),
        ("EI_KERNEL(32) k(int n) {\n}", "first parameter must be `const Step. step`"),
        ("EI_KERNEL(32) k(const Step* step, short n) {\n}", "`short n` is neither"),
        ("EI_KERNEL(32) k(const Step* step, int) {\n}", "`int` is neither"),
        ("EI_KERNEL(32) k(const Step* step) {\n  none();\n}", r"can't compile k: .*k.cu:3"),
        ("// Variants: A = 1 2\nEI_KERNEL(32) k(const Step* step) {\n}", r"such as k\(A=1\)"),
        ("// Variants: A\nEI_KERNEL(32) k(const Step* step) {\n}", "`A` is not `MACRO = value"),
    ],
)
def test_what_is_no_kernel_is_refused(make: Make, text: str, said: str) -> None:
    with pytest.raises(DeviceError, match=said):
        make(text)


def test_variants_are_listed_in_the_text(tmp_path: Path) -> None:
    (tmp_path / "k.cu").write_text("""// Adds.
// Variants: TYPE = A B; N = 1
//   2
// Variants: TYPE = A; N = 4
// Not this: N = 8
#include "k.cuh"
EI_KERNEL(32 * N) k(const Step* step,
                    float* x /* , int y */) {
}
""")
    (tmp_path / "k.cuh").write_text("#pragma once\nint first;\n")
    sources = Sources(tmp_path)
    expected = [("A", 1), ("A", 2), ("B", 1), ("B", 2), ("A", 4)]
    assert sources.variants("k") == [Kernel.of("k", TYPE=t, N=n) for t, n in expected]
    signature = sources.signature(Kernel.of("k", TYPE="C", N=1))  # the list is of the usual ones
    assert [p.name for p in signature.parameters] == ["step", "x"]
    assert sources.flat("k.cu").count("int first;") == 1
    assert str(Kernel.of("k", N=4, TYPE="A")) == "k(N=4, TYPE=A)"
    with pytest.raises(ValueError, match="neither a name nor an integer"):
        Kernel.of("k", TYPE="A B")
    with pytest.raises(DeviceError, match="there is no none.cu in"):
        sources.variants("none")


def test_launches_are_checked(make: Make) -> None:
    device = make("""
EI_KERNEL(64) k(const Step* step) {
}
""")
    args: dict[str, Any] = {"step": put_step(device, 1)}
    kernel = Kernel.of("k")
    for grid, threads, shared, said in [
        ((0, 1, 1), 32, 0, "a grid of"),
        ((1, 65536, 1), 32, 0, "a grid of"),
        ((1, 1, 1), 48, 0, "48 threads"),
        ((1, 1, 1), 96, 0, "96 threads, and it is declared for 64"),
        ((1, 1, 1), 32, 100 << 10, "102400 bytes of shared memory"),
    ]:
        with pytest.raises(ValueError, match=said):
            device.launch(kernel, grid, threads, shared, args)
    with pytest.raises(ValueError, match="arguments of kernel other are given to kernel k"):
        device.launch(kernel, (1, 1, 1), 32, 0, Bound(Kernel.of("other"), None))
    with pytest.raises(DeviceError, match="kernel other is not loaded"):
        device.bind(Kernel.of("other"), {})


def test_memory_is_reserved_and_checked() -> None:
    device = shim(memory_bytes=1 << 20)
    address = device.reserve(1000)
    assert address % 256 == 0 and device.memory() == ((1 << 20) - 1000, 1 << 20)
    data = np.arange(250, dtype=np.int32)
    assert (get(device, address, 250, np.int32) == -1).all()  # of any content
    device.write(address, data)
    device.copy(address + 500, address, 500)
    device.fill(address, 4, 1)
    expected = np.concatenate([[0x01010101], data[1:125], data[:125]])
    assert np.array_equal(get(device, address, 250, np.int32), expected)
    with pytest.raises(MemoryError, match="1047577 bytes are not free"):
        device.reserve((1 << 20) - 999)
    for call in (
        lambda: device.write(address + 4, data),
        lambda: device.fill(address - 1, 1),
        lambda: device.copy(address, address + 996, 8),
        lambda: device.write_now(address + 998, 1),
        lambda: device.free(address + 256),
    ):
        with pytest.raises(DeviceError, match="reserved"):
            call()
    with pytest.raises(ValueError, match="contiguous and writable"):
        device.read(address, np.zeros((4, 4), np.int32).T)
    device.free(address)
    with pytest.raises(DeviceError, match="reserved"):
        device.write(address, data)


def test_a_graph_does_later_what_was_recorded(make: Make) -> None:
    device = make("""
EI_KERNEL(32) k(const Step* step, int* out) {
  if (threadIdx.x == 0) {
    out[0] += ei_rows(step, 0);
  }
}
""")
    step, out = put_step(device, 5), put(device, np.zeros(2, np.int32))
    args = device.bind(Kernel.of("k"), {"step": step, "out": out})
    fetched = device.host(4)

    def body() -> None:
        device.launch(Kernel.of("k"), (1, 1, 1), 32, 0, args)
        device.copy(out + 4, out, 4)
        device.fetch(out, fetched)
        device.fill(out, 4)

    graph = device.record(body)
    assert not get(device, out, 2, np.int32).any()
    for n_rows in (5, 7):
        before = device.mark()
        device.write(step, np.array([n_rows], np.int32))
        graph.replay()
        after = device.mark()
        after.wait()
        assert after.seconds_since(before) > 0
        assert fetched.view(np.int32)[0] == n_rows
        assert get(device, out, 2, np.int32).tolist() == [0, n_rows]
    with pytest.raises(DeviceError, match="write can't be recorded"):
        device.record(lambda: device.write(step, fetched))
    device.write(step, fetched)  # nothing is recorded any more


# -- order ---------------------------------------------------------------------------------------

_SLOW = """
EI_KERNEL(32) k(const Step* step, int* out, int n) {
  for (int i = 0; i < n; ++i) {
    atomicAdd(out, __shfl_sync(EI_ALL_LANES, 1, 0));
    if (*(const volatile int*)&step->abort) {
      return;
    }
  }
}
"""


def test_a_device_goes_on_while_its_host_does(make: Make) -> None:
    device = make(_SLOW, runs_at_once=False)
    step, out = put_step(device, 1), put(device, np.zeros(1, np.int32))
    data = np.array([1], np.int32)
    for _ in range(3):
        args = {"step": step, "out": out, "n": 1000}
        device.launch(Kernel.of("k"), (1, 1, 1), 32, 0, args)
        before = device.mark()
        device.write(out, data)
        data[0] += 1  # was copied
        fetched = device.host(4)
        device.fetch(out, fetched)
        after = device.mark()
        assert not fetched.any()
        after.wait()
        assert fetched.view(np.int32)[0] == data[0] - 1
        assert after.seconds_since(before) > 0
    args["n"] = 2**31 - 1  # minutes
    device.launch(Kernel.of("k"), (1, 1, 1), 32, 0, args)
    device.write_now(step + 12, 1)
    assert 0 < get(device, out, 1, np.int32)[0] < 2**31 - 1
    device.close()
    with pytest.raises(DeviceError, match="the device is closed"):
        device.mark()


def test_memory_outlives_what_runs_on_it_when_a_device_is_forgotten(make: Make) -> None:
    device = make(_SLOW, runs_at_once=False)
    args = {"step": put_step(device, 1), "out": device.reserve(4), "n": 20000}
    device.launch(Kernel.of("k"), (1, 1, 1), 32, 0, args)
    thread = device._stream._thread
    del device  # waits
    assert not thread.is_alive()


def test_what_fails_is_told_by_everything_after(make: Make) -> None:
    device = make("""
EI_KERNEL(32) k(const Step* step) {
  if (threadIdx.x == 3) {
    __syncwarp();
  }
}
""", runs_at_once=False)  # fmt: skip
    out = device.reserve(4)
    device.launch(Kernel.of("k"), (1, 1, 1), 32, 0, {"step": put_step(device, 1)})
    late = device.mark()
    for call in (
        late.wait,
        device.mark,
        lambda: device.fill(out, 4),
        lambda: get(device, out, 1, np.int32),
        lambda: device.free(out),
    ):
        with pytest.raises(DeviceError, match="kernel k: divergent threads in block"):
            call()
    device.close()


# -- memory and arithmetic that sanitizers watch -------------------------------------------------


def test_reads_up_to_the_end_of_guarded_memory(make: Make) -> None:
    device = make(_SUM, allocate=GuardedMemory)
    x = np.arange(1001, dtype=np.int32)
    assert run(device, 1, x=put(device, x), n=1001)[0] == x.sum()


_SUM = """
EI_KERNEL(32) k(const Step* step, int* out, const int* x, int n) {
  for (int i = threadIdx.x; i < n; i += 32) {
    atomicAdd(out, x[i]);
  }
}
"""

_BEYOND = """
import sys, numpy as np
from pathlib import Path
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.cuda.shim import ShimDevice
from tests.shim import GuardedMemory, put, put_step
folder, *flags = sys.argv[1:]
device = ShimDevice(sources=[Path(folder)], flags=flags, allocate=GuardedMemory)
device.load([Kernel.of("k")])
x = put(device, np.zeros(1000, np.int32))
args = {"step": put_step(device, 1), "out": put(device, np.zeros(1, np.int32)), "x": x, "n": 1004}
device.launch(Kernel.of("k"), (1, 1, 1), 32, 0, args)
device.mark().wait()
"""


def beyond(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """A process in which kernel `k` of a folder is told of more than there is."""
    command = [sys.executable, "-c", _BEYOND, str(folder), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_reading_behind_guarded_memory_ends_the_process(make: Make, tmp_path: Path) -> None:
    make(_SUM)
    assert beyond(tmp_path, "-O1").returncode < 0


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("values[x[0] + n] = 1;", r"k.cu:5:\d+: runtime error: index 1004 out of bounds"),
        ("out[0] = *(const int*)((const char*)x + 1);", "k.cu:5:.*load of misaligned address"),
        ("out[0] = 1 << n;", "k.cu:5:.*shift exponent 1004 is too large"),
        ("out[0] = (int)(3e9f * n);", "k.cu:5:.*outside the range of representable values"),
    ],
)
def test_sanitizers_find_what_is_undefined(
    make: Make, tmp_path: Path, statement: str, said: str
) -> None:
    text = f"""
EI_KERNEL(32) k(const Step* step, int* out, const int* x, int n) {{
  EI_SHARED(int, values, [32]);
  {statement}
}}
"""
    (tmp_path / "k.cu").write_text(f'#include "dev.cuh"\n{text}')
    done = beyond(tmp_path, *SANITIZERS)
    assert done.returncode != 0
    assert re.search(said, done.stderr), done.stderr


def run_checked(*tests: str) -> None:
    """Tests whose kernels are watched by sanitizers and whose memory ends where nothing is."""
    shim()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        env={**os.environ, CHECKED: "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_some_tests_of_kernels_pass_under_sanitizers_and_with_guarded_memory() -> None:
    """One of each kind: rows, pages, states, and a product through copies to shared memory."""
    some = (
        "ops.py::test_select", "ops.py::test_store", "recurrent.py::test_conv",
        "matmul.py::test_matmul_by_tensor_cores[Q5_0]",
    )  # fmt: skip
    run_checked(*(f"tests/test_cuda_{each}" for each in some))


@pytest.mark.slow
def test_tests_of_kernels_pass_under_sanitizers_and_with_guarded_memory() -> None:
    files = {path for path in Path(__file__).parent.glob("test_cuda_*.py")}
    files -= {Path(__file__), Path(__file__).with_name("test_cuda_compile.py")}
    run_checked(*map(str, sorted(files)))


# -- compilers and caches ------------------------------------------------------------------------


def test_kernels_are_compiled_once_and_found_again(make: Make, tmp_path: Path) -> None:
    text = """
EI_KERNEL(32) k(const Step* step, int* out) {
  out[threadIdx.x] = VALUE;
}
"""
    (tmp_path / "k.cu").write_text('// Variants: VALUE = 1 2 3\n#include "dev.cuh"\n' + text)
    kernels = [Kernel.of("k", VALUE=value) for value in (1, 2, 3)]
    folder = tmp_path / "cache"
    told: list[tuple[int, int]] = []
    for n_compiled in (3, 0):
        told.clear()
        device = shim(folder, sources=[tmp_path])
        device.load(kernels, lambda done, total, kernel: told.append((done, total)))
        assert told == [(done, n_compiled) for done in range(n_compiled)]
        for value, kernel in enumerate(kernels, 1):
            out = device.reserve(128)
            device.launch(kernel, (1, 1, 1), 32, 0, {"step": put_step(device, 1), "out": out})
            assert (get(device, out, 32, np.int32) == value).all()
    damaged = next(folder.glob("k.VALUE=2-*.so"))
    data = damaged.read_bytes()
    damaged.unlink()  # the old file is mapped into this process
    damaged.write_bytes(data[:-1])
    device = shim(folder, sources=[tmp_path])
    device.load(kernels, lambda done, total, kernel: told.append((done, total)))
    assert told == [(0, 1)]


def test_what_others_can_write_is_not_taken(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(DeviceError, match="others can write to .* EDGEINFER_HOME"):
        shim(tmp_path)


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert platform.find_program("g++") is None
    with pytest.raises(DeviceError, match=r"there is none in PATH: install g\+\+"):
        ShimDevice()
