"""What a chat asks of a model, met by `LLM` and by a model on a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from edgeinfer.engine.memory_plan import MemoryPlan
from edgeinfer.results import Completion, Event
from edgeinfer.text.messages import Message


class ChatStream(Protocol):
    """The events of one answer; `close`, from any thread, ends it at once.

    `dropped_turns` of the conversation had no room: that is known with the first event.
    """

    @property
    def dropped_turns(self) -> int: ...

    @property
    def completion(self) -> Completion: ...

    def __iter__(self) -> Iterator[Event]: ...

    def close(self) -> None: ...

    def __enter__(self) -> ChatStream: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class ChatModel(Protocol):
    """The part of `LLM` that a chat uses. What nobody knows is None: a server tells less."""

    @property
    def name(self) -> str: ...

    @property
    def n_ctx(self) -> int | None: ...

    @property
    def n_ctx_train(self) -> int | None: ...

    @property
    def recommended(self) -> Mapping[str, Any]: ...

    @property
    def plan(self) -> MemoryPlan | None: ...

    def stream_chat(
        self,
        messages: str | Sequence[Message],
        *,
        template_args: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> ChatStream: ...

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]: ...

    def detokenize(self, token_ids: Sequence[int], *, special: bool = False) -> str: ...

    def close(self) -> None: ...
