"""Kernels by name and macros, the texts they are made of, and the arguments they take.

A kernel's declaration and its list of variants are read from its .cu text: they stand nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import product
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgeinfer.errors import DeviceError

SYMBOL = "ei_kernel_"
JOINED = "joined"  # the kernel that has others as its parts
_HERE = Path(__file__).parent
_WORD = re.compile(r"-?\w+")


class Kernel(NamedTuple):
    """A variant of a kernel: the name of its .cu file, and macros with their values, by name.

    `JOINED` has others as its `parts`.
    """

    name: str
    defines: tuple[tuple[str, str], ...] = ()
    parts: tuple[Kernel, ...] = ()

    @classmethod
    def of(cls, name: str, **defines: str | int) -> Kernel:
        """`Kernel.of("matmul", TYPE="Q4_0", WARPS=4)`: matmul.cu with -DTYPE=Q4_0 -DWARPS=4."""
        values = {macro: str(index(v) if isinstance(v, int) else v) for macro, v in defines.items()}
        for word in (name, *values.values()):
            if not _WORD.fullmatch(word):
                raise ValueError(f"{word!r} is neither a name nor an integer")
        return cls(name, tuple(sorted(values.items())))

    @property
    def flags(self) -> list[str]:
        """A compiler's flags that choose this variant."""
        return [f"-D{macro}={value}" for macro, value in self.defines]

    @property
    def label(self) -> str:
        """What its files are called after: "matmul.TYPE=Q4_0.WARPS=4"."""
        if self.parts:
            labels = " ".join(part.label for part in self.parts)
            return f"{self.name}.{sha256(labels.encode()).hexdigest()[:24]}"
        return ".".join([self.name, *(f"{macro}={value}" for macro, value in self.defines)])

    def __str__(self) -> str:
        values = ", ".join(f"{macro}={value}" for macro, value in self.defines)
        values = values or ", ".join(map(str, self.parts))
        return f"{self.name}({values})" if values else self.name


class Parameter(NamedTuple):
    """A parameter of a kernel, with its type in C."""

    name: str
    type: str

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint64 if self.type.endswith("*") else _SCALARS[self.type])

    def convert(self, value: Any, kernel: str) -> np.generic:
        """The value as C takes it; TypeError or ValueError where it is none of this type."""
        what = f"{self.name} of kernel {kernel} is {self.type}, not {value!r}"
        kinds = _INTEGERS if self.dtype.kind != "f" else (*_INTEGERS, float, np.floating)
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, kinds):
            raise TypeError(what)
        if self.dtype.kind == "f":
            with np.errstate(over="ignore"):
                converted: np.generic = self.dtype.type(value)
            is_in_range = bool(np.isfinite(converted)) or not np.isfinite(value)
        else:
            limits = np.iinfo(self.dtype)
            is_in_range = limits.min <= int(value) <= limits.max
            converted = self.dtype.type(int(value) if is_in_range else 0)
        if not is_in_range:
            raise ValueError(f"{what}: it is out of range")
        return converted


_INTEGERS = (int, np.integer)
_SCALARS = {
    "int": np.int32,
    "unsigned": np.uint32,
    "long long": np.int64,
    "float": np.float32,
    "double": np.float64,
}


class Signature(NamedTuple):
    """The parameters of a kernel, in order."""

    kernel: str
    parameters: tuple[Parameter, ...]

    @classmethod
    def parse(cls, name: str, text: str) -> Signature:
        """Read `EI_KERNEL(THREADS) name(const Step* step, ...) {` in the text of a kernel."""
        found = DECLARATION.findall(_COMMENT.sub("", text))
        if len(found) != 1 or found[0][0] != name:
            names = ", ".join(each[0] for each in found) or "none"
            raise DeviceError(
                f"{name}.cu must have one line `EI_KERNEL(THREADS) {name}(const Step* step, ...) "
                f"{{`; the kernels it declares: {names}"
            )
        parameters = tuple(_parameter(name, each) for each in found[0][1].split(","))
        if parameters[0] != ("step", "const Step*"):
            raise DeviceError(f"{name}.cu: the first parameter must be `const Step* step`")
        return cls(name, parameters)

    def pack(self, args: Mapping[str, Any]) -> tuple[np.generic, ...]:
        """Arguments in order, as C takes them: TypeError where one is missing, unknown or wrong."""
        names = [each.name for each in self.parameters]
        missing = [name for name in names if name not in args]
        unknown = [name for name in args if name not in names]
        if missing or unknown:
            raise TypeError(
                f"kernel {self.kernel} takes {', '.join(names)}; missing: "
                f"{', '.join(missing) or 'none'}, unknown: {', '.join(unknown) or 'none'}"
            )
        return tuple(each.convert(args[each.name], self.kernel) for each in self.parameters)


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
DECLARATION = re.compile(r"^EI_KERNEL\([^\n]*\)\s+(\w+)\(([^()]*)\)\s*\{", re.MULTILINE)
_PARAMETER = re.compile(r"((?:const )?\w+\*|" + "|".join(_SCALARS) + r") (\w+)")


def _parameter(kernel: str, text: str) -> Parameter:
    found = _PARAMETER.fullmatch(" ".join(text.split()))
    if found is None:
        kinds = ", ".join(_SCALARS)
        raise DeviceError(
            f"{kernel}.cu: parameter `{text.strip()}` is neither `const Type* name`, `Type* name` "
            f"nor one of {kinds}"
        )
    return Parameter(found[2], found[1])


