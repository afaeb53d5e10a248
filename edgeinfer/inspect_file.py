"""What can be told of a model file without loading its weights.

Knows nothing of how it is shown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgeinfer.engine.memory_plan import MemoryPlan
from edgeinfer.errors import EdgeInferError, ModelNotFoundError, UnsupportedModelError
from edgeinfer.gguf import GGUFFile, Metadata
from edgeinfer.graph import Attention, ExpertLinear, Graph, Linear, Route
from edgeinfer.load_settings import LoadSettings
from edgeinfer.model import Model
from edgeinfer.options import LoadOptions, Unpack
from edgeinfer.runtime import find_file, plan_model
from edgeinfer.terminal import one_line
from edgeinfer.text.chat import read_template
from edgeinfer.text.template_engine import TemplateEngine
from edgeinfer.text.tokenizer import Tokenizer


def describe(path: str) -> dict[str, Any]:
    """Facts of a file; one that can't run is described as far as it is understood."""
    with GGUFFile.open(find_file(path)) as file:
        facts: dict[str, Any] = {
            "name": file.name,
            "path": str(file.path),
            "architecture": one_line(file.metadata.get_str("general.architecture")),
            "n_bytes": file.n_bytes,
            "n_tensors": len(file.tensors),
            "version": file.version,
        }
        try:
            facts |= _model_facts(Model.load(file))
        except UnsupportedModelError as error:
            facts |= {"runs": False, "reason": str(error)}
        facts |= _text_facts(file)
    return facts


def _model_facts(model: Model) -> dict[str, Any]:
    hp = model.hparams
    return {
        "runs": True,
        "n_params": model.n_params,
        "quantisation": model.quantisation,
        "n_layers": hp.n_layers,
        "dim": hp.dim,
        **_widths(model.graph),
        "vocab_size": hp.vocab_size,
        "n_ctx_train": hp.n_ctx_train,
    }


def _widths(graph: Graph) -> dict[str, Any]:
    """Heads and feed-forward widths, a list where layers differ."""
    attentions = [op for op in graph.ops if isinstance(op, Attention)]
    products = [op for op in graph.ops if isinstance(op, (Linear, ExpertLinear))]
    downs = [op for op in products if re.search(r"ffn_down(_exps)?\.", op.weight.name)]
    routes = [op for op in graph.ops if isinstance(op, Route)]
    columns = {
        "n_heads": [op.n_heads for op in attentions],
        "n_kv_heads": [op.cache.n_heads for op in attentions],
        "head_dim": [op.cache.k_dim for op in attentions],
        "ffn_dim": [op.weight.shape[-1] for op in downs],
    }
    if any(op.cache.window for op in attentions):
        columns["window"] = [op.cache.window for op in attentions]
    if routes:
        columns["n_experts"] = [op.x.dim for op in routes]
        columns["n_experts_used"] = [op.n_used for op in routes]
    return {
        name: values[0] if len(set(values)) == 1 else values for name, values in columns.items()
    }


def _text_facts(file: GGUFFile) -> dict[str, Any]:
    wanted = {
        "tokenizer": "tokenizer.ggml.model",
        "pre": "tokenizer.ggml.pre",
        "license": "general.license",
    }
    facts: dict[str, Any] = {}
    for name, key in wanted.items():
        value = file.metadata.get(key)
        facts[name] = one_line(value) if isinstance(value, str) else None
    facts["chat_template"] = "tokenizer.chat_template" in file.metadata
    return facts


def plan(
    model: str | PathLike[str],
    *,
    freed: Mapping[str, int] = MappingProxyType({}),
    **load: Unpack[LoadOptions],
) -> MemoryPlan:
    """The memory that `LLM(model, **load)` would take; PlanError where it does not fit.

    `freed` bytes, by memory as `MemoryPlan.pools` names them, come back before it is loaded. Of a
    model on the hub that is not here, `download` fetches the header alone.
    """
    settings = LoadSettings.resolve("plan", load)
    with _opened(model, settings.may_download) as file:
        return plan_model(Model.load(file), settings, freed)


def _opened(model: str | PathLike[str], may_download: bool) -> GGUFFile:
    try:
        return GGUFFile.open(find_file(model))
    except ModelNotFoundError:
        from edgeinfer.hub.header import is_on_hub, open_header

        if not (may_download and isinstance(model, str) and is_on_hub(model)):
            raise
    return open_header(model)


def read_tokenizer(path: str, pre: str | None) -> Tokenizer:
    """The tokenizer of a file, also of one that has no weights."""
    with GGUFFile.open(find_file(path)) as file:
        return Tokenizer.from_metadata(file.metadata, pre=pre)


def check_template(name: str, model: str | None) -> None:
    """InvalidRequestError or TemplateError where no chat can have the template of this name.

    A model has names of its own: without one, or where it can't be opened, files alone are looked
    into. A pipe, which can be read once, is left for whoever loads the model.
    """
    if Path(name).is_fifo():
        return
    with ExitStack() as stack, closing(TemplateEngine()) as engine:
        metadata = Metadata(Path(), {}) if os.path.exists(name) else None
        with suppress(EdgeInferError, OSError):  # told by whoever loads it
            if model is not None:
                metadata = stack.enter_context(GGUFFile.open(find_file(model))).metadata
        if metadata is not None:
            read_template(name, metadata, engine)
