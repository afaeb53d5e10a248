"""Sampling and the context length, as a form: what is left empty stays as it shows in grey.

Knows nothing of how a model is opened anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.widgets import Input, Label, Static

from edgeinfer import printable
from edgeinfer.tui.dialog import Dialog
from edgeinfer.tui.errors import in_chat
from edgeinfer.tui.loader import Task
from edgeinfer.tui.palette import Palette
from edgeinfer.tui.params import CONTEXT, PARAMS, SAMPLING, context_in_force, in_force, parse_param

if TYPE_CHECKING:
    from edgeinfer import ChatModel

_HINT = "tab next   enter apply   empty = the value in grey   esc back"

CheckContext = Callable[[int], None]


class ChatParams(NamedTuple):
    """What the user has set: sampling by name, and the context length, None for the usual one."""

    sampling: Mapping[str, Any]
    n_ctx: int | None


class ParamsScreen(Dialog[ChatParams | None]):
    """Ends with the new values, None when left as they were.

    `check` raises where a context length has no room; it may take its time. With a `context`, that
    is filled in and applied as if Enter were pressed.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Back"),
        Binding("down", "app.focus_next", "Next", priority=True, show=False),
        Binding("up", "app.focus_previous", "Previous", priority=True, show=False),
    ]

    AUTO_FOCUS = "Input"
    GIVES_WAY = "#rows"

    def __init__(
        self,
        given: ChatParams,
        model: ChatModel | None,
        check: CheckContext,
        *,
        context: str | None = None,
        is_served: bool = False,
    ) -> None:
        super().__init__()
        self._is_served = is_served  # by a server, which sets the context length
        self._given, self._model, self._check = given, model, check
        self._length = context
        self._wrong = "", ""  # a field, and why it is
        self._checking: tuple[ChatParams, Task[None]] | None = None

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            with Vertical(id="rows"):
                for param in SAMPLING if self._is_served else PARAMS:
                    yield from self._row(param.name)
            yield Static(id="about", classes="hint")
            yield Static(_HINT, id="keys", classes="hint")

    def _row(self, name: str) -> ComposeResult:
        given, model = self._given, self._model
        if name == CONTEXT.name:
            now, usual = context_in_force(given.n_ctx, model), context_in_force(None, model)
            value: Any = self._length or given.n_ctx
        else:
            now, usual = (
                in_force(name, each, model, is_served=self._is_served)
                for each in (given.sampling, {})
            )
            value = given.sampling.get(name)
        text = "" if value is None else str(value)
        with Horizontal(classes="row"):
            yield Label(name.replace("_", " "))
            yield Input(text, placeholder=usual.value, id=name, compact=True)
            yield Static(Text(printable(now.source)), classes="source")

    def on_mount(self) -> None:
        self.query_one(".dialog").border_title = (
            "Sampling" if self._is_served else "Sampling and context"
        )
        self.set_interval(1 / 8, self._tick)
        if self._length is not None:
            self._apply()

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        """Say what the field is, or what is wrong with it."""
        about = next((each.help for each in PARAMS if each.name == event.widget.id), "")
        wrong, why = self._wrong
        is_wrong = wrong == event.widget.id
        self._say(why if is_wrong else about, is_bad=is_wrong)

    @on(Input.Submitted)
    def _apply(self) -> None:
        values: dict[str, Any] = dict(self._given.sampling)
        for field in self.query(Input):
            assert field.id is not None
            try:
                values[field.id] = parse_param(field.id, field.value)
            except ValueError as error:
                self._wrong = field.id, str(error)
                self._say(str(error), is_bad=True)
                field.focus()
                return
        self._wrong = "", ""
        n_ctx = values.pop(CONTEXT.name, self._given.n_ctx)
        set_values = {name: value for name, value in values.items() if value is not None}
        params = ChatParams(set_values, n_ctx)
        if n_ctx is None or n_ctx == self._given.n_ctx:
            self.dismiss(params)
        else:
            self._say("looking whether that fits …")
            self._checking = params, Task(lambda: self._check(n_ctx))

    def _tick(self) -> None:
        if self._checking is None or not self._checking[1].is_over:
            return
        (params, task), self._checking = self._checking, None
        if task.error is None:
            self.dismiss(params)
        else:
            self._say(in_chat(task.error), is_bad=True)

    def _say(self, text: str, *, is_bad: bool = False) -> None:
        palette = Palette.of(self.app.current_theme)
        about = self.query_one("#about", Static)
        about.update(Text(printable(text), palette.bad if is_bad else palette.muted))
        self.fit()
