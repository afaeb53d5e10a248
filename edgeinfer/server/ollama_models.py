"""What Ollama's API tells of models: those there are, those that are loaded, and one in full."""

from __future__ import annotations

import hashlib
import time
from datetime import datetime, timezone

from edgeinfer.llm import LLM
from edgeinfer.server.errors import Json
from edgeinfer.server.models import ServedModel


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
        "details": _details(model.llm),
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


def _details(llm: LLM | None) -> Json:
    if llm is None:
        family, size, quant = "", "", ""
    else:
        model = llm.runtime.model
        family, quant = model.hparams.architecture, model.quantisation
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


def shown(model: ServedModel) -> Json:
    llm = model.opened
    opened, architecture = llm.runtime, llm.runtime.model.hparams.architecture
    template = opened.found_template
    source = "" if template is None else template.source
    capabilities = ["completion", "tools"]
    if "think" in source:
        capabilities.append("thinking")
    if opened.pooling:
        capabilities.append("embedding")
    return {
        "modelfile": "",
        "parameters": "\n".join(f"{name} {value}" for name, value in llm.recommended.items()),
        "template": source,
        "modified_at": _time(model.created),
        "details": _details(llm),
        "model_info": {
            "general.architecture": architecture,
            "general.parameter_count": opened.model.n_params,
            f"{architecture}.context_length": llm.n_ctx_train,
            f"{architecture}.embedding_length": opened.model.hparams.dim,
            f"{architecture}.block_count": opened.model.hparams.n_layers,
        },
        "capabilities": capabilities,
    }
