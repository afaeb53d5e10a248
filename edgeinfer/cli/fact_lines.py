"""Facts about a file or this machine as lines for people; `--json` has them by their keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeinfer.terminal import one_line

_MAX_SHOWN = 2000  # characters of a fact

SECTIONS = {
    "edgeinfer": "packages",
    "python": "Python",
    "platform": "system",
    "cpu": "processor",
    "gpu": "GPU",
}
# What a key with spaces for underscores would not tell.
_LABELS = {
    "in_venv": "in a virtual environment",
    "free_threaded": "without a global lock",
    "libc": "C library",
    "stdout_encoding": "encoding of the output",
    "logical_cpus": "processors",
    "family": "instruction set",
    "llvm_name": "called by LLVM",
    "read_gb_s": "memory is read at",
    "available_bytes": "free",
    "models_bytes": "for models, if nothing else is said",
    "driver": "NVIDIA driver",
    "nvrtc": "NVRTC, which compiles kernels",
    "auto": "taken by --device auto, the later ones where a model needs them",
    "install": "to use it",
    "n_objects": "built files",
    "can_build": "can be built here",
    "origins": "kernels",
    "free_disk_bytes": "free disk",
    "n_models": "models found",
    "default_model": "the default model is here",
    "folders": "looked in",
    "token": "token for the hub",
    "path": "file",
    "n_bytes": "size",
    "n_tensors": "tensors",
    "n_params": "parameters",
    "n_layers": "layers",
    "dim": "width",
    "n_heads": "attention heads",
    "n_kv_heads": "heads of keys and values",
    "head_dim": "width of a head",
    "window": "window of each layer, 0 for none",
    "ffn_dim": "width of the feed-forward layers",
    "n_experts": "experts",
    "n_experts_used": "experts of a token",
    "vocab_size": "vocabulary",
    "n_ctx_train": "trained for a context of",
    "pre": "pre-tokenizer",
    "license": "licence",
}
_COUNTED = {"vocab_size": " tokens", "n_ctx_train": " tokens"}
_ABSENT = {"license": "not named", "pre": "not named", "board": "not known", "libc": "not known"}
_ONLY_IF_THERE = ("error", "auto", "install")
_ORIGINS = {
    "cached": "built before",
    "ready": "came with the package",
    "to_build": "to build once they are needed",
}


def fact_lines(facts: Mapping[str, Any]) -> list[str]:
    """A line for each fact, and one for each item of what is kept by folder."""
    lines = []
    for key, value in facts.items():
        if key == "reason" or (key in _ONLY_IF_THERE and value is None):
            continue
        label = _LABELS.get(key, key.replace("_", " "))
        if key == "folders":
            lines.append(f"{label}:{'' if value else ' none'}")
            lines += [f"  {_clean(name)}: {_models(n)}" for name, n in value.items()]
        elif key == "version" and "n_tensors" in facts:
            lines.append(f"GGUF version: {value}")
        elif key == "runs" and not value:
            lines.append(f"runs: no; {_clean(facts['reason'])}")
        else:
            lines.append(f"{label}: {_clean(_text(key, value))}")
    return lines


def version_lines(versions: Mapping[str, str | None]) -> list[str]:
    """A line for each package."""
    return [f"{_clean(name)}: {version or 'not installed'}" for name, version in versions.items()]


def _text(key: str, value: Any) -> str:
    if value is None or value == [] or value == "":
        return _ABSENT.get(key, "none")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("bytes"):
        return _size(value)
    if key == "n_params":
        return f"{value / 1e9:.2f} billion" if value >= 1e9 else f"{value / 1e6:.1f} million"
    if key.endswith("_gb_s"):
        return f"{value} GB/s"
    if key == "origins":
        return ", ".join(f"{value[name]} {what}" for name, what in _ORIGINS.items())
    if key == "devices":
        return "; ".join(map(_gpu, value))
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, int):
        return f"{value:,}{_COUNTED.get(key, '')}"
    return str(value)


def _gpu(device: Mapping[str, Any]) -> str:
    capability = f"compute capability {device['compute_capability']}"
    return f"{device['name']}, {capability}, {_size(device['memory_bytes'])}"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def _models(n: int) -> str:
    return f"{n} model{'' if n == 1 else 's'}"


def _clean(value: object) -> str:
    return one_line(str(value), _MAX_SHOWN)
