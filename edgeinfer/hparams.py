"""The numbers of a model from its metadata: each takes part in the forward pass or is refused.

What has no row here is without effect on these architectures, or known to nobody. Left aside on
purpose: `vocab_size` (the embedding tells), `pooling_type` and `embedding_length_out` (embeddings
are not computed), `*_swa` (no layer has a window), `rope.scaling.original_context_length`, `.yarn_
beta_*` and `.yarn_log_multiplier` (YaRN is refused), `rope.dimension_sections` (text has one
position), `tensor_data_layout` (history).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from edgeinfer.errors import InvalidModelError, UnsupportedModelError
from edgeinfer.gguf import Array, GGUFFile, Value
from edgeinfer.graph import Hparams, without_leading_ones
from edgeinfer.terminal import one_line

# Each is a module of edgeinfer.models with a `forward(g)`.
ARCHITECTURES = ("llama", "qwen2", "qwen3")

# Far above any model in use: a hostile file can't make loading slow or sizes overflow.
_MAX_LAYERS = 4096
_MAX_DIM = 1 << 20

# Metadata that changes the computation unless it has one of these values.
_NEUTRAL: dict[str, tuple[tuple[bool | float | str, ...], str]] = {
    "attention.causal": ((True,), "bidirectional attention"),
    "attention.clamp_kqv": ((0,), "clamped q, k and v"),
    "attention.indexer.top_k": ((0,), "sparse attention"),
    "attention.max_alibi_bias": ((0,), "ALiBi positions"),
    "attention.output_scale": ((0, 1), "an attention output multiplier"),
    "attention.recurrent_layers": ((0,), "recurrent layers"),
    "attention.scale": ((0,), "a custom attention scale"),
    "attention.shared_kv_layers": ((0,), "K and V shared between layers"),
    "attention.temperature_length": ((0,), "attention temperature"),
    "attention.temperature_scale": ((0,), "attention temperature"),
    "attention.value_scale": ((0, 1), "a value multiplier"),
    "attn_logit_softcapping": ((0,), "attention logit soft-capping"),
    "embedding_length_per_layer_input": ((0,), "per-layer embeddings"),
    "embedding_scale": ((0, 1), "an embedding multiplier"),
    "expert_count": ((0,), "mixture of experts"),
    "expert_used_count": ((0,), "mixture of experts"),
    "final_logit_softcapping": ((0,), "final logit soft-capping"),
    "full_attention_interval": ((0, 1), "layers without full attention"),
    "hidden_activation": (("silu", "swish", "swiglu"), "another activation than SiLU"),
    "hyper_connection.count": ((0, 1), "hyper-connections"),
    "logit_scale": ((0, 1), "a logit multiplier"),
    "nextn_predict_layers": ((0,), "multi-token prediction layers"),
    "residual_scale": ((0, 1), "a residual multiplier"),
    "rope.scaling.alpha": ((0, 1), "NTK rope scaling"),
    "rope.scaling.attn_factor": ((1,), "an attention factor of the rope scaling"),
    "rope.scaling.yarn_attn_factor": ((1,), "an attention factor of the rope scaling"),
    "rope.scaling.yarn_ext_factor": ((-1, 0), "YaRN rope scaling"),
    "swiglu_clamp_exp": ((0,), "clamped SwiGLU"),
    "swiglu_clamp_shexp": ((0,), "clamped SwiGLU"),
    "use_parallel_residual": ((False,), "attention and feed-forward in parallel"),
}
_ROPE_NAMES = {"yarn": "YaRN rope scaling", "longrope": "longrope"}


def read_hparams(file: GGUFFile) -> Hparams:
    """The numbers of a model of a known architecture, each checked for sense."""
    read = _Reader(file)
    n_layers = read.count("block_count", high=_MAX_LAYERS)
    dim = read.count("embedding_length")
    n_heads = read.per_layer("attention.head_count", n_layers)
    n_kv_heads = read.per_layer("attention.head_count_kv", n_layers, n_heads)
    ffn_dim = read.per_layer("feed_forward_length", n_layers)
    if n_heads % n_kv_heads:
        read.wrong("attention.head_count_kv", n_kv_heads, f"a divisor of the {n_heads} heads")
    if not read.has("attention.key_length") and dim % n_heads:
        read.wrong("attention.head_count", n_heads, f"a divisor of the embedding length {dim}")
    head_dim = read.count("attention.key_length", dim // n_heads)
    if head_dim % 2:
        read.wrong("attention.key_length", head_dim, "an even number")
    if (v_dim := read.count("attention.value_length", head_dim)) != head_dim:
        read.unsupported(f"value heads of {v_dim} beside key heads of {head_dim}")
    rope_dims = read.count("rope.dimension_count", head_dim)
    if rope_dims % 2 or rope_dims > head_dim:
        read.wrong("rope.dimension_count", rope_dims, f"an even number up to {head_dim}")
    n_ctx_train = read.count("context_length", high=2**31 - 1)
    _check_neutral(read, n_ctx_train)
    norm_eps = read.number("attention.layer_norm_rms_epsilon")
    if not 0 < norm_eps < 1:
        read.wrong("attention.layer_norm_rms_epsilon", norm_eps, "a number between 0 and 1")
    rope_base = read.number("rope.freq_base", 10000.0)
    if not 1 <= rope_base <= 1e12:
        read.wrong("rope.freq_base", rope_base, "a number from 1 to 1e12")
    return Hparams(
        architecture=read.architecture,
        n_layers=n_layers,
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        vocab_size=_vocab_size(file),
        n_ctx_train=n_ctx_train,
        norm_eps=norm_eps,
        rope_dims=rope_dims,
        rope_base=rope_base,
        rope_scale=_rope_scale(read),
    )


def unsupported(architecture: str, what: str, missing: Sequence[str], found: str = "") -> NoReturn:
    raise UnsupportedModelError(
        f"{what} {', '.join(missing)}{found}, which edgeinfer lacks; it runs plain "
        f"{', '.join(ARCHITECTURES)}. Choose a model of one of these.",
        architecture=architecture,
        missing=missing,
    )


class _Reader:
    """Typed metadata of one architecture; keys are written without its prefix."""

    def __init__(self, file: GGUFFile) -> None:
        self.architecture = file.metadata.get_str("general.architecture")
        self._file, self._metadata = file, file.metadata

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def has(self, name: str) -> bool:
        return self.key(name) in self._metadata

    def count(self, name: str, default: int | None = None, high: int = _MAX_DIM) -> int:
        return self._metadata.get_int(self.key(name), default, low=1, high=high)

    def number(self, name: str, default: float | None = None) -> float:
        return self._metadata.get_float(self.key(name), default)

    def text(self, name: str, default: str) -> str:
        return self._metadata.get_str(self.key(name), default)

    def values(self, name: str) -> list[Value]:
        """What the file says: nothing, one value, or those of an array."""
        value = self._metadata.get(self.key(name))
        if isinstance(value, Array) and value.item_type != "string":
            return value.tolist()
        return [] if value is None else [value]

    def per_layer(self, name: str, n_layers: int, default: int | None = None) -> int:
        """A count, or an array of the same count for every layer."""
        if not isinstance(self._metadata.get(self.key(name)), Array):
            return self.count(name, default)
        counts = set(self._metadata.get_ints(self.key(name), n_layers, high=_MAX_DIM))
        if len(counts) > 1:
            self.unsupported(f"{name} that differs between layers")
        if counts == {0}:
            self.wrong(name, 0, "1 or more")
        return counts.pop()

    def wrong(self, name: str, value: float, wanted: str) -> NoReturn:
        raise InvalidModelError(
            f"found {value}, need {wanted}; take a file from another publisher",
            path=self._file.path,
            field=self.key(name),
        )

    def unsupported(self, operation: str, found: str = "") -> NoReturn:
        unsupported(self.architecture, f"this {self.architecture} file needs", [operation], found)


def _check_neutral(read: _Reader, n_ctx_train: int) -> None:
    for name, (neutral, operation) in _NEUTRAL.items():
        for value in read.values(name):
            if value not in neutral:
                read.unsupported(operation, f" ({read.key(name)} is {one_line(str(value), 40)})")
    # A window that holds the whole context changes nothing.
    name = "attention.sliding_window"
    for window in read.values(name):
        if not isinstance(window, int) or 0 < window < n_ctx_train:
            shown = one_line(str(window), 40)
            found = f" ({read.key(name)} is {shown} of {n_ctx_train} tokens)"
            read.unsupported("sliding-window attention", found)


def _rope_scale(read: _Reader) -> float:
    """By what positions are multiplied: the inverse of a linear scaling's factor."""
    kind = read.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        read.unsupported(_ROPE_NAMES.get(kind, f"rope scaling {one_line(kind)!r}"))
    name = "rope.scaling.factor" if read.has("rope.scaling.factor") else "rope.scale_linear"
    factor = read.number(name, 0.0)
    if factor < 0 or 0 < factor < 1e-6 or factor > 1e6:
        read.wrong(name, factor, "0 or a number from 1e-6 to 1e6")
    return 1.0 if kind == "none" or factor == 0 else 1 / factor


def _vocab_size(file: GGUFFile) -> int:
    """Rows of the embedding, which must match the tokenizer's vocabulary where there is one."""
    embedding = file.tensors.get("token_embd.weight")
    shape = without_leading_ones(embedding.shape) if embedding is not None else ()
    if len(shape) != 2:
        found = "no such tensor" if embedding is None else f"shape {embedding.shape}"
        raise InvalidModelError(
            f"found {found}, need a matrix; this file holds no language model, or is damaged",
            path=file.path,
            field="token_embd.weight",
        )
    n_rows, key = shape[0], "tokenizer.ggml.tokens"
    if key in file.metadata and len(file.metadata.get_array(key)) != n_rows:
        raise InvalidModelError(
            f"found {len(file.metadata.get_array(key))} tokens, token_embd.weight has {n_rows} "
            "rows; take a file from another publisher",
            path=file.path,
            field=key,
        )
    return n_rows
