"""fma and half floats as plain arithmetic, for x86 processors that have no such instructions.

LLVM would call functions there, and an object may call none. Rewrites the text of unoptimised IR;
knows no kernel.
"""

from __future__ import annotations

import re

# Through doubles: the product is exact, and only one sum in 10 ** 9 is rounded twice.
_FMA32 = """
define internal {f} @"ei.fma.{suffix}"({f} %x, {f} %y, {f} %z) {{
  %x1 = fpext {f} %x to {d}
  %y1 = fpext {f} %y to {d}
  %z1 = fpext {f} %z to {d}
  %p = fmul {d} %x1, %y1
  %s = fadd {d} %p, %z1
  %r = fptrunc {d} %s to {f}
  ret {f} %r
}}
"""
# Veltkamp's and Dekker's product in two parts: exact where the sum is, as in `math.sincos`.
_FMA64 = """
define internal {d} @"ei.split.{suffix}"({d} %x) {{
  %c = fmul {d} %x, {factor}
  %t = fsub {d} %c, %x
  %r = fsub {d} %c, %t
  ret {d} %r
}}
define internal {d} @"ei.fma.{suffix}"({d} %x, {d} %y, {d} %z) {{
  %p = fmul {d} %x, %y
  %xh = call {d} @"ei.split.{suffix}"({d} %x)
  %yh = call {d} @"ei.split.{suffix}"({d} %y)
  %xl = fsub {d} %x, %xh
  %yl = fsub {d} %y, %yh
  %hh = fmul {d} %xh, %yh
  %hl = fmul {d} %xh, %yl
  %lh = fmul {d} %xl, %yh
  %ll = fmul {d} %xl, %yl
  %e0 = fsub {d} %hh, %p
  %e1 = fadd {d} %e0, %hl
  %e2 = fadd {d} %e1, %lh
  %e = fadd {d} %e2, %ll
  %s = fadd {d} %p, %z
  %r = fadd {d} %s, %e
  ret {d} %r
}}
"""
_HALVES = """
define internal {f} @"ei.extend.{n}"({h} %x) {{
  %bits = bitcast {h} %x to {i16}
  %word = zext {i16} %bits to {i32}
  %size = and {i32} %word, {c7fff}
  %moved = shl {i32} %size, {c13}
  %tiny = bitcast {i32} %moved to {f}
  %value = fmul {f} %tiny, {scale}
  %finite = bitcast {f} %value to {i32}
  %over = icmp ugt {i32} %size, {c7bff}
  %infinite = or {i32} %finite, {c7f800000}
  %most = select {i1} %over, {i32} %infinite, {i32} %finite
  %top = and {i32} %word, {c8000}
  %sign = shl {i32} %top, {c16}
  %all = or {i32} %most, %sign
  %r = bitcast {i32} %all to {f}
  ret {f} %r
}}
define internal {h} @"ei.round.{n}"({f} %x) {{
  %bits = bitcast {f} %x to {i32}
  %size = and {i32} %bits, {c7fffffff}
  %turned = xor {i32} %bits, %size
  %sign = lshr {i32} %turned, {c16}
  %float = bitcast {i32} %size to {f}
  %lifted = fadd {f} %float, {half}
  %raised = bitcast {f} %lifted to {i32}
  %small = sub {i32} %raised, {c3f000000}
  %moved = lshr {i32} %size, {c13}
  %odd = and {i32} %moved, {c1}
  %lower = sub {i32} %size, {c37fff001}
  %even = add {i32} %lower, %odd
  %usual = lshr {i32} %even, {c13}
  %tiny = icmp ult {i32} %size, {c38800000}
  %finite = select {i1} %tiny, {i32} %small, {i32} %usual
  %nan = icmp ugt {i32} %size, {c7f800000}
  %odds = select {i1} %nan, {i32} {c7e00}, {i32} {c7c00}
  %over = icmp uge {i32} %size, {c47800000}
  %most = select {i1} %over, {i32} %odds, {i32} %finite
  %all = or {i32} %most, %sign
  %short = trunc {i32} %all to {i16}
  %r = bitcast {i16} %short to {h}
  ret {h} %r
}}
"""
_DECLARED_FMA = re.compile(r"declare .*@llvm\.fma\.((?:v\d+)?f(?:32|64))\(.*\n")
_EXTEND = re.compile(r"fpext (<\d+ x half>|half) (\S+) to (<\d+ x float>|float)")
_ROUND = re.compile(r"fptrunc (<\d+ x float>|float) (\S+) to (<\d+ x half>|half)")


def without_fma(ir: str) -> str:
    """The same code with fma and conversions of halves as plain arithmetic."""
    tails = []
    for suffix in sorted(set(_DECLARED_FMA.findall(ir))):
        n = int(suffix[1:-3]) if suffix[0] == "v" else 0
        types = _types(n)
        template = _FMA32 if suffix.endswith("32") else _FMA64
        tails.append(
            template.format(suffix=suffix, factor=_splat("double", 0x41A0000002000000, n), **types)
        )
        ir = ir.replace(f"@llvm.fma.{suffix}", f'@"ei.fma.{suffix}"')
    ir = re.sub(r'declare .*@"ei\.fma\..*\n', "", ir)
    widths = set()

    def call(result: str, match: re.Match[str]) -> str:
        n = re.search(r"\d+", match[1])
        widths.add(int(n[0]) if n and match[1][0] == "<" else 0)
        name = "extend" if result == "float" else "round"
        count = int(n[0]) if n and match[1][0] == "<" else 0
        return f'call {match[3]} @"ei.{name}.{count}"({match[1]} {match[2]})'

    ir = _EXTEND.sub(lambda match: call("float", match), ir)
    ir = _ROUND.sub(lambda match: call("half", match), ir)
    for n in sorted(widths):
        constants = {f"c{value:x}": _splat("i32", value, n) for value in (
            0x7FFF, 0x7BFF, 0x8000, 0x7FFFFFFF, 0x3F000000, 0x37FFF001, 0x38800000, 0x7F800000,
            0x7E00, 0x7C00, 0x47800000, 1,
        )}  # fmt: skip
        constants |= {"c13": _splat("i32", 13, n), "c16": _splat("i32", 16, n)}
        scale, half = _splat("float", 0x46F0000000000000, n), _splat("float", 0x3FE0000000000000, n)
        tails.append(_HALVES.format(n=n, scale=scale, half=half, **constants, **_types(n)))
    return ir + "".join(tails)


def _types(n: int) -> dict[str, str]:
    names = {"f": "float", "d": "double", "h": "half", "i16": "i16", "i32": "i32", "i1": "i1"}
    return {key: f"<{n} x {name}>" if n else name for key, name in names.items()}


def _splat(kind: str, value: int, n: int) -> str:
    """A constant of the IR; floats by the bits of a double, as IR spells them."""
    text = f"0x{value:016X}" if kind in ("float", "double") else str(value)
    return "<" + ", ".join([f"{kind} {text}"] * n) + ">" if n else text
