"""The conversation on show: a list of drawn blocks of which only the visible ones cost anything.

Knows nothing of models or of the store.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.geometry import Offset, Size
from textual.message import Message
from textual.selection import Selection
from textual.strip import Strip

from edgeinfer.tui.blocks import Block, BlockList
from edgeinfer.tui.entries import RunningEntry
from edgeinfer.tui.look import Look
from edgeinfer.tui.palette import Palette
from edgeinfer.tui.rows import Row
from edgeinfer.tui.selectable import Selectable

_GUTTER = 3
_MOST_COLUMNS = 96  # longer lines are hard to read


class Transcript(Selectable, can_focus=True, inherit_bindings=False):
    """Draws blocks as they come into view; follows the end until the reader scrolls away."""

    FOCUS_ON_CLICK = False  # what is typed belongs in the prompt

    @dataclass
    class CopyRequested(Message):
        """Someone clicked on a code block's copy."""

        text: str

    @dataclass
    class EntryClicked(Message):
        """Someone clicked on a message."""

        entry: int

    def __init__(self, palette: Palette, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.follows = True
        self.selected: int | None = None
        self._list = BlockList()
        self._look = Look(palette)
        self._width = 0
        self._answer: RunningEntry | None = None
        self._answer_at = 0
        self._is_placing = False

    # -- content ---------------------------------------------------------------------------------

    @property
    def blocks(self) -> list[Block]:
        return self._list.blocks

    def set_palette(self, palette: Palette) -> None:
        self._look = Look(palette)
        for block in self.blocks:
            block.forget()
        self._settle()
        self.refresh()

    def show(self, blocks: list[Block]) -> None:
        """Replace everything, and go to the end."""
        self.screen.clear_selection()
        self._answer = None
        self._list.remove(0)
        self._append(blocks)
        self.follows = True
        self._settle()

    def add(self, blocks: list[Block]) -> None:
        """Blocks of finished messages, at the end."""
        self._append(blocks)
        self._settle()

    def start(self, entry: RunningEntry) -> None:
        """An answer begins; `update_running` draws what it has become."""
        self.screen.clear_selection()
        self._answer, self._answer_at = entry, len(self._list)

    def update_running(self, first: int) -> None:
        """Draw the running answer again from its block `first` on."""
        if self._answer is None:
            return
        at = self._answer_at + first
        self._list.remove(at)
        self._append(self._answer.blocks[first:])
        self._settle()

    def stop_running(self) -> None:
        self._answer = None

    def _append(self, blocks: list[Block]) -> None:
        for block in blocks:
            if block.rows is None:
                block.estimate(self._columns)
        self._list.insert(len(self._list), blocks)

    def follow(self) -> None:
        """Go to the end and stay there."""
        self.follows = True
        self._settle()

    # -- selection of messages -------------------------------------------------------------------

    def select(self, entry: int | None) -> None:
        """Mark a message and bring it into view."""
        self.selected = entry
        span = self._list.span(entry) if entry is not None else None
        if span is not None:
            self._reveal(*span)
        self.refresh()

    def select_next(self, step: int) -> None:
        """Go to the message after (1) or before (-1) the marked one, from the last if none is."""
        entries = self._list.entries()
        if not entries:
            return
        if self.selected not in entries:
            self.select(entries[-1])
            return
        index = entries.index(self.selected) + step
        self.select(entries[max(0, min(len(entries) - 1, index))])

    def toggle_thinking(self, entry: int) -> bool:
        """Fold or unfold the thoughts of a message; False if it has none."""
        found = False
        for index, block in enumerate(self.blocks):
            if block.entry == entry and block.kind == "thinking":
                self._toggle(index)
                found = True
        return found

    def _toggle(self, index: int) -> None:
        block = self.blocks[index]
        block.is_folded = not block.is_folded
        block.forget()
        block.draw(self._look, self._columns)
        self._list.measure(index)
        self._settle()

    def _reveal(self, first: int, last: int) -> None:
        self._draw_range(first, last)
        top, bottom = self._list.top(first), self._list.top(last) + self.blocks[last].height
        if top >= self.scroll_offset.y and bottom <= self.scroll_offset.y + self.size.height:
            return
        self.follows = False
        self.scroll_to(y=max(0, top - 1), animate=False, force=True)
        self._settle()

    # -- placing ---------------------------------------------------------------------------------

    @property
    def _columns(self) -> int:
        return max(8, min(_MOST_COLUMNS, self._width - 2 * _GUTTER))

    @property
    def _left(self) -> int:
        return max(_GUTTER, (self._width - self._columns) // 2)

    def on_resize(self, event: events.Resize) -> None:
        width = self.scrollable_content_region.width or event.size.width
        if width != self._width:
            index = self._list.find(self.scroll_offset.y) if len(self._list) else 0
            self._width = width
            for block in self.blocks:
                block.forget()
                block.estimate(self._columns)
            self._list.measure()
            if not self.follows:
                self._resize_list()
                self.scroll_to(y=self._list.top(index), animate=False, force=True)
        self._settle()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        if not self._is_placing:
            self.follows = self.is_vertical_scroll_end
            self._settle()

    def _settle(self) -> None:
        """Draw what is in view; where guessed heights were wrong, what is read stays in place."""
        if not self._width or self._is_placing:
            return
        self._is_placing = True
        try:
            # What is being selected stays under the mouse.
            follows = self.follows and self.text_selection is None
            for _ in range(8):
                if follows:
                    self._resize_list()
                    self.scroll_to(y=self.max_scroll_y, animate=False, force=True)
                if not self._draw_visible():
                    break
            self._resize_list()
            if follows:
                self.scroll_to(y=self.max_scroll_y, animate=False, force=True)
        finally:
            self._is_placing = False
        self.refresh()

    def _resize_list(self) -> None:
        size = Size(self._width, self._list.n_lines)
        if size != self.virtual_size:
            self.virtual_size = size

    def _draw_visible(self) -> bool:
        """Draw the blocks in view; whether that moved anything."""
        if not len(self._list):
            return False
        y = self.scroll_offset.y
        first = self._list.find(y)
        last = self._list.find(y + max(1, self.size.height))
        above = self._list.top(first) + self.blocks[first].height - y
        is_cut = self._list.top(first) < y and self.blocks[first].rows is None
        moved = self._draw_range(first, last)
        if moved and is_cut and not self.follows:
            bottom = self._list.top(first) + self.blocks[first].height
            self._resize_list()
            self.scroll_to(y=max(0, bottom - above), animate=False, force=True)
        return moved

    def _draw_range(self, first: int, last: int) -> bool:
        moved = False
        for block in self.blocks[first : last + 1]:
            if block.rows is None:
                before = block.height
                block.draw(self._look, self._columns)
                moved = moved or block.height != before
        if moved:
            self._list.measure(first)
        return moved

    # -- painting --------------------------------------------------------------------------------

    def render_line(self, y: int) -> Strip:
        width, base = self.size.width, self.rich_style
        line = y + self.scroll_offset.y
        if not len(self._list) or line >= self._list.n_lines:
            return Strip.blank(width, base)
        segments = Segment.apply_style(self.segments_of(line), base)
        return Strip(segments).adjust_cell_length(width, base)

    def segments_of(self, line: int) -> list[Segment]:
        """A line of the conversation as it is drawn, the selection included."""
        index = self._list.find(line)
        block, at = self.blocks[index], line - self._list.top(index)
        rows = block.draw(self._look, self._columns)
        row = rows[at] if at < len(rows) else Row([])
        is_text = bool(row.segments)
        mark = " "
        if block.entry == self.selected and (is_text or block.kind != "note"):
            mark = "┃"
        accent = Style.parse(self._look.palette.accent)
        margin = Segment(" " * (self._left - 2) + mark, accent)
        bar = Segment("▌", accent) if block.kind == "user" and is_text else Segment(" ")
        found = self.selected_range(index, len(block.shown))
        segments = row.marked(block.shown, *found, self._selection_style) if found else row.segments
        return [margin, bar, *segments]

    @property
    def _selection_style(self) -> Style:
        if self.app.no_color:
            return Style(reverse=True)
        style = self.screen.get_component_rich_style("screen--selection")
        # Most themes leave the text's colour, for which Textual would take the ground's.
        return style if self.app.current_theme.ansi else Style(bgcolor=style.bgcolor)

    # -- the mouse -------------------------------------------------------------------------------

    def place_at(self, offset: Offset) -> Offset | None:
        if not len(self._list):
            return None
        y = max(0, min(offset.y, self.scrollable_content_region.height - 1))
        line = min(y + self.scroll_offset.y, self._list.n_lines - 1)
        index = self._list.find(line)
        block = self.blocks[index]
        block.draw(self._look, self._columns)
        return Offset(block.place(line - self._list.top(index), offset.x - self._left), index)

    def range_around(self, place: Offset, *, whole_line: bool) -> tuple[int, int]:
        return self.blocks[place.y].range_around((place.x + 1) // 2, whole_line=whole_line)

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """The text under a mouse selection, as it was written."""
        parts = []
        for index, block in enumerate(self.blocks):
            block.draw(self._look, self._columns)
            found = self.selected_range(index, len(block.shown))
            if found and block.shown:
                parts.append(block.copied(*found))
        return "\n\n".join(parts), "\n"

    def on_click(self, event: events.Click) -> None:
        offset = event.get_content_offset(self)
        if offset is None or event.button != 1:
            return
        if event.chain > 1:
            self.select_around(offset, whole_line=event.chain > 2)
            return
        line = offset.y + self.scroll_offset.y
        if self.text_selection is not None or line >= self._list.n_lines:
            return
        index = self._list.find(line)
        block, at = self.blocks[index], line - self._list.top(index)
        if block.kind == "thinking" and at == 0:
            self._toggle(index)
        elif block.kind == "code" and at == 0:
            self.post_message(self.CopyRequested(block.text))
        elif block.entry > 0:
            self.post_message(self.EntryClicked(block.entry))
