"""Turns the tokens of a generation into text: deltas as they come, a completion at the end.

Knows nothing of prompts or of how tokens are made.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, TypeVar

from edgeinfer.chat import ReasoningSplitter
from edgeinfer.errors import ClosedError
from edgeinfer.generation import Generation
from edgeinfer.results import (
    Completion,
    Delta,
    Done,
    Event,
    PromptProgress,
    Timings,
    TokenLogprob,
    Usage,
)
from edgeinfer.sequence import Finished, Prefilled, Token
from edgeinfer.tokenizer import StopFinder, StreamDecoder, Tokenizer

_Self = TypeVar("_Self", bound="Stream")
_Reason = Literal["stop", "length", "cancelled"]


@dataclass(slots=True)
class AnswerText:
    """Text from token ids: whole characters, nothing of a stop string, reasoning apart."""

    decoder: StreamDecoder
    stops: StopFinder
    splitter: ReasoningSplitter | None
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    stop: str | None = None

    @classmethod
    def open(
        cls, tokenizer: Tokenizer, stop: tuple[str, ...], splitter: ReasoningSplitter | None
    ) -> AnswerText:
        """A `splitter` means a chat, else the answer continues the prompt's text."""
        strip_space = None if splitter is not None else False
        decoder = StreamDecoder(tokenizer, strip_space=strip_space)
        return cls(decoder, StopFinder(stop), splitter)

    def push(self, token: int) -> Delta | None:
        """What the token adds; nothing while it may belong to a stop string."""
        text, self.stop = self.stops.push(self.decoder.push(token))
        return self._add(*(self.splitter.push(text) if self.splitter else ("", text)))

    def flush(self) -> Delta | None:
        """What was held back, at the end of the generation."""
        text = ""
        if self.stop is None:
            text, self.stop = self.stops.push(self.decoder.flush())
            text += self.stops.flush() if self.stop is None else ""
        if self.splitter is None:
            return self._add("", text)
        reasoning, shown = self.splitter.push(text)
        more_reasoning, more_shown = self.splitter.flush()
        return self._add(reasoning + more_reasoning, shown + more_shown)

    def _add(self, reasoning: str, text: str) -> Delta | None:
        if not reasoning and not text:
            return None
        self.reasoning.append(reasoning)
        self.text.append(text)
        return Delta(text=text, reasoning=reasoning)


class Stream(Iterator[Event]):
    """The events of one answer. `close` cancels it; so does dropping the last reference."""

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        answer: AnswerText,
        *,
        model: str,
        load_s: float,
        owner: object,
        dropped_turns: int = 0,
    ) -> None:
        self._generation, self._tokenizer, self._answer = generation, tokenizer, answer
        self._model, self._load_s = model, load_s
        self.dropped_turns = dropped_turns  # the oldest ones, that the prompt has no room for
        self._owner = owner  # keeps the model open while someone iterates
        self._ready: deque[Event] = deque()
        self._tokens: list[Token] = []
        self._prefill: list[Prefilled] = []
        self._completion: Completion | None = None
        self._is_over = False

    @property
    def completion(self) -> Completion:
        """The whole answer, once the stream has ended or was closed."""
        if self._completion is None:
            raise ClosedError("the stream has not ended, or failed: there is no completion")
        return self._completion

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The tokens of the prompt, template included."""
        return self._generation.request.ids

    def __iter__(self: _Self) -> _Self:
        return self

    def __next__(self) -> Event:
        while not self._ready:
            if self._is_over:
                raise StopIteration
            self._take(next(self._generation))
        return self._ready.popleft()

    def run(self) -> Completion:
        """Wait for the end; an interrupted wait cancels the generation."""
        with self:
            for _ in self:
                pass
        return self.completion

    def close(self) -> None:
        """Cancel what is left of the generation; what was generated is in `completion`.

        What was read and written stays in the cache until the room is needed.
        """
        if not self._is_over:
            self._generation.cancel(keep_cache=True)
            self._end("cancelled", None)
        self._ready.clear()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_is_over", True):
            with contextlib.suppress(Exception):
                self._generation.cancel()

    def _take(self, event: Prefilled | Token | Finished) -> None:
        if isinstance(event, Prefilled):
            self._prefill.append(event)
            self._ready.append(PromptProgress(done=event.done, total=event.total))
        elif isinstance(event, Token):
            self._tokens.append(event)
            self._show(self._answer.push(event.id))
            if self._answer.stop is not None:
                self._generation.cancel(keep_cache=True)
                self._end("stop", self._answer.stop)
        elif event.error is not None:
            self._is_over = True
            raise event.error
        else:
            assert event.reason != "error"
            self._end(event.reason, event.stop_id)

    def _show(self, delta: Delta | None) -> None:
        if delta is not None:
            self._ready.append(delta)

    def _end(self, reason: _Reason, stop: str | int | None) -> None:
        self._is_over = True
        self._show(self._answer.flush())
        if self._answer.stop is not None:
            reason, stop = "stop", self._answer.stop
        prompt, first = self._generation.request, self._prefill[:1]
        self._completion = Completion(
            text="".join(self._answer.text),
            reasoning="".join(self._answer.reasoning),
            token_ids=tuple(token.id for token in self._tokens),
            finish_reason=reason,
            stop=stop,
            logprobs=self._logprobs(),
            usage=Usage(
                prompt_tokens=len(prompt.ids),
                completion_tokens=len(self._tokens),
                cached_tokens=first[0].cached if first else 0,
            ),
            timings=self._timings(),
            seed=prompt.params.seed or 0,
            model=self._model,
        )
        self._ready.append(Done(completion=self._completion))

    def _logprobs(self) -> tuple[TokenLogprob, ...] | None:
        if self._generation.request.params.logprobs is None:
            return None
        return tuple(
            TokenLogprob(
                id=token.id,
                text=self._tokenizer.piece(token.id).decode(errors="replace"),
                logprob=float("nan") if token.logprob is None else token.logprob,
                top=token.top,
            )
            for token in self._tokens
        )

    def _timings(self) -> Timings:
        submitted = self._generation.submitted_at
        prefill_s, n_prefilled, first_s, decode_s = 0.0, 0, 0.0, 0.0
        if self._prefill:
            start, end = self._prefill[0], self._prefill[-1]
            prefill_s, n_prefilled = end.at - start.at, end.done - start.cached
        if self._tokens:
            first_s = self._tokens[0].at - submitted
            decode_s = self._tokens[-1].at - self._tokens[0].at
        return Timings(
            load_s=self._load_s,
            first_token_s=first_s,
            prefill_tok_s=n_prefilled / prefill_s if prefill_s else 0.0,
            decode_tok_s=(len(self._tokens) - 1) / decode_s if decode_s else 0.0,
            total_s=time.perf_counter() - submitted,
            proposed_tokens=self._generation.n_proposed,
            accepted_tokens=self._generation.n_accepted,
        )
