"""Small random models, and metadata of none, for tests; written in milliseconds.

Knows nothing of what the tests do with them.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeinfer.gguf import GGUFFile, Metadata

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


def metadata_of(values: Mapping[str, Any]) -> Metadata:
    """The metadata of a file with these values: integers of 64 bits, floats, text, and lists."""
    pairs = b"".join(_string(key) + _value(value) for key, value in values.items())
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, len(values)) + pairs)
        file.flush()
        return GGUFFile.open(file.name).metadata


def _value(value: Any) -> bytes:
    if not isinstance(value, (list, tuple)):
        return struct.pack("<I", _kind(value)) + _item(value)
    kind = _kind(value[0]) if value else _STRING
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(map(_item, value))


_STRING, _ARRAY = 8, 9
_FORMS = {
    bool: (7, "?"),
    int: (11, "q"),
    float: (12, "d"),
    str: (_STRING, ""),
    bytes: (_STRING, ""),
}


def _kind(value: Any) -> int:
    return _ARRAY if isinstance(value, (list, tuple)) else _FORMS[type(value)][0]


def _item(value: Any) -> bytes:
    if isinstance(value, (list, tuple)):
        return _value(value)
    if isinstance(value, (str, bytes)):
        return _string(value)
    return struct.pack("<" + _FORMS[type(value)][1], value)


def _string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw
