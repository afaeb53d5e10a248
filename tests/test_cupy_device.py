"""The device that is a GPU, as far as that can be seen without one: what it calls, what it says."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer import LLM, platform
from edgeinfer.cli.models import start_notes
from edgeinfer.errors import DeviceError
from edgeinfer.kernels.cuda.cupy_device import CudaDevice
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.platform import CudaDriver, Gpu
from tests import fake_cupy
from tests.fake_cupy import Cuda
from tests.models_for_tests import tiny_model

ORIN = Gpu("Orin", "8.7", 8 << 30)
DRIVER = CudaDriver(12060, (Gpu("A", "8.9", 8 << 30), ORIN))
K = Kernel.of("k")
_TEXT = """#include "dev.cuh"
EI_KERNEL(64) k(const Step* step, float* x, int n, float c) {
  x[threadIdx.x] = c * n;
}
"""


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """CuPy on host memory, and a driver with two GPUs."""
    monkeypatch.setattr(platform, "cuda_driver", lambda: DRIVER)
    return fake_cupy.install(monkeypatch)


@pytest.fixture
def device(cuda: Cuda, tmp_path: Path) -> CudaDevice:
    (tmp_path / "k.cu").write_text(_TEXT)
    return CudaDevice(1, tmp_path / "cache", sources=[tmp_path])


def test_without_cupy_the_command_that_installs_it_is_named(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cuda.runtime.version = 13000
    said = (
        "CuPy is here for CUDA 13, .* CUDA up to 12.6; uninstall it, then .*pip install .*cuda12x"
    )
    with pytest.raises(DeviceError, match=said):
        CudaDevice(0, tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="needs CuPy, .* run .*pip install .*cupy-cuda12x"):
        CudaDevice(0, tmp_path)
    with pytest.raises(DeviceError, match="there is no cuda:2"):
        CudaDevice(2, tmp_path)


def test_a_cupy_that_is_broken_is_named_with_what_it_lacks(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And `auto` does without."""
    for name in ("cupy", "cupy.cuda"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy/__init__.py").write_text(
        "try:\n    raise OSError('libcudart.so.12: cannot open shared object file')\n"
        "except OSError as error:\n    raise ImportError('== ten lines ==') from error\n"
    )
    said = "can't be used: OSError: libcudart.so.12: .*; uninstall it, then run .*pip install"
    with pytest.raises(DeviceError, match=said):
        CudaDevice(0, tmp_path)
    with LLM(tiny_model(tmp_path), device="auto", threads=1, n_ctx=64) as llm:
        assert llm.runtime.device.kind == "cpu"
        [note] = start_notes(llm)
        assert note.startswith("no GPU is used: CuPy is here and can't be used: OSError: libcudart")


@pytest.mark.skipif(platform.cuda_driver() is not None, reason="there is a driver")
def test_a_machine_without_a_driver_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="needs an NVIDIA driver, and none was found"):
        CudaDevice(0, tmp_path)


def test_cupy_is_imported_only_when_a_device_is_opened() -> None:
    code = "import edgeinfer.kernels.cuda.cupy_device, sys; print('cupy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_what_a_gpu_is(device: CudaDevice, cuda: Cuda) -> None:
    assert device.facts == ("Orin", 87, 14, 166912, False, True)
    assert device.memory()[0] <= platform.available_memory() * 2  # of the host, which it shares
    assert set(cuda.runtime.devices) == {1}


def test_memory(device: CudaDevice, cuda: Cuda) -> None:
    rng = np.random.default_rng(1)
    n = (30 << 20) + 5  # more than both large buffers hold
    data = rng.integers(0, 256, n, np.uint8)
    address = device.reserve(n)
    device.write(address, data)
    small = [rng.integers(0, 256, 1000, np.uint8) for _ in range(70)]  # than there are buffers
    for i, part in enumerate(small):
        device.write(address + 1000 * i, part.view(np.uint32)[:, None])
        data[1000 * i : 1000 * (i + 1)] = part
    device.fill(address + 7, 3, 9)
    device.copy(address + 100, address + 200, 50)
    device.write_now(address + 400, -2)
    data[7:10], data[100:150] = 9, data[200:250]
    data[400:404].view(np.int32)[0] = -2
    got, fetched = np.empty(n, np.uint8), device.host(50)
    device.read(address, got)
    device.fetch(address + 100, fetched)
    assert np.array_equal(got, data) and np.array_equal(fetched, data[100:150])
    with pytest.raises(ValueError, match="contiguous and writable"):
        device.fetch(address, got[::2])
    with pytest.raises(MemoryError, match="cuda:1: 1073741825 bytes: cudaError2"):
        device.reserve((1 << 30) + 1)
    device.free(address)
    with pytest.raises(DeviceError, match="no memory was reserved at"):
        device.free(address)
    device.reserve(10)
    device.close()
    assert not cuda.runtime.memory
    with pytest.raises(DeviceError, match="cuda:1 is closed"):
        device.mark()


