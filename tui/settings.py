"""What the chat is started with.

Knows nothing of widgets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from edgeinfer import ChatModel, MemoryPlan, Progress, Sampling


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A model to offer: on disk when it has a path, else it would be fetched by its name.

    On a server the path is its name there, and 0 bytes are not shown.
    """

    name: str
    path: str | None
    n_bytes: int
    note: str = ""
    licence: str = ""
    resumes: bool = True  # a download that was cut short goes on where it stopped


class OfferedModel(Protocol):
    """A model of a server by its name; the context length is 0 where that is not told."""

    @property
    def id(self) -> str: ...

    @property
    def n_ctx(self) -> int: ...


class ChatServer(Protocol):
    """What runs the models where this process only talks to them.

    `offered` is what it told when it was last asked to `open` one, "" being the only one.
    """

    @property
    def place(self) -> str: ...

    @property
    def is_here(self) -> bool: ...

    @property
    def offered(self) -> Sequence[OfferedModel]: ...

    def open(self, id: str = ...) -> ChatModel: ...


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
    `finds_titles` lets the model name conversations while it is idle; `stops_repeats` ends answers
    that say the same again and again.

    Where there is a `server` it opens and lists models, by names for paths; this machine has none.
    """

    data_folder: Path
    open_model: OpenModel
    model: str | None = None
    system: str | None = None
    sampling: Sampling = field(default_factory=lambda: _no_sampling())
    keeps_history: bool = True
    finds_titles: bool = False
    stops_repeats: bool = False
    server: ChatServer | None = None
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
