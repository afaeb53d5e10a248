"""A conversation to the token ids of a prompt: cut to the context, rendered, encoded.

Knows nothing of models or of what becomes of a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from edgeinfer.errors import EdgeInferError
from edgeinfer.options import Overflow
from edgeinfer.text.chat import ChatTemplate
from edgeinfer.text.hiding import Hiding
from edgeinfer.text.messages import Conversation, text_of
from edgeinfer.text.tokenizer import TooManyTokens
from edgeinfer.text.turns import SYSTEM, drop_turns

_AROUND_MESSAGE = 8  # tokens of the template beside a message, roughly
_OTHER_QUESTION = {"role": "user", "content": "?"}


class Prompt(NamedTuple):
    """The ids of a prompt: `n_pinned` of them stay when it slides, `n_dropped` turns are left out.

    Prompts to come are likely to part from it behind one of `borders` tokens, and to share the
    first `n_stable`.
    """

    ids: list[int]
    n_pinned: int
    n_dropped: int
    borders: tuple[int, ...] = ()
    n_stable: int = 0


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
    n_stable: int = 0,
    has_borders: bool = False,
) -> Prompt:
    """What asks a model to go on with a conversation that has `n_ctx` tokens of room.

    Later ones begin with the same `n_stable` messages. Borders take time to find, and are looked
    for where a model `has_borders`. TooManyTokens once there are more than `most` tokens.
    """
    n_dropped, n_pinned = 0, 1
    asked = (i for i, m in enumerate(chat.messages) if m["role"] not in SYSTEM)
    n_system = next(asked, len(chat.messages))
    if overflow == "drop-turns":

        def n_tokens(text: str) -> int:
            try:
                return len(tokenizer.encode(text, most=most)) + _AROUND_MESSAGE
            except TooManyTokens as error:
                return error.at_least

        n_held = n_tokens(json.dumps(chat.tools, ensure_ascii=False)) if chat.tools else 0
        kept, n_dropped = drop_turns(
            chat.messages, lambda message: n_tokens(text_of(message)), n_ctx, n_held
        )
        chat = chat._replace(messages=kept)
    ids = _encode(tokenizer, template, chat, most)
    if overflow != "error":
        # What stays is whatever comes before the first question: most templates have tools there.
        begun = chat.first(n_system)
        begun = begun._replace(messages=[*begun.messages, _OTHER_QUESTION], continues=False)
        n_pinned = max(1, _n_tokens(tokenizer, template, begun, ids))
    n_stable = min(n_stable, n_system if n_dropped else len(chat.messages))
    counts = {n_stable}
    if has_borders:  # the system's, what the last question follows, and what the answer follows
        counts |= {n_system, len(chat.messages) - 1, len(chat.messages)}
    elif n_stable == len(chat.messages):  # near enough, and takes no time
        return Prompt(ids, n_pinned, n_dropped, n_stable=len(ids))
    ends = {n: _n_tokens(tokenizer, template, chat.first(n), ids) for n in counts}
    borders = tuple(sorted({end for n, end in ends.items() if has_borders and end}))
    return Prompt(ids, n_pinned, n_dropped, borders, ends[n_stable])


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
    hiding = Hiding(tokenizer.special_texts, [template.source_of(chat), *chat])
    text = template.render_chat(chat, hiding, add_generation_prompt=asks)
    ids = tokenizer.encode_marked(hiding.without_escapes(text), hiding.restore, most=most)
    return ids[1:] if ids[:2] == [tokenizer.bos_id] * 2 else ids


def _n_tokens(
    tokenizer: ChatTokenizer, template: ChatTemplate, begun: Conversation, ids: list[int]
) -> int:
    """Tokens of the first messages of a prompt, as far as it begins with them."""
    if not begun.messages:
        return 0
    try:
        alone = _encode(tokenizer, template, begun, asks=False)
    except EdgeInferError:  # a template that wants a user's turn
        return 0
    pairs = zip(ids, alone, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(alone)))
