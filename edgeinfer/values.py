"""How values that callers give are read: each to the type that is used, or ValueError.

Knows no keyword: `parameters` says which of them takes what.
"""

from __future__ import annotations

import contextlib
import math
import os
import reprlib
from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from edgeinfer.errors import InvalidRequestError

MOST_BREAKERS, LONGEST_BREAKER = 32, 128  # texts, characters
MOST_IDS = 1 << 24  # more than any context holds; copied they take 0.7 GB
CACHE_TYPES = ("f16", "q8_0", "q4_0")
_INT32, _INT64 = 2**31 - 1, 2**63 - 1
_UNITS = {"": 1, "B": 1, "%": 1} | {
    letter + ending: 1 << 10 * n for n, letter in enumerate("KMGT", 1) for ending in ("", "B", "IB")
}
_UNIT_LETTERS = "KMGTIBkmgtib%"
_MAKES_ITERATORS = 0x2A0  # inspect's CO_GENERATOR, CO_COROUTINE and CO_ASYNC_GENERATOR


def integer(value: Any) -> int:
    """A whole number of Python or NumPy; True and 60.0 are none."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError
    return int(value)


def number(value: Any) -> float:
    """A finite number of Python or NumPy."""
    checked = _real(value)
    if not math.isfinite(checked):
        raise ValueError
    return checked


def positive(value: Any) -> float:
    checked = number(value)
    if checked <= 0:
        raise ValueError
    return checked


def switch(value: Any) -> bool:
    # NumPy's booleans are no bool, and what they are registered as differs by version.
    if not isinstance(value, bool) and type(value).__name__ not in ("bool_", "bool"):
        raise ValueError
    return bool(value)


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def texts(value: Any) -> tuple[str, ...]:
    """Several texts, none empty; they can be gone through again, so no generator."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Collection):
        raise ValueError
    if not all(isinstance(each, str) and each for each in value):
        raise ValueError
    return tuple(value)


def breakers(value: Any) -> tuple[str, ...]:
    """Texts, few and short: each is looked for in all of a vocabulary."""
    found = texts(value)
    if len(found) > MOST_BREAKERS or any(len(each) > LONGEST_BREAKER for each in found):
        raise ValueError
    return found


def text_or_texts(value: Any) -> tuple[str, ...]:
    return texts((value,) if isinstance(value, str) else value)


def id_set(value: Any) -> frozenset[int]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Collection):
        raise ValueError
    if len(value) > MOST_IDS:
        raise ValueError
    checked = frozenset(map(integer, value))
    if any(not 0 <= token <= _INT32 for token in checked):
        raise ValueError
    return checked


def biases(value: Any) -> dict[int, float]:
    """What is added to a token's logit, by id; infinities ban and force."""
    if not isinstance(value, Mapping) or len(value) > MOST_IDS:
        raise ValueError
    checked = {integer(token): _real(bias) for token, bias in value.items()}
    if any(not 0 <= token <= _INT32 or math.isnan(bias) for token, bias in checked.items()):
        raise ValueError
    return checked


def memory_size(value: Any) -> int | str:
    """Bytes, or a text that `parse_memory` reads."""
    size = value if isinstance(value, str) else int(_real(value))
    parse_memory(size, 0)
    return size


def layer_count(value: Any) -> int | str:
    """A number of layers, -1 for all, or "auto"; a flag spells it as text."""
    if isinstance(value, str):
        return value if value == "auto" else layer_count(int(value))
    if not -1 <= (n_layers := integer(value)) <= _INT32:
        raise ValueError
    return n_layers


def cache_types(value: Any) -> tuple[str, str]:
    """The types of K and of V, from one for both or from two."""
    k_type, v_type = (value, value) if isinstance(value, str) else texts(value)
    if not {k_type, v_type} <= set(CACHE_TYPES):
        raise ValueError
    return k_type, v_type


def layers(value: Any) -> tuple[int, ...]:
    """Numbers of layers, each once, ascending."""
    return tuple(sorted(id_set(value)))


