"""Makes the blocks of a message: of a finished one at once, of a running one as it comes.

Knows nothing of widgets. Whatever is shown passes the filter of control characters here.
"""

from __future__ import annotations

from edgeinfer import StreamFilter, one_line, printable
from edgeinfer.tui.blocks import Block, Kind
from edgeinfer.tui.records import Node
from edgeinfer.tui.splitter import Piece, Splitter, split


def blocks_of(node: Node, note: str) -> list[Block]:
    """A finished message; `note` is the line below an answer, "" for none."""
    if node.role == "user":
        return [user_block(node, note)]
    blocks = []
    if node.reasoning.strip():
        seconds = float(node.details.get("thinking_s", 0.0))
        blocks.append(_thinking(node.id, printable(node.reasoning), _thought(seconds)))
    blocks += [_block(piece, node.id) for piece in split(printable(node.content))]
    error = node.details.get("error")
    if error:
        blocks.append(Block("failure", printable(str(error)), node.id))
    elif note:
        blocks.append(Block("note", note, node.id))
    return blocks


def user_block(node: Node, note: str) -> Block:
    notes = [attachment_label(each.name, each.n_tokens) for each in node.attachments]
    return Block("user", printable(node.content), node.id, notes=[*notes, note] if note else notes)


def attachment_label(name: str, n_tokens: int | None) -> str:
    size = "" if n_tokens is None else f" · {n_tokens:,} tokens"
    return f"+ {one_line(name)}{size}"


class RunningEntry:
    """The blocks of an answer while it is written: closed ones stay, the last one grows."""

    def __init__(self, id: int) -> None:
        self.id = id
        self.blocks: list[Block] = []
        self._splitter = Splitter()
        self._filter, self._thought_filter = StreamFilter(), StreamFilter()
        self._thinking: Block | None = None
        self._tail: Block | None = None

    def push(self, text: str, reasoning: str, seconds: float) -> int:
        """Take new text; the index of the first block that changed."""
        first = len(self.blocks)
        if reasoning:
            first = min(first, self._think(self._thought_filter.push(reasoning), seconds))
        if text:
            first = min(first, self._write(self._splitter.push(self._filter.push(text))))
        return first

    def tick(self, seconds: float) -> int:
        """Let the clock of an open thought run."""
        if self._thinking is None or not self._thinking.is_open:
            return len(self.blocks)
        self._thinking.notes = [f"Thinking · {seconds:.0f} s"]
        self._thinking.forget()
        return self.blocks.index(self._thinking)

    def finish(self, note: str, error: str, thinking_s: float) -> int:
        """Close everything and say how it ended."""
        self._end_thought(thinking_s)
        if self._thinking is not None and thinking_s:
            self._thinking.notes = [_thought(thinking_s)]
            self._thinking.forget()
        rest = self._splitter.push(self._filter.flush())
        first = self._write([*rest, *self._splitter.flush()])
        if error:
            self.blocks.append(Block("failure", printable(error), self.id))
        elif note:
            self.blocks.append(Block("note", note, self.id))
        return min(first, 0 if self._thinking else first)

    def _think(self, text: str, seconds: float) -> int:
        if self._thinking is None:
            self._thinking = _thinking(self.id, "", "Thinking")
            self._thinking.is_open = True
            self.blocks.append(self._thinking)
        self._thinking.text += text
        return self.tick(seconds)

    def _end_thought(self, seconds: float) -> None:
        if self._thinking is not None and self._thinking.is_open:
            self._thinking.notes = [_thought(seconds)]
            self._thinking.close()

    def end_thought(self, seconds: float) -> None:
        """The answer itself begins."""
        self._end_thought(seconds)

    def _write(self, closed: list[Piece]) -> int:
        """Replace the open tail by what it has become."""
        first = len(self.blocks)
        if self._tail is not None:
            first = self.blocks.index(self._tail)
        tail = self._splitter.tail()
        if self._tail is not None and tail is not None and not closed:
            self._tail.text = tail.text
            self._tail.forget(width_changed=False)
            return first
        del self.blocks[first:]
        self.blocks += [_block(piece, self.id) for piece in closed]
        self._tail = None
        if tail is not None:
            self._tail = _block(tail, self.id)
            self._tail.is_open = True
            self.blocks.append(self._tail)
        return first


def _block(piece: Piece, entry: int) -> Block:
    kind: Kind = piece.kind
    return Block(kind, piece.text, entry, language=piece.language)


def _thinking(entry: int, text: str, heading: str) -> Block:
    return Block("thinking", text, entry, notes=[heading])


def _thought(seconds: float) -> str:
    return f"Thought for {seconds:.1f} s" if seconds >= 0.1 else "Thought"
