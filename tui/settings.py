"""What the chat is started with, and the little it asks of a model.

Knows nothing of widgets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from edgeinfer import Event, MemoryPlan, Message, Progress, Sampling


class AnswerStream(Protocol):
    """The events of one answer; `close`, from any thread, ends it at once."""

    dropped_turns: int

    def __iter__(self) -> Iterator[Event]: ...

    def close(self) -> None: ...


class ChatModel(Protocol):
    """The part of `edgeinfer.LLM` that a chat uses; tests script one."""

    @property
    def name(self) -> str: ...

    @property
    def n_ctx(self) -> int: ...

    @property
    def n_ctx_train(self) -> int: ...

    @property
    def recommended(self) -> Mapping[str, Any]: ...

    @property
    def plan(self) -> MemoryPlan: ...

    def stream_chat(
        self,
        messages: str | Sequence[Message],
        *,
        template_args: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> AnswerStream: ...

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]: ...

    def detokenize(self, token_ids: Sequence[int], *, special: bool = False) -> str: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A model to offer: on disk when it has a path, else it would be fetched by its name."""

    name: str
    path: str | None
    n_bytes: int
    note: str = ""
    licence: str = ""
    resumes: bool = True  # a download that was cut short goes on where it stopped


class OpenModel(Protocol):
    """Opens a file; `n_ctx` is given where the chat asks for a context length of its own."""

    def __call__(
        self, path: str, progress: Callable[[Progress], None], /, *, n_ctx: int = ...
    ) -> ChatModel: ...


class PlanModel(Protocol):
    """The memory that a file would take; raises PlanError where there is too little.

    `freed` bytes of each memory come back before it is opened: those of the model that is open.
    """

    def __call__(
        self, path: str, /, *, n_ctx: int = ..., freed: Mapping[str, int] = ...
    ) -> MemoryPlan: ...


ListModels: TypeAlias = Callable[[], list[ModelChoice]]
Fetch: TypeAlias = Callable[[str, Callable[[int, int], None]], str]
Decode: TypeAlias = Callable[[bytes, str], "tuple[str, int]"]
RunTool: TypeAlias = Callable[[Sequence[str], bytes], bool]
RunEditor: TypeAlias = Callable[[Sequence[str], Path], int]


class StopForShell(Protocol):
    """Stop this process, or only wait for its terminal unless `now`; with all of its `group`.

    False where it `is_ending` while the terminal is another program's.
    """

    def __call__(
        self, terminal: int, is_ending: Callable[[], bool], *, now: bool, group: bool = False
    ) -> bool: ...


def _as_utf8(data: bytes, name: str) -> tuple[str, int]:
    text = data.decode("utf-8", "replace")
    return text, text.count("\ufffd")


def _no_models() -> list[ModelChoice]:
    return []


def _no_model() -> str | None:
    return None


def _no_memory() -> int:
    return 0


def _no_tool(command: Sequence[str], text: bytes) -> bool:
    return False


def _no_stop(
    terminal: int, is_ending: Callable[[], bool], *, now: bool, group: bool = False
) -> bool:
    return True


def _no_editor(command: Sequence[str], file: Path) -> int:
    raise OSError("there is no terminal for an editor")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings:
    """Where to keep files, and what the command line asked for.

    `last_model` is taken when `model` is None; `plan_model` previews the memory of a file;
    `fetch` downloads a named model and returns its path; what it tells its progress to may raise
    to end it. Without the last two there is no preview and no download. `run_tool` gives a text to
    a program of the system, `run_editor` a file and the terminal. `decode` makes a text of the
    bytes of a file, and says how many characters were none; it raises for what is no text.
    `finds_titles` lets the model name conversations while it is idle.
    """

    data_folder: Path
    open_model: OpenModel
    model: str | None = None
    system: str | None = None
    sampling: Sampling = field(default_factory=lambda: _no_sampling())
    keeps_history: bool = True
    finds_titles: bool = False
    list_models: ListModels = _no_models
    plan_model: PlanModel | None = None
    fetch: Fetch | None = None
    last_model: Callable[[], str | None] = _no_model
    memory_now: Callable[[], int] = _no_memory
    run_tool: RunTool = _no_tool
    stop_for_shell: StopForShell = _no_stop
    run_editor: RunEditor = _no_editor
    decode: Decode = _as_utf8
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path = field(default_factory=Path.cwd)


def _no_sampling() -> Sampling:
    return {}
