"""Runs requests on the models that are served: what all APIs share.

Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeinfer.aio import AsyncStream
from edgeinfer.engine.generation import check_length
from edgeinfer.engine.plan_rows import size_text
from edgeinfer.errors import BusyError, ContextLengthError, InvalidRequestError, Keyword
from edgeinfer.llm import LLM
from edgeinfer.replying import chosen_tools
from edgeinfer.server.answers import Answer
from edgeinfer.server.doorbell import Doorbell
from edgeinfer.server.errors import ApiError
from edgeinfer.server.metrics import Exposition
from edgeinfer.server.models import Models, ServedModel
from edgeinfer.server.prefix_care import steady
from edgeinfer.server.requests import Chat, Request
from edgeinfer.server.token_ids import MOST_MADE, check_origin, limited
from edgeinfer.text.infill import infill_prompt
from edgeinfer.text.messages import Conversation
from edgeinfer.text.prompt import chat_prompt

T = TypeVar("T")
_NEVER = -1e9  # what keeps a token from being picked
_MOST_TEXTS = 2048  # to embed in one request
_BEGUN: ContextVar[AsyncExitStack] = ContextVar("begun")  # what ends with a request


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes on."""

    most_body: int = 32 << 20  # bytes
    most_bodies: int = 8  # of the largest, at once; smaller ones as many as take their place
    most_waiting: int = 256  # requests at once, running ones included
    most_answers: int = 128  # of one request
    ping_seconds: float = 10.0
    grace_seconds: float = 5.0  # in which answers may end once the server is to stop
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    origins: tuple[str, ...] = ()  # that may be where a browser's page comes from
    hosts: tuple[str, ...] | None = None  # names that the server answers to; None: any
    has_prefix_care: bool = True  # what changes in a system message is moved behind the history

    @property
    def most_held(self) -> int:
        """Bytes of all bodies together."""
        return self.most_bodies * self.most_body