def watched(value: Any) -> tuple[str | int, ...]:
    """Names of what steps yield, and numbers of layers."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Collection):
        raise ValueError
    if len(value) > MOST_IDS:
        raise ValueError
    names = [each for each in value if isinstance(each, str)]
    if not len(value) or not set(names) <= {"logits", "hidden"}:
        raise ValueError
    return (*sorted(set(names)), *layers([each for each in value if not isinstance(each, str)]))


def schema(value: Any) -> Any:
    """What may be a JSON schema: `text.grammar` says whether it is."""
    if not isinstance(value, (str, bool, Mapping, type)) and not hasattr(value, "__origin__"):
        raise ValueError
    return value


def function(value: Any) -> Callable[..., Any]:
    """What does something when it is called: a coroutine or a generator would only be made."""
    if not callable(value):
        raise ValueError
    called = value
    while isinstance(called, partial):
        called = called.func
    if not hasattr(called, "__code__"):  # an object, not a function of Python's
        called = type(called).__call__
    flags = getattr(getattr(called, "__code__", None), "co_flags", 0)
    if flags & _MAKES_ITERATORS:
        raise ValueError
    checked: Callable[..., Any] = value
    return checked


def _real(value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError
    return float(value)


def is_same(value: Any, expected: Any) -> bool:
    """Whether a value out of a file is this one: True and 1.0 are equal to 1, and another."""
    return type(value) is type(expected) and bool(value == expected)


def is_plain(text: str) -> bool:
    """Whether Python reads no number out of a text that nobody meant: 10 out of 1_0, or ٣."""
    return text.isascii() and "_" not in text


def parse_memory(value: int | str, available: int) -> int:
    """Bytes from a count, "512M", "2 GiB" or "80%" of `available`."""
    text = str(value).strip()
    number = text.rstrip(_UNIT_LETTERS)
    unit = text[len(number) :].upper()
    if unit not in _UNITS or not is_plain(number):
        raise ValueError
    size = float(number) * _UNITS[unit]
    if unit == "%":
        if not 0 < size <= 100:
            raise ValueError
        return int(available * size / 100)
    if not 1 <= size < 2**60:
        raise ValueError
    return int(size)


def id_list(
    value: Any, param: str, check_length: Callable[[int], object] | None = None
) -> list[int]:
    """Token ids from a list, a range or an array; InvalidRequestError for anything else.

    How many there are is told to `check_length`, which may raise, before they are copied.
    """
    n_ids = _n_items(value)
    if n_ids is not None:
        if check_length is not None:
            check_length(n_ids)
        if n_ids > MOST_IDS:
            raise InvalidRequestError(
                f"{param} has {n_ids:,} ids; at most {MOST_IDS:,} are taken", param=param
            )
        with contextlib.suppress(TypeError, ValueError, OverflowError, MemoryError):
            ids = list(islice(value, n_ids + 1))  # whatever it says of its length
            if not all(type(id) is int for id in ids):
                ids = [integer(id) for id in ids]
            if len(ids) == n_ids and (not ids or -_INT64 <= min(ids) <= max(ids) <= _INT64):
                return ids
    kind = "text or a list of token ids" if param == "prompt" else "a list of token ids"
    raise InvalidRequestError(f"{param} is {shown(value)}; it must be {kind}", param=param)


def file_path(value: Any, param: str) -> Path:
    """A path that a system can take; InvalidRequestError for anything else."""
    with contextlib.suppress(TypeError, ValueError):
        text = os.fspath(value)
        if isinstance(text, str) and text and b"\0" not in os.fsencode(text):
            return Path(text)
    raise InvalidRequestError(f"{param} is {shown(value)}; it must be a path", param=param)


def _n_items(value: Any) -> int | None:
    """The length of a list, a range or an array, None for anything else."""
    is_text = isinstance(value, (str, bytes, bytearray, memoryview, Mapping))
    if is_text or not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        return None
    try:
        return len(value)
    except (TypeError, ValueError, OverflowError):
        return None


def shown(value: Any) -> str:
    """A value in an error: short, whatever it is."""
    try:
        return _SHORT.repr(value)
    except Exception:  # an integer of 5,000 digits has no repr
        return f"a value of type {type(value).__name__}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
