"""A model on a server, in the form that a chat asks for one: `edgeinfer.ChatModel`."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import ClosedError, EdgeInferError, InvalidRequestError
from edgeinfer.remote.address import Address
from edgeinfer.remote.answer import Collected
from edgeinfer.remote.connection import Connection
from edgeinfer.remote.refusals import ServerError, TooLongError, broken, refused
from edgeinfer.results import Completion, Done, Event
from edgeinfer.terminal import one_line
from edgeinfer.text.lenient_json import clean_text
from edgeinfer.text.turns import drop_turns

if TYPE_CHECKING:
    from edgeinfer.text.messages import Message

_ENDPOINT = "/chat/completions"
_WAIT_SECONDS = 600.0  # for the next byte: long prompts are read in silence
_LIFE_SECONDS = 3600.0  # that pings and the like, and no event, may come for
_LAST_SECONDS = 5.0  # for what may follow the end of an answer
_MOST_TRIES = 8  # of one request, each shorter or plainer than the one before
_HERE_ALONE = ("overflow", "on_step", "watch", "priority", "n_stable", "speculation")
_WHOLE = ("application/json", "text/html")  # replies that come in one piece


class RemoteModel:
    """Answers come from `address`. What the server does not tell is None or empty."""

    def __init__(
        self,
        address: Address,
        id: str,
        *,
        n_ctx: int = 0,
        n_ctx_train: int = 0,
        recommended: Mapping[str, Any] | None = None,
        known: Sequence[str] = (),
        tells_progress: bool = False,
    ) -> None:
        self.address, self.id = address, id
        self.n_ctx, self.n_ctx_train = n_ctx or None, n_ctx_train or None
        self.recommended = dict(recommended or {})
        self.plan = None  # whose memory it is knows the server
        self.known, self.tells_progress = tuple(known), tells_progress
        self.token_share = 0.0  # tokens a character, as the last prompt was counted
        self._tokens: list[str] = []  # that log-probabilities have named
        self._numbers: dict[str, int] = {}

    @property
    def name(self) -> str:
        """The model and where it runs; of a file's path its last part."""
        id = re.split(r"[/\\]", self.id)[-1] if self.id.endswith(".gguf") else self.id
        return f"{one_line(id)} at {self.address.place}"

    def stream_chat(
        self,
        messages: str | Sequence[Message],
        *,
        template_args: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> RemoteStream:
        """An answer, asked for when its first event is."""
        turns: list[Any] = (
            [{"role": "user", "content": messages}] if isinstance(messages, str) else [*messages]
        )
        turns = [_clean(turn) for turn in turns]
        overflow = sampling.get("overflow") or "error"
        if overflow == "slide":
            raise InvalidRequestError(
                "overflow is 'slide', and no server has that; 'error' and 'drop-turns' are possible"
            )
        body = {"model": self.id, "stream": True, "stream_options": {"include_usage": True}}
        body |= _as_sent(sampling)
        if template_args:
            body["chat_template_kwargs"] = dict(template_args)
        if self.tells_progress:
            body["return_progress"] = True
        return RemoteStream(self, turns, body, drops_turns=overflow == "drop-turns")

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Never: a text goes to a server when it is sent, not when it is counted."""
        raise ServerError(f"tokens are not counted at {self.address.place}")

    def detokenize(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Of tokens in the `logprobs` of this model's answers."""
        return "".join(self._tokens[id] for id in token_ids)

    def close(self) -> None:
        """Nothing is held open between answers."""

    def number_of(self, token: str) -> int:
        """That `detokenize` knows it by."""
        n = self._numbers.setdefault(token, len(self._tokens))
        if n == len(self._tokens):
            self._tokens.append(token)
        return n


class RemoteStream:
    """The events of one answer, for one reader; `close`, from any thread, ends it at once."""

    def __init__(
        self, model: RemoteModel, messages: list[Any], body: dict[str, Any], *, drops_turns: bool
    ) -> None:
        self.dropped_turns = 0
        self._model, self._messages, self._body = model, messages, body
        self._drops_turns = drops_turns
        self._connection = Connection(model.address)
        seed = body.get("seed")
        self.told = Collected(
            model.address, model.name, seed if isinstance(seed, int) else 0, model.number_of
        )
        self._is_closed = False
        self._heard_at = 0.0  # when an event came, or was asked for
        self._completion: Completion | None = None
        self._events = self._read()

    @property
    def completion(self) -> Completion:
        """The answer, once it has ended or was closed."""
        if self._completion is None:
            if not self._is_closed:
                raise ClosedError("the stream has not ended, or failed: there is no completion")
            self._completion = self.told.completion(is_whole=False)
        return self._completion

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        """End the connection; what has come is in `completion`."""
        self._is_closed = True
        self._connection.end()
        with suppress(ValueError):  # another thread is reading: that ends by itself
            self._events.close()

    def __enter__(self) -> RemoteStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self) -> Generator[Event, None, None]:
        try:
            self._ask()
            is_stream = self._connection.content_type not in _WHOLE
            self._heard_at = time.monotonic()
            for event in self.told.events(self._chunks(), is_stream=is_stream):
                yield event
                self._heard_at = time.monotonic()
            if not self.told.has_ended:
                raise broken(EOFError("no end was sent"), self._model.address, has_begun=True)
            self._completion = self.told.completion(is_whole=True)
            if n_prompt := self._completion.usage.prompt_tokens:
                self._model.token_share = n_prompt / _length(self._messages)
            yield Done(completion=self._completion)
        except EdgeInferError:
            if not self._is_closed:
                raise
        finally:
            self._connection.close()

    def _chunks(self) -> Iterator[bytes]:
        """What breaks off once the answer has ended takes nothing from it."""
        try:
            for chunk in self._connection.chunks():
                yield chunk
                if self.told.has_ended:
                    self._connection.wait_at_most(_LAST_SECONDS)
                elif time.monotonic() - self._heard_at > _LIFE_SECONDS:
                    raise ServerError(
                        f"{self._model.address.place} has sent signs of life for "
                        f"{_LIFE_SECONDS / 60:.0f} minutes, and nothing of an answer; see what it "
                        "does, or try again later"
                    )
        except ServerError:
            if not self.told.has_ended:
                raise

    def _ask(self) -> None:
        """Until the server takes the request, or what it refuses can't be left out."""
        model = self._model
        if self._drops_turns and model.n_ctx:
            self._drop_turns(model.token_share, model.n_ctx)
        for n_left in reversed(range(_MOST_TRIES)):
            body = {**self._body, "messages": self._messages}
            self._connection.ask(model.address.path(_ENDPOINT), body, seconds=_WAIT_SECONDS)
            refusal = self._connection.refusal
            if refusal is None:
                return
            error = refused(refusal, model.address, model.id, model.known)
            self._connection.close()
            if not (n_left and self._comply(error)):
                raise error
            self._connection = Connection(model.address)
            if self._is_closed:  # that one was not there to be ended
                raise ServerError("the answer was stopped")

    def _comply(self, error: EdgeInferError) -> bool:
        """Whether there is another way to ask, which the next try takes."""
        body, said = self._body, str(error)
        if isinstance(error, TooLongError):
            return self._drops_turns and self._shorten(error) > 0
        if "max_completion_tokens" in said and "max_tokens" in body:
            body["max_completion_tokens"] = body.pop("max_tokens")
            return True
        return "stream_options" in said and body.pop("stream_options", None) is not None

    def _shorten(self, error: TooLongError) -> int:
        """Leave out turns after a refusal; how many, 0 where the last alone is too long."""
        n_characters = _length(self._messages)
        n_tokens = error.n_tokens or n_characters
        return self._drop_turns(n_tokens / n_characters, min(error.n_ctx or n_tokens, n_tokens))

    def _drop_turns(self, share: float, n_ctx: int) -> int:
        """Leave out the oldest ones that have no room, at `share` tokens a character."""
        self._messages, n_dropped = drop_turns(
            self._messages, lambda message: math.ceil(_length([message]) * share), n_ctx
        )
        self.dropped_turns += n_dropped
        return n_dropped


