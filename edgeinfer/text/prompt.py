"""A conversation to the token ids of a prompt: cut to the context, rendered, encoded.

Knows nothing of models or of what becomes of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from edgeinfer.errors import EdgeInferError
from edgeinfer.options import Overflow
from edgeinfer.text.chat import ChatTemplate
from edgeinfer.text.hiding import Hiding
from edgeinfer.text.messages import Conversation, text_of
from edgeinfer.text.tokenizer import TooManyTokens
from edgeinfer.text.turns import SYSTEM, drop_turns

_AROUND_MESSAGE = 8  # tokens of the template beside a message, roughly


class ChatPrompt(NamedTuple):
    """The ids of a chat: `n_pinned` of them stay when it slides, `n_dropped` turns are left out."""

    ids: list[int]
    n_pinned: int
    n_dropped: int


class ChatTokenizer(Protocol):
    """What a prompt asks of a tokenizer."""

    bos_id: int | None
    special_texts: tuple[str, ...]

    def encode(self, text: str, *, most: int | None = None) -> list[int]: ...

    def encode_marked(
        self,
        text: str,
        restore: Mapping[int, str | None],
        *,
        bos: bool | None = None,
        most: int | None = None,
    ) -> list[int]: ...


def chat_prompt(
    tokenizer: ChatTokenizer,
    template: ChatTemplate,
    chat: Conversation,
    *,
    overflow: Overflow = "error",
    n_ctx: int = 0,
    most: int | None = None,
) -> ChatPrompt:
    """What asks a model to go on with a conversation that has `n_ctx` tokens of room.

    TooManyTokens once there are more than `most`.
    """
    n_dropped, n_pinned = 0, 1
    if overflow == "drop-turns":

        def n_tokens(message: Mapping[str, Any]) -> int:
            try:
                return len(tokenizer.encode(text_of(message), most=most)) + _AROUND_MESSAGE
            except TooManyTokens as error:
                return error.at_least

        kept, n_dropped = drop_turns(chat.messages, n_tokens, n_ctx)
        chat = chat._replace(messages=kept)
    ids = _encode(tokenizer, template, chat, most)
    if overflow != "error":
        n_pinned = _n_system_tokens(tokenizer, template, chat, ids)
    return ChatPrompt(ids, n_pinned, n_dropped)


def _encode(
    tokenizer: ChatTokenizer,
    template: ChatTemplate,
    chat: Conversation,
    most: int | None = None,
    *,
    asks: bool = True,
) -> list[int]:
    """Ids in which only the template makes control tokens: messages stay text.

    Assistant turns keep their <think> tags, since templates look for them.
    """
    hiding = Hiding(tokenizer.special_texts, [template.source, *chat])
    text = template.render_chat(chat, hiding, add_generation_prompt=asks)
    ids = tokenizer.encode_marked(hiding.without_escapes(text), hiding.restore, most=most)
    return ids[1:] if ids[:2] == [tokenizer.bos_id] * 2 else ids


def _n_system_tokens(
    tokenizer: ChatTokenizer, template: ChatTemplate, chat: Conversation, ids: list[int]
) -> int:
    """Tokens before the first turn that is not the system's, at least one."""
    system = [message for message in chat.messages[:1] if message["role"] in SYSTEM]
    if not system:
        return 1
    try:
        alone = _encode(tokenizer, template, Conversation(system, [], {}), asks=False)
    except EdgeInferError:  # a template that wants a user's turn
        return 1
    pairs = zip(ids, alone, strict=False)
    return max(1, next((i for i, (a, b) in enumerate(pairs) if a != b), len(alone)))
