"""What goes with the message that is being written: files named in it, long texts pasted into it.

Knows nothing of widgets. A file is read in a thread; whose name is deleted goes, and comes back
with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from edgeinfer.tui.completions import mentioned, written_names
from edgeinfer.tui.errors import in_chat
from edgeinfer.tui.files import FoundFile, read_attachment
from edgeinfer.tui.loader import Task
from edgeinfer.tui.records import Attachment
from edgeinfer.tui.settings import Decode

_PATIENCE_SECONDS = 0.03  # of the screen, with a file
_NO_FILE = (FileNotFoundError, NotADirectoryError, ValueError)


_Reading: TypeAlias = Task[tuple[Attachment, str]]


@dataclass(slots=True)
class _Held:
    """An attachment, or a file that is still read; `is_named` once the text has named it.

    `is_guess`: the name may mean a file or be just a word.
    """

    content: Attachment | _Reading
    is_named: bool = False
    is_guess: bool = False


class Attachments:
    """Those of one draft, by name. `shown` are the ones that would be sent now."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._held: dict[str, _Held] = {}
        self._popped: list[tuple[str, _Held]] = []
        self._text = ""
        self._named: set[str] = set()
        self._tried: set[str] = set()

    @property
    def shown(self) -> list[Attachment]:
        contents = (each.content for each in self._present().values())
        return [each for each in contents if isinstance(each, Attachment)]

    @property
    def reading(self) -> list[str]:
        """Names of files that are not read yet."""
        return [name for name, each in self._present().items() if isinstance(each.content, Task)]

    def add(self, attachment: Attachment) -> None:
        """Attach a text, in place of one of the same name."""
        self._hold(attachment.name, attachment)

    def read(self, file: FoundFile, is_guess: bool = False) -> None:
        """Attach a file; `take` has it once it is read, at once if that is quick."""
        task = Task(lambda: read_attachment(file.path, file.name, self._decode))
        self._hold(file.name, task)
        self._held[file.name].is_guess = is_guess
        task.wait(_PATIENCE_SECONDS)

    def read_written(self, file_of: Callable[[str], FoundFile]) -> None:
        """Attach what the text names and nobody chose; a word that is no file stays a word."""
        names = set(written_names(self._text))
        for name in names - self._held.keys() - self._tried:
            self._tried.add(name)
            self.read(file_of(name), is_guess=True)
        self._tried &= names

    def take(self) -> tuple[list[Attachment], list[str]]:
        """Files that have been read since the last look, and what is to be told of them."""
        read, notes = [], []
        for name, each in list(self._held.items()):
            task = each.content
            if not isinstance(task, Task) or not task.is_over:
                continue
            if task.error is None:
                each.content, note = task.result
                read.append(each.content)
            else:
                del self._held[name]
                is_word = each.is_guess and isinstance(task.error.__cause__, _NO_FILE)
                note = "" if is_word else in_chat(task.error)
            notes += [note] if note else []
        return read, notes

    def set_text(self, text: str) -> None:
        """What the draft has become: whose name is gone from it is not sent."""
        self._text = text
        self._named = mentioned(text, self._held)
        for name in self._named:
            self._held[name].is_named = True

    def replace(self, attachment: Attachment, other: Attachment) -> None:
        """The same text, of which more is known."""
        for each in self._held.values():
            if each.content is attachment:
                each.content = other

    def pop(self) -> str:
        """Take the last one away; its name, "" if there is none."""
        name = next(reversed(self._present()), "")
        if name:
            self._popped.append((name, self._held.pop(name)))
        return name

    def push_back(self) -> bool:
        """Have the one back that was last taken away; False if there is none."""
        if not self._popped:
            return False
        name, held = self._popped.pop()
        self._held.setdefault(name, held)
        return True

    def clear(self) -> None:
        self._held.clear()
        self._popped.clear()
        self._tried.clear()

    def _hold(self, name: str, content: Attachment | _Reading) -> None:
        self._held.pop(name, None)
        self._held[name] = _Held(content)
        self.set_text(self._text)

    def _present(self) -> dict[str, _Held]:
        """Those that the text names, and those that it never did."""
        return {
            name: each
            for name, each in self._held.items()
            if not each.is_named or name in self._named
        }
