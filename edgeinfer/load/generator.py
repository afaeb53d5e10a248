"""Asks what a traffic says when it says it, whether or not earlier answers have come.

What a request took counts from when it was due: a server that is slow, or a client that could not
send it in time, does not make it look quicker.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from edgeinfer.errors import EdgeInferError, reason_of
from edgeinfer.load.answer_stream import AnswerStream, StreamError
from edgeinfer.load.http_client import Client, ConnectionLost, Reply
from edgeinfer.load.traffic import Conversation, Texts, Turn
from edgeinfer.platform import EnergyMeter
from edgeinfer.remote.address import Address
from edgeinfer.remote.refusals import Refusal, ServerError, broken, refused, words_of
from edgeinfer.terminal import one_line

_SAMPLE_SECONDS = 0.5  # between looks at the meter
_LONGEST_WAIT = 60.0  # seconds that a server's Retry-After is obeyed for
_USUAL_WAIT = 1.0
_GUESSED_SECONDS = 2.0  # that an answer took before the run
_RETRIED = (429, 503)
_FINAL = (301, 302, 303, 307, 308, 401, 403)  # of a list of models: answers won't come either
_LIST_SECONDS, _MOST_LIST = 20.0, 8 << 20  # that a list of models may take; bytes of it
RUNNING = "still running"  # the failure of what the end of a run has cut off

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a load is put on. Times are in seconds."""

    model: str
    rate: float = 1.0  # conversations a second; with `n_users` it is nobody's
    n_users: int = 0  # that many ask one thing after the other, without pauses; 0: open loop
    seconds: float = 60.0  # in which requests come
    head_start: float = 0.0  # before them, in which conversations had begun that go on
    warmup: float = 0.0  # the first of those in which requests come, which are not counted
    drain: float = 60.0  # that answers may take after those
    deadline: float = 600.0  # from when a request was due to its answer's end
    most_in_flight: int = 1024
    n_retries: int = 2  # where the server says to come again
    shares_prompts: bool = True
    seed: int = 1
    body: dict[str, Any] = field(default_factory=dict)  # more fields of each request
    ignores_eos: bool = False


@dataclass(slots=True)
class Record:
    """One request. Times are those of `time.perf_counter`; `failure` is "" where it was answered.

    `times` are those of pieces of text.
    """

    due: float
    sent: float = 0.0
    ended: float = 0.0
    times: array[float] = field(default_factory=lambda: array("d"))
    n_prompt: int = 0
    n_answer: int = 0
    n_cached: int | None = None
    n_retried: int = 0
    failure: str = RUNNING
    message: str = ""  # what was said of it


@dataclass
class Measured:
    """What a run has seen, also one that was interrupted."""

    settings: Settings
    records: list[Record] = field(default_factory=list)
    begun: float = 0.0
    ended: float = 0.0
    cpu_seconds: float = 0.0  # of this process
    latest: float = 0.0  # seconds that a request was sent after it was due, without the guard
    n_held: int = 0  # requests that the guard made wait
    joules: dict[str, float] = field(default_factory=dict)


