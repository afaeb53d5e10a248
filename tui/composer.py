"""The bottom of the screen: what waits, what is attached, completions, and the prompt.

Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.notifications import SeverityLevel
from textual.timer import Timer
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from edgeinfer import one_line, printable
from edgeinfer.tui.attachments import Attachments
from edgeinfer.tui.completions import Candidate, Sources, complete
from edgeinfer.tui.entries import attachment_label
from edgeinfer.tui.palette import Palette
from edgeinfer.tui.prompt import Prompt
from edgeinfer.tui.records import Attachment, Draft
from edgeinfer.tui.settings import Decode


class Composer(Vertical):
    """Prompt with attachments, queue and completions around it."""

    @dataclass
    class Attached(Message):
        """A text was attached whose tokens are not counted yet."""

        attachment: Attachment

    @dataclass
    class Detached(Message):
        """An attachment was taken away; `undo` has it back."""

        name: str

    class QueueRecalled(Message):
        """The last waiting message is wanted back."""

    def __init__(self, sources: Sources, decode: Decode) -> None:
        super().__init__(id="composer")
        self._attached = Attachments(decode)
        self._is_searching = False
        self._sources = sources
        self._candidates: list[Candidate] = []
        self._queued: list[str] = []
        self._n_pasted = 0
        self._notice_timer: Timer | None = None

    def compose(self) -> ComposeResult:
        yield Static(id="notice")
        yield OptionList(id="completions", compact=True)
        yield Static(id="tray")
        with Vertical(id="frame"):
            yield Prompt(id="prompt")

    def on_mount(self) -> None:
        self._popup.display = False
        self._popup.can_focus = False
        self.query_one("#tray").display = False
        self.query_one("#notice").display = False

    @property
    def prompt(self) -> Prompt:
        return self.query_one(Prompt)

    @property
    def _popup(self) -> OptionList:
        return self.query_one("#completions", OptionList)

    def set_hint(self, title: str, hint: str) -> None:
        """What the frame says above and below the prompt."""
        frame = self.query_one("#frame")
        frame.border_title, frame.border_subtitle = title, hint

    def tell(self, text: Content, severity: SeverityLevel, seconds: float) -> None:
        """Show a notice above the prompt for a while."""
        notice = self.query_one("#notice", Static)
        notice.set_classes(f"-{severity}")
        notice.update(text)
        notice.display = True
        if self._notice_timer is not None:
            self._notice_timer.stop()
        self._notice_timer = self.set_timer(seconds, self._end_notice)

    def _end_notice(self) -> None:
        self.query_one("#notice").display = False

    # -- attachments and queue -------------------------------------------------------------------

    @property
    def attachments(self) -> list[Attachment]:
        """What would be sent with the message now."""
        return self._attached.shown

    def attach(self, attachment: Attachment) -> None:
        self._attached.add(attachment)
        self._draw_tray()
        self.post_message(self.Attached(attachment))

    def tend(self) -> None:
        """Take what threads have found and read; to be called now and then."""
        read, notes = self._attached.take()
        for attachment in read:
            self.post_message(self.Attached(attachment))
        for text in notes:
            self._say(text)
        if read or notes:
            self._draw_tray()
        if self._is_searching:
            self._complete()

    def _say(self, text: str) -> None:
        self.app.notify(printable(text), severity="warning", markup=False)

    def attach_written(self) -> None:
        """Attach files that were named without being chosen from the list."""
        self._attached.set_text(self.prompt.text)
        self._attached.read_written(self._sources.file)
        self.tend()
        self._draw_tray()

    def set_count(self, attachment: Attachment, n_tokens: int) -> None:
        """The tokens of an attachment, once they are known."""
        self._attached.replace(attachment, replace(attachment, n_tokens=n_tokens))
        self._draw_tray()

    def show_queue(self, texts: list[str]) -> None:
        self._queued = texts
        self._draw_tray()

    def _draw_tray(self) -> None:
        """Waiting messages and attachments, a line each."""
        palette = Palette.of(self.app.current_theme)
        room = max(10, self.size.width - 12)
        lines = []
        for text in self._queued:
            shown = " ".join(printable(text).split())[:room]
            lines.append(Text.assemble(("next  ", palette.accent), (shown, palette.muted)))
        for each in self.attachments:
            label = attachment_label(each.name, each.n_tokens)
            wait = "" if each.n_tokens is not None else " · counting"
            lines.append(Text(f"{label}{wait}", palette.muted))
        for name in self._attached.reading:
            lines.append(Text(f"{attachment_label(name, None)} · reading", palette.muted))
        tray = self.query_one("#tray", Static)
        tray.display = bool(lines)
        tray.update(Text("\n").join(lines))

    @on(Prompt.LongPaste)
    def _attach_paste(self, event: Prompt.LongPaste) -> None:
        event.stop()
        self._n_pasted += 1
        self.attach(Attachment(f"pasted text {self._n_pasted}", event.text))

    @on(Prompt.Left)
    def _take_back(self, event: Prompt.Left) -> None:
        event.stop()
        if name := self._attached.pop():
            self._draw_tray()
            self.post_message(self.Detached(name))
        elif self._queued:
            self.post_message(self.QueueRecalled())

    def undo(self) -> None:
        """Take back the last change of what is written, or of what is attached to no text."""
        if not self.prompt.text and self._attached.push_back():
            self._draw_tray()
        else:
            self.prompt.undo()

    # -- sending ---------------------------------------------------------------------------------

    @property
    def draft(self) -> Draft:
        """What is written and attached."""
        self._attached.set_text(self.prompt.text)  # keys may be ahead of what was told of them
        return Draft(self.prompt.text, tuple(self.attachments))

    @property
    def reading(self) -> list[str]:
        """Names of files that will be attached once they are read."""
        return self._attached.reading

    def show(self, draft: Draft) -> None:
        """Have this written and attached instead."""
        self.prompt.set_text(draft.text)
        self._attached.clear()
        for attachment in draft.attachments:
            self.attach(attachment)
        self._attached.set_text(draft.text)
        self._draw_tray()

    # -- completions -----------------------------------------------------------------------------

    @on(Prompt.Changed)
    def _note_text(self) -> None:
        before = self.attachments, self._attached.reading
        self._attached.set_text(self.prompt.text)
        if before != (self.attachments, self._attached.reading):
            self._draw_tray()

    @on(Prompt.Changed)
    @on(Prompt.SelectionChanged)
    def _complete(self) -> None:
        prompt = self.prompt
        is_first = prompt.cursor_location[0] == 0
        self._show_candidates(complete(prompt.line_to_cursor, is_first, self._sources))
        self._is_searching = self._sources.was_early()

    def _show_candidates(self, candidates: list[Candidate]) -> None:
        if candidates == self._candidates:
            return
        self._candidates = candidates
        popup = self._popup
        popup.display = bool(candidates)
        muted = Palette.of(self.app.current_theme).muted
        width = max((len(each.label) for each in candidates), default=0)
        popup.clear_options()
        for each in candidates:
            help = (f"  {one_line(each.help)}", muted)
            popup.add_option(Option(Text.assemble(f"{one_line(each.label):{width}}", help)))
        popup.highlighted = 0 if candidates else None

    def takes(self, key: str) -> bool:
        """Whether a key was for the list of completions.

        Enter on a command that is complete already sends it.
        """
        popup = self._popup
        if not self._candidates or key not in ("up", "down", "tab", "enter", "escape"):
            return False
        if key == "up":
            popup.action_cursor_up()
        elif key == "down":
            popup.action_cursor_down()
        elif key == "escape":
            self._show_candidates([])
        elif popup.highlighted is not None:
            return self._accept(self._candidates[popup.highlighted]) or key != "enter"
        return True

    @on(OptionList.OptionSelected, "#completions")
    def _take_click(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self._accept(self._candidates[event.option_index])
        self.prompt.focus()

    def _accept(self, candidate: Candidate) -> bool:
        """Write the candidate; False where it is written already."""
        prompt = self.prompt
        row, column = prompt.cursor_location
        typed = prompt.line_to_cursor[candidate.start :]
        self._show_candidates([])
        if candidate.file is None and typed.strip() == candidate.text.strip():
            return False
        prompt.replace(candidate.text, (row, candidate.start), (row, column))
        if candidate.file is not None:
            self._attached.read(candidate.file)
            self._attached.set_text(prompt.text)
            self.tend()
            self._draw_tray()
        return True
