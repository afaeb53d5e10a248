"""Sampling, as a form: what is left empty keeps the model's default.

Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Label, Static

from edgeinfer.tui.params import PARAMS, parse_param

_HINT = "tab next   enter apply   empty = the model's default   esc back"


class ParamsScreen(ModalScreen[dict[str, Any] | None]):
    """Ends with the new values, None when left as they were."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Back"),
        Binding("down", "app.focus_next", "Next", priority=True, show=False),
        Binding("up", "app.focus_previous", "Previous", priority=True, show=False),
    ]

    AUTO_FOCUS = "Input"

    def __init__(self, sampling: Mapping[str, Any]) -> None:
        super().__init__()
        self._sampling = dict(sampling)

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            for param in PARAMS:
                value = self._sampling.get(param.name)
                with Horizontal(classes="row"):
                    yield Label(param.name.replace("_", " "))
                    yield Input(
                        "" if value is None else str(value),
                        placeholder=param.help,
                        id=param.name,
                        compact=True,
                    )
            yield Static(_HINT, classes="hint")

    def on_mount(self) -> None:
        self.query_one(".dialog").border_title = "Sampling"

    @on(Input.Submitted)
    def _apply(self) -> None:
        values = dict(self._sampling)
        for field in self.query(Input):
            assert field.id is not None
            try:
                values[field.id] = parse_param(field.id, field.value)
            except ValueError as error:
                self.query_one(".hint", Static).update(Text(str(error)))
                field.focus()
                return
        self.dismiss({name: value for name, value in values.items() if value is not None})
