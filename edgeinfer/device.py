"""Where a model runs: the devices that a caller names, or the best that are here.

Knows no kernels, and loads nothing of CUDA but its driver.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from edgeinfer import platform
from edgeinfer.errors import Advice, DeviceError, Keyword

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgeinfer.platform import CudaDriver, Gpu

_NAME = re.compile(r"(auto|cpu|reference|law)|(cuda|shim)(?::(\d{1,3}))?", re.ASCII)
_LEAST_DRIVER = 12000  # CUDA 12.0, as drivers write it
_NO_GPU = 100  # a driver's error where there is none, or all are hidden
_LEAST_CAPABILITY = (6, 1)  # the first with products of four bytes
_LEAST_CAPABILITY_OF_FAST = (7, 5)
_CAPABILITY_OF_CUDA_13 = (7, 5)  # its compiler knows none below
_ON_THE_CPU: Advice = (", or use ", Keyword("device", "cpu"))


@dataclass(frozen=True, slots=True)
class Device:
    """This machine's processors ("cpu", "reference", "law"), or one of several by its number.

    "reference" computes in float32; "law" has the bits of every other device, at NumPy's pace.
    "cuda" is a GPU, "shim" the same kernels compiled for the processors, for tests. "auto" is what
    `choose` finds.
    """

    kind: str
    index: int = 0

    @classmethod
    def parse(cls, name: str) -> Device:
        """ "cpu" or "cuda:1"; DeviceError for what is the name of none."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise DeviceError(
                f"no device {name[:80]!r}; there are auto, cpu, reference, law, cuda and, where "
                "there are several, cuda:N and cuda:0,cuda:1"
            )
        return cls(match[1] or match[2], int(match[3] or 0))

    @property
    def has_number(self) -> bool:
        return self.kind in ("cuda", "shim")

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}" if self.has_number else self.kind


class Choice(NamedTuple):
    """A device, and a line for people where it is not the one that they would expect.

    `further` ones share its layers, in this order: all of them, or as many as a model needs.
    """

    device: Device
    note: str = ""
    further: tuple[Device, ...] = ()
    if_needed: bool = False  # where one alone does not hold a model


def find(name: str) -> Choice:
    """The devices of a name: of one, of several GPUs ("cuda:0,cuda:1"), or of any ("cuda").

    DeviceError as `Device.parse` and `choose` say, and where several can't be taken together.
    """
    if "," in name:
        return _together(name.split(","))
    if name == "cuda":
        return _any_gpu()
    return choose(Device.parse(name))


def _together(names: Sequence[str]) -> Choice:
    """These GPUs, in their order."""
    devices = [Device.parse(name) for name in names]
    for name, device in zip(names, devices, strict=True):
        if ":" not in name or device.kind != devices[0].kind:
            raise DeviceError(
                f"{name} is named together with other devices; only GPUs share layers, each named "
                "by its number, such as cuda:0,cuda:1",
                advice=("the layers that ", Keyword("gpu_layers"), " leaves run on the CPU"),
            )
        if devices.count(device) > 1:
            raise DeviceError(f"{device} is named twice; name each device once")
    first, *further = (choose(device).device for device in devices)
    return Choice(first, further=tuple(further))


def _any_gpu() -> Choice:
    """The first GPU that can be used, and the others if needed."""
    driver = platform.cuda_driver()
    first, *others = (driver and usable_gpus(driver)) or [0]
    _check_cuda(driver, first)
    return _if_needed(first, others)


def _if_needed(first: int, others: Sequence[int]) -> Choice:
    further = tuple(Device("cuda", index) for index in others)
    return Choice(Device("cuda", first), further=further, if_needed=bool(further))


def choose(asked: Device) -> Choice:
    """The device that was asked for; for "auto" a GPU where one can be used, else the CPU.

    DeviceError says what was found, and what to do, where there is no GPU to be had that was
    asked for.
    """
    if asked.kind == "auto":
        return _best()
    if asked.kind == "cuda":
        _check_cuda(platform.cuda_driver(), asked.index)
    return Choice(asked)


def _best() -> Choice:
    driver = platform.cuda_driver()
    usable = [] if driver is None else usable_gpus(driver)
    if driver is None or not usable:
        return Choice(Device("cpu"), why_unusable(driver))
    first, *others = usable
    if has_cupy():
        return _if_needed(first, others)
    name, command = driver.devices[first].name, install_command(driver, first)
    return Choice(Device("cpu"), f"{name} is not used, since CuPy is missing; run: {command}")


def why_unusable(driver: CudaDriver | None) -> str:
    """Of a machine without a usable GPU, why: "" where nobody would expect to have one."""
    if driver is None or driver.error == _NO_GPU or not (driver.error or driver.devices):
        return ""
    if driver.error:
        return f"no GPU is used: the NVIDIA driver fails (error {driver.error}); see nvidia-smi"
    gpu = driver.devices[0]
    if driver.version < _LEAST_DRIVER:
        return (
            f"{gpu.name} is not used: its driver runs CUDA up to {cuda_version(driver)}, 12.0 is "
            "needed; update the driver"
        )
    return (
        f"{gpu.name} is not used: it has compute capability {gpu.compute_capability}, 6.1 is needed"
    )


