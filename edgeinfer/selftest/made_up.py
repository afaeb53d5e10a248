"""Models without a file: tensors of any type and shape, the same bytes on every machine.

Knows nothing of what is computed with them.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgeinfer import quant
from edgeinfer.errors import InvalidModelError
from edgeinfer.graph import Graph, Hparams
from edgeinfer.quant import QuantType, Weight

KindOf: TypeAlias = Callable[[str], QuantType]  # the type of a matrix, by its tensor's name

# Where a block has its half floats, and the root mean square of its values where those are 1.
_HALVES: dict[str, tuple[tuple[int, ...], float]] = {
    "Q4_0": ((0,), 4.6), "Q4_1": ((0, 2), 9), "Q5_0": ((0,), 9.2), "Q5_1": ((0, 2), 18),
    "Q8_0": ((0,), 74), "Q2_K": ((80, 82), 17), "Q3_K": ((108,), 43), "Q4_K": ((0, 2), 320),
    "Q5_K": ((0, 2), 660), "Q6_K": ((208,), 1370), "IQ4_NL": ((0,), 66), "IQ4_XS": ((0,), 1220),
}  # fmt: skip
_MXFP4_EXPONENTS = 119  # and the seven above: values of about 1/16
_REPEATED_BLOCKS = 1 << 14  # of a large tensor, before they come again


class Numbers:
    """Settings of a model by their keys; what is not given is the default. See `Settings`."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = {"attention.layer_norm_rms_epsilon": 1e-5, **given}

    def has(self, name: str) -> bool:
        return name in self._given

    def is_array(self, name: str) -> bool:
        return isinstance(self._given.get(name), tuple)

    def count(self, name: str, default: int | None = None, **options: Any) -> int:
        return int(self._value(name, default, **options))

    def number(self, name: str, default: float | None = None, **options: Any) -> float:
        return float(self._value(name, default, **options))

    def flag(self, name: str, default: bool | None = None, **options: Any) -> bool:
        return bool(self._value(name, default, **options))

    def text(self, name: str, default: str | None = None) -> str:
        return str(self._value(name, default))

    def wrong(self, name: str, value: object, wanted: str) -> NoReturn:
        raise InvalidModelError(f"{name} is {value}, not {wanted}", field=name)

    def unsupported(self, name: str, operation: str) -> NoReturn:
        raise InvalidModelError(f"{operation} is not run", field=name)

    def _value(self, name: str, default: Any, layer: int | None = None, **limits: Any) -> Any:
        value = self._given.get(name, default)
        assert value is not None, f"{name} must be given"
        if not isinstance(value, tuple):
            return value
        assert layer is not None, f"{name} is a number for each layer"
        return value[layer]


class MadeUp(Graph):
    """A graph that finds whatever tensor it asks for, and of those that may be missing some.

    Matrices are of the type that `kind_of` gives, vectors F32. `has_more` matches names of tensors
    that a file may lack. Large tensors repeat themselves where they may (`is_large`), so that they
    take no memory.
    """

    def __init__(
        self,
        hparams: Hparams,
        numbers: Mapping[str, Any],
        kind_of: KindOf,
        has_more: str = "output.weight",
        is_large: bool = False,
    ) -> None:
        super().__init__(hparams, Numbers(numbers), {})
        self._kind_of, self._has_more, self._is_large = kind_of, re.compile(has_more), is_large

    def has(self, name: str) -> bool:
        return self._has_more.fullmatch(name) is not None

    def _weight(self, name: str, *shape: int) -> Weight:
        if name not in self._weights:
            is_matrix = len(shape) > 1 and not name.endswith(".bias")
            kind = self._kind_of(name) if is_matrix else quant.F32
            self._weights[name] = made_up(name, kind, shape, self._is_large)
        return super()._weight(name, *shape)


def made_up(name: str, kind: QuantType, shape: tuple[int, ...], repeats: bool = False) -> Weight:
    """A tensor whose values are drawn by its name: rows of a matrix have a length of about 1."""
    n_blocks = kind.row_bytes(math.prod(shape)) // kind.block_bytes
    n_drawn = min(n_blocks, _REPEATED_BLOCKS) if repeats else n_blocks
    bits = np.random.PCG64(zlib.crc32(name.encode()))
    if kind.block > 1:
        drawn = _blocks(kind, n_drawn, shape, bits)
    else:
        drawn = _floats(name, kind, shape, n_drawn, bits)
    once = memoryview(drawn.tobytes())
    if n_drawn == n_blocks:
        return Weight(name, shape, kind, once)
    return Weight(name, shape, kind, _Repeated(once, kind.block_bytes * n_blocks))


def _floats(
    name: str, kind: QuantType, shape: tuple[int, ...], n: int, bits: np.random.PCG64
) -> NDArray[Any]:
    values = _uniform(n, bits)
    if name.endswith(".bias"):
        values = values / 4
    elif name.endswith(".ssm_a"):  # states fade
        values = (values - 2) / 8
    elif len(shape) == 1:  # of a norm
        values = 1 + values / 4
    else:
        values = values * _size(shape, 0.577)
    floats = values.astype(np.float32)
    if kind is quant.BF16:
        return (floats.view(np.uint32) >> 16).astype(np.uint16)
    return floats.astype(np.float16) if kind is quant.F16 else floats


def _blocks(
    kind: QuantType, n_blocks: int, shape: tuple[int, ...], bits: np.random.PCG64
) -> NDArray[Any]:
    n_words = -(-n_blocks * kind.block_bytes // 8)
    raw = bits.random_raw(n_words).view(np.uint8)[: n_blocks * kind.block_bytes]
    blocks = raw.reshape(n_blocks, kind.block_bytes)
    if kind is quant.MXFP4:
        blocks[:, 0] = _MXFP4_EXPONENTS + blocks[:, 0] % 8
        return blocks
    places, rms = _HALVES[kind.name]
    for at in places:
        halves = (_uniform(n_blocks, bits) * _size(shape, 0.577 * rms)).astype("<f2")
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(n_blocks, 2)
    return blocks


def _size(shape: tuple[int, ...], rms: float) -> float:
    """The factor of values of such a root mean square that makes rows as long as 1."""
    return 1.0 / (rms * math.sqrt(shape[-1]))


def _uniform(n: int, bits: np.random.PCG64) -> NDArray[np.float64]:
    """Numbers from -1 to 1."""
    words: NDArray[np.uint64] = bits.random_raw(n) >> np.uint64(32)
    return words.astype(np.float64) * 2.0**-31 - 1.0


class _Repeated:
    """Bytes that come again and again: see `LazyBytes`."""

    def __init__(self, once: memoryview, n_bytes: int) -> None:
        self._once, self._n_bytes = once, n_bytes

    def __len__(self) -> int:
        return self._n_bytes

    def __getitem__(self, part: slice, /) -> memoryview:
        begin, end, _ = part.indices(self._n_bytes)
        buffer = memoryview(bytearray(max(0, end - begin)))
        self.read_into(buffer, begin)
        return buffer

    def read_into(self, buffer: memoryview, start: int) -> None:
        done = 0
        while done < len(buffer):
            at = (start + done) % len(self._once)
            n = min(len(self._once) - at, len(buffer) - done)
            buffer[done : done + n] = self._once[at : at + n]
            done += n

    def forget(self, start: int, n_bytes: int) -> bool:
        return False
