"""Chooses a model: those on disk with size and fit, some to download, or a path.

Knows nothing of conversations. Also the first screen of someone who has no model yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from edgeinfer import MemoryPlan, PlanError, one_line, printable
from edgeinfer.tui.dialog import Dialog
from edgeinfer.tui.downloads import Download, Downloads
from edgeinfer.tui.errors import in_chat
from edgeinfer.tui.gauge import size_text
from edgeinfer.tui.loader import Task
from edgeinfer.tui.palette import Palette
from edgeinfer.tui.settings import ChatSettings, ModelChoice

_HINT = "enter choose   esc back   or type the path of a .gguf file"
_HINT_SERVED = "enter choose   esc back   or type the name of a model"
_HINT_RUNNING = "esc leaves the download running   ctrl+x cancels it   enter choose"


class ModelScreen(Dialog[str | None]):
    """Ends with the path of the model to load, None for none."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "back", "Back"),
        Binding("down", "move(1)", "Next", priority=True, show=False),
        Binding("up", "move(-1)", "Previous", priority=True, show=False),
        Binding("ctrl+x", "cancel", "Cancel the download", priority=True, show=False),
    ]

    AUTO_FOCUS = "#path"
    GIVES_WAY = "#choices"

    def __init__(
        self,
        settings: ChatSettings,
        choices: list[ModelChoice],
        downloads: Downloads,
        title: str,
        current: str | None,
        *,
        freed: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self._settings, self._choices, self._title = settings, choices, title
        self._downloads = downloads
        self._current, self._freed = current, freed  # bytes of the open model by memory
        self._plans: dict[str, Task[MemoryPlan]] = {}
        self._is_running = False  # a download, as far as is shown
        self._asked = ""  # the model whose download waits for a yes
        self._shown: tuple[str, str] | None = None  # text and color of the preview

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(id="welcome-text")
            yield OptionList(id="choices", compact=True)
            yield Static(id="preview")
            is_served = self._settings.server is not None
            example = "name" if is_served else "path/to/model.gguf"
            yield Input(placeholder=example, id="path", compact=True)
            yield Static(_HINT_SERVED if is_served else _HINT, id="keys", classes="hint")

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
            if each.n_bytes:
                row.append(f"  {size_text(each.n_bytes):>8}", palette.muted)
            row.append(f"  {one_line(where)}" if where else "", palette.accent)
            shown.add_option(Option(row))
        shown.display = bool(self._choices)
        paths = [each.path for each in self._choices]
        at = paths.index(self._current) if self._current and self._current in paths else 0
        shown.highlighted = at if self._choices else None
        self.set_interval(1 / 8, self._tick)

    def action_back(self) -> None:
        running = self._downloads.current
        if running is not None and not running.task.is_over:
            running.is_awaited = False
            self.app.notify(f"{running.name} goes on downloading", markup=False)
        self.dismiss(None)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Ctrl+X is for the path while there is nothing to cancel."""
        return action != "cancel" or self._downloads.current is not None

    def action_cancel(self) -> None:
        running = self._downloads.current
        if running is None:
            return
        self._downloads.cancel()
        resumes = any(each.resumes for each in self._choices if each.name == running.name)
        then = "goes on from there" if resumes else "begins anew"
        self._say(f"cancelled at {running.share:.0%}; choosing {running.name} again {then}")

    def action_move(self, step: int) -> None:
        shown = self.query_one(OptionList)
        if shown.highlighted is not None:
            shown.highlighted = max(0, min(len(self._choices) - 1, shown.highlighted + step))

    @on(OptionList.OptionHighlighted)
    def _preview(self) -> None:
        """Ask, once per file, what it would take; the answer comes with a tick."""
        self._asked = ""
        choice, plan_model = self._highlighted(), self._settings.plan_model
        if choice is not None and choice.path is not None and plan_model is not None:
            path = choice.path
            if path not in self._plans:
                self._plans[path] = Task(lambda: plan_model(path, freed=self._freed))
        text, is_bad = self._preview_text()
        self._say(text, is_bad=is_bad)

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
        if choice is None:
            return
        current = self._downloads.current
        if choice.path is not None:
            self.dismiss(choice.path)
        elif current is not None:
            self._end_download(current, choice.name)
        elif self._asked != choice.name:
            self._asked = choice.name
            self._draw_preview()
        elif (started := self._downloads.start(choice.name)) is not None:
            self._asked = ""
            started.is_awaited = True
            self._tick()

    def _end_download(self, current: Download, chosen: str) -> None:
        """Take the one that is over, if it failed, or is what was chosen or waited for."""
        error = current.task.error
        if not current.task.is_over:
            return
        if error is not None:
            self._downloads.take()
            self._say(f"the download failed: {in_chat(error)}", is_bad=True)
        elif current.is_awaited or chosen == current.name:
            self._downloads.take()
            self.dismiss(current.task.result)

    def _tick(self) -> None:
        current = self._downloads.current
        if self._is_running != (current is not None):
            self._is_running = current is not None
            self.query_one("#keys", Static).update(_HINT_RUNNING if current else _HINT)
        if current is not None:
            self._end_download(current, "")
        self._draw_preview()

    def _draw_preview(self) -> None:
        """What was said last stays where there is nothing to say of the chosen one."""
        text, is_bad = self._preview_text()
        if text:
            self._say(text, is_bad=is_bad)

    def _preview_text(self) -> tuple[str, bool]:
        """What the chosen model would take, how far a download is; and whether it is bad news."""
        choice, current = self._highlighted(), self._downloads.current
        text, is_bad = self._fit_of(choice)
        if choice is not None and choice.path is None and choice.name == self._asked:
            licence = f", licence {choice.licence}" if choice.licence else ""
            text = f"{choice.name} is {size_text(choice.n_bytes)} to download{licence}. "
            text += "enter again downloads it"
        lines = [text] if text else []
        if current is not None:
            lines.append(f"{current.name} is here now" if current.task.is_over else current.text())
        return "\n".join(lines), is_bad

    def _fit_of(self, choice: ModelChoice | None) -> tuple[str, bool]:
        """Whether it fits, in words."""
        task = self._plans.get(choice.path or "") if choice else None
        if task is None:
            return "", False
        if not task.is_over:
            return "reading the file …", False
        if task.error is not None:
            reason = in_chat(task.error)
            return f"does not fit: {reason}" if isinstance(task.error, PlanError) else reason, True
        plan = task.result
        note = f", {plan.note}" if plan.note else ""
        sizes = [(p, size_text(p.total_bytes), size_text(p.available)) for p in plan.pools]
        (_, size, free), *others = sizes
        beside = "".join(f", {size} of {free} on {pool.name}" for pool, size, free in others)
        return f"fits: {size} of {free} free{beside}, context {plan.n_ctx:,} tokens{note}", False

    def _say(self, text: str, *, is_bad: bool = False) -> None:
        palette = Palette.of(self.app.current_theme)
        color = palette.bad if is_bad else palette.muted
        if self._shown != (text, color):
            self._shown = text, color
            self.query_one("#preview", Static).update(Text(printable(text), color))
            self.fit()

    def _highlighted(self) -> ModelChoice | None:
        at = self.query_one(OptionList).highlighted
        return None if at is None else self._choices[at]
