"""Chooses a model: those on disk with size and fit, one to download, or a path.

Knows nothing of conversations. Also the first screen of someone who has no model yet.
"""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.timer import Timer
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from edgeinfer import MemoryPlan, PlanError, one_line, printable
from edgeinfer.tui.dialog import Dialog
from edgeinfer.tui.errors import in_chat
from edgeinfer.tui.gauge import progress_bar, size_text
from edgeinfer.tui.loader import Task
from edgeinfer.tui.palette import Palette
from edgeinfer.tui.settings import ChatSettings, ModelChoice

_HINT = "enter choose   esc back   or type the path of a .gguf file"


class ModelScreen(Dialog[str | None]):
    """Ends with the path of the model to load, None for none."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "back", "Back"),
        Binding("down", "move(1)", "Next", priority=True, show=False),
        Binding("up", "move(-1)", "Previous", priority=True, show=False),
    ]

    AUTO_FOCUS = "#path"
    GIVES_WAY = "#choices"

    def __init__(
        self, settings: ChatSettings, choices: list[ModelChoice], title: str, current: str | None
    ) -> None:
        super().__init__()
        self._settings, self._choices, self._title = settings, choices, title
        self._current = current
        self._plans: dict[str, Task[MemoryPlan]] = {}
        self._fetch: Task[str] | None = None
        self._fetched = (0, 0)
        self._timer: Timer | None = None

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(id="welcome-text")
            yield OptionList(id="choices", compact=True)
            yield Static(id="preview")
            yield Input(placeholder="path/to/model.gguf", id="path", compact=True)
            yield Static(_HINT, classes="hint")

    def on_mount(self) -> None:
        self.query_one(".dialog").border_title = "Model"
        self.query_one("#welcome-text", Static).update(Text(printable(self._title)))
        self.query_one("#welcome-text").display = bool(self._title)
        shown = self.query_one(OptionList)
        shown.can_focus = False
        palette = Palette.of(self.app.current_theme)
        width = max((len(each.name) for each in self._choices), default=0)
        for each in self._choices:
            where = each.note or ("" if each.path else "download")
            row = Text(f"{one_line(each.name):{min(44, width)}}", no_wrap=True)
            row.append(f"  {size_text(each.n_bytes):>8}", palette.muted)
            row.append(f"  {one_line(where)}" if where else "", palette.accent)
            shown.add_option(Option(row))
        shown.display = bool(self._choices)
        paths = [each.path for each in self._choices]
        at = paths.index(self._current) if self._current and self._current in paths else 0
        shown.highlighted = at if self._choices else None
        self._timer = self.set_interval(1 / 8, self._tick)

    def action_back(self) -> None:
        if self._fetch is None:
            self.dismiss(None)
        else:
            self._say("the download can't be left here; ctrl+q ends the chat, it resumes later")

    def action_move(self, step: int) -> None:
        shown = self.query_one(OptionList)
        if shown.highlighted is not None:
            shown.highlighted = max(0, min(len(self._choices) - 1, shown.highlighted + step))

    @on(OptionList.OptionHighlighted)
    def _preview(self) -> None:
        """Ask, once per file, what it would take; the answer comes with a tick."""
        choice, plan_model = self._highlighted(), self._settings.plan_model
        if choice is None or choice.path is None or plan_model is None:
            self._say("")
            return
        path = choice.path
        if path not in self._plans:
            self._plans[path] = Task(lambda: plan_model(path))
        self._draw_preview()

    @on(Input.Submitted)
    def _enter(self, event: Input.Submitted) -> None:
        path = event.value.strip()
        if path:
            self.dismiss(path)
        else:
            self._choose(self._highlighted())

    @on(OptionList.OptionSelected)
    def _click(self, event: OptionList.OptionSelected) -> None:
        self._choose(self._choices[event.option_index])

    def _choose(self, choice: ModelChoice | None) -> None:
        fetch = self._settings.fetch
        if choice is None or self._fetch is not None:
            return
        if choice.path is not None:
            self.dismiss(choice.path)
        elif fetch is not None:
            self._fetch = Task(lambda: fetch(choice.name, self._note_fetched))

    def _note_fetched(self, done: int, total: int) -> None:
        self._fetched = (done, total)

    def _tick(self) -> None:
        if self._fetch is None:
            self._draw_preview()
            return
        done, total = self._fetched
        if not self._fetch.is_over:
            share = done / total if total else 0.0
            counts = f"{size_text(done)} of {size_text(total)}" if total else "starting"
            self._say(f"downloading  {progress_bar(share, 24)}  {counts}")
        elif self._fetch.error is not None:
            self._say(f"the download failed: {self._fetch.error}", is_bad=True)
            self._fetch = None
        else:
            self.dismiss(self._fetch.result)

    def _draw_preview(self) -> None:
        choice = self._highlighted()
        task = self._plans.get(choice.path or "") if choice else None
        if task is None or self._fetch is not None:
            return
        if not task.is_over:
            self._say("reading the file …")
        elif isinstance(task.error, PlanError):
            self._say(f"does not fit: {in_chat(task.error)}", is_bad=True)
        elif task.error is not None:
            self._say(in_chat(task.error), is_bad=True)
        else:
            plan = task.result
            note = f", {plan.note}" if plan.note else ""
            self._say(
                f"fits: {size_text(plan.total_bytes)} of {size_text(plan.available)} free, "
                f"context {plan.n_ctx:,} tokens{note}"
            )

    def _say(self, text: str, *, is_bad: bool = False) -> None:
        palette = Palette.of(self.app.current_theme)
        color = palette.bad if is_bad else palette.muted
        preview = self.query_one("#preview", Static)
        preview.update(Text(printable(text), color))
        self.fit()

    def _highlighted(self) -> ModelChoice | None:
        at = self.query_one(OptionList).highlighted
        return None if at is None else self._choices[at]
