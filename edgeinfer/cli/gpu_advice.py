"""What keeps the GPUs of this machine from running models, and what to do: a line for each thing.

Imports nothing of CUDA: a CuPy that does not fit would fail, and some take a second.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

from edgeinfer import device, platform

_CUPYS = {12: "cupy-cuda12x", 13: "cupy-cuda13x"}  # by the CUDA that each is made for


def gpu_advice() -> Iterator[str]:
    """Nothing where no GPU could be used, unless CuPy says that somebody expects one to be."""
    driver = platform.cuda_driver()
    cupys = {cuda: name for cuda, name in _CUPYS.items() if _is_installed(name)}
    names = " and ".join(cupys.values())
    usable = [] if driver is None else device.usable_gpus(driver)
    if driver is None or not usable:
        if why := device.why_unusable(driver):
            yield why
        elif cupys:
            yield f"{names} is here, and no NVIDIA GPU that can be used: models run on the CPU"
        return
    if not device.has_cupy():
        return  # what to install stands among the facts
    command, runs = device.install_command(driver, usable[0]), driver.version // 1000
    if len(cupys) > 1:
        yield f"{names} are both installed, and Python finds one of them: uninstall the other"
    elif cupys and min(cupys) > runs:
        yield (
            f"{names} is for CUDA {min(cupys)}, and the NVIDIA driver runs CUDA up to "
            f"{device.cuda_version(driver)}: uninstall it, then run {command}"
        )
    elif list(cupys) == [13] and "cupy-cuda12x" in command:
        gpu = driver.devices[usable[0]].name
        yield f"{gpu} needs CUDA 12, which {names} is not for: uninstall it, then run {command}"
    if not any(library.cuda <= runs for library in platform.nvrtc_libraries()):
        yield f"no NVRTC of CUDA {runs} is here, which compiles the GPU's kernels: run {command}"


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
