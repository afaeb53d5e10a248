"""Rotary position embedding: the rotation of a head, and what a file says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from edgeinfer.quant import Weight
from edgeinfer.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RopeKind: TypeAlias = Literal["norm", "neox"]

_N_SPANS = 256  # in which a growing magnitude grows
_MOST_POSITIONS = 2**31 - 1
# Of the factors that angles are divided by: at position 10^9 they are 10^13 at most, and kernels
# still know sines of those.
LEAST_FACTOR = 0.01


class Yarn(NamedTuple):
    """Rotation of a longer context than was trained, n_ctx (Peng et al. 2023).

    Pairs that turn more than beta_fast times in n_ctx positions turn as they did, those that turn
    less than beta_slow times are slowed by the rope's scale, and between them it is a blend.
    """

    n_ctx: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


class Longer(NamedTuple):
    """Factors in place of a rope's own, in contexts of more than `n_ctx` positions."""

    n_ctx: int
    factors: Weight | None


class Growth(NamedTuple):
    """A magnitude that grows with the position: times 1 + factor * ln(1 + floor(pos / n_ctx)).

    It stays as it is from position 255 * n_ctx on.
    """

    factor: float
    n_ctx: int


class Rope(NamedTuple):
    """Rotary position embedding (Su et al. 2021) of the first `n_dims` of a head.

    `kind` pairs neighbours (2i, 2i+1: "norm") or halves (i, i + n_dims/2: "neox"). The angle of
    pair i at position p is p * frequencies()[i]; what is turned is also multiplied by
    magnitudes()[p // growth.n_ctx], or the last of them, or `magnitude` where nothing grows.
    """

    kind: RopeKind
    n_dims: int
    base: float
    scale: float = 1.0
    factors: Weight | None = None  # (n_dims / 2,), Llama 3's `rope_freqs`
    yarn: Yarn | None = None
    magnitude: float = 1.0
    growth: Growth | None = None
    longer: Longer | None = None  # settled by `in_context`; backends know of none

    def in_context(self, n_ctx: int) -> Rope:
        """The rotation of sequences that may hold n_ctx positions."""
        if self.longer is None:
            return self
        factors = self.longer.factors if n_ctx > self.longer.n_ctx else self.factors
        return self._replace(factors=factors, longer=None)

    def tables(self) -> list[Weight]:
        """Its factors, in any context."""
        both = (self.factors, self.longer.factors if self.longer else None)
        return [table for table in both if table is not None]

    def magnitudes(self) -> NDArray[np.float64]:
        """What multiplies rotated values, for each `growth.n_ctx` positions."""
        import numpy as np

        if self.growth is None:
            return np.array([self.magnitude], np.float64)
        spans = np.arange(_N_SPANS, dtype=np.float64)
        grown: NDArray[np.float64] = self.magnitude * (1 + self.growth.factor * np.log1p(spans))
        return grown

    def frequencies(self) -> NDArray[np.float64]:
        """Radians a position of each pair: scale / (base ** (2i / n_dims) * factors[i])."""
        import numpy as np

        i = np.arange(self.n_dims // 2, dtype=np.float64)
        wave: NDArray[np.float64] = np.float64(self.base) ** (2 * i / self.n_dims)
        if self.factors is not None:
            from edgeinfer.dequantize import dequantize

            wave = wave * dequantize(self.factors)
        slowed = self.scale / wave
        if self.yarn is None:
            return slowed
        kept = self._kept(i, self.yarn)
        return slowed * (1 - kept) + 1 / wave * kept

    def _kept(self, i: NDArray[np.float64], yarn: Yarn) -> NDArray[np.float64]:
        """How much of each pair's own frequency stays, from 1 for the fastest to 0."""

        def pair(n_turns: float) -> float:
            ratio = math.log(yarn.n_ctx / (n_turns * 2 * math.pi))
            return self.n_dims * ratio / (2 * math.log(self.base))

        first = max(0, math.floor(pair(yarn.beta_fast)))
        last = min(self.n_dims - 1, math.ceil(pair(yarn.beta_slow)))
        kept: NDArray[np.float64] = 1 - ((i - first) / max(0.001, last - first)).clip(0, 1)
        return kept


FREQS, SHORT, LONG = (f"rope_{name}.weight" for name in ("freqs", "factors_short", "factors_long"))


class RopeReader(NamedTuple):
    """Reads what a file says of the rotation in a layer, or in all of them."""

    settings: Settings
    layer: int | None
    n_ctx_train: int

    def n_dims(self, head_dim: int, in_window: bool = False) -> int:
        """How much of a head is rotated."""
        name = "rope.dimension_count"
        n_dims = self.settings.count(name, head_dim, layer=self.layer)
        if in_window:
            name = f"{name}_swa"
            n_dims = self.settings.count(name, min(n_dims, head_dim), layer=self.layer)
        if n_dims % 2 or n_dims > head_dim:
            self.settings.wrong(name, n_dims, f"an even number up to {head_dim}")
        return n_dims

    def in_window(self, kind: RopeKind, head_dim: int, is_alike: bool) -> Rope:
        """The rotation in layers with a window; `is_alike` by the base of others."""
        base = self._base("rope.freq_base", 10000.0) if is_alike else 10000.0
        base = self._base("rope.freq_base_swa", base)
        return Rope(kind, self.n_dims(head_dim, in_window=True), base)

    def _base(self, name: str, default: float) -> float:
        return self.settings.number(name, default, layer=self.layer, low=1.001, high=1e12)

    def rope(self, kind: RopeKind, n_dims: int, tables: Mapping[str, Weight]) -> Rope:
        """`tables` are the factors that the file has, by the tensor's name."""
        base = self._base("rope.freq_base", 10000.0)
        scale, yarn, magnitude = self._scaling()
        if FREQS in tables or not tables:
            if self.settings.text("rope.scaling.type", "") == "longrope":
                self.settings.wrong("rope.scaling.type", "longrope", f"{LONG} beside it")
            return Rope(kind, n_dims, base, scale, tables.get(FREQS), yarn, magnitude)
        longer = Longer(self._trained_length(), tables.get(LONG))
        return Rope(kind, n_dims, base, scale, tables.get(SHORT), yarn, magnitude, longer=longer)

    def growing(self, rope: Rope, head_dim: int) -> Rope:
        """A rotation that multiplies what it rotates as `attention.temperature_scale` says."""
        name = "attention.temperature_scale"
        factor = self.settings.number(name, 0.0, low=0, high=1e3)
        if factor and rope.n_dims != head_dim:
            self.settings.unsupported(name, "queries that grow where they are not rotated")
        return rope._replace(growth=Growth(factor, self._trained_length())) if factor else rope

    def _trained_length(self) -> int:
        """Positions of the training that scaling sets out from."""
        name = "rope.scaling.original_context_length"
        return self.settings.count(name, self.n_ctx_train, layer=self.layer, high=_MOST_POSITIONS)

    def _scaling(self) -> tuple[float, Yarn | None, float]:
        """Scale, YaRN and magnitude."""
        settings, prefix = self.settings, "rope.scaling"
        kind = settings.text(f"{prefix}.type", "linear")
        if kind not in ("none", "linear", "yarn", "longrope"):
            settings.unsupported(f"{prefix}.type", f"rope scaling {kind!r}")
        magnitude = settings.number(f"{prefix}.attn_factor", 1.0, low=1e-6, high=1e6)
        old, name = "rope.scale_linear", f"{prefix}.factor"
        name = name if settings.has(name) or not settings.has(old) else old
        factor = settings.number(name, 0.0, low=0, high=1e6)
        if 0 < factor < LEAST_FACTOR:
            settings.wrong(name, factor, f"0 or a number from {LEAST_FACTOR:g} to 1e6")
        factor = 1.0 if kind == "none" or factor == 0 else factor
        if kind != "yarn":
            return 1 / factor, None, magnitude
        # Converters copy the betas of any family, whose training went by them as Transformers does.
        # NOTE: llama.cpp reads them in a few families alone, and takes 32 and 1 in all others.
        yarn = Yarn(
            self._trained_length(),
            settings.number(f"{prefix}.yarn_beta_fast", 32.0, low=1e-3, high=1e6),
            settings.number(f"{prefix}.yarn_beta_slow", 1.0, low=1e-3, high=1e6),
        )
        multiplier = settings.number(f"{prefix}.yarn_log_multiplier", 0.0, low=0, high=1e3)
        log = 0.1 * math.log(max(factor, 1.0))
        own = (1 + log) / (1 + multiplier * log)
        self._check_usual(own)
        return 1 / factor, yarn, magnitude * own

    def _check_usual(self, magnitude: float) -> None:
        """What a converter copies beside YaRN must say what YaRN does: nobody acts by it."""
        name = "rope.scaling.yarn_ext_factor"
        if self.settings.number(name, -1.0) not in (-1, 1):
            self.settings.unsupported(name, "a part of YaRN's blend")
        # The magnitude, as OLMo 3 has it, what would make 1 of it, as DeepSeek's Qwen 3 has it, or
        # nothing: llama.cpp takes the same one for all three.
        name = "rope.scaling.yarn_attn_factor"
        told, usual = self.settings.number(name, 1.0), (1, magnitude, 1 / magnitude)
        if not any(math.isclose(told, each, rel_tol=1e-3) for each in usual):
            self.settings.unsupported(name, "another magnitude than YaRN's own")
