"""pack.<type>: rows of a GGUF tensor into groups of 8.

Knows nothing of a type's blocks beyond their sizes.
"""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.formats import FORMATS as SIZES
from edgeinfer.kernels.cpu.layout import (
    PACK_DST,
    PACK_N_BLOCKS,
    PACK_N_ROWS,
    PACK_PER_CHUNK,
    PACK_SRC,
)
from edgeinfer.kernels.cpu.native.formats import FORMATS
from edgeinfer.kernels.cpu.native.words import set_word, word

jit = njit(error_model="numpy")


def make(isa, type_name):
    file_bytes, packed_bytes = SIZES[type_name].file_bytes, SIZES[type_name].packed_bytes
    pack = FORMATS[type_name].pack

    @jit
    def clear(p, n_bytes):
        for i in range(0, n_bytes, 8):
            set_word(p + i, 0)

    @jit
    def full_group(src, row_bytes, n_blocks, dst):
        for _ in range(n_blocks):
            for lane in range(8):
                pack(src + lane * row_bytes, dst, lane)
            src += file_bytes
            dst += packed_bytes

    @jit
    def short_group(src, row_bytes, n_blocks, dst, n_lanes):
        clear(dst, n_blocks * packed_bytes)
        for _ in range(n_blocks):
            for lane in range(n_lanes):
                pack(src + lane * row_bytes, dst, lane)
            src += file_bytes
            dst += packed_bytes

    def kernel(header, args, chunk, thread):
        n_rows, n_blocks = word(args + PACK_N_ROWS), word(args + PACK_N_BLOCKS)
        per_chunk = word(args + PACK_PER_CHUNK)
        row_bytes, group_bytes = n_blocks * file_bytes, n_blocks * packed_bytes
        first = chunk * per_chunk
        last = min((n_rows + 7) // 8, first + per_chunk)
        for g in range(first, last):
            src = word(args + PACK_SRC) + 8 * g * row_bytes
            dst = word(args + PACK_DST) + g * group_bytes
            if n_rows - 8 * g >= 8:
                full_group(src, row_bytes, n_blocks, dst)
            else:
                short_group(src, row_bytes, n_blocks, dst, n_rows - 8 * g)

    return kernel
