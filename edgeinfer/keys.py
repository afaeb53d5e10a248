"""The keys under an architecture's prefix: read with their types, and none left aside unread.

What a model file reads is ticked off. At the end every key must have been read, or hold a value
that changes nothing, or stand in `_INERT` with the reason; else the file is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from edgeinfer.errors import InvalidModelError, UnsupportedModelError
from edgeinfer.gguf import Array, GGUFFile
from edgeinfer.terminal import one_line

# The values of `pooling_type`: -1 and 0 say nothing.
_POOLINGS = {-1: "", 0: "", 1: "mean", 2: "cls", 3: "last", 4: "rank"}
# Far above any model in use: a hostile file can't make loading slow or sizes overflow.
_MAX_LAYERS = 4096
_MAX_COUNT = 1 << 20
_LEAST_NUMBER, _MOST_NUMBER = 1e-30, 1e30  # in size: a float32 holds those, and what they make


class _Inert(NamedTuple):
    """Why a key may stay unread: with any value, or only with one of `values`.

    Not so once the model file has found a number other than 0 behind the key `unless`.
    """

    reason: str
    values: tuple[bool | float | str, ...] | None = None
    unless: str = ""


_SAYS_NOTHING = _Inert("tells tools about the file")
_AFTERWARDS = _Inert("of matrices behind the model, which are refused where there are any")
_MULTIPLIES = _Inert("multiplies by 1", (1,))
_WINDOWED = _Inert("of layers with a window; there are none", None, "attention.sliding_window")
_YARN = _Inert("acts with YaRN alone, which `rope.scaling.type` asks for")
_LENGTH = _Inert("acts with YaRN, or rope factors that it chooses between")
_GELU = _Inert("what the model file writes", ("gelu", "gelu_pytorch_tanh"))
_INERT = {
    "vocab_size": _Inert("the embedding has as many rows"),
    "tensor_data_layout": _Inert("how converters of 2023 ordered rows"),
    "attention.layer_norm_epsilon": _Inert("of norms that subtract the mean, which it has none of"),
    "hidden_activation": _Inert("what the model file writes", ("silu", "swish", "swiglu")),
    "rope.dimension_sections": _Inert("text has one position"),
    "rope.scaling.finetuned": _SAYS_NOTHING,
    "rope.scale_linear": _Inert("gives way to `rope.scaling.factor`"),
    "embedding_length_out": _AFTERWARDS,
    "classifier.output_labels": _AFTERWARDS,
    "attention.output_scale": _MULTIPLIES,
    "attention.value_scale": _MULTIPLIES,
    "embedding_scale": _MULTIPLIES,
    "residual_scale": _MULTIPLIES,
    "logit_scale": _MULTIPLIES,
    "rope.scaling.alpha": _MULTIPLIES,
    "rope.scaling.yarn_attn_factor": _MULTIPLIES,
    "hyper_connection.count": _Inert("one residual stream", (1,)),
    "full_attention_interval": _Inert("every layer has attention", (1,)),
    "attention.sliding_window_pattern": _WINDOWED,
    "attention.key_length_swa": _WINDOWED,
    "attention.value_length_swa": _WINDOWED,
    "rope.dimension_count_swa": _WINDOWED,
    "rope.freq_base_swa": _WINDOWED,
    "rope.scaling.original_context_length": _LENGTH,
    "rope.scaling.yarn_beta_fast": _YARN,
    "rope.scaling.yarn_beta_slow": _YARN,
    "rope.scaling.yarn_log_multiplier": _YARN,
    "rope.scaling.yarn_ext_factor": _Inert("the default", (-1,)),
    # With its prefix: of one architecture alone.
    "phi3.attention.sliding_window": _Inert("not applied, as in llama.cpp"),
    "lfm2moe.feed_forward_length": _Inert("of layers without experts; there are none"),
    "gemma2.hidden_activation": _GELU,
    "gemma3.hidden_activation": _GELU,
}


class Keys:
    """What a file says of its model; names are written without the architecture's prefix."""

    def __init__(self, file: GGUFFile) -> None:
        self.architecture = file.metadata.get_str("general.architecture")
        self._file, self._metadata = file, file.metadata
        self._read: set[str] = set()
        self._acting: set[str] = set()  # whole numbers that were read and are not 0
        self._arrays: dict[str, tuple[Any, ...]] = {}
        self._n_blocks = self._whole("block_count", _MAX_LAYERS)
        # Blocks that guess tokens stand behind those of the model, and are counted with them. Who
        # knows of them reads the key; for others it is one that acts and that nobody has read.
        drafts = "nextn_predict_layers"
        n_drafts = self._metadata.get_int(self._key(drafts), 0, low=0, high=_MAX_LAYERS)
        self.n_layers = self._n_blocks - n_drafts
        if self.n_layers < 1:
            self.wrong(drafts, n_drafts, f"fewer than the {self._n_blocks} blocks")
        self.n_ctx_train = self._whole("context_length", 2**31 - 1)

    def has(self, name: str) -> bool:
        return self._key(name) in self._metadata

    def is_array(self, name: str) -> bool:
        """Whether each layer has a value of its own."""
        return isinstance(self._metadata.get(self._key(name)), Array)

    def count(
        self,
        name: str,
        default: int | None = None,
        *,
        layer: int | None = None,
        low: int = 1,
        high: int = _MAX_COUNT,
    ) -> int:
        """A whole number; of an array, the one of a layer."""
        count: int
        if self.is_array(name):
            count = self._of_layer(name, self._metadata.get_ints, layer)
            if not low <= count <= high:
                self.wrong(name, count, f"integers from {low} to {high}")
        else:
            count = self._metadata.get_int(self._tick(name), default, low=low, high=high)
        if count:
            self._acting.add(name)
        return count

    def number(
        self,
        name: str,
        default: float | None = None,
        *,
        layer: int | None = None,
        low: float = float("-inf"),
        high: float = float("inf"),
    ) -> float:
        """A finite number; of an array, the one of a layer."""
        value: float
        if self.is_array(name):
            value = self._of_layer(name, self._metadata.get_floats, layer)
        else:
            value = self._metadata.get_float(self._tick(name), default)
        if not low <= value <= high:
            self.wrong(name, value, f"a number from {low:g} to {high:g}")
        if value and not _LEAST_NUMBER <= abs(value) <= _MOST_NUMBER:
            wanted = f"0 or a number of a size from {_LEAST_NUMBER:g} to {_MOST_NUMBER:g}"
            self.wrong(name, value, wanted)
        return value

    def flag(self, name: str, default: bool | None = None, *, layer: int | None = None) -> bool:
        """True or false; of an array, that of a layer."""
        if self.is_array(name):
            value: bool = self._of_layer(name, self._metadata.get_bools, layer)
            return value
        return self._metadata.get_bool(self._tick(name), default)

    def text(self, name: str, default: str | None = None) -> str:
        return self._metadata.get_str(self._tick(name), default)

    def pooling(self) -> str:
        """How the file says that embeddings are pooled, "" where it does not.

        UnsupportedModelError for a model whose tokens see those behind them.
        """
        if not self.flag("attention.causal", True):
            self.unsupported("attention.causal", "attention to later tokens (an encoder)")
        kind = self._metadata.get_int(self._tick("pooling_type"), -1, low=-1)
        return _POOLINGS.get(kind, str(kind))

    def wrong(self, name: str, value: object, wanted: str) -> NoReturn:
        """InvalidModelError for what no model can have."""
        raise InvalidModelError(
            f"found {value}, need {wanted}; take a file from another publisher",
            path=self._file.path,
            field=self._key(name),
        )

    def unsupported(self, name: str, operation: str) -> NoReturn:
        """UnsupportedModelError for what a model may have and this version has not."""
        raise UnsupportedModelError(
            f"{self._key(name)} is {self._shown(name)}: that needs {operation}, which edgeinfer "
            "lacks; choose a model without it",
            architecture=self.architecture,
            missing=[operation],
        )

    def check_all_read(self) -> None:
        """UnsupportedModelError for the first key that acts and that nobody has read."""
        for key in self._metadata:
            name = key.removeprefix(f"{self.architecture}.")
            if name != key and name not in self._read and not self._is_inert(name):
                raise UnsupportedModelError(
                    f"{key} is {self._shown(name)}, and nothing here reads that: the result would "
                    "be wrong; choose a model without it",
                    architecture=self.architecture,
                    missing=[name],
                )

    def _is_inert(self, name: str) -> bool:
        value = self._metadata[self._key(name)]
        entry = _INERT.get(self._key(name)) or _INERT.get(name)
        acts = entry is None or entry.unless in self._acting
        if entry is not None and not acts and entry.values is None:
            return True
        if isinstance(value, Array) and value.item_type == "string":
            return len(value) == 0
        values = value.tolist() if isinstance(value, Array) else [value]
        if name == "attention.sliding_window":  # one that holds the whole context is none
            return all(_is_window(each, self.n_ctx_train) for each in values)
        neutral = (0, "", *(() if entry is None or acts else entry.values or ()))
        return all(each in neutral for each in values)

    def _shown(self, name: str) -> str:
        value = self._metadata.get(self._key(name))
        few = isinstance(value, Array) and len(value) <= 8 and value.item_type != "string"
        return one_line(str(value.tolist() if few else value), 40)  # type: ignore[union-attr]

    def _key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def _whole(self, name: str, high: int) -> int:
        """A number that is one for all layers."""
        return self._metadata.get_int(self._tick(name), low=1, high=high)

    def _tick(self, name: str) -> str:
        self._read.add(name)
        return self._key(name)

    def _of_layer(
        self, name: str, read: Callable[[str, int], tuple[Any, ...]], layer: int | None
    ) -> Any:
        """The value of a layer, or the one that all layers have."""
        key = self._tick(name)
        if name not in self._arrays:
            self._arrays[name] = read(key, self._n_blocks)
        values = self._arrays[name]
        if layer is None and len(set(values)) > 1:
            self.unsupported(name, f"{name} that differs between layers")
        return values[layer or 0]


def _is_window(value: object, n_ctx_train: int) -> bool:
    return value == 0 or isinstance(value, int) and value >= n_ctx_train
