"""The parameters that can be changed during a chat, and what is in force of each.

Knows nothing of widgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from edgeinfer import ANSWER, LOAD, EdgeInferError

if TYPE_CHECKING:
    from edgeinfer import ChatModel

SAMPLING = tuple(
    ANSWER[name]
    for name in (
        "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "max_tokens", "seed",
        "overflow", "logprobs",
    )
)  # fmt: skip
CONTEXT = LOAD["n_ctx"]._replace(
    name="context",
    help="Tokens that the conversation and its answer may have; the model is opened anew.",
)
PARAMS = (*SAMPLING, CONTEXT)
CHAT_DEFAULTS = {"overflow": "drop-turns"}  # a chat goes on where a single request would fail
_UNSET = {"max_tokens": "no limit", "seed": "another each time", "logprobs": "none"}
_AT_SERVER = "the server’s own"


class InForce(NamedTuple):
    """A value as it is shown, and whose it is."""

    value: str
    source: str


def in_force(
    name: str, sampling: Mapping[str, Any], model: ChatModel | None, *, is_served: bool = False
) -> InForce:
    """What the next answer will use, were `sampling` all that the user has set.

    Of a model that `is_served` by others the value is empty where they do not tell it.
    """
    if sampling.get(name) is not None:
        return InForce(str(sampling[name]), "yours")
    try:
        advised = model.recommended if model is not None else {}
    except EdgeInferError:  # the answer will say so
        advised = {}
    if name in advised:
        return InForce(str(advised[name]), _AT_SERVER if is_served else "the model’s own")
    if is_served and name not in CHAT_DEFAULTS and name not in _UNSET:
        return InForce("", _AT_SERVER)
    usual = CHAT_DEFAULTS.get(name, ANSWER[name].default)
    return InForce(_UNSET[name] if usual is None else str(usual), "usual")


def context_in_force(asked: int | None, model: ChatModel | None) -> InForce:
    """The context length; `asked` is what the user wants of it."""
    if model is None:
        return InForce(str(asked or "what fits"), "yours" if asked else "usual")
    if model.plan is None or model.n_ctx_train is None:  # on a server
        return InForce(str(model.n_ctx or ""), _AT_SERVER)
    trained = f"trained for {model.n_ctx_train:,}"
    if asked is None:
        return InForce(str(model.n_ctx), model.plan.note or f"usual; {trained}")
    is_beyond = asked > model.n_ctx_train
    return InForce(str(asked), f"yours; only {trained}" if is_beyond else f"yours; {trained}")


def parse_param(name: str, text: str) -> Any:
    """The value of a parameter, None for an empty text; ValueError says what is possible."""
    param = next((param for param in PARAMS if param.name == name), None)
    if param is None:
        raise ValueError(f"no parameter {name}; there are {', '.join(p.name for p in PARAMS)}")
    text = text.strip().replace(",", "") if param is CONTEXT else text.strip()
    return param.parse(text, in_form=True) if text.lower() not in ("", "default") else None
