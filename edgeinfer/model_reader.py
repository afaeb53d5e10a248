"""What a model file asks of the file it is recorded from: numbers by key, tensors by name.

Both are ticked off, so that nothing stays unread unseen. Knows no operation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, NoReturn

from edgeinfer.errors import InvalidModelError, UnsupportedModelError
from edgeinfer.hparams import Hparams
from edgeinfer.ops import KV
from edgeinfer.quant import Weight
from edgeinfer.rope import FREQS, LONG, SHORT, Rope, RopeKind, RopeReader
from edgeinfer.settings import Settings


class Heads(NamedTuple):
    """The heads of a layer: n of queries, n_kv of keys and values."""

    n: int
    n_kv: int
    k_dim: int
    v_dim: int
    window: int = 0

    @property
    def cache(self) -> KV:
        return KV(self.n_kv, self.k_dim, self.v_dim, self.window)


class DeltaHeads(NamedTuple):
    """The heads of a delta net, n_k of keys and n_v of values, and the taps before it."""

    n_k: int
    n_v: int
    dim: int
    n_taps: int


class ModelReader:
    """Numbers and tensors of one file, for the layer that is being recorded."""

    def __init__(self, hparams: Hparams, settings: Settings, weights: Mapping[str, Weight]) -> None:
        self.hparams = hparams
        self._settings, self._weights = settings, dict(weights)
        self._used: set[str] = set()
        self._layer = -1

    @property
    def dim(self) -> int:
        return self.hparams.dim

    def count(self, name: str, default: int | None = None, low: int = 1) -> int:
        """A whole number of at least `low`; without a default the file must have it."""
        return self._settings.count(name, default, layer=self._here, low=low)

    def number(
        self,
        name: str,
        default: float | None = None,
        low: float = -math.inf,
        high: float = math.inf,
    ) -> float:
        return self._settings.number(name, default, layer=self._here, low=low, high=high)

    def flag(self, name: str, default: bool | None = None) -> bool:
        return self._settings.flag(name, default, layer=self._here)

    def text(self, name: str, default: str | None = None) -> str:
        return self._settings.text(name, default)

    def window(
        self, period: int | None = None, default: int = 0, *, dense_first: bool = False
    ) -> int:
        """How many positions the layer sees, 0 for all.

        There is a window in the layers that `attention.sliding_window_pattern` names: one by one,
        or by a number, of which the last (or first) layer sees all. `period` is its default, and
        `default` the width's.
        """
        name = "attention.sliding_window_pattern"
        width = self.count("attention.sliding_window", default, low=0)
        if self._settings.is_array(name):
            return width if self.flag(name) else 0
        if not width and not self._settings.has(name):
            return 0
        period = self.count(name, period, low=0)
        dense = 0 if dense_first else period - 1
        return width if not period or self._layer % period != dense else 0

    def heads(self, window: int = 0) -> Heads:
        """How many heads there are and how wide, each by its own key. Windows have widths."""
        n = self.count("attention.head_count")
        n_kv = self.count("attention.head_count_kv", n)
        if n % n_kv:
            self._settings.wrong("attention.head_count_kv", n_kv, f"a divisor of the {n} heads")
        if not self._settings.has("attention.key_length") and self.dim % n:
            wanted = f"a divisor of the embedding length {self.dim}"
            self._settings.wrong("attention.head_count", n, wanted)
        k_dim = self.count("attention.key_length", self.dim // n)
        v_dim = self.count("attention.value_length", k_dim)
        if window:
            k_dim = self.count("attention.key_length_swa", k_dim)
            v_dim = self.count("attention.value_length_swa", v_dim)
        return Heads(n, n_kv, k_dim, v_dim, window)

    def is_recurrent(self, period: int) -> bool:
        """Whether the layer keeps a state in place of keys and values.

        `attention.recurrent_layers` says so of each; without it all do but the last of every
        `full_attention_interval`, by default `period`, layers.
        """
        name = "full_attention_interval"
        period = self.count(name, period)
        if self._settings.has("attention.recurrent_layers"):
            return self.flag("attention.recurrent_layers")
        return self._layer % period != period - 1

    def delta_heads(self) -> DeltaHeads:
        """How many heads a delta net has, how wide, and how many rows its convolutions see."""
        n_k, n_v = self.count("ssm.group_count"), self.count("ssm.time_step_rank")
        dim, inner = self.count("ssm.state_size"), self.count("ssm.inner_size")
        if n_v % n_k:
            wanted = f"a multiple of the {n_k} key heads"
            self._settings.wrong("ssm.time_step_rank", n_v, wanted)
        if inner != n_v * dim:
            self._settings.wrong("ssm.inner_size", inner, f"{n_v} heads of {dim}")
        return DeltaHeads(n_k, n_v, dim, self.count("ssm.conv_kernel", low=2))

    def skip_drafts(self) -> None:
        """Leave the blocks alone that guess tokens: the last `nextn_predict_layers` of all."""
        for i in range(self.count("nextn_predict_layers", 0, low=0)):
            prefix = f"blk.{self.hparams.n_layers + i}."
            self._used.update(name for name in self._weights if name.startswith(prefix))

    def rope(self, kind: RopeKind, head_dim: int) -> Rope:
        """The layer's rotation, with the factors of its pairs where the file has them.

        `rope_freqs` acts in any context, `rope_factors_short` in those that are no longer than
        `rope.scaling.original_context_length`, `rope_factors_long` in others.
        """
        reader = self._rope_reader()
        n_dims = reader.n_dims(head_dim)
        tables = {
            name: self._weight(name, n_dims // 2) for name in (FREQS, SHORT, LONG) if self.has(name)
        }
        return reader.rope(kind, n_dims, tables)

    def window_rope(self, kind: RopeKind, head_dim: int, *, is_alike: bool = False) -> Rope:
        """The rotation in layers with a window, without scaling and factors.

        Its base is that of `rope.freq_base_swa`, and by default 10,000 or, `is_alike`, the others'.
        """
        return self._rope_reader().in_window(kind, head_dim, is_alike)

    def growing(self, rope: Rope, head_dim: int) -> Rope:
        """A rotation that multiplies what it rotates, too, as `attention.temperature_scale` says.

        For queries: their scores grow with each `rope.scaling.original_context_length` positions.
        """
        return self._rope_reader().growing(rope, head_dim)

    def _rope_reader(self) -> RopeReader:
        return RopeReader(self._settings, self._here, self.hparams.n_ctx_train)

    @property
    def _here(self) -> int | None:
        """The layer that is being recorded."""
        n = self.hparams.n_layers
        if self._layer > n:  # a draft, whose block stands behind those of the layers
            return self._layer - 1
        return self._layer if 0 <= self._layer < n else None

    # -- tensors -----------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether the file holds this tensor (full name)."""
        return name in self._weights

    def first(self, *names: str) -> str:
        """The first of these names whose weight the file holds, or the last."""
        return next((name for name in names if self.has(f"{name}.weight")), names[-1])

    @property
    def unused(self) -> list[str]:
        """Names of tensors in the file that no op reads: a sign of an unsupported variant."""
        return sorted(set(self._weights) - self._used)

    def _weight(self, name: str, *shape: int) -> Weight:
        weight = self._weights.get(name)
        if weight is None:
            self._lacks(name)
        if weight.shape != shape:
            if without_leading_ones(weight.shape) != without_leading_ones(shape):
                raise InvalidModelError(
                    f"shape is {weight.shape}, the metadata asks for {shape}; take a file from "
                    "another publisher",
                    field=name,
                )
            weight = self._weights[name] = replace(weight, shape=shape)
        self._used.add(name)
        return weight

    def _optional(self, name: str, *shape: int) -> Weight | None:
        """A tensor if the file has it."""
        return self._weight(name, *shape) if self.has(name) else None

    def _lacks(self, name: str) -> NoReturn:
        """What the file holds in place of a tensor tells what kind of model it is."""
        architecture, stem = self.hparams.architecture, name.rpartition(".")[0]
        others = [each for each in self._weights if each.startswith(stem)]
        if others:
            raise UnsupportedModelError(
                f"the file lacks {name}, which edgeinfer's {architecture} needs, and holds "
                f"{', '.join(others[:3])}: another kind of {architecture} than it runs",
                architecture=architecture,
                missing=others,
            )
        raise InvalidModelError(
            f"the file lacks a tensor that {architecture} needs; take one from another publisher",
            field=name,
        )


def without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Files may write a vector (n,) as (1, n): what counts is the rest."""
    n_ones = next((i for i, n in enumerate(shape) if n != 1), len(shape))
    return shape[n_ones:]
