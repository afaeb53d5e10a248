"""A model file understood: its numbers, its recorded forward pass and what it recommends.

Knows nothing of a machine: no backend, no memory plan, no running.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from edgeinfer.errors import InvalidModelError, UnsupportedModelError
from edgeinfer.gguf import Array, GGUFFile
from edgeinfer.graph import Attention, Graph, Hparams
from edgeinfer.quant import RUNNABLE, Weight, dequantize

# Each is a module of edgeinfer.models with a `forward(g)`.
ARCHITECTURES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """Everything about one file. The file must stay open for as long as the weights are read.

    `sampling` holds the file's `general.sampling.*` values without that prefix.
    """

    file: GGUFFile
    name: str
    hparams: Hparams
    graph: Graph
    sampling: Mapping[str, bool | int | float | str]

    @classmethod
    def load(cls, file: GGUFFile) -> Model:
        """Check the file's numbers and record its forward pass."""
        architecture = file.metadata.get_str("general.architecture")
        _check_architecture(architecture, file)
        hparams = read_hparams(file)
        if operations := _operations_of(file.tensors):
            _unsupported(architecture, f"this {architecture} file needs", operations)
        graph = Graph(hparams, file.tensors)
        forward: Callable[[Graph], None] = importlib.import_module(
            f"edgeinfer.models.{architecture}"
        ).forward
        forward(graph)
        _check_unused(graph)
        _check_types(graph, file.tensors)
        _check_rope_factors(graph)
        name = file.metadata.get_str("general.name", "") or file.path.stem
        return cls(file, name, hparams, graph, _read_sampling(file))

    @property
    def architecture(self) -> str:
        return self.hparams.architecture

    @property
    def n_params(self) -> int:
        """Weights of all tensors; a tied head counts once."""
        return sum(weight.n_elements for weight in self.file.tensors.values())

    @property
    def bytes_by_type(self) -> dict[str, int]:
        """Bytes of the tensors of each type, the largest first."""
        sizes: dict[str, int] = {}
        for weight in self.file.tensors.values():
            sizes[weight.type.name] = sizes.get(weight.type.name, 0) + len(weight.data)
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    @property
    def quantisation(self) -> str:
        """The types of the weights, the one with most bytes first: "Q4_K + Q6_K + F32"."""
        return " + ".join(self.bytes_by_type)


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
    for key, (neutral, operation) in _NEUTRAL.items():
        if read.number(key, neutral[0]) not in neutral:
            read.unsupported(operation)
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
        n_ctx_train=read.count("context_length", high=2**31 - 1),
        norm_eps=norm_eps,
        rope_dims=rope_dims,
        rope_base=rope_base,
        rope_scale=_rope_scale(read),
    )


# Far above any model in use: a hostile file can't make loading slow or sizes overflow.
_MAX_LAYERS = 4096
_MAX_DIM = 1 << 20

# Metadata that changes the computation unless it has one of these values.
_NEUTRAL: dict[str, tuple[tuple[float, ...], str]] = {
    "expert_count": ((0,), "mixture of experts"),
    "attention.causal": ((True,), "bidirectional attention"),
    "attention.clamp_kqv": ((0,), "clamped q, k and v"),
    "attention.scale": ((0,), "a custom attention scale"),
    "attention.max_alibi_bias": ((0,), "ALiBi positions"),
    "attn_logit_softcapping": ((0,), "attention logit soft-capping"),
    "final_logit_softcapping": ((0,), "final logit soft-capping"),
    "logit_scale": ((0, 1), "a logit multiplier"),
    "embedding_scale": ((0, 1), "an embedding multiplier"),
    "residual_scale": ((0, 1), "a residual multiplier"),
    "nextn_predict_layers": ((0,), "multi-token prediction layers"),
}

