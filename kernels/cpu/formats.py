"""How each weight type is packed for the CPU kernels: block sizes, activations, bytes.

Knows nothing of instructions: `native/formats.py` holds the code, host code needs only the sizes.

Packed weights are cut into groups of 8 rows. A group is its blocks in order; a block holds the
same columns of all 8 rows. `[4][8 rows][4]` below is an array of bytes, first index outermost, so
32 bytes hold four bytes of each row: one vector register, one lane per row. A *quad* is four
consecutive elements of a row. Half floats are the file's own.

- q4_0 (32 columns): d half [8 rows] | quants [4][8 rows][4]: the low nibbles of quant vector j are
  quad j, the high nibbles quad 4 + j. q4_1: d | m half [8 rows] | quants.
- q5_0: d | fifth bits [8 rows][4]: bit j of byte k belongs to element k of quad j | quants as in
  q4_0. q5_1: d | m | fifth bits | quants.
- q8_0: d | [8 quads][8 rows][4], every byte 128 more than the file's.
- q4_k (256 columns): d | dmin | scales [8 sub-blocks][8 rows] bytes | mins likewise | for each of 8
  sub-blocks of 32: quants as in q4_0.
- q5_k: d | dmin | scales | mins | for each sub-block: fifth bits, quants as in q5_0.
- q6_k: d | scales int8 [8][8 rows][2], the two bytes for sub-blocks 2i and 2i + 1 | for each of 16
  sub-blocks of 16: nibbles [2][8 rows][4], low nibbles of vector j for quad j, high ones for quad
  2 + j; high bits [8 rows][4], bits 2j and 2j + 1 of byte k for element k of quad j.
- q2_k: d | dmin | [8][8 rows][2] bytes, scale in the low and min in the high nibble | for each of
  16 sub-blocks of 16: [8 rows][4], bits 2j and 2j + 1 of byte k for element k of quad j.
- q3_k: d | scales' low 4 bits [4][8 rows][2], of sub-blocks 2i, 2i + 1 in the low nibbles and of
  8 + 2i, 9 + 2i in the high ones | their high 2 bits [2][8 rows][2], of pair i (sub-blocks 2i and
  2i + 1) in bits 2 (i // 2) of [i % 2] | for each pair: [2][8 rows][4] as in q2_k, third bits
  [8 rows][4], bit 4s + j of byte k for element k of quad j of the pair's sub-block s.
- iq4_nl: as q4_0. iq4_xs (256 columns): d | scales int8 [8 sub-blocks][8 rows] | for each of 8
  sub-blocks of 32: quants as in q4_0. mxfp4 (32 columns): exponents [8 rows] bytes | quants.
- f16, bf16, f32 (4 columns): [8 rows][4] elements; columns that a last block lacks are 0.
"""

from __future__ import annotations

from dataclasses import dataclass

GROUP_ROWS = 8


@dataclass(frozen=True, slots=True)
class Format:
    """One weight type: `block` columns are `file_bytes` per row in the file and `packed_bytes`
    per group of 8 rows in memory; `activation` names the input's layout in `layout.py`."""

    block: int
    file_bytes: int
    packed_bytes: int
    activation: str

    def n_blocks(self, n_cols: int) -> int:
        """Blocks of a row: floats may leave their last one short, ValueError for other types."""
        if self.activation != "f32" and n_cols % self.block:
            raise ValueError(f"{n_cols} columns are not whole blocks of {self.block}")
        return -(-n_cols // self.block)


FORMATS = {
    "q4_0": Format(32, 18, 144, "a32"),
    "q4_1": Format(32, 20, 160, "a32"),
    "q5_0": Format(32, 22, 176, "a32"),
    "q5_1": Format(32, 24, 192, "a32"),
    "q8_0": Format(32, 34, 272, "a32"),
    "q2_k": Format(256, 84, 672, "a32"),
    "q3_k": Format(256, 110, 880, "a32"),
    "q4_k": Format(256, 144, 1184, "a32"),
    "q5_k": Format(256, 176, 1440, "a32"),
    "q6_k": Format(256, 210, 1680, "a32"),
    "iq4_nl": Format(32, 18, 144, "a32"),
    "iq4_xs": Format(256, 136, 1104, "a32"),
    "mxfp4": Format(32, 17, 136, "a32"),
    "f16": Format(4, 8, 64, "f32"),
    "bf16": Format(4, 8, 64, "f32"),
    "f32": Format(4, 16, 128, "f32"),
}


def packed_bytes(type_name: str, n_rows: int, n_cols: int) -> int:
    """Bytes of a packed matrix; rows are padded to whole groups."""
    form = FORMATS[type_name]
    return -(-n_rows // GROUP_ROWS) * form.n_blocks(n_cols) * form.packed_bytes
