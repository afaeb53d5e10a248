"""Names of devices, and which one a machine has to offer; drivers are made up, none is needed."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeinfer import LLM, DeviceError, PlanError, UnsupportedModelError, backend, plan, platform
from edgeinfer.backend import Program, find_device
from edgeinfer.batch import Demand, StepLimits, StepRequest
from edgeinfer.cli.models import start_notes
from edgeinfer.device import Choice, Device, choose, model_room
from edgeinfer.graph import Segment
from edgeinfer.platform import CudaDriver, Gpu

from .models_for_tests import tiny_model

OLD, NEW = Gpu("GTX 960", "5.2", 4 << 30), Gpu("RTX 4090", "8.9", 24 << 30)
DRIVER = CudaDriver(12040, (OLD, NEW))


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("auto", Device("auto")), ("cpu", Device("cpu")), ("reference", Device("reference")),
        ("cuda", Device("cuda", 0)), ("cuda:0", Device("cuda", 0)), ("cuda:12", Device("cuda", 12)),
        ("shim", Device("shim")), ("shim:1", Device("shim", 1)),
    ],
)  # fmt: skip
def test_a_device_keeps_its_number(name: str, device: Device) -> None:
    assert Device.parse(name) == device
    assert Device.parse(str(device)) == device


@pytest.mark.parametrize(
    "name",
    [
        "", " ", "gpu", "CPU", "cpu:0", "auto:1", "reference:0", "cuda:", "cuda:x", "cuda:-1",
        "cuda:1.5", "cuda:1:2", "cuda: 1", "cuda:٣", "cuda1", "cuda:9999", "cuda:1\n",
        "x" * 5000, "cuda:\x1b[1m",
    ],
)  # fmt: skip
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(DeviceError, match="there are auto, cpu, reference, law, cuda") as caught:
        Device.parse(name)
    assert "shim" not in str(caught.value) and len(str(caught.value)) < 400


def with_cupy(monkeypatch: pytest.MonkeyPatch, is_there: bool) -> None:
    found = importlib.machinery.ModuleSpec("cupy", None) if is_there else None
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: found if name == "cupy" else find(name, *a)
    )


@pytest.mark.parametrize("has_cupy", [True, False])
@pytest.mark.parametrize(
    ("driver", "note"),
    [
        (None, ""),
        (CudaDriver(13000, (), 100), ""),  # all are hidden, or there is none
        (CudaDriver(13000, ()), ""),
        (CudaDriver(11040, (NEW,)), "RTX 4090 is not used: .* up to 11.4, 12.0 .*; update the dr"),
        (CudaDriver(12000, (OLD,)), "GTX 960 is not used: .*capability 5.2, 6.1 is needed$"),
        (CudaDriver(13000, (), 999), r"no GPU is used: the NVIDIA driver fails \(error 999\)"),
    ],
)
def test_auto_is_the_cpu_where_no_gpu_is_usable_and_says_why(
    monkeypatch: pytest.MonkeyPatch, driver: CudaDriver | None, note: str, has_cupy: bool
) -> None:
    monkeypatch.setattr(platform, "cuda_driver", lambda: driver)
    with_cupy(monkeypatch, has_cupy)
    found = choose(Device("auto"))
    assert found == Choice(Device("cpu"), found.note)
    assert bool(found.note) == bool(note) and re.match(note, found.note)


def test_auto_takes_the_first_gpu_that_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "cuda_driver", lambda: DRIVER)
    with_cupy(monkeypatch, True)
    assert choose(Device("auto")) == Choice(Device("cuda", 1))
    with_cupy(monkeypatch, False)
    device, note, *_ = choose(Device("auto"))
    assert device == Device("cpu") and "\n" not in note
    assert "RTX 4090" in note and f"{sys.executable} -m pip install 'cupy-cuda12x" in note


@pytest.mark.parametrize(
    ("driver", "index", "has_cupy", "says"),
    [
        (None, 0, True, "needs an NVIDIA driver, and none was found; install"),
        (
            CudaDriver(13000, (), 100),
            0,
            True,
            r"finds no GPU for cuda:0 \(error 100\); see what nvidia-smi",
        ),
        (CudaDriver(11040, (NEW,)), 0, True, r"up to 11.4, 12.0 is needed; update the driver"),
        (
            DRIVER,
            0,
            True,
            r"cuda:0 \(GTX 960\) has compute capability 5.2, 6.1 is needed; use device='cpu'",
        ),
        (DRIVER, 2, True, r"no cuda:2; there are cuda:0 \(GTX 960\), cuda:1 \(RTX 4090\)"),
        (
            DRIVER,
            1,
            False,
            "needs CuPy, which is not installed; run .*-m pip install 'cupy-cuda12x",
        ),
        (CudaDriver(13010, (NEW,)), 0, False, "-m pip install 'cupy-cuda13x"),
        (CudaDriver(13010, (Gpu("GTX 1080", "6.1", 1),)), 0, False, "'cupy-cuda12x"),
    ],
)
def test_a_gpu_that_can_not_be_had_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
    driver: CudaDriver | None,
    index: int,
    has_cupy: bool,
    says: str,
) -> None:
    monkeypatch.setattr(platform, "cuda_driver", lambda: driver)
    with_cupy(monkeypatch, has_cupy)
    with pytest.raises(DeviceError, match=says):
        choose(Device("cuda", index))


def test_several_gpus_are_taken_in_the_order_they_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    zero, one, two = (Device("cuda", i) for i in range(3))
    monkeypatch.setattr(platform, "cuda_driver", lambda: CudaDriver(13000, (NEW, NEW, NEW)))
    with_cupy(monkeypatch, True)
    assert find_device("cuda:2,cuda:0,cuda:1") == Choice(two, further=(zero, one))
    assert find_device("cuda:1") == Choice(one)
    for any_of_them in ("cuda", "auto"):
        assert find_device(any_of_them) == Choice(zero, further=(one, two), if_needed=True)
    monkeypatch.setattr(platform, "cuda_driver", lambda: DRIVER)
    assert find_device("cuda") == Choice(one)  # the other one is too old


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("cuda:0,cuda:0", "^cuda:0 is named twice; name each device once"),
        ("cuda:1,cuda:0,cuda:01", "^cuda:1 is named twice"),
        ("cuda:1,cpu", "^cpu is named together with other devices; only GPUs .*gpu_layers leaves"),
        ("cpu,cuda:1", "^cpu is named together"),
        ("auto,auto", "^auto is named together"),
        ("cuda:1,shim:0", "^shim:0 is named together"),
        ("cuda:1,cuda", "^cuda is named together .*such as cuda:0,cuda:1; "),
        ("cuda:1,", "^no device ''; there are auto"),
        (",", "^no device ''"),
        ("cuda:1, cuda:2", "^no device ' cuda:2'; .*cuda:N and cuda:0,cuda:1"),
        ("cuda:1;cuda:2", "^no device 'cuda:1;cuda:2'"),
        ("cuda:1,cuda:7", r"^there is no cuda:7; there are cuda:0 \(GTX 960\), cuda:1 "),
        ("cuda:0,cuda:1", r"^cuda:0 \(GTX 960\) has compute capability 5.2"),
    ],
)
def test_gpus_that_can_not_be_taken_together(
    monkeypatch: pytest.MonkeyPatch, names: str, says: str
) -> None:
    monkeypatch.setattr(platform, "cuda_driver", lambda: DRIVER)
    with_cupy(monkeypatch, True)
    with pytest.raises(DeviceError, match=says):
        find_device(names)


def test_any_gpu_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cupy(monkeypatch, False)
    for driver, says in (
        (None, "cuda:0 needs an NVIDIA driver"),
        (CudaDriver(12000, (OLD,)), "cuda:0 .* has compute capability 5.2"),
        (CudaDriver(13000, (), 100), r"finds no GPU for cuda:0 \(error 100\)"),
        (DRIVER, r"cuda:1 \(RTX 4090\) needs CuPy"),
    ):
        monkeypatch.setattr(platform, "cuda_driver", lambda driver=driver: driver)
        with pytest.raises(DeviceError, match=says):
            find_device("cuda")


def test_a_gpu_that_is_there_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "cuda_driver", lambda: DRIVER)
    with_cupy(monkeypatch, True)
    assert choose(Device("cuda", 1)) == Choice(Device("cuda", 1))


def test_this_machine_runs_on_its_processors(tmp_path: Path) -> None:
    with LLM(tiny_model(tmp_path), device="cpu", threads=1) as llm:
        assert llm.runtime.device == Device("cpu") and start_notes(llm) == []
    assert find_device("reference") == Choice(Device("reference"))


class Broken:
    """A GPU that has room for everything, and fails when something is compiled for it."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def memories(self, host: int) -> dict[str, int]:
        return {"host": host}

    def demand(self, segment: Segment, request: StepRequest) -> Demand:
        return Demand(StepLimits.of(request, 320, segment.groups, 64), {"host": {}})

    def compile(self, segment: Segment, limits: StepLimits) -> Program:
        raise self.error


