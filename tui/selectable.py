"""A scrolled view whose text is selected with the mouse: visibly, and in places of the text.

Knows nothing of what the text is. Textual's own selection counts characters of rows: it would
break lines where the screen does, and lose its place when rows move.
"""

from __future__ import annotations

from textual import events
from textual.geometry import Offset
from textual.scroll_view import ScrollView
from textual.selection import Selection
from textual.timer import Timer

_SCROLLS_A_SECOND = 15.0


class Selectable(ScrollView):
    """A place is an `Offset`: twice the index of a character in its part, and the part's index.

    Odd ones are gaps: one less than the index before which they are. So the end of a selection,
    to which one is added, takes the character under the mouse but none from beyond a row.
    """

    ALLOW_SELECT = False  # by Textual itself
    _anchor: Offset | None = None
    _pointer = Offset(0, 0)
    _scroller: Timer | None = None

    def place_at(self, offset: Offset) -> Offset | None:
        """The place nearest to an offset within the view; None when there is no text."""
        raise NotImplementedError

    def range_around(self, place: Offset, *, whole_line: bool) -> tuple[int, int]:
        """The bounds of the word or line there, as indexes of characters."""
        raise NotImplementedError

    def selected_range(self, part: int, length: int) -> tuple[int, int] | None:
        """The characters of a part that are selected; None when it is outside."""
        selection = self.text_selection
        if selection is None:
            return None
        start, end = selection
        if (start and start.y > part) or (end and end.y < part):
            return None
        first = (start.x + 1) // 2 if start and start.y == part else 0
        last = (end.x + 1) // 2 if end and end.y == part else length
        return max(0, first), min(last, length)

    def selection_updated(self, selection: Selection | None) -> None:
        self.refresh()

    def on_mouse_down(self, event: events.MouseDown) -> None:
        if event.button == 1:
            self._anchor = self.place_at(event.get_content_offset_capture(self))
            self.capture_mouse()

    def on_mouse_move(self, event: events.MouseMove) -> None:
        if self._anchor is None:
            return
        self._pointer = event.get_content_offset_capture(self)
        self._extend()
        is_outside = not 0 <= self._pointer.y < self.scrollable_content_region.height
        if is_outside and self._scroller is None:
            self._scroller = self.set_interval(1 / _SCROLLS_A_SECOND, self._scroll_on)
        elif not is_outside:
            self._stop_scrolling()

    def on_mouse_up(self, event: events.MouseUp) -> None:
        self._stop_dragging()

    def on_hide(self) -> None:
        self._stop_dragging()

    def select_around(self, offset: Offset, *, whole_line: bool) -> None:
        """Select the word or the line at an offset within the view."""
        place = self.place_at(offset)
        if place is not None:
            start, end = self.range_around(place, whole_line=whole_line)
            bounds = Offset(2 * start, place.y), Offset(2 * end, place.y)
            self.screen.selections = {self: Selection(*bounds)} if start < end else {}

    def _extend(self) -> None:
        """Select from where the mouse went down to where it is."""
        end = self.place_at(self._pointer)
        if self._anchor is not None and end is not None:
            first, last = sorted((self._anchor, end), key=lambda place: (place.y, place.x))
            self.screen.selections = {self: Selection(first, last + (1, 0))}

    def _scroll_on(self) -> None:
        """The mouse is held beyond the view: the further, the faster."""
        y, height = self._pointer.y, self.scrollable_content_region.height
        self.scroll_relative(y=y if y < 0 else y - height + 1, animate=False)
        self._extend()

    def _stop_dragging(self) -> None:
        self._anchor = None
        self._stop_scrolling()
        self.release_mouse()

    def _stop_scrolling(self) -> None:
        if self._scroller is not None:
            self._scroller.stop()
            self._scroller = None
