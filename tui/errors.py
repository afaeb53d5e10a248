"""What the chat says of an error: in its own words, and what to do about it here.

Knows nothing of widgets. Messages of the API name its keywords, which nobody types in a chat.
"""

from __future__ import annotations

from edgeinfer import (
    ClosedError,
    ContextLengthError,
    EdgeInferError,
    InvalidRequestError,
    ModelNotFoundError,
    PlanError,
    one_line,
)
from edgeinfer.tui.gauge import size_text


def in_chat(error: BaseException, *, drops_turns: bool = True) -> str:
    """One line, never empty; `drops_turns` as long as old messages may go when room is short."""
    if isinstance(error, ContextLengthError):
        return _too_long(error, drops_turns)
    if isinstance(error, PlanError):
        return _too_large(error)
    if isinstance(error, ModelNotFoundError):
        shows = "/model shows the models that are here, and some to fetch"
        return str(error) if error.near else f"{error.found}; {shows}"
    if isinstance(error, InvalidRequestError) and error.param == "overflow":
        return (
            "the context is too short to let its oldest text go: /params context makes it longer, "
            "/params overflow drop-turns lets whole messages go instead"
        )
    if isinstance(error, ClosedError):
        return f"the model is not open any more ({error}); /model opens it again"
    if isinstance(error, EdgeInferError):
        return str(error)
    text = one_line(" ".join(str(error).split()), 500)
    return f"unexpected {type(error).__name__}{f': {text}' if text else ''}; /retry tries again"


def _too_long(error: ContextLengthError, drops_turns: bool) -> str:
    forget = "" if drops_turns else "; /params overflow drop-turns lets the oldest messages go"
    return (
        f"this is too long: {error.n_tokens:,} tokens to read, and the context holds "
        f"{error.n_ctx:,}. Shorten it or attach less; /params context makes room{forget}"
    )


def _too_large(error: PlanError) -> str:
    if error.needed is None or error.available is None:
        found = "memory ran out"
    else:
        needed, free = size_text(error.needed), size_text(error.available)
        where = "of memory" if error.memory == "host" else f"on {error.memory}"
        found = f"the model needs {needed} {where}, {free} are free"
    if (n_ctx := error.n_ctx) is not None:
        return f"{found}. A context of {n_ctx:,} tokens would fit: /params context {n_ctx}"
    return (
        f"{found}. Close other programs, shorten the context with /params context, or choose a "
        "smaller model with /model"
    )
