"""What a request is refused with, whatever the API: a status, a kind and a message.

Each API puts these into an envelope of its own.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from typing import Any, TypeAlias

from edgeinfer.errors import (
    BusyError,
    ClosedError,
    ContextLengthError,
    EdgeInferError,
    InvalidRequestError,
    ModelNotFoundError,
    PlanError,
    TemplateError,
)

Json: TypeAlias = "dict[str, Any]"
RETRY_SECONDS = 2
_LOG = logging.getLogger(__name__)
_NEVER_AGAIN = {"x-should-retry": "false"}  # official clients repeat what fails otherwise


class ApiError(Exception):
    """A refusal. `facts` are further fields of the envelope, `headers` of the reply."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {**_usual_headers(status), **(headers or {})}
        self.facts = dict(facts or {})
        super().__init__(message)

    @classmethod
    def of(cls, error: BaseException) -> ApiError:
        """What a client is told of an error; what nobody expected is logged."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, ContextLengthError):
            return _too_long(error)
        if isinstance(error, InvalidRequestError):
            return cls(400, str(error), param=error.param)
        if isinstance(error, TemplateError):
            return cls(400, str(error), param="messages")
        if isinstance(error, BusyError):
            return cls(429, str(error), code="rate_limit_exceeded")
        if isinstance(error, ClosedError):
            return cls(503, str(error))
        if isinstance(error, PlanError):  # nor will it fit in a moment
            return cls(507, str(error), param="model")
        if isinstance(error, ModelNotFoundError):
            return cls(404, str(error), code="model_not_found", param="model")
        if isinstance(error, EdgeInferError):
            return cls(500, str(error))
        _log(error)
        return cls(500, f"an error that should not be: {type(error).__name__}")


def _log(error: BaseException) -> None:
    """Where it came from, but not what it says: that may hold a prompt."""
    lines = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    _LOG.error("a request failed: %s\n%s", type(error).__name__, lines)


def _usual_headers(status: int) -> Mapping[str, str]:
    if status in (429, 503):
        return {"retry-after": str(RETRY_SECONDS)}
    return _NEVER_AGAIN if status in (500, 507) else {}


def _too_long(error: ContextLengthError) -> ApiError:
    """In the words that clients look for: each knows another part of this message."""
    n_tokens, n_ctx = error.n_tokens, error.n_ctx
    return ApiError(
        400,
        f"context_length_exceeded: prompt is too long: {n_tokens} tokens > {n_ctx} maximum. This "
        f"model's maximum context length is {n_ctx} tokens; the request exceeds the context "
        "window.",
        code="context_length_exceeded",
        param="messages",
        facts={"n_prompt_tokens": n_tokens, "n_ctx": n_ctx},
    )
