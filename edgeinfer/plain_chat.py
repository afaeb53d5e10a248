"""A chat line by line, for pipes and plain terminals.

Knows nothing of loading models or of flags.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgeinfer.console import Output, note

if TYPE_CHECKING:
    from edgeinfer.chat import Message
    from edgeinfer.llm import LLM
    from edgeinfer.options import Sampling
    from edgeinfer.stream import Stream


def talk(
    llm: LLM,
    system: str | None,
    sampling: Sampling,
    follow: Callable[[Stream, Output | None], None],
) -> None:
    """Answer every line until end of input. Ctrl-C ends an answer; between answers, the chat."""
    messages: list[Message] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    while (line := _read_line()) is not None:
        if not line.strip():
            continue
        turns: list[Message] = [*messages, {"role": "user", "content": line}]
        with llm.stream_chat(turns, **sampling) as stream:
            try:
                follow(stream, Output())
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                stream.close()
                note("\n(stopped)")
        messages = [*turns, {"role": "assistant", "content": stream.completion.text}]


def _read_line() -> str | None:
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    line = sys.stdin.buffer.readline()
    return line.decode("utf-8", "replace").rstrip("\r\n") if line else None