def _check_cuda(driver: CudaDriver | None, index: int) -> None:
    """Raise DeviceError unless kernels can run on this GPU."""
    if driver is None:
        raise DeviceError(
            f"cuda:{index} needs an NVIDIA driver, and none was found",
            advice=("install the one of your GPU", *_ON_THE_CPU),
        )
    if driver.error or not driver.devices:
        raise DeviceError(
            f"the NVIDIA driver finds no GPU for cuda:{index} (error {driver.error})",
            advice=("see what nvidia-smi says", *_ON_THE_CPU),
        )
    if index >= len(driver.devices):
        here = ", ".join(f"cuda:{i} ({gpu.name})" for i, gpu in enumerate(driver.devices))
        raise DeviceError(f"there is no cuda:{index}; there are {here}")
    gpu = driver.devices[index]
    if driver.version < _LEAST_DRIVER:
        raise DeviceError(
            f"the NVIDIA driver of cuda:{index} runs CUDA up to {cuda_version(driver)}, 12.0 is "
            "needed",
            advice=("update the driver", *_ON_THE_CPU),
        )
    if _capability(gpu) < _LEAST_CAPABILITY:
        raise DeviceError(
            f"cuda:{index} ({gpu.name}) has compute capability {gpu.compute_capability}, 6.1 is "
            "needed",
            advice=("use ", Keyword("device", "cpu")),
        )
    if not has_cupy():
        command = install_command(driver, index)
        raise DeviceError(
            f"cuda:{index} ({gpu.name}) needs CuPy, which is not installed",
            advice=(f"run {command}", *_ON_THE_CPU),
        )


def has_cupy() -> bool:
    """Whether CuPy is installed; it is not imported."""
    from importlib.util import find_spec

    try:
        return find_spec("cupy") is not None
    except (ImportError, ValueError):  # somebody forbids it, or has put something in its place
        return False


def usable_gpus(driver: CudaDriver) -> list[int]:
    """The numbers of the GPUs that kernels can run on, as far as the driver tells."""
    if driver.version < _LEAST_DRIVER:
        return []
    capabilities = map(_capability, driver.devices)
    return [i for i, each in enumerate(capabilities) if each >= _LEAST_CAPABILITY]


def has_fast_numerics(gpu: Gpu) -> bool:
    """Whether its tensor cores multiply halves; kernels/cuda/backend.py says the same."""
    return _capability(gpu) >= _LEAST_CAPABILITY_OF_FAST


class ModelRoom(NamedTuple):
    """Bytes that models may take: of the host's memory, and of all usable GPUs' own beside it."""

    host: int
    gpus: int

    def __str__(self) -> str:
        beside = f", {self.gpus / 1e9:.1f} GB on GPUs" if self.gpus else ""
        return f"{self.host / 1e9:.1f} GB of memory to use{beside}"


def model_room() -> ModelRoom:
    """What a plan would have to share out, as far as can be told without opening a device."""
    driver = platform.cuda_driver() if has_cupy() else None
    usable = [] if driver is None else [driver.devices[i] for i in usable_gpus(driver)]
    own = sum(gpu.n_bytes for gpu in usable if not gpu.is_integrated)
    return ModelRoom(platform.memory_budget(), own * _USABLE_SHARE // 100)


_USABLE_SHARE = 90  # per cent of a GPU's memory: the rest is its driver's, and the screen's


def cuda_version(driver: CudaDriver) -> str:
    """The newest CUDA that a driver runs, such as 12.4."""
    return f"{driver.version // 1000}.{driver.version % 1000 // 10}"


def install_command(driver: CudaDriver, index: int) -> str:
    """The command that adds what a GPU's kernels need: the requirements of one of our extras."""
    import importlib.metadata  # 20 ms that starts don't need
    import sys

    capability = _capability(driver.devices[index])
    is_new = driver.version >= 13000 and capability >= _CAPABILITY_OF_CUDA_13
    extra = "cuda13" if is_new else "cuda12"
    try:
        requires = importlib.metadata.requires("edgeinfer") or []
    except importlib.metadata.PackageNotFoundError:
        requires = []
    wanted = [r.partition(";")[0].strip() for r in requires if f'"{extra}"' in r.replace("'", '"')]
    packages = " ".join(f"'{each}'" for each in wanted) or f"'.[{extra}]'"
    return f"{sys.executable} -m pip install {packages}"


def _capability(gpu: Gpu) -> tuple[int, int]:
    major, _, minor = gpu.compute_capability.partition(".")
    return int(major), int(minor or 0)
