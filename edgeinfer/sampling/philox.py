"""Random numbers by seed and index: the same ones on every device, in any order."""

from __future__ import annotations

from collections.abc import Sequence


def philox(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words from a counter and a key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & 0xFFFFFFFF, a >> 32 ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniforms(seed: int, index: int) -> tuple[float, float]:
    """Two numbers in [0, 1) for the token at `index`: one draws it, one is XTC's chance."""
    low = 0xFFFFFFFF
    a, b, c, d = philox((index & low, index >> 32, 0, 0), (seed & low, seed >> 32))
    return _uniform(a, b), _uniform(c, d)


def _uniform(a: int, b: int) -> float:
    return ((a >> 5) * 2.0**26 + (b >> 6)) * 2.0**-53
