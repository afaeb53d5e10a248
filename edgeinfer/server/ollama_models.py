"""What Ollama's API tells of models: those there are, those that are loaded, and one in full."""

from __future__ import annotations

import hashlib
import time
from datetime import datetime, timezone

from edgeinfer.gguf import GGUFFile
from edgeinfer.model import Model
from edgeinfer.options import LoadOptions
from edgeinfer.parameters import POOLINGS
from edgeinfer.sampling.recommended import recommended
from edgeinfer.server.errors import Json
from edgeinfer.server.models import ServedModel
from edgeinfer.text.chat_templates import own_template


def now() -> str:
    return _time(datetime.now(timezone.utc).timestamp())


def _time(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat().replace("+00:00", "Z")


def listed(model: ServedModel) -> Json:
    name = model.name if ":" in model.name else f"{model.name}:latest"
    return {
        "name": name,
        "model": name,
        "modified_at": _time(model.created),
        "size": model.n_bytes,
        "digest": hashlib.sha256(f"{name} {model.n_bytes} {model.created}".encode()).hexdigest(),
        "details": _details(model.llm.runtime.model if model.llm is not None else None),
    }


def running(model: ServedModel) -> Json:
    llm = model.opened
    others = sum(pool.total_bytes for pool in llm.plan.pools[1:])
    return {
        **listed(model),
        "size": llm.plan.total_bytes,
        "size_vram": others,
        "context_length": llm.n_ctx,
        "expires_at": _expiry(model),
    }


def _expiry(model: ServedModel) -> str:
    """When an idle model is unloaded; one that stays until its memory is needed says never."""
    if model.keep_seconds is None:
        return "2099-01-01T00:00:00Z"
    since = time.time() if model.n_users else model.last_used
    return _time(since + model.keep_seconds)


def _details(model: Model | None) -> Json:
    if model is None:
        family, size, quant = "", "", ""
    else:
        family, quant = model.architecture, model.quantisation
        size = (
            f"{model.n_params / 1e9:.1f}B"
            if model.n_params > 1e9
            else f"{model.n_params / 1e6:.0f}M"
        )
    return {
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": size,
        "quantization_level": quant,
    }


def shown(served: ServedModel, load: LoadOptions) -> Json:
    """One in full, by its header where it is not loaded: to be looked at costs no other its place.

    It may be called in any thread.
    """
    if (llm := served.llm) is not None:
        opened = llm.runtime
        template = opened.found_template
        source = "" if template is None else template.source
        return _shown(served, opened.model, source, opened.pooling)
    with GGUFFile.open(served.path) as file:
        model = Model.load(file)
        pooling = load.get("pooling") or (model.pooling if model.pooling in POOLINGS else "")
        return _shown(served, model, own_template(file.metadata) or "", pooling)


def _shown(served: ServedModel, model: Model, template: str, pooling: str) -> Json:
    architecture, hparams = model.architecture, model.hparams
    capabilities = ["completion", "tools"]
    if "think" in template:
        capabilities.append("thinking")
    if pooling:
        capabilities.append("embedding")
    settings = recommended(model.sampling)
    return {
        "modelfile": "",
        "parameters": "\n".join(f"{name} {value}" for name, value in settings.items()),
        "template": template,
        "modified_at": _time(served.created),
        "details": _details(model),
        "model_info": {
            "general.architecture": architecture,
            "general.parameter_count": model.n_params,
            f"{architecture}.context_length": hparams.n_ctx_train,
            f"{architecture}.embedding_length": hparams.dim,
            f"{architecture}.block_count": hparams.n_layers,
        },
        "capabilities": capabilities,
    }
