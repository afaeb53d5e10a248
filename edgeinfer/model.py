"""A model file understood: its numbers, its recorded forward pass and what it recommends.

Knows nothing of a machine: no backend, no memory plan, no running.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from edgeinfer.errors import InvalidModelError, UnsupportedModelError
from edgeinfer.gguf import Array, GGUFFile
from edgeinfer.graph import Graph, Hparams, Rotate
from edgeinfer.hparams import ARCHITECTURES, read_hparams, unsupported
from edgeinfer.quant import RUNNABLE, Weight, dequantize
from edgeinfer.terminal import one_line


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
            unsupported(architecture, f"this {architecture} file needs", operations)
        graph = Graph(hparams, file.tensors)
        forward: Callable[[Graph], None] = importlib.import_module(
            f"edgeinfer.models.{architecture}"
        ).forward
        forward(graph)
        _check_unused(graph)
        _check_types(graph, file.tensors)
        _check_rope_factors(graph)
        name = one_line(file.metadata.get_str("general.name", "") or file.path.stem)
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


def _check_architecture(architecture: str, file: GGUFFile) -> None:
    if architecture in ARCHITECTURES:
        return
    missing = _MISSING.get(architecture) or _operations_of(file.tensors) or ("a model file",)
    unsupported(architecture, f"architecture {one_line(architecture, 60)!r} needs", missing)


def _check_unused(graph: Graph) -> None:
    """A tensor that no op reads would be left out of the computation without a word."""
    # Old converters wrote rotation tables that every runtime computes itself.
    unused = [name for name in graph.unused if not name.endswith(".attn_rot_embd.weight")]
    if unused:
        shown = ", ".join(one_line(name, 60) for name in unused[:4])
        shown += f" and {len(unused) - 4} more" if unused[4:] else ""
        architecture = graph.hparams.architecture
        unsupported(architecture, f"this {architecture} file needs operations for", [shown])


def _check_types(graph: Graph, tensors: Mapping[str, Weight]) -> None:
    """Every tensor that is read must be of a type that runs."""
    unused = set(graph.unused)
    bad = [w for name, w in tensors.items() if name not in unused and not w.type.is_runnable]
    if bad:
        types = sorted({weight.type.name for weight in bad})
        more = f" ({len(bad)} tensors are {', '.join(types[:4])})" if bad[1:] else ""
        raise UnsupportedModelError(
            f"{one_line(bad[0].name)} is {bad[0].type.name}{more}; edgeinfer runs "
            f"{', '.join(t.name for t in RUNNABLE)}. Choose another quantisation of this model, "
            "for example Q4_K_M.",
            architecture=graph.hparams.architecture,
            missing=types,
        )


def _check_rope_factors(graph: Graph) -> None:
    """Rotation divides by them; an infinite one leaves its pair as it is."""
    ropes = {op.rope for op in graph.ops if isinstance(op, Rotate)}
    for factors in {rope.factors for rope in ropes if rope.factors is not None}:
        if not all(x > 1e-6 for x in dequantize(factors).tolist()):
            raise InvalidModelError(
                "a factor is not a positive number; download the file again", field=factors.name
            )


def _read_sampling(file: GGUFFile) -> dict[str, bool | int | float | str]:
    prefix, values = "general.sampling.", {}
    for key in file.metadata:
        value = file.metadata[key] if key.startswith(prefix) else None
        if value is not None and not isinstance(value, Array):
            values[key.removeprefix(prefix)] = value
    sequence = values.pop("sequence", None)
    return values if sequence is None else {**values, **_off(str(sequence), file)}


# The samplers in the order that is fixed here, by their names in `general.sampling.sequence`, and
# what turns off those that a file leaves out.
_CHAIN: dict[str, tuple[str, float]] = {
    "penalties": ("penalty_last_n", 0),
    "dry": ("dry_multiplier", 0),
    "top_n_sigma": ("top_n_sigma", -1),
    "top_k": ("top_k", 0),
    "typ_p": ("typical_p", 1),
    "top_p": ("top_p", 1),
    "min_p": ("min_p", 0),
    "xtc": ("xtc_probability", 0),
    "temperature": ("temp", 1),
}


def _off(sequence: str, file: GGUFFile) -> dict[str, float]:
    """Values that leave only the samplers of a sequence such as "top_k;top_p;temperature"."""
    names = [name for name in sequence.split(";") if name]
    if names != [name for name in _CHAIN if name in names]:
        unsupported(
            file.metadata.get_str("general.architecture"),
            "this file asks for",
            [f"the sampler order {one_line(sequence, 60)}"],
        )
    return dict(off for name, off in _CHAIN.items() if name not in names)


def _operations_of(names: Iterable[str]) -> tuple[str, ...]:
    """What the tensors of these names are for, as far as it is known."""
    wanted = {op: None for name in names for part, op in _TENSOR_OPERATIONS.items() if part in name}
    return tuple(wanted)
