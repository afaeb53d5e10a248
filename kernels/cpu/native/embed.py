"""embed.<type>: rows of a packed matrix as floats, for the token embedding.

Knows nothing of tokens beyond their ids.
"""

from __future__ import annotations

from edgeinfer.kernels.cpu.formats import FORMATS as SIZES
from edgeinfer.kernels.cpu.layout import (
    EMBED_DIM,
    EMBED_N_BLOCKS,
    EMBED_OUT,
    EMBED_STRIDE,
    EMBED_W,
    H_IDS,
)
from edgeinfer.kernels.cpu.native.formats import FORMATS
from edgeinfer.kernels.cpu.native.sink import clear_behind
from edgeinfer.kernels.cpu.native.words import load_i32, store_f32, word


def make(isa, type_name):
    block, packed_bytes = SIZES[type_name].block, SIZES[type_name].packed_bytes
    value = FORMATS[type_name].value

    def kernel(header, args, chunk, thread):
        row = load_i32(word(header + H_IDS) + 4 * chunk)
        n_blocks = word(args + EMBED_N_BLOCKS)
        p = word(args + EMBED_W) + (row >> 3) * n_blocks * packed_bytes
        out = word(args + EMBED_OUT) + chunk * word(args + EMBED_STRIDE)
        left = word(args + EMBED_DIM)
        clear_behind(out, left)
        while left > 0:
            for k in range(min(left, block)):
                store_f32(out + 4 * k, value(p, k, row & 7))
            p += packed_bytes
            out += 4 * block
            left -= block

    return kernel
