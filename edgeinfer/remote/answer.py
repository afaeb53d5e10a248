"""One answer of a server: its frames as the events that a local model's answer has.

What a server does not tell is 0 in the completion: nothing is made up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

from edgeinfer.event_stream import BEGINNINGS, BLANK
from edgeinfer.remote.address import Address
from edgeinfer.remote.frames import as_object, frames, no_api
from edgeinfer.remote.refusals import ServerError, said_in_answer
from edgeinfer.remote.told import WholeCharacters, count, counts_of, number, parts_of
from edgeinfer.results import Completion, Delta, Event, PromptProgress, Timings, TokenLogprob, Usage
from edgeinfer.text.lenient_json import clean_text
from edgeinfer.text.reply import Piece, ReasoningSplitter

_MOST_CHARACTERS = 64 << 20  # of an answer: one that never ends would take all memory
_OF_JSON = b'{[<"'  # what replies begin with
_MOST_BLANK = 1024  # chunks
_Reason = Literal["stop", "length", "cancelled"]
_REASONS: dict[str, _Reason] = {"length": "length", "max_tokens": "length"}


@dataclass(slots=True)
class Collected:
    """An answer as far as it has come."""

    address: Address
    model: str
    seed: int
    intern: Callable[[str], int]  # a number for a token that the server gives as text
    began_at: float = field(default_factory=time.perf_counter)
    reason: str = ""
    usage: Mapping[str, Any] | None = None  # as the server tells it
    timings: Mapping[str, Any] | None = None
    _text: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _splitter: ReasoningSplitter = field(default_factory=ReasoningSplitter)
    _thoughts: WholeCharacters = field(default_factory=WholeCharacters)
    _words: WholeCharacters = field(default_factory=WholeCharacters)
    _n_characters: int = 0
    _first_at: float = 0.0
    _last_at: float = 0.0

    @property
    def has_ended(self) -> bool:
        return bool(self.reason)

    def events(self, chunks: Iterator[bytes], *, is_stream: bool) -> Iterator[Event]:
        """Deltas and how far the prompt is read; ServerError where the answer fails.

        `is_stream` is what the reply's type says, which how it begins may know better.
        """
        address = self.address
        first, chunks = _begun(chunks)
        if first and first in BEGINNINGS + _OF_JSON:
            is_stream = first in BEGINNINGS
        if is_stream:
            for frame in frames(chunks, address):
                if frame is None:
                    self.reason = self.reason or "stop"
                else:
                    yield from self._take(frame)
        else:  # some servers can't stream
            text = b"".join(_limited(chunks, address.place)).decode("utf-8", "replace")
            found = as_object(text, address)
            if "choices" not in found and "error" not in found:
                raise no_api(text, address)
            yield from self._take(found)
            self.reason = self.reason or "stop"
        thought, text = self._splitter.push(Piece(self._words.flush()))
        last_thought, last_text = self._splitter.flush()
        rest = self._delta(self._thoughts.flush() + thought + last_thought, text + last_text)
        if rest is not None:
            yield rest

    def _take(self, frame: Mapping[str, Any]) -> Iterator[Event]:
        if frame.get("error") or frame.get("object") == "error":
            raise said_in_answer(frame, self.address)
        progress = frame.get("prompt_progress")
        if isinstance(progress, Mapping) and (total := count(progress.get("total"))):
            yield PromptProgress(done=min(count(progress.get("processed")), total), total=total)
        if isinstance(told := frame.get("usage"), Mapping):
            self.usage = told
        if isinstance(told := frame.get("timings"), Mapping):
            self.timings = told
        choices = frame.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if isinstance(choice, Mapping):
            yield from self._take_choice(choice)

    def _take_choice(self, choice: Mapping[str, Any]) -> Iterator[Event]:
        given = choice.get("delta") or choice.get("message")
        reasoning, text = parts_of(given if isinstance(given, Mapping) else {})
        reasoning = self._thoughts.push(reasoning) if reasoning else ""
        text = self._words.push(text) if text else ""
        if text:
            thought, text = self._splitter.push(Piece(text))
            reasoning += thought
        logprobs = self._logprobs_of(choice.get("logprobs"))
        delta = self._delta(reasoning, text, logprobs)
        if delta is not None:
            yield delta
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            if reason in ("content_filter", "error"):
                raise ServerError(f"{self.address.place} cut the answer off ({reason})")
            self.reason = reason

    def _delta(
        self, reasoning: str, text: str, logprobs: tuple[TokenLogprob, ...] = ()
    ) -> Delta | None:
        if not (reasoning or text or logprobs):
            return None
        self._n_characters += len(reasoning) + len(text)
        if self._n_characters > _MOST_CHARACTERS:
            raise ServerError(f"{self.address.place} sends an answer without end")
        self._last_at = time.perf_counter()
        self._first_at = self._first_at or self._last_at
        self._text.append(text)
        self._reasoning.append(reasoning)
        self._logprobs += logprobs
        return Delta(text=text, reasoning=reasoning, logprobs=logprobs or None)

    def _logprobs_of(self, given: Any) -> tuple[TokenLogprob, ...]:
        """Every token by its text: a server's own numbers would mean nothing here."""
        rows = given.get("content") if isinstance(given, Mapping) else None
        return tuple(
            TokenLogprob(id=self.intern(text), text=text, logprob=p, top=self._top(row))
            for row, text, p in _priced(rows)
        )

    def _top(self, row: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
        return tuple((self.intern(text), p) for _, text, p in _priced(row.get("top_logprobs")))

    # -- whole -----------------------------------------------------------------------------------

    def completion(self, *, is_whole: bool) -> Completion:
        """What there is; `is_whole` unless it was stopped."""
        reason: _Reason = _REASONS.get(self.reason, "stop") if is_whole else "cancelled"
        return Completion(
            text="".join(self._text),
            reasoning="".join(self._reasoning),
            token_ids=(),
            finish_reason=reason,
            stop=None,
            logprobs=tuple(self._logprobs) or None,
            usage=self._usage(),
            timings=self._timings(),
            seed=self.seed,
            model=self.model,
        )

    def _usage(self) -> Usage:
        n_prompt, n_new, n_cached, _ = counts_of(self.usage or {}, self.timings or {})
        return Usage(prompt_tokens=n_prompt, completion_tokens=n_new, cached_tokens=n_cached)

    def _timings(self) -> Timings:
        """Rates as the server tells them, else its count by the clock here."""
        told = self.timings or {}
        _, n_new, _, n_hidden = counts_of(self.usage or {}, told)
        n_shown = n_new if any(self._reasoning) else n_new - n_hidden
        seconds = self._last_at - self._first_at
        measured = (n_shown - 1) / seconds if n_shown > 1 and seconds > 0 else 0.0
        return Timings(
            load_s=0.0,
            first_token_s=self._first_at - self.began_at if self._first_at else 0.0,
            prefill_tok_s=number(told.get("prompt_per_second")),
            decode_tok_s=number(told.get("predicted_per_second")) or measured,
            total_s=time.perf_counter() - self.began_at,
            proposed_tokens=count(told.get("draft_n")),
            accepted_tokens=count(told.get("draft_n_accepted")),
        )


def _priced(rows: Any) -> Iterator[tuple[Mapping[str, Any], str, float]]:
    """Rows that name a token and its log-probability."""
    for row in rows if isinstance(rows, Sequence) and not isinstance(rows, str) else ():
        if isinstance(row, Mapping) and isinstance(text := row.get("token"), str):
            p = row.get("logprob")
            if isinstance(p, (int, float)) and not isinstance(p, bool) and p <= 0:
                yield row, clean_text(text), float(p)


def _begun(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first byte that is no space, and all of them."""
    blank: list[bytes] = []
    for chunk in chunks:
        if len(blank) > _MOST_BLANK or chunk.lstrip(BLANK):
            return chunk.lstrip(BLANK)[:1], chain(blank, [chunk], chunks)
        blank.append(chunk)
    return b"", iter(blank)


def _limited(chunks: Iterator[bytes], place: str) -> Iterator[bytes]:
    n_bytes = 0
    for chunk in chunks:
        n_bytes += len(chunk)
        if n_bytes > _MOST_CHARACTERS:
            raise ServerError(f"{place} sends an answer without end")
        yield chunk