@pytest.mark.parametrize(
    ("fails_to", "error"),
    [
        ("open", DeviceError("no NVRTC was found; run pip install it")),
        ("compile", DeviceError("no NVRTC was found; run pip install it")),
        ("compile", UnsupportedModelError("CUDA runs no such operation")),
        ("open", PlanError("cuda:1: 64 bytes of the host: all is taken", memory="cuda:1")),
        ("compile", PlanError("cuda:1: 9 bytes: cudaErrorMemoryAllocation", memory="cuda:1")),
    ],
)
def test_a_gpu_that_fails_is_left_where_nobody_asked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_to: str, error: Exception
) -> None:
    opened = backend.open_backend

    def open_backend(device: Device, **options: Any) -> Any:
        if device.kind == "cpu":
            return opened(device, **options)
        if fails_to == "open":
            raise error
        return Broken(error)

    gpu = Choice(Device("cuda", 1))
    monkeypatch.setattr("edgeinfer.load_settings.find_device", lambda name: gpu)
    monkeypatch.setattr("edgeinfer.runtime.open_backend", open_backend)
    path = tiny_model(tmp_path, chat_template="{{ messages[0].content }}")
    assert plan(path).fits
    with LLM(path, threads=1) as llm:
        assert llm.runtime.device == Device("cpu")
        assert start_notes(llm) == [f"no GPU is used: {error}"]
        assert llm.chat("abc", max_tokens=2, temperature=0).usage.completion_tokens == 2
    for forced in ({"device": "cuda:1"}, {"gpu_layers": 1}):
        with pytest.raises(type(error), match=f"^{error}$"):
            LLM(path, **forced)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gpus", "cupy", "n_bytes"),
    [
        ((OLD, NEW), True, (24 << 30) * 9 // 10),  # the old one runs no kernel
        ((NEW, NEW), True, (48 << 30) * 9 // 10),
        ((NEW,), False, 0),
        ((Gpu("Orin", "8.7", 8 << 30, is_integrated=True),), True, 0),  # it is the host's
        ((), True, 0),
    ],
    ids=str,
)
def test_models_may_take_the_hosts_memory_and_that_of_usable_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: tuple[Gpu, ...], cupy: bool, n_bytes: int
) -> None:
    monkeypatch.setattr(platform, "cuda_driver", lambda: CudaDriver(12040, gpus))
    monkeypatch.setattr("edgeinfer.device.has_cupy", lambda: cupy)
    monkeypatch.setattr(platform, "memory_budget", lambda: 5 << 30)
    room = model_room()
    assert room == (5 << 30, n_bytes) and ("on GPUs" in str(room)) == (n_bytes > 0)