class Service:
    """The models and the answers that are on their way."""

    def __init__(self, models: Models, limits: Limits) -> None:
        self.models, self.limits = models, limits
        self.answers: set[Answer] = set()
        self._n_open = 0
        self._doorbell = Doorbell()
        self._stop = asyncio.Event()
        self.is_stopping = False

    @asynccontextmanager
    async def model(self, name: str) -> AsyncIterator[ServedModel]:
        """A loaded model; ApiError where there are too many requests."""
        if self.is_stopping:
            raise ApiError(503, "the server is stopping")
        if self._n_open >= self.limits.most_waiting:
            raise ApiError(
                429,
                f"{self._n_open} requests are being answered; try again later",
                code="rate_limit_exceeded",
            )
        self._n_open += 1
        try:
            async with AsyncExitStack() as stack:
                lease = stack.enter_async_context(self.models.lease(name))
                yield await self.unless_stopped(lease)
        finally:
            self._n_open -= 1

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Answers that are begun inside end with it, also where a handler fails between the two."""
        async with AsyncExitStack() as stack:
            _BEGUN.set(stack)
            yield

    async def answer(self, request: Request) -> Answer:
        """Begin to answer, inside of `request`; whoever reads the answer may close it before."""
        n_answers = request.n * max(1, len(request.prompts))
        if n_answers > self.limits.most_answers:
            raise ApiError(
                400, f"{n_answers} answers are asked for, at most {self.limits.most_answers} work"
            )
        async with AsyncExitStack() as stack:
            model = await stack.enter_async_context(self.model(request.model))
            prepared = self._prepared(request)
            try:
                if request.suffix:
                    prepared = await asyncio.to_thread(_filled_in, model.opened, prepared)
                streams = await _begin(model, prepared, stack)
            except InvalidRequestError as error:
                raise request.structure.renamed(error) from error
            answer = Answer(
                model,
                streams,
                self.limits.ping_seconds,
                self._doorbell,
                stack.pop_all(),
                request.structure,
            )
        self.answers.add(answer)
        answer.stack.callback(self.answers.discard, answer)
        if self._stop.is_set():  # meanwhile
            answer.cut_short()
        _BEGUN.get().push_async_callback(answer.close)
        return answer

    async def embed(
        self, name: str, texts: Sequence[str | list[int]], **options: Any
    ) -> tuple[NDArray[np.float32], int]:
        """The vectors of texts, as `LLM.embed` makes them, and how many tokens those have."""
        if len(texts) > _MOST_TEXTS:
            found = f"there are {len(texts)} texts, at most {_MOST_TEXTS} work"
            raise ApiError(400, found, param="input")
        async with self.model(name) as model:
            assert model.face is not None
            try:
                # What is longer is refused or cut there.
                most = model.opened.n_ctx
                given = [each if isinstance(each, str) else each[:most] for each in texts]
                await asyncio.to_thread(check_origin, model.opened.runtime.tokenizer, given)
                vectors, n_tokens = await self.unless_stopped(model.face.embedding(texts, options))
            except (ContextLengthError, InvalidRequestError) as error:
                refused = ApiError.of(error)
                refused.message = refused.message if refused.code else error.spelled(_as_flag)
                is_named = refused.param in ("model", "dimensions")
                refused.param = refused.param if is_named else "input"
                raise refused from None
            model.metrics.add_prompt(n_tokens)
            return vectors, n_tokens

    async def unless_stopped(self, work: Awaitable[T]) -> T:
        """What `work` gives; it is cancelled where answers are cut short."""
        working, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((working, stop), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ApiError(503, "the server is stopping; the request was cut short")
            return working.result()
        finally:
            for each in (working, stop):
                each.cancel()
            await asyncio.gather(working, stop, return_exceptions=True)

    def _prepared(self, request: Request) -> Request:
        """With a beginning that the next request shares, and is kept for it in a session.

        Who gives tools has one; side requests, such as for a title, give none.
        """
        chat, sampling = request.chat, request.sampling
        if chat is None:
            return request
        if self.limits.has_prefix_care:
            chat = replace(chat, messages=steady(chat.messages))
        if request.session or chat.tools:
            sampling = {"n_stable": len(chat.messages), **sampling}
        if chat.continues:
            sampling = {**sampling, "continue_last": True}
        return replace(request, chat=chat, sampling=sampling)

    async def count_tokens(self, request: Request) -> int:
        return len(await self.prompt_ids(request))

    async def prompt_ids(self, request: Request) -> list[int]:
        """Tokens of a chat's prompt."""
        async with self.model(request.model) as model:
            work = asyncio.to_thread(_ids, model.opened, self._prepared(request))
            return await self.unless_stopped(work)

    async def render(self, request: Request) -> str:
        """The text of a chat's prompt."""
        request = self._prepared(request)
        assert request.chat is not None
        chat = _conversation(request.chat)
        async with self.model(request.model) as model:
            return await asyncio.to_thread(model.opened.runtime.template.render_chat, chat)

    async def with_model(self, name: str, work: Callable[[LLM], T]) -> T:
        """What `work` gives in a thread.

        NOTE: no thread can be ended: it goes on where its client has gone, for the seconds that a
        text of the most tokens takes.
        """
        async with self.model(name) as model:
            return await self.unless_stopped(asyncio.to_thread(work, model.opened))

    def metrics(self) -> str:
        n_waiting = 0
        for answer in self.answers:
            n_waiting += not answer.has_begun
        by_name = {model.name: model.metrics for model in self.models.served}
        return Exposition(by_name, n_waiting).text()

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered."""
        return self._n_open > 0

    def end_answers(self) -> None:
        """Cut short what still runs."""
        self._stop.set()
        self.models.end_pulls()
        for answer in list(self.answers):
            answer.cut_short()


def _filled_in(llm: LLM, request: Request) -> Request:
    """With prompts that ask for what is between them and the suffix."""
    tokenizer = llm.runtime.tokenizer
    n_characters = max(map(len, request.prompts)) + len(request.suffix)
    check_length(n_characters // tokenizer.longest_text, llm.n_ctx, is_least=True)
    prompts = [infill_prompt(tokenizer, each, request.suffix) for each in request.prompts]
    return replace(request, prompts=prompts)


async def _begin(model: ServedModel, request: Request, stack: AsyncExitStack) -> list[AsyncStream]:
    """The streams of all answers; all are closed when the stack is."""
    streams: list[AsyncStream] = []
    for prompt in request.prompts if request.chat is None else [request.chat]:
        for i in range(request.n):
            try:
                stream = await _begin_one(model, request, prompt, i)
            except BusyError as error:
                _check_room(error, streams)
                raise
            stack.push_async_callback(stream.close)
            streams.append(stream)
    return streams


async def _begin_one(
    model: ServedModel, request: Request, prompt: Chat | str | list[int], i: int
) -> AsyncStream:
    """The stream of the answer `i` to a prompt."""
    face = model.face
    assert face is not None
    sampling: Any = request.sampling | request.structure.sampling
    if request.ignores_eos:
        ends = dict.fromkeys(model.opened.runtime.tokenizer.eog_ids, _NEVER)
        sampling["logit_bias"] = ends | sampling.get("logit_bias", {})
    if i and isinstance(sampling.get("seed"), int):
        sampling["seed"] = (sampling["seed"] + i) % (1 << 64)
    if not isinstance(prompt, Chat):
        return await face.stream(prompt, **sampling)
    messages: Any = prompt.messages
    return await face.stream_chat(
        messages,
        tools=prompt.tools,
        tool_choice=prompt.tool_choice,
        parallel_tool_calls=prompt.parallel_tool_calls,
        template_args=prompt.template_args,
        **sampling,
    )


def _check_room(error: BusyError, streams: Sequence[AsyncStream]) -> None:
    """ApiError where it is a request's own answers that take what those that wait may take."""
    taken = error.n_bytes + sum(each.stream.request.n_bytes for each in streams)
    if streams and taken > error.most:
        raise ApiError(
            400,
            f"{len(streams) + 1} of the answers that are asked for take {size_text(taken)}, what "
            f"waits for a model may take {size_text(error.most)}: this request can't be answered "
            "at any time; ask for fewer answers in one request",
        ) from error


def _as_flag(keyword: Keyword) -> str:
    """As whoever has started the server would have said it."""
    return f"--{keyword.name} {keyword.value}"


def _conversation(chat: Chat) -> Conversation:
    messages: Any = chat.messages
    choice = chosen_tools(chat.tools, chat.tool_choice, chat.parallel_tool_calls)
    told = choice.told if choice is not None else []
    return Conversation.of(messages, told, chat.template_args, continues=chat.continues)


def _ids(llm: LLM, request: Request) -> list[int]:
    assert request.chat is not None
    opened, chat = llm.runtime, _conversation(request.chat)
    with limited():
        return chat_prompt(opened.tokenizer, opened.template, chat, most=MOST_MADE).ids
