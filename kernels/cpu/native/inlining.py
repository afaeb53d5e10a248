"""Which functions of a kernel stay functions: the builder inlines all others."""

from __future__ import annotations

from numba import types
from numba.extending import intrinsic


@intrinsic
def not_inlined(typingctx):
    """Keep the function that says this a function.

    For those that are long and called from several places: each would be built anew.
    """

    def codegen(context, builder, signature, values):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen
