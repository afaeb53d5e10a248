"""Reads object files as far as it takes to see what they expect others to define.

Knows the two formats that LLVM's linker loads: ELF, on Windows too, and Mach-O.
"""

from __future__ import annotations

import struct

_ELF, _MACH_O = b"\x7fELF\x02\x01", b"\xcf\xfa\xed\xfe"  # 64 bits, little-endian
_SHT_SYMTAB = 2
_LC_SYMTAB = 2
_MACH_O_DEBUG, _MACH_O_TYPE = 0xE0, 0x0E  # bits of a symbol's type


def undefined_symbols(data: bytes) -> list[str]:
    """What a 64-bit little-endian object leaves to others; ValueError for any other format."""
    try:
        if data.startswith(_ELF):
            return _elf(data)
        if data.startswith(_MACH_O):
            return _mach_o(data)
    except struct.error as error:
        raise ValueError(f"a damaged object: {error}") from error
    raise ValueError(f"an object that is neither ELF nor Mach-O: {data[:4]!r}")


def _elf(data: bytes) -> list[str]:
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry_bytes, n = struct.unpack_from("<HH", data, 0x3A)
    # type, offset, size and link of every section
    sections = [struct.unpack_from("<4xI16xQQI", data, table + entry_bytes * i) for i in range(n)]
    found = []
    for kind, offset, size, link in sections:
        if kind != _SHT_SYMTAB:
            continue
        for at in range(offset + 24, offset + size, 24):  # the first stands for no symbol
            name, section = struct.unpack_from("<I2xH", data, at)
            if section == 0:
                found.append(_text(data, sections[link][1] + name))
    return found


def _mach_o(data: bytes) -> list[str]:
    (n_commands,) = struct.unpack_from("<I", data, 16)
    found, at = [], 32
    for _ in range(n_commands):
        command, n_bytes = struct.unpack_from("<II", data, at)
        if command == _LC_SYMTAB:
            offset, n, names = struct.unpack_from("<III", data, at + 8)
            for symbol in range(offset, offset + 16 * n, 16):
                name, kind = struct.unpack_from("<IB", data, symbol)
                if not kind & (_MACH_O_DEBUG | _MACH_O_TYPE):
                    found.append(_text(data, names + name))
        at += n_bytes
    return found


def _text(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()