def test_memory_of_a_device_that_is_forgotten_is_returned(cuda: Cuda, tmp_path: Path) -> None:
    device = CudaDevice(0, tmp_path)
    device.reserve(100)
    assert len(cuda.runtime.memory) == 1
    del device
    assert not cuda.runtime.memory


def test_launches_and_graphs(device: CudaDevice, cuda: Cuda) -> None:
    if not any(each.cuda == 12 for each in platform.nvrtc_libraries()):
        pytest.skip("no NVRTC of CUDA 12: pip install nvidia-cuda-nvrtc-cu12")
    device.load([K])
    assert cuda.driver.attributes == {(77, 8): 166912 - 1024}
    step, x = device.reserve(16), device.reserve(256)
    args = {"step": step, "x": x, "n": -5, "c": 0.1}
    values = (np.uint64(step), np.uint64(x), np.int32(-5), np.float32(0.1))
    expected = ("ei_kernel_k", (1, 2, 3), (64, 1, 1), values, 128, 5)
    before = device.mark()
    device.launch(K, (1, 2, 3), 64, 128, args)
    bound = device.bind(K, args)
    graph = device.record(lambda: device.launch(K, (1, 2, 3), 64, 128, bound))
    assert cuda.launches == [expected]
    for _ in range(2):
        graph.replay()
    assert cuda.launches == [expected] * 3
    assert [type(value) for value in cuda.launches[0][3]] == [type(value) for value in values]
    after = device.mark()
    after.wait()
    assert after.seconds_since(before) == 1.5
    with pytest.raises(TypeError, match="missing: c"):
        device.launch(K, (1, 1, 1), 64, 0, {"step": step, "x": x, "n": 1})
    with pytest.raises(ValueError, match="96 threads, and it is declared for 64"):
        device.launch(K, (1, 1, 1), 96, 0, bound)
    with pytest.raises(ValueError, match="0 to 166912"):
        device.launch(K, (1, 1, 1), 64, 166913, bound)
    with pytest.raises(DeviceError, match="kernel other is not loaded"):
        device.launch(Kernel.of("other"), (1, 1, 1), 64, 0, bound)
    with pytest.raises(DeviceError, match="write can't be recorded"):
        device.record(lambda: device.write(x, np.zeros(4, np.uint8)))
    device.write(x, np.zeros(4, np.uint8))  # nothing is recorded any more


