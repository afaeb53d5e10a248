"""CUDA kernels become machine code without a GPU: NVRTC, its processes, and the cache of cubins."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from edgeinfer import platform
from edgeinfer.errors import DeviceError
from edgeinfer.kernels.cuda import cubins as cubins_module
from edgeinfer.kernels.cuda.compiler import Compiler
from edgeinfer.kernels.cuda.cubins import Cubins
from edgeinfer.kernels.cuda.kernel import Kernel, Sources
from edgeinfer.kernels.cuda.nvrtc import Cubin, Job, Nvrtc, compile_all
from edgeinfer.platform import NvrtcLibrary
from tests import cuda_registers
from tests.cuda_registers import ALL, USUAL, Kernels

_OLDEST = 61
_NO_DRIVER = 62  # has run none since CUDA 10.2


def library(cuda: int) -> NvrtcLibrary:
    """NVRTC of a CUDA; the test is skipped without it."""
    found = [each for each in platform.nvrtc_libraries() if each.cuda == cuda]
    if not found:
        package = "nvidia-cuda-nvrtc" + ("-cu12" if cuda == 12 else "")
        pytest.skip(f"no NVRTC of CUDA {cuda}: pip install {package}")
    return found[0]


# All that dev.cuh has, so that every line of PTX is assembled.
_EVERYTHING = """#include "dev.cuh"
EI_KERNEL(64) k(const Step* step, float* out, const uint4* x, unsigned n) {
  EI_SHARED(float, all, [64]);
  EI_DYN_SHARED(float, more);
  if (ei_aborted(step) || blockIdx.x >= ei_rows(step, 1)) {
    return;
  }
  const uint4 a = ei_stream(x + threadIdx.x);
  const uint2 b = ei_stream((const uint2*)x + threadIdx.x);
  const unsigned words[4] = {a.x, a.y, a.z, a.w}, half[2] = {a.x, a.y};
  const unsigned right[2] = {b.x, b.y};
  int sum[4] = {0, 1, 2, 3};
  ei_mma_m16n8k32(sum, words, right);
  ei_mma_m16n8k16(sum, half, ei_stream((const unsigned*)x));
  float sums[4] = {};
  ei_mma_halves(sums, words, right);
  sum[0] ^= (int)ei_to_halves(sums[0], sums[3]);
  float y = ei_byte_to_float(a.x, 3) + ei_from_half(ei_to_half(ei_to_float(sum[0] ^ sum[3])));
  y = ei_fma(y, ei_div(y, 3.0f), ei_sqrt(y)) + ei_rint(y);
  const double z = ei_fma((double)y, ei_div((double)y, 3.0), ei_sqrt((double)y));
  all[threadIdx.x] = ei_sum32(y) + ei_max32(y) + ei_sum32(sum[1]) + (float)ei_rint(z);
  more[threadIdx.x] = __dp4a((int)a.x, (int)a.y, sum[2]);
  ei_copy_async<4>(more + threadIdx.x, x);
  ei_copy_async<16>(more + 64 + 4 * threadIdx.x, x);
  ei_copy_group();
  ei_copy_wait<0>();
  __syncthreads();
  out[threadIdx.x] = all[63 - threadIdx.x] + more[63 - threadIdx.x];
}
"""


# 64 registers are left to a thread of 1,024.
_MANY_VALUES = """
extern "C" __global__ void __launch_bounds__(1024) k(float* x) {
  float values[100];
  for (int i = 0; i < 100; ++i) {
    values[i] = x[i * 1024 + threadIdx.x];
  }
  __syncthreads();
  for (int i = 0; i < 100; ++i) {
    x[i * 1024 + threadIdx.x] = values[99 - i];
  }
}
"""


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    """Kernel `k`."""
    (tmp_path / "k.cu").write_text(_EVERYTHING)
    return Sources(tmp_path)


@pytest.mark.parametrize("cuda", [12, 13])
def test_all_of_dev_cuh_compiles_for_every_architecture(
    sources: Sources, cuda: int, tmp_path: Path
) -> None:
    path = library(cuda).path
    architectures = [arch for arch in Nvrtc(path).architectures if arch >= _OLDEST]
    assert set(USUAL[cuda]) <= set(architectures)
    jobs = [Cubins(tmp_path, sources, arch, cuda).job(Kernel.of("k")) for arch in architectures]
    for arch, cubin in zip(architectures, compile_all(path, jobs), strict=True):
        assert cubin.data.startswith(b"\x7fELF") and b"ei_kernel_k" in cubin.data
        assert cubin.usage.registers < 64, arch
        assert cubin.usage[1:] == (0, 0, 256), arch


@pytest.mark.parametrize("cuda", [12, 13])
def test_changed_kernels_spill_nothing_and_take_no_more_registers(cuda: int) -> None:
    library(cuda)
    kernels = Kernels(Sources(), cuda_registers.read())
    wrong = kernels.objections(kernels.changed(), cuda, USUAL[cuda])
    assert not wrong, "\n".join(["python -m tests.cuda_registers writes the table:", *wrong])


@pytest.mark.slow
@pytest.mark.parametrize("cuda", [12, 13])
def test_no_architecture_that_a_compiler_knows_is_left_out(cuda: int) -> None:
    known = {arch for arch in Nvrtc(library(cuda).path).architectures if arch >= _OLDEST}
    assert known - {_NO_DRIVER} <= set(ALL[cuda])


@pytest.mark.slow
@pytest.mark.parametrize(("cuda", "arch"), [(cuda, arch) for cuda in ALL for arch in ALL[cuda]])
def test_all_kernels_compile_for_every_architecture_of_our_users(cuda: int, arch: int) -> None:
    if arch not in Nvrtc(library(cuda).path).architectures:
        pytest.skip(f"this NVRTC of CUDA {cuda} does not know sm_{arch}")
    kernels = Kernels(Sources(), cuda_registers.read())
    wrong = kernels.objections(kernels.all, cuda, [arch])
    assert not wrong, "\n".join(wrong)


def early(kernels: Sequence[Kernel], arch: int, folder: Path) -> list[tuple[Job, Job]]:
    """Kernels as they are, and as they are where they may begin early."""
    sources = Sources()
    each = [Cubins(folder, sources, arch, 12, begins_early=is_early) for is_early in (False, True)]
    return [(each[0].job(kernel), each[1].job(kernel)) for kernel in kernels]


def test_a_kernel_that_may_begin_early_waits_before_anything_else(tmp_path: Path) -> None:
    """Every kernel; nothing else of its text changes, nor anything on a GPU that has no such."""
    sources, path = Sources(), library(12).path
    kernels = [sources.variants(name)[0] for name in sources.names()]
    for plain, waiting in early(kernels, 90, tmp_path):
        head, body = waiting.text.split(" ei_wait_for_predecessor();")
        assert (head + body).endswith(plain.text) and re.search(r"\n\S[^;}]*\{$", head)
    select = Kernel.of("select")
    for arch, is_changed in ((89, False), (90, True)):
        plain_cubin, early_cubin = compile_all(path, early([select], arch, tmp_path)[0])
        assert (plain_cubin.data != early_cubin.data) == is_changed
        assert early_cubin.usage[1:3] == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("cuda", "arch"), [(12, 90), (12, 100), (13, 110), (12, 120)])
def test_kernels_that_may_begin_early_spill_nothing(tmp_path: Path, cuda: int, arch: int) -> None:
    sources = Sources()
    kernels = [kernel for name in sources.names() for kernel in sources.variants(name)]
    jobs = [waiting for _, waiting in early(kernels, arch, tmp_path)]
    usages = [cubin.usage for cubin in compile_all(library(cuda).path, jobs)]
    wrong = [f"{job.name}: {u}" for job, u in zip(jobs, usages, strict=True) if any(u[1:3])]
    assert not wrong, "\n".join(wrong)


def test_the_table_is_of_the_kernels_that_there_are() -> None:
    kernels = Kernels(Sources(), cuda_registers.read())
    assert sorted(kernels.table) == sorted(kernels.keys)
    usual = {str(arch) for architectures in USUAL.values() for arch in architectures}
    assert not [k for k, entry in kernels.table.items() if not usual <= entry["registers"].keys()]


def test_what_a_kernel_takes_is_held_against_the_table(sources: Sources, tmp_path: Path) -> None:
    job = Cubins(tmp_path, sources, 90, 12).job(Kernel.of("k"))
    spilling = job._replace(text=_MANY_VALUES)
    [fine, spilt] = compile_all(library(12).path, [job, spilling])
    usage, kernel = fine.usage, Kernel.of("k")
    kernels = Kernels(sources, {"k": {"key": "old", "registers": {"90": usage.registers}}})
    assert kernels.objection(kernel, 12, 90, usage) is None
    assert spilt.usage.spilled_bytes > 0
    for each, said in [
        (spilt.usage, f"{spilt.usage.spilled_bytes} spilled"),
        (usage._replace(registers=200), "takes 200 registers"),
        (usage._replace(shared_bytes=49153), "49153 bytes of static shared memory"),
    ]:
        assert said in (kernels.objection(kernel, 12, 90, each) or "")
    with pytest.raises(ValueError, match="no registers are told of"):
        assert Cubin(b"", "warning").usage


def test_a_kernel_has_changed_when_more_than_its_comments_has(
    sources: Sources, tmp_path: Path
) -> None:
    def is_changed() -> bool:
        return Kernel.of("k") in Kernels(sources, {"k": {"key": key, "registers": {}}}).changed()

    key = Kernels(sources, {}).keys["k"]
    assert not is_changed()
    (tmp_path / "k.cu").write_text("// Says why.\n" + _EVERYTHING.replace(";\n", "; // so\n"))
    assert not is_changed()
    (tmp_path / "k.cu").write_text(_EVERYTHING.replace("63 -", "62 -"))
    assert is_changed()


def test_cubins_are_compiled_once_and_found_again(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(12)
    kernel, folder = Kernel.of("k"), tmp_path / "cache"
    told: list[tuple[int, int, str]] = []
    first = Cubins(folder, sources, 90, 12).load([kernel], lambda *args: told.append(args))
    assert told == [(0, 1, "k")]
    with monkeypatch.context() as without:
        without.setattr(platform, "nvrtc_libraries", list)
        for cuda in (12, 13):  # a driver also takes what an older CUDA has made
            assert Cubins(folder, sources, 90, cuda).load([kernel]) == first
        with pytest.raises(DeviceError, match="pip install --upgrade nvidia-cuda-nvrtc-cu12$"):
            Cubins(folder, sources, 87, 12).load([kernel])
        monkeypatch.setattr(cubins_module, "PACKAGED", folder)
        assert Cubins(tmp_path / "other", sources, 90, 12).load([kernel]) == first
    [path] = folder.glob("k-*.cuda12.90.cubin")
    path.write_bytes(b"damaged")
    assert Cubins(folder, sources, 90, 12).load([kernel]) == first


def test_an_architecture_that_nvrtc_does_not_know_is_named(
    sources: Sources, tmp_path: Path
) -> None:
    library(12)
    said = r"kernels for sm_110 .* \(that of CUDA 12 knows sm_50, .*pip install --upgrade nvidia"
    with pytest.raises(DeviceError, match=said):
        Cubins(tmp_path, sources, 110, 12).load([Kernel.of("k")])


def test_what_does_not_compile_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "k.cu").write_text(_EVERYTHING.replace("ei_max32(y)", "none(y)"))
    job = Cubins(tmp_path, Sources(tmp_path), 90, 12).job(Kernel.of("k"))
    path = library(12).path
    with pytest.raises(DeviceError, match=r'compile k: .* k.cu\(21\): error: .*"none"'):
        compile_all(path, [job] * 3)
    with pytest.raises(DeviceError, match="compile k: .*invalid value for --gpu-architecture"):
        Nvrtc(path).compile(Job("k", "", (), 13))


def test_a_compiler_that_ends_or_is_none_is_an_error(tmp_path: Path) -> None:
    none = tmp_path / "libnvrtc.so.12"
    none.write_bytes(b"no library")
    with pytest.raises(DeviceError, match="NVRTC can't be loaded"):
        compile_all(none, [Job("k", "", (), 90)])
    with pytest.raises(DeviceError, match="the process that compiles k has ended"):
        compile_all(library(12).path, [Job("k", "", 1, 90)])  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", ["", '{"cubin": "f0', "\\xff"])
def test_a_compiler_that_ends_amid_its_answer_is_an_error(
    monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    ending = f"import sys; sys.stdin.readline(); sys.stdout.buffer.write(b'{answer}')"
    monkeypatch.setattr(platform, "python_command", lambda *args: [sys.executable, "-c", ending])
    with pytest.raises(DeviceError, match="the process that compiles k has ended"):
        compile_all(Path("libnvrtc.so.12"), [Job("k", "", (), 90)])


def test_a_compiler_that_can_not_be_started_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "g++").write_bytes(b"\x7fELF no program")
    (tmp_path / "g++").chmod(0o755)
    with monkeypatch.context() as broken, pytest.raises(DeviceError, match="be started: .*Exec"):
        broken.setattr(sys, "executable", str(tmp_path / "g++"))
        compile_all(Path("libnvrtc.so.12"), [Job("k", "", (), 90)])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match=r"g\+\+ can't be run: Exec format error"):
        Compiler(tmp_path / "kernels").libraries({"k": ""}, [])


def test_a_library_that_is_no_nvrtc_is_done_without(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The C library has none of its functions."""
    other, right = NvrtcLibrary(Path("libc.so.6"), 13), library(12)
    monkeypatch.setattr(platform, "nvrtc_libraries", lambda: [other, right])
    assert Cubins(tmp_path, sources, 90, 13).load([Kernel.of("k")])
    monkeypatch.setattr(platform, "nvrtc_libraries", lambda: [other])
    with pytest.raises(DeviceError, match=r"NVRTC can't be loaded: .*nvrtcGetErrorString"):
        Cubins(tmp_path, sources, 89, 13).load([Kernel.of("k")])
    nvrtc = Nvrtc(right.path)
    with pytest.raises(DeviceError, match="NVRTC is too old: .*nvrtcGetNothing"):
        nvrtc._call("GetNothing")


