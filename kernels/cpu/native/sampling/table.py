"""The sample table, whose fields kernels read by name: their offsets and types are its own.

`param(row, "top_p")` is a field of one row, `output(table, "ids")` the address of an array.
"""

from __future__ import annotations

from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from edgeinfer.kernels.cpu.native.simd import F64, I64, load_ir
from edgeinfer.sampling.params import ARRAYS, ROW


def _reader(record):
    """`read(address, name)` of a record whose fields are words and doubles."""

    @intrinsic(prefer_literal=True)
    def read(typingctx, address, name):
        if not isinstance(name, types.StringLiteral):
            return None
        if name.literal_value not in record.fields:
            raise TypingError(f"a sample table has no {name.literal_value!r}")
        kind, offset = record.fields[name.literal_value]
        is_float = kind.kind == "f"

        def codegen(context, builder, signature, values):
            p = builder.add(values[0], I64(offset))
            return load_ir(builder, p, F64 if is_float else I64, 8)

        return (types.float64 if is_float else types.intp)(types.intp, name), codegen

    return read


param = _reader(ROW)
output = _reader(ARRAYS)
