"""Energy that this machine uses, where it tells: processors (RAPL), GPUs (NVML), boards.

Counters of joules are read; where there is only a power it is summed over time between samples.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from edgeinfer.platform import system_files

_ROOT = Path("/")
# The rails of Jetson boards through which all else flows; tegrastats shows the same.
_WHOLE_BOARD = ("VDD_IN", "POM_5V_IN", "VIN_SYS_5V0")

# Joules since something; None where it can't be read now.
_Counter = Callable[[], "float | None"]


class EnergyMeter:
    """Joules since the first `sample`, by source; no source where nothing tells.

    `root` is where the system's own files are looked for.
    """

    def __init__(self, root: Path = _ROOT) -> None:
        found = [*_rapl(root), *_nvml(), *_boards(root)]
        self._counters = {name: counter for name, counter in found if counter() is not None}
        self._last: dict[str, float] = {}
        self.joules: dict[str, float] = {}

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(self._counters)

    def sample(self) -> None:
        """Count what was used since the last time; at least twice a minute, for counters turn."""
        for name, counter in self._counters.items():
            value = counter()
            if value is None:
                continue
            before = self._last.get(name, value)
            self._last[name] = value
            self.joules[name] = self.joules.get(name, 0.0) + max(0.0, value - before)


class _Turning:
    """A counter in a file that begins anew at a limit, as one that does not."""

    def __init__(self, path: Path, most: float) -> None:
        self._path, self._most = path, most
        self._last, self._before = 0.0, 0.0

    def __call__(self) -> float | None:
        value = system_files.number(system_files.read(self._path))
        if value is None:
            return None
        if value < self._last:
            self._before += self._most
        self._last = value
        return (self._before + value) / 1e6


class _Integral:
    """A power in watts as a counter: between two reads it counts as their mean."""

    def __init__(self, power: Callable[[], float | None]) -> None:
        self._power = power
        self._last: tuple[float, float] | None = None
        self._joules = 0.0

    def __call__(self) -> float | None:
        watts, now = self._power(), time.monotonic()
        if watts is None:
            return None
        if self._last is not None:
            self._joules += (watts + self._last[0]) / 2 * (now - self._last[1])
        self._last = watts, now
        return self._joules


def _rapl(root: Path) -> Iterator[tuple[str, _Counter]]:
    """Processor packages and their memory; often only root may read them."""
    for zone in _folders(root / "sys/class/powercap", "intel-rapl:*"):
        name = system_files.read(zone / "name") or ""
        if name.startswith(("package", "dram")):
            most = system_files.number(system_files.read(zone / "max_energy_range_uj")) or 0
            label = name if name.startswith("package") else f"{name} {zone.name.split(':')[1]}"
            yield f"RAPL {label}", _Turning(zone / "energy_uj", most)


def _boards(root: Path) -> Iterator[tuple[str, _Counter]]:
    """What a Jetson draws: voltage times current of its input, in files of hwmon."""
    for folder in _folders(root / "sys/class/hwmon", "hwmon*"):
        if "ina3221" not in (system_files.read(folder / "name") or ""):
            continue
        for label in _folders(folder, "in*_label"):
            name = system_files.read(label) or ""
            if name in _WHOLE_BOARD:
                n = label.name.removeprefix("in").removesuffix("_label")
                yield f"board {name}", _Integral(_RailPower(folder, n))


class _RailPower:
    def __init__(self, folder: Path, n: str) -> None:
        self._files = folder / f"in{n}_input", folder / f"curr{n}_input"

    def __call__(self) -> float | None:
        volts, amperes = (system_files.number(system_files.read(each)) for each in self._files)
        return volts * amperes / 1e6 if volts is not None and amperes is not None else None


def _folders(parent: Path, pattern: str) -> list[Path]:
    try:
        return sorted(parent.glob(pattern))
    except OSError:
        return []


def _nvml() -> Iterator[tuple[str, _Counter]]:
    """GPUs, by the library that comes with NVIDIA's driver."""
    try:
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        count = ctypes.c_uint()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return
        for i in range(count.value):
            device = ctypes.c_void_p()
            if nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(device)) == 0:
                yield f"GPU {i}", _gpu_counter(nvml, device)
    except (OSError, AttributeError):  # no such library, or an older one
        return


def _gpu_counter(nvml: ctypes.CDLL, device: ctypes.c_void_p) -> _Counter:
    def joules() -> float | None:
        found = ctypes.c_ulonglong()
        code = nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(found))
        return None if code else found.value / 1e3

    def watts() -> float | None:
        found = ctypes.c_uint()
        return (
            None if nvml.nvmlDeviceGetPowerUsage(device, ctypes.byref(found)) else found.value / 1e3
        )

    return joules if joules() is not None else _Integral(watts)
