"""Runs GGUF language models from readable Python kernels; `LLM` is the way in.

Importing this loads neither NumPy nor anything slower: what needs them comes when first named.
"""

from __future__ import annotations

import os.path

TYPE_CHECKING = False  # `typing` is 5 ms in which an interrupt would print a traceback
if TYPE_CHECKING:
    from typing import Any

    from edgeinfer.aio import AsyncLLM, AsyncStream
    from edgeinfer.chat_model import ChatModel, ChatStream
    from edgeinfer.engine.hooks import Step
    from edgeinfer.engine.memory_plan import MemoryPlan
    from edgeinfer.errors import (
        BusyError,
        ClosedError,
        ContextLengthError,
        DeviceError,
        DownloadError,
        EdgeInferError,
        InvalidModelError,
        InvalidRequestError,
        ModelNotFoundError,
        PlanError,
        SessionError,
        TemplateError,
        UnsupportedModelError,
        reason_of,
    )
    from edgeinfer.hub.discovery import ModelInfo, list_models
    from edgeinfer.hub.fetch import pull
    from edgeinfer.inspect_file import plan
    from edgeinfer.llm import LLM
    from edgeinfer.options import LoadOptions, Progress, Sampling
    from edgeinfer.parameters import ANSWER, LOAD, Parameter
    from edgeinfer.repeats import RepeatGuard
    from edgeinfer.replay import Recording, Replay
    from edgeinfer.results import (
        CallDelta,
        Completion,
        Delta,
        Done,
        Event,
        PromptProgress,
        Timings,
        TokenLogprob,
        ToolCall,
        Usage,
    )
    from edgeinfer.stream import Stream
    from edgeinfer.terminal import StreamFilter, one_line, printable
    from edgeinfer.text.messages import Message

__version__ = "0.1.0"

# A checkout without symbolic links holds `kernels` beside this folder, not in it.
if not os.path.isdir(os.path.join(os.path.dirname(__file__), "kernels")):
    __path__.append(os.path.dirname(os.path.dirname(__file__)))

_HOME = {
    "LLM": "llm", "AsyncLLM": "aio", "Message": "text.messages",
    "ChatModel": "chat_model", "ChatStream": "chat_model",
    "Recording": "replay", "Replay": "replay",
    "LoadOptions": "options", "Progress": "options", "Sampling": "options", "Step": "engine.hooks",
    "ANSWER": "parameters", "LOAD": "parameters", "Parameter": "parameters",
    "MemoryPlan": "engine.memory_plan", "plan": "inspect_file",
    "ModelInfo": "hub.discovery", "list_models": "hub.discovery", "pull": "hub.fetch",
    "Completion": "results", "Delta": "results", "Done": "results", "Event": "results",
    "PromptProgress": "results", "Timings": "results", "TokenLogprob": "results",
    "Usage": "results", "CallDelta": "results", "ToolCall": "results",
    "AsyncStream": "aio", "Stream": "stream",
    "StreamFilter": "terminal", "one_line": "terminal", "printable": "terminal",
    "BusyError": "errors", "ClosedError": "errors", "ContextLengthError": "errors",
    "DeviceError": "errors", "DownloadError": "errors", "EdgeInferError": "errors",
    "InvalidModelError": "errors", "InvalidRequestError": "errors",
    "ModelNotFoundError": "errors", "PlanError": "errors", "SessionError": "errors",
    "TemplateError": "errors", "UnsupportedModelError": "errors", "reason_of": "errors",
    "RepeatGuard": "repeats",
}  # fmt: skip

__all__ = [
    "ANSWER",
    "AsyncLLM",
    "AsyncStream",
    "BusyError",
    "CallDelta",
    "ChatModel",
    "ChatStream",
    "ClosedError",
    "Completion",
    "ContextLengthError",
    "Delta",
    "DeviceError",
    "Done",
    "DownloadError",
    "EdgeInferError",
    "Event",
    "InvalidModelError",
    "InvalidRequestError",
    "LLM",
    "LOAD",
    "LoadOptions",
    "MemoryPlan",
    "Message",
    "ModelInfo",
    "ModelNotFoundError",
    "Parameter",
    "PlanError",
    "Progress",
    "PromptProgress",
    "Recording",
    "RepeatGuard",
    "Replay",
    "Sampling",
    "SessionError",
    "Step",
    "Stream",
    "StreamFilter",
    "TemplateError",
    "Timings",
    "TokenLogprob",
    "ToolCall",
    "UnsupportedModelError",
    "Usage",
    "__version__",
    "list_models",
    "one_line",
    "plan",
    "printable",
    "pull",
    "reason_of",
]


def __getattr__(name: str) -> Any:
    import importlib

    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module 'edgeinfer' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"edgeinfer.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