_MOE = "mixture of experts"
_SWA = "sliding-window attention"
_DELTA = "gated delta-net layers"
_MAMBA = "Mamba 2 layers"
# What known architectures need beyond the operations there are.
_MISSING: dict[str, tuple[str, ...]] = {
    "qwen2moe": (_MOE,),
    "qwen3moe": (_MOE,),
    "qwen3next": (_DELTA, _MOE, "gated attention"),
    "qwen35": (_DELTA, "gated attention", "multi-section rope"),
    "qwen35moe": (_DELTA, "gated attention", "multi-section rope", _MOE),
    "qwen2vl": ("multi-section rope",),
    "qwen3vl": ("multi-section rope",),
    "gemma": ("GeGLU", "an embedding multiplier"),
    "gemma2": ("GeGLU", "an embedding multiplier", _SWA, "logit soft-capping"),
    "gemma3": ("GeGLU", "an embedding multiplier", _SWA, "rope bases per layer"),
    "gemma3n": ("GeGLU", "AltUp", "LAuReL", "per-layer embeddings", "shared K/V", _SWA),
    "gemma4": ("GeGLU", "head sizes per layer", "shared K/V", _SWA, "final logit soft-capping"),
    "phi3": ("fused qkv", "fused gate and up", "longrope"),
    "mistral3": ("YaRN rope scaling", "attention temperature"),
    "gpt-oss": (_MOE, "MXFP4", "attention sinks", _SWA, "YaRN rope scaling"),
    "granite": ("embedding, residual, attention and logit multipliers",),
    "granitemoe": ("embedding, residual, attention and logit multipliers", _MOE),
    "granitehybrid": ("embedding, residual, attention and logit multipliers", _MAMBA, _MOE),
    "lfm2": ("gated short convolutions",),
    "lfm2moe": ("gated short convolutions", _MOE),
    "nemotron_h": (_MAMBA, "squared ReLU"),
    "nemotron_h_moe": (_MAMBA, "squared ReLU", _MOE),
    "smollm3": ("layers without positions",),
    "deepseek2": ("multi-head latent attention", _MOE),
    "exaone4": ("norms after the block", _SWA, "layers without positions"),
    "glm4": ("norms after the block",),
    "hunyuan-dense": ("norms after the rotation",),
    "olmo2": ("norms after the block",),
    "minicpm": ("embedding, residual and logit multipliers",),
    "falcon-h1": (_MAMBA, "attention and Mamba 2 in parallel"),
    "cohere2": ("LayerNorm without bias", _SWA, "attention and feed-forward in parallel"),
    "mamba": ("Mamba layers",),
    "mamba2": (_MAMBA,),
    "bert": ("bidirectional attention", "LayerNorm"),
    "gpt2": ("LayerNorm", "learned positions"),
}
# Parts of tensor names that tell of an operation which no supported architecture has.
_TENSOR_OPERATIONS = {
    "_exps": _MOE,
    "ffn_gate_inp": _MOE,
    "rope_factors_": "longrope",
    "ssm_": "state-space layers",
    "shortconv": "gated short convolutions",
    "attn_sinks": "attention sinks",
    "attn_qkv": "fused qkv",
    "post_attention_norm": "norms after the block",
    "post_ffw_norm": "norms after the block",
    "norm.bias": "LayerNorm",
    "nextn": "multi-token prediction layers",
    "cls.": "a classifier head",
    "position_embd": "learned positions",
}
_ROPE_NAMES = {"yarn": "YaRN rope scaling", "longrope": "longrope"}


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
        """A number, or a boolean where the default is one."""
        if isinstance(default, bool):
            return self._metadata.get_bool(self.key(name), default)
        return self._metadata.get_float(self.key(name), default)

    def text(self, name: str, default: str) -> str:
        return self._metadata.get_str(self.key(name), default)

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

    def unsupported(self, *operations: str) -> NoReturn:
        _unsupported(self.architecture, f"this {self.architecture} file needs", operations)


def _check_architecture(architecture: str, file: GGUFFile) -> None:
    if architecture in ARCHITECTURES:
        return
    missing = _MISSING.get(architecture) or _operations_of(file.tensors) or ("a model file",)
    _unsupported(architecture, f"architecture {architecture!r} needs", missing)


