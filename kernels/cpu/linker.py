"""Lays compiled kernels out in one image of machine code, as far as they are of the plainest kind.

That is what LLVM makes of a kernel for x86-64 systems with ELF objects: code and constants that
refer to each other by distance. Whatever else an object holds is refused, and left to LLVM's own
linker: importing that takes a tenth of a start. Knows kernels by name only.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

_MAGIC, _X86_64, _RELOCATABLE = b"\x7fELF\x02\x01", 62, 1
_PROGBITS, _SYMTAB, _RELA, _REL = 1, 2, 4, 9
_WRITE, _ALLOC, _TLS = 1, 2, 0x400  # flags of a section
_UNWIND = 0x70000001  # a section for debuggers and exceptions
_PC32 = 2  # the one relocation: 32 bits, the distance to a symbol
_FUNCTION = 2  # a symbol's type

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_INT32 = struct.Struct("<i")


class UnknownObject(Exception):
    """An object holds something that this linker does not know."""


class _Section(NamedTuple):
    type: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    align: int


def lay_out(objects: Mapping[str, bytes]) -> tuple[bytes, dict[str, int]]:
    """The image, which runs at any address of a page, and where in it each symbol lies."""
    image, symbols = bytearray(), dict[str, int]()
    for name, data in objects.items():
        try:
            symbols |= _add(image, data)
        except (struct.error, IndexError) as error:
            raise UnknownObject(f"kernel {name}: {error}") from error
        except UnknownObject as error:
            raise UnknownObject(f"kernel {name}: {error}") from None
    return bytes(image), symbols


def _add(image: bytearray, data: bytes) -> dict[str, int]:
    """Append an object's code and constants; where its global functions lie."""
    sections = _sections(data)
    places: dict[int, int] = {}  # of the sections that are in the image, by number
    for i, section in enumerate(sections):
        if section.flags & _ALLOC and section.type != _UNWIND:
            if section.type != _PROGBITS or section.flags & (_WRITE | _TLS):
                raise UnknownObject(f"a section of type {section.type:#x}, {section.flags:#x}")
            image += bytes(-len(image) % max(section.align, 1))
            places[i] = len(image)
            image += _bytes(data, section)
    for section in sections:
        if section.type in (_RELA, _REL) and section.info in places:
            if section.type == _REL:
                raise UnknownObject("relocations without addends")
            size = sections[section.info].size
            _relocate(image, data, sections, places, section, size)
    return {
        _name(data, sections[table.link], name): places[home] + value
        for table in sections
        if table.type == _SYMTAB
        for name, info, _, home, value, _ in _SYMBOL.iter_unpack(_bytes(data, table))
        if info & 15 == _FUNCTION and info >> 4 and home in places
    }


def _sections(data: bytes) -> list[_Section]:
    kind, machine = struct.unpack_from("<HH", data, 16)
    if not data.startswith(_MAGIC) or (kind, machine) != (_RELOCATABLE, _X86_64):
        raise UnknownObject("not a relocatable x86-64 ELF object")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry_bytes, n = struct.unpack_from("<HH", data, 0x3A)
    sections = []
    for at in range(table, table + n * entry_bytes, entry_bytes):
        _, type, flags, _, offset, size, link, info, align, _ = _SECTION.unpack_from(data, at)
        sections.append(_Section(type, flags, offset, size, link, info, align))
    return sections


def _relocate(
    image: bytearray,
    data: bytes,
    sections: list[_Section],
    places: Mapping[int, int],
    section: _Section,
    size: int,
) -> None:
    """Write the distances that the code of one section is waiting for."""
    base = places[section.info]
    symbols = list(_SYMBOL.iter_unpack(_bytes(data, sections[section.link])))
    for offset, info, addend in _RELOCATION.iter_unpack(_bytes(data, section)):
        _, _, _, home, value, _ = symbols[info >> 32]
        if info & 0xFFFFFFFF != _PC32 or home not in places or offset + 4 > size:
            raise UnknownObject(f"relocation {info:#x} at {offset:#x}")
        at = base + offset
        _INT32.pack_into(image, at, places[home] + value + addend - at)


def _bytes(data: bytes, section: _Section) -> bytes:
    end = section.offset + section.size
    if end > len(data):
        raise UnknownObject(f"a section ends at {end}, the object at {len(data)}")
    return data[section.offset : end]


def _name(data: bytes, names: _Section, at: int) -> str:
    start = names.offset + at
    return data[start : data.index(b"\0", start)].decode()
