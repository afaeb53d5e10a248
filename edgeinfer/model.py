"""A model file understood: its numbers, its recorded forward pass and what it recommends.

Knows nothing of a machine: no backend, no memory plan, no running.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from edgeinfer.errors import InvalidModelError, UnsupportedModelError
from edgeinfer.gguf import Array, GGUFFile
from edgeinfer.graph import Graph, Hparams, Rotate, without_leading_ones
from edgeinfer.keys import Keys
from edgeinfer.quant import RUNNABLE, Weight
from edgeinfer.rope import LEAST_FACTOR
from edgeinfer.terminal import one_line


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """Everything about one file. The file must stay open for as long as the weights are read.

    `sampling` holds the file's `general.sampling.*` values without that prefix. `pooling` is what
    it says of embeddings: "mean", "last", what is not done here ("cls", "rank"), or "".
    """

    file: GGUFFile
    name: str
    hparams: Hparams
    graph: Graph
    sampling: Mapping[str, bool | int | float | str]
    pooling: str = ""

    @classmethod
    def load(cls, file: GGUFFile) -> Model:
        """Check the file's numbers and record its forward pass."""
        forward = _forward(file.metadata.get_str("general.architecture"))
        keys = Keys(file)
        hparams = Hparams(
            architecture=keys.architecture,
            n_layers=keys.n_layers,
            dim=keys.count("embedding_length"),
            vocab_size=_vocab_size(file),
            n_ctx_train=keys.n_ctx_train,
        )
        graph = Graph(hparams, keys, file.tensors)
        forward(graph)
        pooling = keys.pooling()
        keys.check_all_read()
        _check_unused(graph)
        _check_types(graph, file.tensors)
        _check_rope_factors(graph)
        return cls(file, file.name, hparams, graph, _read_sampling(file), pooling)

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


_ENCODERS = (
    "bert", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llama-embed",
    "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "t5encoder",
)  # fmt: skip
_Forward: TypeAlias = "Callable[[Graph], None]"


def architectures() -> dict[str, _Forward]:
    """What every file of `edgeinfer.models` records, by the names of architectures."""
    return {name: forward for file in _model_files() for name, forward in _read(file)}


def _model_files() -> list[str]:
    from edgeinfer import models

    return [info.name for info in pkgutil.iter_modules(models.__path__)]


def _read(file: str) -> list[tuple[str, _Forward]]:
    """A file is named after its architecture, or says in NAMES which ones it stands for."""
    module = importlib.import_module(f"edgeinfer.models.{file}")
    return [(name, module.forward) for name in getattr(module, "NAMES", (file,))]


def _forward(architecture: str) -> _Forward:
    files = _model_files()
    for file in sorted(files, key=lambda file: file != architecture):  # most often the first
        for name, forward in _read(file):
            if name == architecture:
                return forward
    if architecture in _ENCODERS:
        raise UnsupportedModelError(
            f"{architecture} is an encoder: its tokens see those behind them, which edgeinfer "
            "lacks; for embeddings choose a model with a causal one, for example Qwen3-Embedding",
            architecture=architecture,
            missing=["attention to later tokens"],
        )
    raise UnsupportedModelError(
        f"architecture {one_line(architecture, 60)!r} is not known here; edgeinfer runs "
        f"{', '.join(sorted(architectures()))}. Choose a model of one of these.",
        architecture=architecture,
        missing=[f"architecture {architecture}"],
    )


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


def _check_unused(graph: Graph) -> None:
    """A tensor that no op reads would be left out of the computation without a word."""
    # Old converters wrote rotation tables that every runtime computes itself.
    unused = [name for name in graph.unused if not name.endswith(".attn_rot_embd.weight")]
    if unused:
        shown = ", ".join(one_line(name, 60) for name in unused[:4])
        shown += f" and {len(unused) - 4} more" if unused[4:] else ""
        raise UnsupportedModelError(
            f"nothing here reads {shown}: the result would be wrong; choose a model without it",
            architecture=graph.hparams.architecture,
            missing=unused[:4],
        )


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
    from edgeinfer.dequantize import dequantize

    ropes = {op.rope for op in graph.ops if isinstance(op, Rotate)}
    for factors in {table for rope in ropes for table in rope.tables()}:
        if not all(x >= LEAST_FACTOR for x in dequantize(factors).tolist()):
            raise InvalidModelError(
                f"a factor is not a number from {LEAST_FACTOR:g} on; download the file again",
                field=factors.name,
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
        raise UnsupportedModelError(
            f"general.sampling.sequence is {one_line(sequence, 60)}: edgeinfer runs samplers in "
            f"the order {';'.join(_CHAIN)}",
            architecture=file.metadata.get_str("general.architecture"),
            missing=[f"the sampler order {sequence}"],
        )
    return dict(off for name, off in _CHAIN.items() if name not in names)
