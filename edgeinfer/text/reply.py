"""Token ids to what a reader sees: whole characters, no stop string, reasoning apart.

Control tokens are never shown, yet a stop string or the tags of reasoning may be some. So text
travels as pieces in which the spellings of control tokens are marked.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, NamedTuple, Protocol

from edgeinfer.errors import InvalidRequestError
from edgeinfer.results import Delta, ToolCall
from edgeinfer.text.tokenizer import StreamDecoder, Tokenizer


class Piece(NamedTuple):
    """Text, or the spelling of one control token."""

    text: str
    is_control: bool = False


class Tags(NamedTuple):
    """What stands before and after reasoning."""

    open: str
    close: str


class FindsCalls(Protocol):
    """Tells calls of tools from text: `call_finder.CallFinder`, which starts do without."""

    @property
    def done(self) -> tuple[ToolCall, ...]: ...
    @property
    def is_full(self) -> bool: ...
    def push(self, text: str, *, is_control: bool = False) -> list[Delta]: ...
    def end(self, was_cut: bool) -> list[Delta]: ...


@dataclass(slots=True)
class AnswerText:
    """The text of one answer, from its token ids."""

    tokenizer: Tokenizer
    decoder: StreamDecoder
    stops: StopFinder
    splitter: ReasoningSplitter | None
    finder: FindsCalls | None
    stop: str | None = None
    _text: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        tokenizer: Tokenizer,
        stop: tuple[str, ...],
        splitter: ReasoningSplitter | None,
        finder: FindsCalls | None = None,
        *,
        is_exact: bool = False,
    ) -> AnswerText:
        """A `splitter` means a chat, else the answer continues the prompt's text.

        `is_exact` leaves a space at its start, which a vocabulary may have put there, in the text.
        """
        strip_space = None if splitter is not None and not is_exact else False
        decoder = StreamDecoder(tokenizer, strip_space=strip_space)
        return cls(tokenizer, decoder, StopFinder(stop), splitter, finder)

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.finder.done if self.finder is not None else ()

    @property
    def is_whole(self) -> bool:
        """Whether a stop string has ended it, or the last call that is wanted."""
        return self.stop is not None or (self.finder is not None and self.finder.is_full)

    def push(self, token: int) -> list[Delta]:
        """What the token adds; nothing while it may belong to a stop string or to a call."""
        return self._add(self._find(self._piece(token)))

    def flush(self, last: int | None = None) -> list[Delta]:
        """What was held back, at the end; `last` is the token that was the end, if one was."""
        pieces: list[Piece] = []
        if self.stop is None:
            pieces += self._find(Piece(self.decoder.flush()))
        if self.stop is None and last is not None and self._is_hidden(last):
            pieces += self._find(self._piece(last))
        if self.stop is None:
            pieces += self.stops.flush()
        was_cut = last is None and self.stop is None
        return self._add(pieces, is_last=True, was_cut=was_cut)

    def _piece(self, token: int) -> Piece:
        text = self.decoder.push(token)
        if not text and self._is_hidden(token):
            return Piece(self.tokenizer.text(token), is_control=True)
        return Piece(text)

    def _is_hidden(self, token: int) -> bool:
        """Control tokens, and those of types that stand for no text."""
        return self.tokenizer.is_control(token) or not self.tokenizer.piece(token)

    def _find(self, piece: Piece) -> list[Piece]:
        pieces, self.stop = self.stops.push(piece)
        return pieces

    def _add(
        self, pieces: Iterable[Piece], *, is_last: bool = False, was_cut: bool = False
    ) -> list[Delta]:
        found: list[Delta] = []
        for piece in pieces:
            found += self._split(piece)
        if is_last and self.splitter is not None:
            found += self._parts(*self.splitter.flush())
        if is_last and self.finder is not None:
            found += self.finder.end(was_cut)
        deltas = _merged(found)
        _extend(self._reasoning, [delta.reasoning for delta in deltas])
        _extend(self._text, [delta.text for delta in deltas])
        return deltas

    def _split(self, piece: Piece) -> list[Delta]:
        """Reasoning, text and calls, in the order in which they come."""
        if self.splitter is None:
            return self._parts("", "" if piece.is_control else piece.text)
        found = self._parts(*self.splitter.push(piece))
        if self.finder is not None and piece.is_control and not self.splitter.in_reasoning:
            found += self.finder.push(piece.text, is_control=True)
        return found

    def _parts(self, reasoning: str, text: str) -> list[Delta]:
        found = [Delta(reasoning=reasoning)] if reasoning else []
        if self.finder is not None:
            return found + self.finder.push(text)
        return found + ([Delta(text=text)] if text else [])


def _extend(parts: list[str], more: list[str]) -> None:
    """Append; many are joined, as one takes 60 bytes beside its letters."""
    parts += more
    if len(parts) > _MOST_PARTS:
        parts[:] = ["".join(parts)]


_MOST_PARTS = 1024


def _merged(deltas: Iterable[Delta]) -> list[Delta]:
    """Reasoning and the text right behind it are one delta, as are neighbours of one kind."""
    merged: list[Delta] = []
    for delta in deltas:
        before = merged[-1] if merged else None
        if before is None or before.call or delta.call or (before.text and delta.reasoning):
            merged.append(delta)
        else:
            merged[-1] = Delta(
                text=before.text + delta.text, reasoning=before.reasoning + delta.reasoning
            )
    return merged


class StopFinder:
    """Finds the first stop string in pieces as they come, however many there are.

    A control token is one symbol: it matches where a stop string spells all of it, and what stands
    before and after it is not adjacent. What might begin a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise InvalidRequestError("a stop string is empty", param="stop")
        self._stops, self._sorted = frozenset(stops), sorted(stops)
        self._lengths = sorted({len(stop) for stop in stops}, reverse=True)
        self._held: list[Piece] = []

    def push(self, piece: Piece) -> tuple[list[Piece], str | None]:
        """What is certain not to belong to a stop string, and the one that was completed or None.

        After a match the pieces before the stop string are all there is.
        """
        if not self._stops or not piece.text:
            return [piece] if piece.text else [], None
        pieces = [*self._held, piece]
        text = "".join([each.text for each in pieces])
        inside = _inside_controls(pieces)
        if found := self._find(text, len(piece.text), inside):
            self._held = []
            return _split(pieces, found.start)[0], text[found.start : found.stop]
        shown, self._held = _split(pieces, len(text) - self._overlap(text, inside))
        return shown, None

    def _find(self, text: str, n_new: int, inside: list[range]) -> range | None:
        """Where a stop string lies that the last `n_new` characters end, the first and longest."""
        for end in range(len(text) - n_new + 1, len(text) + 1):
            for n in self._lengths:
                if n <= end and text[end - n : end] in self._stops:
                    if not any(end - n in each or end in each for each in inside):
                        return range(end - n, end)
        return None

    def _overlap(self, text: str, inside: list[range]) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        for n in range(min(len(text), self._lengths[0] - 1), 0, -1):
            begun = text[len(text) - n :]
            at = bisect_right(self._sorted, begun)  # what goes on from it comes right behind it
            if at < len(self._sorted) and self._sorted[at].startswith(begun):
                if not any(len(text) - n in each for each in inside):
                    return n
        return 0

    def flush(self) -> list[Piece]:
        """What was held back, once no more can come."""
        held, self._held = self._held, []
        return held


