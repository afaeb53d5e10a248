"""Finds calls of tools in a reply as it comes; what is none stays text.

Knows nothing of how single formats spell calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeinfer.results import Delta, ToolCall
from edgeinfer.text.call_formats import CallFormat, Parse, call_format
from edgeinfer.text.call_json import json_calls
from edgeinfer.text.reader import CutOff, Reader, Steps
from edgeinfer.text.tools import Calls, Enough, NotACall

_MOST_AGAIN = 1 << 16  # what follows after so many is text: each marker might read all of it


class CallFinder:
    """Turns a reply into text and calls. How it is cut into pieces changes nothing in them.

    Where there is a limit, what follows the last of the `most` calls is nobody's concern; so is
    what is no call where a reply `has_text` not.
    """

    def __init__(
        self,
        format: CallFormat,
        tools: Sequence[Mapping[str, Any]],
        most: int | None = None,
        *,
        has_text: bool = True,
    ) -> None:
        self._format, self._reader = format, Reader()
        self._calls = Calls(tools, most, on_done=self._reader.mark, has_text=has_text)
        self._controls = format.controls
        self._steps = self._read()
        self._gap = ""  # white space that is text if no call follows
        self._is_first = True  # no text has come yet
        self._n_again = 0  # characters that are read again because they were no call
        next(self._steps)

    @property
    def done(self) -> tuple[ToolCall, ...]:
        """The calls by now; the last may have been cut off."""
        return tuple(self._calls.done)

    @property
    def is_full(self) -> bool:
        """Whether there are as many calls as are wanted."""
        return self._calls.is_full

    def push(self, text: str, *, is_control: bool = False) -> list[Delta]:
        """What is certain by now."""
        if not text or (is_control and text not in self._controls):
            return []
        self._reader.push(text)
        self._go_on()
        return self._calls.take()

    def end(self, was_cut: bool) -> list[Delta]:
        """What was held back. `was_cut`: the model had more to say, and a call may be open."""
        if self._calls.is_full:
            return []
        self._reader.end(was_cut)
        self._go_on()
        return self._calls.take()

    def _go_on(self) -> None:
        try:
            next(self._steps)
        except (StopIteration, Enough):
            pass
        if self._calls.is_open:  # no way back from here
            self._reader.mark()

    def _read(self) -> Steps[None]:
        yield
        if self._format.whole_reply is not None:
            yield from self._try(self._format.whole_reply, "")
            return
        reader = self._reader
        while not reader.is_at_end:
            marker = yield from self._copy_text()
            if marker is None:
                break
            reader.mark()
            if marker == "{":
                yield from self._try(json_calls, marker)
            else:
                reader.skip(len(marker))
                yield from self._try(self._format.markers[marker], marker)
        self._calls.text(self._gap)

    def _copy_text(self) -> Steps[str | None]:
        """Text up to a marker, which stays; None at the end. Space before it is kept apart."""
        reader, markers = self._reader, tuple(self._format.markers)
        if self._n_again > _MOST_AGAIN:
            markers = ()
        while True:
            self._gap += yield from reader.space()
            if self._is_first and self._format.may_be_bare and (yield from reader.look()) == "{":
                return "{"
            if not (yield from reader.look()):
                return None
            if end := (yield from self._copy_words(markers)):
                return end

    def _copy_words(self, markers: tuple[str, ...]) -> Steps[str]:
        """Text as it comes, without the space at its end."""

        def write(text: str) -> None:
            self._reader.mark()  # nobody goes back here: what was read is forgotten
            kept = (self._gap + text).rstrip()
            if kept:
                self._is_first = False
                self._calls.text(kept)
            self._gap = (self._gap + text)[len(kept) :]

        return (yield from self._reader.copy_until(markers, write))

    def _try(self, parse: Parse, marker: str) -> Steps[None]:
        """Read a call, or give its marker back as text."""
        calls, reader = self._calls, self._reader
        n_before = len(calls.done)
        try:
            yield from parse(reader, calls)
            calls.finish()
            self._gap, self._is_first = "", False
            yield from reader.space()
            return
        except (NotACall, CutOff):
            pass
        was_open = calls.is_open
        calls.finish()
        if len(calls.done) == n_before:
            self._n_again += reader.n_taken
            calls.text(self._gap + marker)
            reader.reset()
            reader.skip(len(marker))
        elif not was_open:
            reader.reset()
        self._gap, self._is_first = "", False


def call_finder(
    template: str,
    tools: Sequence[Mapping[str, Any]],
    most: int | None = None,
    *,
    has_text: bool = True,
) -> CallFinder | None:
    """For the replies of a model with that chat template; None where nothing is to be found."""
    format = call_format(template)
    is_needed = tools or format.has_wrappers or format.whole_reply is not None
    return CallFinder(format, tools, most, has_text=has_text) if is_needed else None