def _clean(turn: Mapping[str, Any]) -> dict[str, Any]:
    content = turn["content"]
    return {**turn, "content": clean_text(content) if isinstance(content, str) else content}


def _length(messages: Sequence[Mapping[str, Any]]) -> int:
    """Characters, with what a template puts around each."""
    return sum(len(str(message["content"])) + 16 for message in messages)


def _as_sent(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling keywords by the names that servers have for them."""
    found: dict[str, Any] = {}
    for name, value in sampling.items():
        if value is None or name in _HERE_ALONE:
            continue
        if name == "logprobs":
            found |= {"logprobs": True, "top_logprobs": value}
        elif name == "schema":
            form = {"name": "answer", "strict": True, "schema": _schema(value)}
            found["response_format"] = {"type": "json_schema", "json_schema": form}
        elif name == "continue_last":
            found |= {"continue_final_message": value, "add_generation_prompt": not value}
        elif name == "repeat_penalty":
            found |= {name: value, "repetition_penalty": value}
        elif isinstance(value, (tuple, frozenset)):
            found[name] = sorted(value)
        else:
            found[name] = value
    return found


def _schema(given: Any) -> Any:
    try:
        return json.loads(given) if isinstance(given, str) else {**given}
    except (ValueError, TypeError, RecursionError):
        raise InvalidRequestError("the schema is no JSON", param="schema") from None