class Generator:
    """One run; `measured` grows while it lasts."""

    def __init__(
        self,
        client: Client,
        settings: Settings,
        conversations: Iterable[Conversation],
        texts: Texts,
        has_meter: bool = False,
    ) -> None:
        self._client, self._settings, self._texts = client, settings, texts
        self._conversations = enumerate(conversations)
        self.measured = Measured(settings)
        self._guard = asyncio.Semaphore(settings.most_in_flight)
        self._meter = EnergyMeter() if has_meter else None
        self._end = 0.0  # after which no request comes

    async def run(self) -> None:
        measured, settings = self.measured, self._settings
        measured.begun = time.perf_counter()
        self._end = measured.begun + settings.seconds
        cpu = time.process_time()
        measuring = asyncio.create_task(self._measure_energy())
        talks = set[asyncio.Task[None]]()
        try:
            if settings.n_users:
                talks |= {asyncio.create_task(self._use()) for _ in range(settings.n_users)}
            else:
                await self._let_come(talks)
            await self._drain(talks)
        finally:
            for task in (measuring, *talks):
                task.cancel()
            ended = await asyncio.gather(measuring, *talks, return_exceptions=True)
            self._client.close()
            measured.ended = time.perf_counter()
            measured.cpu_seconds = time.process_time() - cpu
        for error in ended:
            if isinstance(error, Exception):
                raise error

    async def _let_come(self, talks: set[asyncio.Task[None]]) -> None:
        """Begin conversations at their times, until the end."""
        settings = self._settings

        def forget(talk: asyncio.Task[None]) -> None:
            if not talk.cancelled() and talk.exception() is None:  # else `run` raises it
                talks.discard(talk)

        for i, conversation in self._conversations:
            due = self.measured.begun + conversation.at / settings.rate - settings.head_start
            await asyncio.sleep(min(due, self._end) - time.perf_counter())
            if due >= self._end:
                return
            talk = asyncio.create_task(self._talk(i, conversation, due))
            talks.add(talk)
            talk.add_done_callback(forget)

    async def _drain(self, talks: set[asyncio.Task[None]]) -> None:
        """Wait for the answers that are on their way; users without pauses end at once."""
        left = self._end - time.perf_counter()
        if not self._settings.n_users:
            left += self._settings.drain
        if talks:
            await asyncio.wait(talks, timeout=max(0.0, left))

    async def _use(self) -> None:
        for i, conversation in self._conversations:
            await self._talk(i, conversation, time.perf_counter())
            if time.perf_counter() >= self._end:
                return

    async def _talk(self, i: int, conversation: Conversation, due: float) -> None:
        messages = self._system(i, conversation)
        turns, n = conversation.turns, 0
        while due < self.measured.begun:  # that was before the run: what it left is made up
            answer = self._texts.words(turns[n].answer, f"{self._settings.seed} {i} {n} answer")
            messages += [self._said(i, n, turns[n]), {"role": "assistant", "content": answer}]
            n += 1
            if n == len(turns):
                return
            due += turns[n].think + _GUESSED_SECONDS
        await asyncio.sleep(due - time.perf_counter())
        while due < self._end:
            messages.append(self._said(i, n, turns[n]))
            record = Record(due)
            self.measured.records.append(record)
            stream = await self._ask(record, messages, turns[n])
            n += 1
            if stream is None or n == len(turns):
                return
            messages.append({"role": "assistant", "content": stream.text})
            due = record.ended + (0.0 if self._settings.n_users else turns[n].think)
            await asyncio.sleep(min(due, self._end) - time.perf_counter())

    def _said(self, i: int, n: int, turn: Turn) -> dict[str, str]:
        """What a user says."""
        text = self._texts.words(turn.user, f"{self._settings.seed} {i} {n}")
        return {"role": "user", "content": text}

    def _system(self, i: int, conversation: Conversation) -> list[dict[str, str]]:
        if not conversation.system_tokens:
            return []
        key = f"system {conversation.system}"
        if not self._settings.shares_prompts:  # not with those of a run with another seed, either
            key = f"{self._settings.seed} {i} system"
        return [{"role": "system", "content": self._texts.words(conversation.system_tokens, key)}]

    async def _ask(
        self, record: Record, messages: list[dict[str, str]], turn: Turn
    ) -> AnswerStream | None:
        """The answer, None where there was none; the record says why."""
        body = _encode(self._body(messages, turn))
        is_held = self._guard.locked()
        self.measured.n_held += is_held
        try:
            async with self._guard:
                record.sent = time.perf_counter()
                if not is_held:
                    self.measured.latest = max(self.measured.latest, record.sent - record.due)
                left = record.due + self._settings.deadline - record.sent
                stream = await asyncio.wait_for(self._try(record, body), max(0.0, left))
        except (StreamError, ConnectionLost, OSError, asyncio.TimeoutError) as error:
            if _is_deadline(error):
                after = f" after {record.message}" if record.message else ""
                said = f"no whole answer in {self._settings.deadline:g} s{after}"
            elif isinstance(error, StreamError):
                said = self._client.address.hidden(reason_of(error))
            else:  # in the words in which `run --url` tells it
                said = str(_lost(error, self._client.address))
            record.failure, record.message = _kind(error), one_line(said, 300)
        else:
            record.failure = ""
        record.ended = time.perf_counter()
        return stream if not record.failure else None

    def _body(self, messages: list[dict[str, str]], turn: Turn) -> dict[str, Any]:
        settings = self._settings
        more: dict[str, Any] = {}
        if settings.ignores_eos:
            more = {"ignore_eos": True, "min_tokens": turn.answer}
        return {
            "model": settings.model,
            "messages": messages,
            "max_tokens": turn.answer,
            "stream": True,
            "stream_options": {"include_usage": True},
            **more,
            **settings.body,
        }

    async def _try(self, record: Record, body: bytes) -> AnswerStream:
        """An answer; the server may say a few times that it wants to be asked again."""
        while True:
            stream = AnswerStream()
            record.times = stream.times
            path = "/chat/completions"
            reply = await self._client.request("POST", path, body, stream.take)
            if reply.status in _RETRIED and record.n_retried < self._settings.n_retries:
                record.n_retried += 1
                said = words_of(stream.refusal, self._client.address)
                record.message = f"HTTP {reply.status}: {said}".removesuffix(": ")
                await asyncio.sleep(_wait_of(reply))
                continue
            if reply.status != 200:
                said = words_of(stream.refusal, self._client.address)
                raise StreamError(f"HTTP {reply.status}", said)
            stream.finish()
            record.message = ""
            if stream.usage is not None:
                record.n_prompt = stream.usage.prompt_tokens or 0
                record.n_answer = stream.usage.completion_tokens or 0
            record.n_answer = record.n_answer or len(stream.times)
            record.n_cached = stream.n_cached
            return stream

    async def _measure_energy(self) -> None:
        meter = self._meter
        if meter is None:
            return
        try:
            while True:
                meter.sample()
                await asyncio.sleep(_SAMPLE_SECONDS)
        finally:
            meter.sample()
            self.measured.joules = meter.joules


