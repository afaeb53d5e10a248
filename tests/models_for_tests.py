"""Small random models for tests, written in milliseconds.

Knows nothing of what the tests do with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .bench.make_model import make_model


def tiny_model(folder: Path, **overrides: Any) -> Path:
    """Write a 2-layer model to `folder`; `overrides` are the keywords of `make_model`.

    Widths are the smallest that the types hold: 64, or 256 where a type of that block is asked for.
    """
    wide = any(mark in overrides.get("quant", "Q4_0") for mark in ("_K", "_XS"))
    shape = dict(dim=256, n_heads=8, ffn_dim=512) if wide else dict(dim=64, n_heads=4, ffn_dim=128)
    options: dict[str, Any] = {"n_kv_heads": 2, "vocab": 320, "n_ctx": 256, **shape, **overrides}
    labels = [f"{key}_{value}" for key, value in overrides.items() if key in _IN_NAME]
    return make_model(folder / f"{'-'.join(['tiny', *labels])}.gguf", **options)


# Keys that tell the files of one test apart.
_IN_NAME = ("arch", "quant", "n_layers", "seed", "tied", "bias", "qk_norm", "rope_freqs")