class Sources:
    """The texts of kernels: .cu, .cuh and .h files of some folders and of this one, in this order.

    Headers are included at the top of a file, under no condition.
    """

    def __init__(self, *folders: Path) -> None:
        self._folders = (*folders, _HERE)

    def names(self) -> list[str]:
        """Every kernel there is."""
        return sorted({path.stem for folder in self._folders for path in folder.glob("*.cu")})

    def signature(self, kernel: Kernel) -> Signature:
        """DeviceError where the variant has other macros than those that are listed."""
        listed = self.variants(kernel.name)
        macros = [macro for macro, _ in kernel.defines]
        if not any([macro for macro, _ in each.defines] == macros for each in listed):
            raise DeviceError(
                f"{kernel} has other macros than the variants that {kernel.name}.cu lists, such "
                f"as {listed[0]}"
            )
        return Signature.parse(kernel.name, self._read(f"{kernel.name}.cu"))

    def kernel_text(self, kernel: Kernel) -> str:
        """The text of a kernel as a compiler takes it; in it, the kernel is called `SYMBOL` name.

        CUDA has functions of its own that are called `norm` or `exp`.
        """
        seen = set[str]()
        text = "\n".join(self._lines(f"{kernel.name}.cu", seen)) + "\n"
        text = _HEAD.sub(rf"\g<1>{SYMBOL}\g<2>(", text)
        if kernel.name == JOINED:
            text += "\n".join(self._parts(kernel.parts, seen)) + "\n"
        return text

    def _parts(self, parts: Sequence[Kernel], seen: set[str]) -> Iterator[str]:
        """Kernels as functions, each in a namespace of its own, and `ei_run_part` of joined.cuh.

        Headers that are not yet `seen` come before each.
        """
        calls = []
        for i, part in enumerate(parts):
            lines = self._read(f"{part.name}.cu").splitlines()
            for found in filter(None, map(_INCLUDE.fullmatch, lines)):
                if found[1] not in seen:
                    yield from self._lines(found[1], seen)
            body = "\n".join("" if _INCLUDE.fullmatch(line) else line for line in lines)
            body = _HEAD.sub(r"EI_DEV void \g<2>(", body)
            yield from (f"#define {macro} {value}" for macro, value in part.defines)
            yield f"namespace part_{i} {{"
            yield f'#line 1 "{part.name}.cu"'
            yield body.replace("EI_SHARED(", "EI_SHARED_OF_PART(")
            yield "}"
            yield from (f"#undef {macro}" for macro, _ in part.defines)
            types = [each.type for each in self.signature(part).parameters]
            args = [f"ei_argument<{each}>(call.arguments, {n})" for n, each in enumerate(types)]
            calls.append(f"case {i}: part_{i}::{part.name}({', '.join(args)}); break;")
        yield from ("EI_DEV void ei_run_part(const Call& call) {", "switch (call.kernel) {")
        yield from (*calls, "}", "}")

    def variants(self, name: str) -> list[Kernel]:
        """The usual variants: `// Variants: TYPE = Q4_0 Q4_1; WARPS = 1 4` in its text.

        Each such comment is one product; it may go on in comments that are indented by three
        spaces. Without one there is one variant, of no macros.
        """
        found = [
            Kernel.of(name, **dict(zip(macros, values, strict=True)))
            for comment in _VARIANTS.findall(self._read(f"{name}.cu"))
            for macros, choices in [_choices(name, comment.replace("\n//", " "))]
            for values in product(*choices)
        ]
        return list(dict.fromkeys(found)) or [Kernel(name)]

    def flat(self, file: str) -> str:
        """A file's text with that of all headers in it, each once."""
        return "\n".join(self._lines(file, set())) + "\n"

    def _lines(self, file: str, seen: set[str]) -> Iterator[str]:
        seen.add(file)
        yield f'#line 1 "{file}"'
        for number, line in enumerate(self._read(file).splitlines(), 1):
            included = _INCLUDE.fullmatch(line)
            if included is None:
                yield "" if line.strip() == "#pragma once" else line
                continue
            if included[1] not in seen:
                yield from self._lines(included[1], seen)
            yield f'#line {number + 1} "{file}"'

    def _read(self, file: str) -> str:
        for folder in self._folders:
            path = folder / file
            if path.is_file():
                return path.read_text("utf-8")
        folders = ", ".join(map(str, self._folders))
        raise DeviceError(f"there is no {file} in {folders}")


_HEAD = re.compile(r"^(EI_KERNEL\([^\n]*\)\s+)(\w+)\(", re.MULTILINE)
_INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)".*')
_VARIANTS = re.compile(r"^// Variants:(.*(?:\n//   .*)*)", re.MULTILINE)


def _choices(kernel: str, comment: str) -> tuple[list[str], list[list[str]]]:
    """Macros, and the values of each, of `A = 1 2; B = 3`."""
    macros, choices = [], []
    for part in comment.split(";"):
        macro, equals, values = part.partition("=")
        if not (equals and macro.strip().isidentifier() and values.split()):
            raise DeviceError(f"{kernel}.cu: `{part.strip()}` is not `MACRO = value value ...`")
        macros.append(macro.strip())
        choices.append(values.split())
    return macros, choices