def _is_deadline(error: Exception) -> bool:
    """Whether it is ours: what the system has waited for too long, such as a connection, has a
    number."""
    return isinstance(error, asyncio.TimeoutError) and getattr(error, "errno", None) is None


def _kind(error: Exception) -> str:
    """What failures of a kind are counted by."""
    if _is_deadline(error):
        return "deadline"
    if isinstance(error, StreamError):
        return error.kind
    if isinstance(error, ConnectionLost):
        return "connection lost"
    return "connection refused" if isinstance(error, ConnectionRefusedError) else "no connection"


def _lost(error: Exception, address: Address) -> ServerError:
    return broken(error, address, has_begun=isinstance(error, ConnectionLost) and error.has_begun)


def _wait_of(reply: Reply) -> float:
    """Seconds that a server asks to be left alone; dates are not read."""
    with contextlib.suppress(ValueError):
        seconds = float(reply.headers.get("retry-after", ""))
        if seconds >= 0:
            return min(seconds, _LONGEST_WAIT)
    return _USUAL_WAIT


async def find_model(client: Client) -> str:
    """The name of the first model that a server lists, "" where it lists none.

    EdgeInferError where there is no server, or one that asks for a key or sends elsewhere.
    """
    found = bytearray()

    def take(at: float, status: int, data: bytes) -> None:
        found.extend(data[: _MOST_LIST - len(found)])

    address = client.address
    try:
        reply = await asyncio.wait_for(client.request("GET", "/models", b"", take), _LIST_SECONDS)
    except asyncio.TimeoutError:
        raise broken(TimeoutError(), address, has_begun=False) from None
    except (OSError, ConnectionLost, UnicodeError) as error:
        raise _lost(error, address) from None
    if reply.status in _FINAL:
        raise refused(Refusal(reply.status, reply.headers, bytes(found)), address, "", ())
    with contextlib.suppress(msgspec.MsgspecError, ValueError, LookupError, TypeError):
        if reply.status == 200:
            return str(msgspec.json.decode(bytes(found))["data"][0]["id"])
    return ""


async def tokens_per_word(client: Client, settings: Settings) -> float:
    """How many tokens a word of our texts has, as the server counts; 1 where it does not.

    EdgeInferError where it does not answer.
    """
    counts, sizes = [], (40, 240)
    for n in sizes:
        generator = Generator(client, settings, (), Texts())
        record = Record(time.perf_counter())
        message = {"role": "user", "content": Texts().words(n, f"calibration {settings.seed}")}
        if await generator._ask(record, [message], Turn(n, 1)) is None:
            parts = dict.fromkeys(filter(None, (record.failure, record.message)))
            raise EdgeInferError(
                f"{client.address.place} gave no answer to a first request: {': '.join(parts)}"
            )
        counts.append(record.n_prompt)
    slope = (counts[1] - counts[0]) / (sizes[1] - sizes[0])
    return slope if slope > 0 else 1.0