def test_blocks_that_wait_for_each_other_are_at_once(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As many as all multiprocessors hold, by a launch that fails where they are more."""
    if not any(each.cuda == 12 for each in platform.nvrtc_libraries()):
        pytest.skip("no NVRTC of CUDA 12: pip install nvidia-cuda-nvrtc-cu12")
    monkeypatch.setattr(platform, "cuda_driver", lambda: HOPPER)
    library = FakeLibrary()
    monkeypatch.setattr(platform, "cuda_library", lambda: library)
    (tmp_path / "k.cu").write_text(_TEXT)
    device = CudaDevice(0, tmp_path / "cache", sources=[tmp_path], begins_early=True)
    device.load([K])
    bound = device.bind(K, {"step": 7, "x": 8, "n": -5, "c": 0.5})
    assert device.blocks_at_once(K, 64, 48 << 10) == 14 * 3
    assert device.blocks_at_once(K, 64, 166912) == 14
    device.launch(K, (1, 1, 1), 64, 0, bound)
    device.launch(K, (42, 1, 1), 64, 48 << 10, bound, at_once=True)  # nor may it begin early
    device.launch(K, (1, 1, 1), 64, 0, bound)
    assert [call[1] for call in cuda.launches if call[-1] == "cooperative"] == [(42, 1, 1)]
    assert (len(cuda.launches), len(library.launches)) == (2, 1)
    cuda.runtime.is_cooperative = 0
    other = CudaDevice(0, tmp_path / "cache", sources=[tmp_path])
    other.load([K])
    assert other.blocks_at_once(K, 64, 0) == 0 and not other.facts.is_cooperative


def test_after_a_fault_everything_says_so(device: CudaDevice, cuda: Cuda) -> None:
    address = device.reserve(16)
    event = device.mark()
    cuda.runtime.fails["memsetAsync"] = 700
    fault = "cuda:1 failed: fill: cudaError700"
    with pytest.raises(DeviceError, match=fault):
        device.fill(address, 16)
    cuda.runtime.fails.clear()
    for call in (
        lambda: device.fill(address, 16),
        event.wait,
        device.mark,
        device.memory,
        lambda: device.free(address),
        lambda: device.record(lambda: None),
    ):
        with pytest.raises(DeviceError, match=fault):
            call()
    device.close()


def test_each_launch_can_be_waited_for(cuda: Cuda, tmp_path: Path) -> None:
    if not any(each.cuda == 12 for each in platform.nvrtc_libraries()):
        pytest.skip("no NVRTC of CUDA 12: pip install nvidia-cuda-nvrtc-cu12")
    (tmp_path / "k.cu").write_text(_TEXT)
    device = CudaDevice(0, tmp_path / "cache", sources=[tmp_path], waits_for_each=True)
    device.load([K])
    cuda.runtime.fails["synchronize"] = 700
    with pytest.raises(DeviceError, match="cuda:0 failed: kernel k: cudaError700"):
        device.launch(K, (1, 1, 1), 32, 0, {"step": 0, "x": 0, "n": 1, "c": 0})


class FakeLibrary:
    """Of a driver, the call that takes attributes of a launch; as words of its structures."""

    def __init__(self, status: int = 0) -> None:
        self.launches: list[dict[str, Any]] = []
        self.status = status
        types = (ctypes.c_int, *[ctypes.c_void_p] * 4)
        self.cuLaunchKernelEx = ctypes.CFUNCTYPE(*types)(self._launch)

    def _launch(self, config: int, function: int, parameters: int, extra: int | None) -> int:
        words = (ctypes.c_uint * 7).from_address(config)
        stream, attributes = (ctypes.c_void_p.from_address(config + at).value for at in (32, 40))
        assert attributes is not None and extra is None
        pointers = (ctypes.c_void_p * 4).from_address(parameters)
        types = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int, ctypes.c_float)
        self.launches.append({
            "grid": tuple(words[:3]), "block": tuple(words[3:6]), "shared": words[6],
            "stream": stream, "function": function,
            "attributes": ctypes.c_uint.from_address(config + 48).value,
            "attribute": [ctypes.c_int.from_address(attributes + at).value for at in (0, 8)],
            "values": [t.from_address(p).value for t, p in zip(types, pointers, strict=True)],
        })  # fmt: skip
        return self.status


HOPPER = CudaDriver(12060, (Gpu("H200", "9.0", 8 << 30), ORIN))


def test_a_kernel_behind_a_kernel_may_begin_early(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Behind anything else, or first in a graph, it may not; below Hopper none may."""
    if not any(each.cuda == 12 for each in platform.nvrtc_libraries()):
        pytest.skip("no NVRTC of CUDA 12: pip install nvidia-cuda-nvrtc-cu12")
    monkeypatch.setattr(platform, "cuda_driver", lambda: HOPPER)
    library = FakeLibrary()
    monkeypatch.setattr(platform, "cuda_library", lambda: library)
    (tmp_path / "k.cu").write_text(_TEXT)
    folder = tmp_path / "cache"
    device, orin = (CudaDevice(i, folder, sources=[tmp_path], begins_early=True) for i in (0, 1))
    args = {"step": 7, "x": 8, "n": -5, "c": 0.5}
    counts = []
    for each in (device, orin):
        each.load([K])
        bound, address = each.bind(K, args), each.reserve(4)

        def launch(each: CudaDevice = each, bound: Any = bound) -> None:
            each.launch(K, (1, 2, 3), 64, 128, bound)

        for between in (
            lambda: None,
            lambda each=each, address=address: each.fill(address, 4),
            lambda each=each: each.mark(),
            lambda each=each: each.record(lambda: None),
        ):
            launch()
            between()
        launch()
        each.record(lambda: (launch(), launch()))
        launch()
        counts.append((len(library.launches), len(cuda.launches)))
    assert counts == [(2, 5), (2, 11)]
    assert library.launches[0] == library.launches[1] == {
        "grid": (1, 2, 3), "block": (64, 1, 1), "shared": 128, "stream": 5, "function": 77,
        "attributes": 1, "attribute": [6, 1], "values": [7, 8, -5, 0.5],
    }  # fmt: skip
    library.status = 700
    with pytest.raises(DeviceError, match="kernel k: error 700 of cuLaunchKernelEx"):
        device.launch(K, (1, 1, 1), 32, 0, args)
    monkeypatch.setattr(platform, "cuda_library", lambda: None)
    with pytest.raises(DeviceError, match="has no cuLaunchKernelEx"):
        CudaDevice(0, tmp_path, begins_early=True)


OURS = ("do", "call", "fail")  # of the fake, for tests


def test_calls_are_those_of_cupy() -> None:
    real = pytest.importorskip("cupy.cuda", reason="no CuPy to compare with")
    fake = Cuda()
    for ours, theirs in ((fake.runtime, real.runtime), (fake.driver, real.driver)):
        for name in (name for name in vars(type(ours)) if name[0] != "_" and name not in OURS):
            there = getattr(theirs, name)
            if isinstance(there, int):
                assert getattr(ours, name) == there, name
            else:
                code = getattr(type(ours), name).__code__
                names = re.findall(r"(\w+)(?:=\w+)?[,)]", there.__doc__.partition("\n")[0])
                assert list(code.co_varnames[1 : code.co_argcount]) == names, name
    assert {"load", "get_function"} <= set(dir(real.function.Module))
    assert {"begin_capture", "end_capture", "record", "synchronize"} <= set(dir(real.Stream))
    assert {"launch", "upload"} <= set(dir(real.Graph))
    assert {"record", "synchronize"} <= set(dir(real.Event))
    assert {"alloc_pinned_memory", "get_elapsed_time"} <= set(dir(real))