def test_what_can_not_be_kept_is_used_all_the_same(sources: Sources, tmp_path: Path) -> None:
    library(12)
    (tmp_path / "file").touch()
    cubins = Cubins(tmp_path / "file" / "cache", sources, 90, 12)
    [data] = cubins.load([Kernel.of("k")]).values()
    assert data.startswith(b"\x7fELF") and cubins.unkept == "Not a directory"


@pytest.mark.parametrize("at", ["lib/libnvrtc.so.99", "Library/bin/nvrtc64_990_0.dll"])
def test_compilers_are_found_where_conda_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    path = tmp_path / at
    path.parent.mkdir(parents=True)
    path.touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert platform.nvrtc_libraries()[0] == NvrtcLibrary(path, 99)


def test_compilers_are_found_where_jetpack_has_them(tmp_path: Path) -> None:
    folder = tmp_path / "usr/local/cuda-11.4/targets/aarch64-linux/lib"
    folder.mkdir(parents=True)
    for name in ("libnvrtc.so.11", "libnvrtc.so.11.4.1", "libnvrtc.alt.so.11", "libnvrtc.so"):
        (folder / name).touch()
    found = platform.nvrtc_libraries(tmp_path)
    assert NvrtcLibrary(folder / "libnvrtc.so.11", 11) in found
    assert [each.cuda for each in found] == sorted({each.cuda for each in found}, reverse=True)
