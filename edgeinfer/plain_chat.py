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


_LEAST_SLIDING = 128  # tokens: four pages of the cache


def talk(
    llm: LLM,
    system: str | None,
    sampling: Sampling,
    follow: Callable[[Stream, Output | None], None],
) -> None:
    """Answer every line until end of input. Ctrl-C ends an answer; between answers, the chat."""
    messages: list[Message] = []
    if llm.n_ctx >= _LEAST_SLIDING:
        sampling.setdefault("overflow", "slide")
    told = False
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
        answer = stream.completion
        messages = [*turns, {"role": "assistant", "content": answer.text}]
        is_full = answer.usage.prompt_tokens + answer.usage.completion_tokens > llm.n_ctx
        if is_full and not told:
            note(f"(the context of {llm.n_ctx} tokens is full: the oldest turns are forgotten)")
        told = told or is_full


def _read_line() -> str | None:
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    line = sys.stdin.buffer.readline()
    return line.decode("utf-8", "replace").rstrip("\r\n") if line else None
