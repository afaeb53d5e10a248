"""Titles by the model: asked for while nobody waits, given up as soon as somebody does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeinfer import one_line
from edgeinfer.tui.conversation import TITLE_LENGTH, Conversation, title_of
from edgeinfer.tui.search import tokens
from edgeinfer.tui.turn import Turn

if TYPE_CHECKING:
    from edgeinfer import ChatModel, Completion, Message
    from edgeinfer.tui.records import Node

_IDLE_SECONDS = 2.0
_MOST_TRIES = 2
_MOST_WORDS = 8
# After the conversation itself: its beginning has been read already, so this costs little.
_ASK: Message = {
    "role": "user",
    "content": "Give this conversation a title of two to six words. Answer with the title alone.",
}
_SAMPLING = {"max_tokens": 24, "temperature": 0.0, "overflow": "error"}
_STEM, _SHORT = 4, 3  # characters that are the same in forms of a word; of words that say little
_LABEL = re.compile(r"^\W*(?:(?:title|subject|topic)\W*:)?\W*", re.IGNORECASE)


class TitleWriter:
    """Gives a conversation another title than its first words, once, where the model finds one."""

    def __init__(self) -> None:
        self._turn: Turn | None = None
        self._text = ""
        self._of: Conversation | None = None
        self._idle_from: float | None = None
        self._tries: dict[int, int] = {}

    def tend(self, conversation: Conversation, model: ChatModel | None, now: float) -> bool:
        """Go on, while nothing else is to be done (then there is a model); whether it has one."""
        if model is None:
            self.cancel()
        elif self._turn is not None:
            return self._take(self._turn)
        elif self._idle_from is None:
            self._idle_from = now
        elif now - self._idle_from >= _IDLE_SECONDS and self._wants_one(conversation):
            assert conversation.id is not None
            self._tries[conversation.id] = self._tries.get(conversation.id, 0) + 1
            self._of, self._text = conversation, ""
            self._turn = Turn(model, [*conversation.for_model(), _ASK], _SAMPLING)
            self._turn.start()
        return False

    def cancel(self) -> None:
        """Somebody waits for the model."""
        self._idle_from = None
        if self._turn is not None:
            self._turn.stop()
            self._turn = None

    def _wants_one(self, conversation: Conversation) -> bool:
        if self._tries.get(conversation.id or 0, 0) >= _MOST_TRIES:
            return False
        branch = conversation.branch()
        return len(branch) >= 2 and branch[-1].state == "done" and _is_made_up(conversation)

    def _take(self, turn: Turn) -> bool:
        is_over = turn.is_over
        completion = None
        while turn.events:
            _, event = turn.events.popleft()
            if event.type == "delta":
                self._text += event.text
            elif event.type == "done":
                completion = event.completion
        if not is_over:
            return False
        of, self._turn = self._of, None
        title = _title(self._text, completion, of.branch() if of else [])
        assert of is not None and of.id is not None
        self._tries[of.id] = _MOST_TRIES
        if not title or not _is_made_up(of):
            return False
        of.rename(title)
        return True


def _is_made_up(conversation: Conversation) -> bool:
    """Whether its title is its first words still."""
    first = next(iter(conversation.nodes()), None)
    return first is not None and conversation.title == title_of(first.content, first.attachments)


def _title(text: str, completion: Completion | None, branch: Sequence[Node]) -> str:
    """The title in what a model has said of a branch; "" where it has said something else."""
    line, _, rest = text.strip().partition("\n")
    if completion is None or (completion.finish_reason != "stop" and not rest):
        return ""
    title = _LABEL.sub("", one_line(line)).rstrip(" .\"'*_”’»")
    fits = len(title) <= TITLE_LENGTH and len(title.split()) <= _MOST_WORDS
    return title if fits and not title.endswith(":") and _is_of(title, branch) else ""


def _is_of(title: str, branch: Sequence[Node]) -> bool:
    """Whether half of a title's words are the user's, and each comes once.

    Small models make up others, and a title of these alone says less than the question.
    """
    words = _words(title)
    asked = {w[:_STEM] for node in branch if node.role == "user" for w in _words(node.content)}
    n_asked = sum(word[:_STEM] in asked for word in words)
    return len(set(words)) == len(words) <= 2 * n_asked > 0


def _words(text: str) -> list[str]:
    """Those that mean something; of what is written without spaces, every character."""
    return [word for word in tokens(text).split() if len(word) > _SHORT or not word.isascii()]