def _inside_controls(pieces: Sequence[Piece]) -> list[range]:
    """Where in the joined text no match may begin or end."""
    ends = accumulate(len(piece.text) for piece in pieces)
    return [
        range(end - len(piece.text) + 1, end)
        for piece, end in zip(pieces, ends, strict=True)
        if piece.is_control
    ]


def _split(pieces: list[Piece], at: int) -> tuple[list[Piece], list[Piece]]:
    """Cut before character `at` of the joined text."""
    for i, piece in enumerate(pieces):
        if at < len(piece.text):
            before, after = piece.text[:at], piece._replace(text=piece.text[at:])
            return [*pieces[:i], *([Piece(before)] if before else [])], [after, *pieces[i + 1 :]]
        at -= len(piece.text)
    return pieces, []


# Reasoning

THINK = Tags("<think>", "</think>")
# NOTE: also things that people ask for in answers, so only a model that names them means these.
_OTHER_TAGS = (
    Tags("[THINK]", "[/THINK]"),
    Tags("<|START_THINKING|>", "<|END_THINKING|>"),
    Tags("<|begin_of_thought|>", "<|end_of_thought|>"),
    Tags("<|inner_prefix|>", "<|inner_suffix|>"),
    Tags("<seed:think>", "</seed:think>"),
    Tags("◁think▷", "◁/think▷"),
    Tags("<thinking>", "</thinking>"),
    Tags("<thought>", "</thought>"),
    Tags("<reasoning>", "</reasoning>"),
)


