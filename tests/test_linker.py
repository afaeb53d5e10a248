"""Our linker against LLVM's, and what it refuses; the answer of LLVM that a start remembers."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import pytest

from edgeinfer import platform
from edgeinfer.kernels.cpu import linker, targets
from edgeinfer.kernels.cpu.kept_objects import symbol
from edgeinfer.kernels.cpu.library import Library
from edgeinfer.kernels.cpu.targets import Target
from tests.native import library

KERNELS = ("norm", "swiglu", "team.step", "copy_rows")
PLAIN = Target.host().machine == "x86_64"


def objects() -> dict[str, bytes]:
    lib = library()
    lib.load(KERNELS)
    return lib._find(KERNELS)[0]


@pytest.mark.skipif(not PLAIN, reason="this linker knows x86-64 objects only")
def test_every_kernel_of_this_machine_is_plain() -> None:
    found = objects()
    image, places = linker.lay_out(found)
    assert places.keys() >= {symbol(name) for name in KERNELS}
    assert all(0 <= at < len(image) and at % 16 == 0 for at in places.values())


@pytest.mark.skipif(not PLAIN, reason="this linker knows x86-64 objects only")
def test_laid_out_code_is_what_llvm_would_run() -> None:
    """The same kernel, read back from where each linker has put it."""
    found = {"team.step": objects()["team.step"]}
    n_bytes = size_of("team.step", found["team.step"])  # tables of jumps lie behind, or elsewhere
    ours, llvms = Library(library().target, Path()), Library(library().target, Path())
    ours._link(found)
    llvms._link_with_llvm(found)
    code = [ctypes.string_at(lib.address("team.step"), n_bytes) for lib in (ours, llvms)]
    assert code[0] == code[1]


def size_of(name: str, data: bytes) -> int:
    """Bytes of a kernel's entry, by the object's symbols."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    (n,) = struct.unpack_from("<H", data, 0x3C)
    sections = [struct.unpack_from("<4xI16xQQI", data, table + 64 * i) for i in range(n)]
    offset, size, link = next(section[1:] for section in sections if section[0] == 2)
    for at in range(offset, offset + size, 24):
        (text,) = struct.unpack_from("<I", data, at)
        if data[sections[link][1] + text :].startswith(symbol(name).encode() + b"\0"):
            n_bytes: int = struct.unpack_from("<Q", data, at + 16)[0]
            return n_bytes
    raise AssertionError(f"{name} is not in its object")


def damaged(data: bytes, at: int, form: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, at, value)
    return bytes(changed)


@pytest.mark.skipif(not PLAIN, reason="this linker knows x86-64 objects only")
def test_what_it_does_not_know_is_refused_and_left_to_llvm() -> None:
    data = objects()["norm"]
    (table,) = struct.unpack_from("<Q", data, 0x28)
    (n,) = struct.unpack_from("<H", data, 0x3C)
    headers = [table + 64 * i for i in range(n)]
    relocations = [at for at in headers if struct.unpack_from("<I", data, at + 4)[0] == 4]
    (entries,) = struct.unpack_from("<Q", data, relocations[0] + 24)
    text = next(at for at in headers if struct.unpack_from("<Q", data, at + 8)[0] & 4)
    for bad in (
        b"",
        data[:100],
        data[: len(data) // 2],
        damaged(data, 18, "<H", 183),  # another machine
        damaged(data, entries + 8, "<I", 1),  # an absolute address
        damaged(data, entries, "<Q", 1 << 40),  # outside its section
        damaged(data, entries + 12, "<I", 1 << 20),  # no such symbol
        damaged(data, text + 8, "<Q", 7),  # code that can be written
        damaged(data, text + 32, "<Q", 1 << 50),  # longer than the object
    ):
        with pytest.raises(linker.UnknownObject, match="norm"):
            linker.lay_out({"norm": bad})
    lib = Library(library().target, Path())
    lib._link({"norm": damaged(data, 20, "<I", 1)})  # nothing is wrong with this one
    assert lib.address("norm")


def test_a_system_that_allows_no_code_of_ours_gets_llvms(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(image: bytes) -> None:
        raise OSError("no")

    monkeypatch.setattr(platform, "Code", refuse)
    lib = Library(library().target, Path())
    lib._link({"norm": objects()["norm"]})
    assert lib.address("norm")


@pytest.mark.skipif(platform.processor_facts() is None, reason="this system describes none")
def test_llvm_is_asked_once_about_a_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    answer = targets._ask_llvm()
    monkeypatch.setattr(targets, "_ask_llvm", lambda: asked.append(1) or answer)
    first = Target.host(memory=tmp_path)
    assert Target.host(memory=tmp_path) == first == Target.host()
    assert len(asked) == 2  # the last one was told of no folder
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    for bad in (b"", b"\xff\xfe", good[:-1], good.replace(b"+", b"-", 1), good + b"\nmore"):
        path.write_bytes(bad)
        assert Target.host(memory=tmp_path) == first
        assert path.read_bytes() == good
    assert len(asked) == 7
    monkeypatch.setattr(platform, "processor_facts", lambda: "another processor")
    assert Target.host(memory=tmp_path) == first and len(asked) == 8
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_only_costs_the_question(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert Target.host(memory=blocked / "cache") == Target.host()
