"""The command `doctor`: facts that explain why a model runs here, runs slowly, or does not run.

Measures for a second at most.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform as _platform
import sys
import threading
import time
from typing import Any

import click

from edgeinfer import backend, config, device, platform
from edgeinfer.cli.console import show, show_json
from edgeinfer.cli.fact_lines import SECTIONS, fact_lines, version_lines
from edgeinfer.cli.gpu_advice import gpu_advice
from edgeinfer.cli.options import common_flags, json_flag
from edgeinfer.hub.catalog import ALIASES, DEFAULT_MODEL, largest_that_fits
from edgeinfer.hub.discovery import list_models, models_folder

_PACKAGES = (
    "numpy", "numba", "llvmlite", "tokenizers", "sentencepiece", "textual", "huggingface_hub",
    "cupy-cuda12x", "cupy-cuda13x",
)  # fmt: skip
_MEASURED_BYTES = 256 << 20
_MEASURED_SECONDS = 0.5


@click.command("doctor", epilog="Example: edgeinfer doctor --json")
@json_flag
@common_flags
def command(as_json: bool) -> None:
    """Facts about this machine, and what to do about them, in a few seconds."""
    facts = examine()
    if as_json:
        show_json(facts)
        return
    for section, values in facts.items():
        show(SECTIONS.get(section, section))
        if section == "edgeinfer":
            values = version_lines(values)
        for line in values if isinstance(values, list) else fact_lines(values):
            show(f"  {line}")


def examine() -> dict[str, Any]:
    """Every fact, by section; a list under "advice" says what to do, in order."""
    facts: dict[str, Any] = {
        "edgeinfer": _versions(),
        "python": _python(),
        "platform": _system(),
        "cpu": _cpu(),
        "memory": _memory(),
        "gpu": _gpu(),
        "kernels": _kernels(),
        "models": _models(),
    }
    facts["advice"] = _advice(facts)
    return facts


def _versions() -> dict[str, Any]:
    return {"edgeinfer": _version("edgeinfer"), **{name: _version(name) for name in _PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> dict[str, Any]:
    return {
        "version": _platform.python_version(),
        "implementation": _platform.python_implementation(),
        "executable": sys.executable,
        "in_venv": sys.prefix != sys.base_prefix,
        "free_threaded": not getattr(sys, "_is_gil_enabled", lambda: True)(),
    }


def _system() -> dict[str, Any]:
    libc, version = _platform.libc_ver()
    return {
        "system": _platform.system(),
        "release": _platform.release(),
        "machine": _platform.machine(),
        "libc": f"{libc} {version}".strip() or None,
        "board": platform.board_name(),
        "stdout_encoding": sys.stdout.encoding if sys.stdout else None,
    }


def _cpu() -> dict[str, Any]:
    target = backend.cpu_target()
    return {
        "name": platform.cpu_name(),
        "logical_cpus": os.cpu_count(),
        "threads_used": config.threads() or platform.default_threads(),
        **target,
        "read_gb_s": _bandwidth(),
    }


def _bandwidth() -> float | None:
    """Bytes a second that all threads together read from memory with NumPy's reductions."""
    import numpy as np

    n_threads = config.threads() or platform.default_threads()
    if platform.available_memory() < 2 * _MEASURED_BYTES:
        return None
    parts = np.array_split(np.ones(_MEASURED_BYTES // 8, np.int64), n_threads)
    passes: list[float] = []
    end = time.perf_counter() + _MEASURED_SECONDS
    while not passes or time.perf_counter() < end:
        threads = [threading.Thread(target=part.max) for part in parts]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        passes.append(time.perf_counter() - start)
    return round(_MEASURED_BYTES / min(passes) / 1e9, 1)


def _memory() -> dict[str, Any]:
    return {
        "available_bytes": platform.available_memory(),
        "models_bytes": sum(device.model_room()),
        "generated_code_may_run": platform.can_run_generated_code(),
    }


def _gpu() -> dict[str, Any]:
    driver = platform.cuda_driver()
    if driver is None:
        return {"driver": None, "devices": [], "auto": None, "install": None}
    usable, has_cupy = device.usable_gpus(driver), device.has_cupy()
    return {
        "driver": f"runs CUDA up to {device.cuda_version(driver)}",
        "error": driver.error or None,
        "devices": [
            {
                "name": gpu.name,
                "compute_capability": gpu.compute_capability,
                "memory_bytes": gpu.n_bytes,
            }
            for gpu in driver.devices
        ],
        "nvrtc": [f"of CUDA {library.cuda}" for library in platform.nvrtc_libraries()],
        "auto": [str(device.Device("cuda", index)) for index in usable if has_cupy] or None,
        "fast_numerics": [
            str(device.Device("cuda", i))
            for i in usable
            if device.has_fast_numerics(driver.devices[i])
        ]
        or None,
        "install": device.install_command(driver, usable[0]) if usable and not has_cupy else None,
    }


def _kernels() -> dict[str, Any]:
    folder = config.cache_folder()
    return {
        "folder": str(folder),
        "writable": platform.is_writable(folder),
        "n_objects": len(platform.files_below(folder, "kernels/*/*.o")),
        "n_bytes": platform.bytes_below(folder),
        "can_build": backend.can_build_kernels(),
        "origins": backend.kernel_origins(),
    }


def _models() -> dict[str, Any]:
    here = list_models()
    folders = {"edgeinfer": [models_folder()], **config.model_folders()}
    folder = models_folder()
    return {
        "folder": str(folder),
        "writable": platform.is_writable(config.data_folder()),
        "free_disk_bytes": platform.free_disk(folder),
        "n_models": len(here),
        "default_model": any(info.name == DEFAULT_MODEL for info in here),
        "folders": {
            str(path): sum(path in info.path.parents for info in here)
            for paths in folders.values()
            for path in paths
            if os.path.isdir(path)
        },
        "hub": config.hub_endpoint(),
        "token": config.hub_token() is not None,
        "offline": config.is_offline(),
    }


def _advice(facts: dict[str, Any]) -> list[str]:
    advice = list(gpu_advice())
    if facts["memory"]["generated_code_may_run"] is False:
        advice.append("this system forbids generated code (SELinux execmem?): --device reference")
    if facts["cpu"]["family"] == "generic":
        advice.append("this processor has no AVX2 or its like: expect a third of the usual speed")
    if not facts["kernels"]["can_build"]:
        if facts["kernels"]["origins"]["to_build"]:
            advice.append("this frozen program lacks kernels: freeze it with a released wheel")
    elif not facts["kernels"]["writable"]:
        advice.append("the kernel cache can't be written, every start builds: set EDGEINFER_HOME")
    elif not (facts["kernels"]["origins"]["cached"] or facts["kernels"]["origins"]["ready"]):
        advice.append("no kernels are built yet: the first start takes longer (edgeinfer warmup)")
    best = largest_that_fits(facts["memory"]["models_bytes"])
    if best is not None and facts["models"]["free_disk_bytes"] > best.n_bytes:
        advice.append(f"the largest model of our list that fits: edgeinfer pull {best.name}")
    elif facts["memory"]["models_bytes"] < ALIASES[DEFAULT_MODEL].n_bytes * 4:
        advice.append("memory is short even for the smallest model")
    return advice
