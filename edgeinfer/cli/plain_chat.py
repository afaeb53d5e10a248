"""A chat line by line, for pipes and plain terminals.

Knows nothing of loading models or of flags.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edgeinfer import platform
from edgeinfer.cli.console import Output, note
from edgeinfer.cli.line_input import LineInput
from edgeinfer.cli.options import as_flag
from edgeinfer.errors import (
    ContextLengthError,
    EdgeInferError,
    InvalidRequestError,
    PlanError,
)

if TYPE_CHECKING:
    from edgeinfer.chat_model import ChatModel, ChatStream
    from edgeinfer.llm import LLM
    from edgeinfer.options import Sampling
    from edgeinfer.results import Completion
    from edgeinfer.text.messages import Message

HELP = """\
/clear          forget the conversation, keep the system message
/system TEXT    set the system message and start anew; without TEXT, show it
/stats          tokens, speed and memory
/exit           end (also /quit, /bye, Ctrl-D); Ctrl-C stops an answer
Any other line is a message; so is a text of several lines that is pasted."""
_ENDS = ("/exit", "/quit", "/bye")

Follow = Callable[["ChatStream", Output | None], None]


def talk(
    llm: LLM | ChatModel,
    system: str | None,
    sampling: Sampling,
    follow: Follow,
    advise: Callable[[], None] = lambda: None,
    history: Path | None = None,
) -> None:
    """Answer every line until end of input; `advise` is called after the first answer.

    `history` is the file in which lines are kept that are typed.
    """
    if sys.stdin.isatty():
        note("a line or a paste is a message, /help shows the commands, Ctrl-D ends")
    typed = LineInput(history)
    conversation, n_answers = _Conversation(llm, system, sampling, follow), 0
    while (line := typed.next()) is not None and line.strip() not in _ENDS:
        try:
            if _obey(conversation, line):
                n_answers += 1
                if n_answers == 1:
                    advise()
        except KeyboardInterrupt:  # a second one, while the first was being dealt with
            if not sys.stdin.isatty():
                raise


def _obey(conversation: _Conversation, line: str) -> bool:
    """Run a command or answer a message; True if there was an answer. No command has two lines."""
    word, _, rest = line.strip().partition(" ")
    if "\n" in line.strip():
        return conversation.answer(line)
    if word in _COMMANDS:
        _COMMANDS[word](conversation, rest.strip())
    elif word.startswith("/") and not rest and "/" not in word[1:]:
        note(f"no command {word}; /help shows them")
    elif word:
        return conversation.answer(line)
    return False


class _Conversation:
    """The messages so far, and what the last answer took."""

    def __init__(
        self, llm: LLM | ChatModel, system: str | None, sampling: Sampling, follow: Follow
    ) -> None:
        self._llm, self._follow, self._sampling = llm, follow, sampling
        self._sampling.setdefault("overflow", "drop-turns")
        self.messages: list[Message] = []
        self.last: Completion | None = None
        self.n_dropped = 0
        self._told = False
        self.start(system)

    @property
    def system(self) -> str:
        first = self.messages[:1]
        return str(first[0]["content"]) if first and first[0]["role"] == "system" else ""

    def start(self, system: str | None) -> None:
        """Forget everything; the system message is what stays."""
        self.messages = [{"role": "system", "content": system}] if system else []
        self.last, self.n_dropped, self._told = None, 0, False

    def answer(self, line: str) -> bool:
        """Answer a message, False if that failed; what came of a stopped answer is kept."""
        turns: list[Message] = [*self.messages, {"role": "user", "content": line}]
        output = Output()
        try:
            with self._llm.stream_chat(turns, **self._sampling) as stream:
                self._tell_dropped(stream.dropped_turns)
                try:
                    self._follow(stream, output)
                except KeyboardInterrupt:
                    if not sys.stdin.isatty():
                        raise
                    stream.close()
                    note("\n(stopped)")
        except EdgeInferError as error:
            if not sys.stdin.isatty():
                raise
            output.end()
            note(f"edgeinfer: {_in_words(error)}")
            return False
        self._tell_dropped(stream.dropped_turns)  # a server has said only now
        self._take(turns, stream.completion)
        return True

    def _take(self, turns: list[Message], answer: Completion) -> None:
        self.last = answer
        if answer.text:
            self.messages = [*turns, {"role": "assistant", "content": answer.text}]
        if answer.finish_reason == "length" and self._sampling.get("max_tokens") is None:
            note("(cut off: the context is full)")
        used = answer.usage.prompt_tokens + answer.usage.completion_tokens
        self._tell_dropped(int(used > (self._llm.n_ctx or used)))

    def _tell_dropped(self, n_dropped: int) -> None:
        """One line, the first time that something is forgotten."""
        self.n_dropped = max(self.n_dropped, n_dropped)
        if n_dropped and not self._told and self._sampling.get("overflow") != "error":
            self._told = True
            kept = "; the system message stays" if self.system else ""
            n_ctx = self._llm.n_ctx
            full = f"the context of {n_ctx} tokens is full" if n_ctx else "the context is full"
            note(f"({full}: the oldest turns drop out{kept})")


def _in_words(error: EdgeInferError) -> str:
    """What was found, and what to do about it here, where nobody types keywords of the API."""
    again = "end with /exit and begin again with"
    if isinstance(error, ContextLengthError):
        return (
            f"this is too long: {error.n_tokens} tokens to read, and the context holds "
            f"{error.n_ctx}; shorten it, /clear forgets what was said, or {again} a larger -c"
        )
    if isinstance(error, PlanError):
        return f"memory ran out; close other programs, or {again} a smaller -c"
    if isinstance(error, InvalidRequestError) and error.param == "overflow":
        return f"the context is too short to slide; {again} a larger -c, or without --overflow"
    return error.spelled(as_flag)


# -- commands ------------------------------------------------------------------------------------


def _show_help(conversation: _Conversation, rest: str) -> None:
    note(HELP)


def _clear(conversation: _Conversation, rest: str) -> None:
    conversation.start(conversation.system or None)
    note("(cleared)")


def _system(conversation: _Conversation, rest: str) -> None:
    if rest:
        conversation.start(rest)
    note(f"system: {conversation.system or '(none)'}")


def _stats(conversation: _Conversation, rest: str) -> None:
    """What is known: a server may not tell its context length or the count of tokens."""
    answer, llm = conversation.last, conversation._llm
    context = f"{llm.n_ctx} tokens" if llm.n_ctx else "of unknown length"
    memory = llm.plan and f"{platform.rss() >> 20} MiB held, {llm.plan.summary} planned"
    if answer is None:
        note("; ".join(filter(None, [f"no answer yet; context {context}", memory])))
        return
    usage, times = answer.usage, answer.timings
    used = usage.prompt_tokens + usage.completion_tokens
    used_text = f"{min(used, llm.n_ctx)} of {context}" if llm.n_ctx and used else context
    n_turns = sum(message["role"] == "user" for message in conversation.messages)
    lines = [
        f"context: {used_text}, {n_turns} turns, {conversation.n_dropped} of them dropped",
        f"last answer: {usage.completion_tokens} tokens at {times.decode_tok_s:.1f} tok/s, first "
        f"after {times.first_token_s:.2f} s; prompt {usage.prompt_tokens} tokens, "
        f"{usage.cached_tokens} of them kept from before",
    ]
    if not used:
        lines[1] = f"last answer: first text after {times.first_token_s:.2f} s"
    note("\n".join([*lines, *([f"memory: {memory}"] if memory else [])]))


_COMMANDS = {
    "/help": _show_help,
    "/?": _show_help,
    "/clear": _clear,
    "/system": _system,
    "/stats": _stats,
}
