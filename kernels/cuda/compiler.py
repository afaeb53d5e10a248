"""Makes shared libraries of kernels' texts with g++, and keeps them in a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from edgeinfer import platform
from edgeinfer.errors import DeviceError, reason_of
from edgeinfer.kernels.cuda.cache import Cache, key_of
from edgeinfer.kernels.cuda.device import Progress

_COMPILERS = ("g++", "c++", "clang++")
_FLAGS = ("-std=c++17", "-shared", "-fPIC", "-w", "-x", "c++", "-", "-U_FORTIFY_SOURCE")
_KERNEL_FLAGS = (
    "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing", "-fno-threadsafe-statics",
    "-fno-exceptions", "-fvisibility=hidden",
)  # fmt: skip


class Compiler:
    """The compiler of this machine; DeviceError where there is none, or others can write there."""

    def __init__(self, folder: Path) -> None:
        program = next(filter(None, map(platform.find_program, _COMPILERS)), None)
        if program is None:
            raise DeviceError(
                "the shim compiles kernels with g++, and there is none in PATH: install g++ "
                "(Debian, Ubuntu: apt install g++; macOS: xcode-select --install)"
            )
        self._program = program
        self._cache = Cache(folder)

    def libraries(
        self, texts: Mapping[str, str], flags: Sequence[str], progress: Progress | None = None
    ) -> dict[str, Path]:
        """The library of each text, compiled now where it is not there, several at a time.

        DeviceError where one can't be compiled, or kept.
        """
        try:
            return self._libraries(texts, flags, progress)
        except OSError as error:  # it can't be started, or has no room for what it writes
            raise DeviceError(f"{self._program} can't be run: {reason_of(error)}") from error

    def _libraries(
        self, texts: Mapping[str, str], flags: Sequence[str], progress: Progress | None
    ) -> dict[str, Path]:
        version = _version(self._program)
        keys = {label: key_of(text, version, *flags) for label, text in texts.items()}
        found = {label: self._cache.find(label, keys[label], ".so") for label in texts}
        paths = {label: path for label, path in found.items() if path is not None}
        missing = [label for label in texts if label not in paths]
        if not missing:
            return paths
        made = platform.mapped(
            lambda label: self._compile(label, texts[label], flags),
            missing,
            platform.usable_processors(),
        )
        for n_done, (label, data) in enumerate(zip(missing, made, strict=True)):
            if progress:
                progress(n_done, len(missing), label)
            paths[label] = self._cache.add(label, keys[label], ".so", data)
        return paths

    def _compile(self, label: str, text: str, flags: Sequence[str]) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "library.so"
            said = Path(folder) / "said"
            command = [self._program, *_FLAGS, *flags, "-o", str(library)]
            with open(said, "wb") as errors:
                # It ends by itself, and starts 20 ms sooner than one that would end with us.
                with platform.start_program(command, errors=errors, ends_with_us=False) as process:
                    process.communicate(text)
            if process.returncode != 0:
                raise DeviceError(
                    f"{self._program} can't compile {label}: "
                    f"{said.read_text('utf-8', 'replace').strip()[:1500]}"
                )
            return library.read_bytes()


def kernel_flags() -> list[str]:
    """Nothing here contracts or reorders arithmetic, or takes a pointer's type for a promise."""
    facts = (platform.processor_facts() or "").split()
    # Without it, x86-64 calls a function for every fused multiply-add.
    return [*_KERNEL_FLAGS, "-mfma"] if "fma" in facts else [*_KERNEL_FLAGS]


@cache
def _version(program: str) -> str:
    """A compiler's version and the machine it compiles for."""
    with platform.start_program([program, "--version"], ends_with_us=False) as process:
        said, _ = process.communicate()
    return str(said)