def _check_unused(graph: Graph) -> None:
    """A tensor that no op reads would be left out of the computation without a word."""
    # Old converters wrote rotation tables that every runtime computes itself.
    unused = [name for name in graph.unused if not name.endswith(".attn_rot_embd.weight")]
    if unused:
        shown = ", ".join(unused[:4]) + (f" and {len(unused) - 4} more" if unused[4:] else "")
        architecture = graph.hparams.architecture
        _unsupported(architecture, f"this {architecture} file needs operations for", [shown])


def _check_types(graph: Graph, tensors: Mapping[str, Weight]) -> None:
    """Every tensor that is read must be of a type that runs."""
    unused = set(graph.unused)
    bad = [w for name, w in tensors.items() if name not in unused and not w.type.is_runnable]
    if bad:
        types = sorted({weight.type.name for weight in bad})
        more = f" ({len(bad)} tensors are {', '.join(types)})" if bad[1:] else ""
        raise UnsupportedModelError(
            f"{bad[0].name} is {bad[0].type.name}{more}; edgeinfer runs "
            f"{', '.join(t.name for t in RUNNABLE)}. Choose another quantisation of this model, "
            "for example Q4_K_M.",
            architecture=graph.hparams.architecture,
            missing=types,
        )


def _check_rope_factors(graph: Graph) -> None:
    """Rotation divides by them."""
    ropes = (op.rope for op in graph.ops if isinstance(op, Attention))
    factors = next((rope.factors for rope in ropes if rope is not None), None)
    if factors is not None and not all(1e-6 < x < 1e6 for x in dequantize(factors).tolist()):
        raise InvalidModelError(
            "a factor is not a positive number; download the file again", field=factors.name
        )


def _vocab_size(file: GGUFFile) -> int:
    """Rows of the embedding, which must match the tokenizer's vocabulary where there is one."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        found = "no such tensor" if embedding is None else f"shape {embedding.shape}"
        raise InvalidModelError(
            f"found {found}, need a matrix; this file holds no language model, or is damaged",
            path=file.path,
            field="token_embd.weight",
        )
    n_rows, key = embedding.shape[0], "tokenizer.ggml.tokens"
    if key in file.metadata and len(file.metadata.get_array(key)) != n_rows:
        raise InvalidModelError(
            f"found {len(file.metadata.get_array(key))} tokens, token_embd.weight has {n_rows} "
            "rows; take a file from another publisher",
            path=file.path,
            field=key,
        )
    return n_rows


def _rope_scale(read: _Reader) -> float:
    """By what positions are multiplied: the inverse of a linear scaling's factor."""
    kind = read.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        read.unsupported(_ROPE_NAMES.get(kind, f"rope scaling {kind!r}"))
    name = "rope.scaling.factor" if read.has("rope.scaling.factor") else "rope.scale_linear"
    factor = read.number(name, 0.0)
    if factor < 0 or 0 < factor < 1e-6 or factor > 1e6:
        read.wrong(name, factor, "0 or a number from 1e-6 to 1e6")
    return 1.0 if kind == "none" or factor == 0 else 1 / factor


def _read_sampling(file: GGUFFile) -> dict[str, bool | int | float | str]:
    prefix, values = "general.sampling.", {}
    for key in file.metadata:
        value = file.metadata[key] if key.startswith(prefix) else None
        if value is not None and not isinstance(value, Array):
            values[key.removeprefix(prefix)] = value
    return values


def _operations_of(names: Iterable[str]) -> tuple[str, ...]:
    """What the tensors of these names are for, as far as it is known."""
    wanted = {op: None for name in names for part, op in _TENSOR_OPERATIONS.items() if part in name}
    return tuple(wanted)


def _unsupported(architecture: str, what: str, missing: Sequence[str]) -> NoReturn:
    raise UnsupportedModelError(
        f"{what} {', '.join(missing)}, which edgeinfer lacks; it runs plain "
        f"{', '.join(ARCHITECTURES)}. Choose a model of one of these.",
        architecture=architecture,
        missing=missing,
    )
