"""A streamed chat completion as it comes: when there was text, what there was, how it ended."""

from __future__ import annotations

import contextlib
from array import array
from typing import Annotated, Any, TypeAlias

import msgspec

from edgeinfer.event_stream import BEGINNINGS, BLANK, EventReader, EventTooLargeError
from edgeinfer.remote.refusals import text_of


class StreamError(Exception):
    """What came is no stream of a chat completion, or one that tells of an error. `kind` counts."""

    def __init__(self, kind: str, message: str = "") -> None:
        self.kind = kind
        super().__init__(message or kind)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class _Details(msgspec.Struct):
    cached_tokens: _Count | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk, strict=False).decode  # some spell counts as 5.0
_MOST_EVENT = 4 << 20  # bytes
_MOST_TEXT = 64 << 20  # characters of an answer: more than any model has said
_MOST_ERROR = 4096  # bytes of a refusal that are kept


class AnswerStream:
    """Takes the parts of one reply."""

    def __init__(self) -> None:
        self.times = array("d")  # when each piece of text came
        self.usage: _Usage | None = None
        self.has_ended = False
        self._texts: list[str] = []
        self._n_text = 0
        self._events = EventReader(_MOST_EVENT)
        self._has_begun = False
        self._taken_at = 0.0
        self._refusal = b""

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def n_cached(self) -> int | None:
        """Tokens of the prompt that were not computed again; None where it is not told."""
        details = self.usage.prompt_tokens_details if self.usage is not None else None
        return details.cached_tokens if details is not None else None

    @property
    def refusal(self) -> bytes:
        """What was said where the reply is no answer."""
        return self._refusal

    def take(self, at: float, status: int, data: bytes) -> None:
        """Parts of a body; StreamError where it can't be gone on with."""
        if status != 200:
            self._refusal += data[: _MOST_ERROR - len(self._refusal)]
            return
        if not self._has_begun:
            self._begin(data)
        self._taken_at = at
        try:
            found = self._events.push(data)
        except EventTooLargeError:
            raise StreamError("malformed stream", "an event has no end") from None
        for each in found:
            self._take_event(each)

    def _begin(self, data: bytes) -> None:
        begun = data.lstrip(BLANK)[:1]
        self._has_begun = bool(begun)
        if begun not in BEGINNINGS:
            raise StreamError("malformed stream", "the reply is no stream of events")

    def _take_event(self, data: bytes) -> None:
        data = data.strip()
        if data == b"[DONE]":
            self.has_ended = True
            return
        if not data:  # it keeps the connection
            return
        try:
            chunk = _decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise StreamError("malformed stream", str(error)) from None
        if chunk.error is not None:
            raise StreamError("error in the stream", text_of({"error": chunk.error})[:200])
        if chunk.usage is not None:
            self.usage = chunk.usage
        for choice in chunk.choices or ():
            self.has_ended |= choice.finish_reason is not None
            delta = choice.delta
            if delta is None:
                continue
            if delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls:
                self._add(delta.content or "")

    def _add(self, text: str) -> None:
        self.times.append(self._taken_at)
        self._texts.append(text)
        self._n_text += 1 + len(text)
        if self._n_text > _MOST_TEXT:
            raise StreamError("malformed stream", "the answer has no end")

    def finish(self) -> None:
        """The reply is whole; StreamError where the answer is not."""
        if not self.has_ended:  # the last event may lack what ends it
            with contextlib.suppress(StreamError):
                self._take_event(self._events.end())
        if not self.has_ended:
            raise StreamError("cut short", "the stream ended without an end of its answer")