def reasoning_tags(template: str, tokenizer: Tokenizer) -> tuple[Tags, ...]:
    """Those of a model: <think>, and what its template or its special tokens name."""
    return THINK, *(
        tags
        for tags in _OTHER_TAGS
        if tags.close in template
        or None not in (tokenizer.special_id(tags.open), tokenizer.special_id(tags.close))
    )


def opened_tags(prompt: str, known: Sequence[Tags] = (THINK,)) -> Tags | None:
    """The tags inside which the prompt ends, so that the reply continues reasoning."""
    end = prompt.rstrip()
    return next((tags for tags in known if end.endswith(tags.open)), None)


class ReasoningSplitter:
    """Splits a reply that comes in pieces into reasoning and text.

    Reasoning is what stands between tags at the very beginning, or behind a tag that is a control
    token anywhere; `opened` are the tags inside which the prompt ends. Of control tokens nothing
    else is passed on.
    """

    def __init__(self, known: Sequence[Tags] = (THINK,), opened: Tags | None = None) -> None:
        self._known, self._opened = known, opened
        self._close = opened.close if opened else ""
        self._state: Literal["start", "reasoning", "between", "text"] = "start"
        self._held = ""
        self._empty = True

    def push(self, piece: Piece) -> tuple[str, str]:
        """The reasoning and the text that are certain by now."""
        if piece.is_control:
            passed = self._settle()
            self._pass_control(piece.text)
            return passed
        self._held += piece.text
        if self._state == "start":
            self._begin()
        reasoning = self._reason() if self._state == "reasoning" else ""
        if self._state == "between":
            self._held = self._held.lstrip()
            self._state = "text" if self._held else "between"
        shown = ""
        if self._state == "text":
            shown, self._held = self._held, ""
        return reasoning, shown

    def flush(self) -> tuple[str, str]:
        """What was held back, once no more can come."""
        held, self._held = self._held, ""
        return (held.rstrip(), "") if self.in_reasoning else ("", held)

    @property
    def in_reasoning(self) -> bool:
        """Whether what comes next is reasoning, for all that is known."""
        return self._state == "reasoning" or (self._state == "start" and bool(self._opened))

    def _begin(self) -> None:
        text = self._held.lstrip()
        for tags in self._known:
            if text.startswith(tags.open):
                self._held, self._close = text[len(tags.open) :], tags.close
                self._state = "reasoning"
                return
        if not any(tags.open.startswith(text) for tags in self._known):
            self._state = "reasoning" if self._opened else "text"

    def _reason(self) -> str:
        if self._empty:
            self._held = self._held.lstrip()
        at = self._held.find(self._close)
        if at >= 0:
            self._state = "between"
            reasoning, self._held = self._held[:at].rstrip(), self._held[at + len(self._close) :]
            return reasoning
        n = next(n for n in range(len(self._close), -1, -1) if self._held.endswith(self._close[:n]))
        return self._pass_reasoning(len(self._held) - n)

    def _pass_reasoning(self, n: int) -> str:
        """The first `n` characters held, without the space that may be the last."""
        sure = self._held[:n].rstrip()
        self._held = self._held[len(sure) :]
        self._empty = self._empty and not sure
        return sure

    def _settle(self) -> tuple[str, str]:
        """A tag that was begun in text does not go on behind a control token."""
        if self._state == "start" and self._held.strip():
            self._state = "reasoning" if self._opened else "text"
        if self._state == "reasoning":
            self._held = self._held.lstrip() if self._empty else self._held
            return self._pass_reasoning(len(self._held)), ""
        if self._state == "text":
            shown, self._held = self._held, ""
            return "", shown
        return "", ""

    def _pass_control(self, text: str) -> None:
        opened = next((tags for tags in self._known if tags.open == text), None)
        if self.in_reasoning and text == self._close:
            self._held, self._state = "", "between"
        elif opened is not None and self._state != "reasoning":
            self._held, self._close = "", opened.close
            self._state, self._empty = "reasoning", True
