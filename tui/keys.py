"""Which key means which command: as the table has it, or as the settings file says instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from textual import events
from textual.keys import key_to_character

from edgeinfer.tui.commands import COMMANDS, Command, Place, nearest
from edgeinfer.tui.settings_file import Entry

_MODIFIERS = {"ctrl", "alt", "shift", "super", "meta", "hyper"}
_WRITING = {
    "space", "backspace", "delete", "tab", "enter", "home", "end", "up", "down", "left", "right",
}  # fmt: skip
_OTHERS = {"escape", "insert", "pageup", "pagedown", *(f"f{i}" for i in range(1, 25))}
_SHOWN = {
    "up": "↑", "down": "↓", "left": "←", "right": "→", "escape": "esc", "pageup": "pgup",
    "pagedown": "pgdn", "underscore": "_",
}  # fmt: skip

_TEMPLATE = """\
# Keys of the edgeinfer chat: take the # from a line and write others, with commas between them,
# or none. Those that write or move in the prompt count while a message is marked.
[keys]"""


class Keys:
    """`complaints` says which entries of the settings file were left aside, and why.

    What writes or moves in the prompt, like a letter, means a command only while a message is
    marked.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.complaints: list[str] = []
        self._of: dict[str, list[str]] = {command.name: [] for command in COMMANDS}
        self._meanings: dict[str, dict[Place, Command]] = {}
        self._entries = entries
        by_name = {command.name: command for command in COMMANDS}
        for name in (name for name in entries if name not in by_name):
            near = nearest(name, by_name)
            self._complain(name, f"no command {name}{near and f'; did you mean {near}?'}")
        for command in sorted(COMMANDS, key=lambda each: each.name not in entries):
            entry = entries.get(command.name)
            for key in _split(command.keys if entry is None else entry.value):
                self._give(key, command)

    def find(self, event: events.Key, places: Iterable[Place]) -> Command | None:
        """What a key means there."""
        names = [event.key, *event.aliases]
        if event.is_printable and event.character:
            names.append(event.character)
        meanings = [self._meanings.get(name, {}) for name in names]
        return next((each[place] for place in places for each in meanings if place in each), None)

    def label(self, name: str, place: Place = "main") -> str:
        """The first key of a command in a place, as people read it; "" for none."""
        keys = (key for key in self._of[name] if self._meanings[key].get(place))
        return _shown(next(keys, ""))

    def labels(self, name: str) -> str:
        """All keys of a command."""
        return ", ".join(map(_shown, self._of[name]))

    def template(self) -> str:
        """A settings file in which every command can be given other keys."""
        rows = [f"# {command.name} = {', '.join(self._of[command.name])}" for command in COMMANDS]
        return "\n".join([_TEMPLATE, *rows, ""])

    def hints(self) -> str:
        """The keys and words of the commands that a marked message has."""
        words: dict[str, list[str]] = {}
        for command in COMMANDS:
            label = self.label(command.name, "message") if command.hint else ""
            if label:
                words.setdefault(command.hint, []).append(label)
        return " · ".join(f"{' '.join(labels)} {word}" for word, labels in words.items())

    def _give(self, key: str, command: Command) -> None:
        place = command.place
        if not _is_key(key):
            self._complain(command.name, f"no key {key}; keys are written like ctrl+r, alt+x, f5")
            return
        if _writes(key) and place != "message":
            if place == "prompt" and key not in ("enter", "tab"):
                self._complain(command.name, f"{key} could not be typed any more")
                return
            place = place if place == "prompt" else "message"
        held = self._meanings.setdefault(key, {})
        rival = next((held[each] for each in held if _is_beside(each, place)), None)
        if rival is None:
            held[place] = command
            self._of[command.name].append(key)
        else:
            of = command.name if command.name in self._entries else rival.name
            self._complain(of, f"{key} means {rival.name}, no longer {command.name}")

    def _complain(self, name: str, text: str) -> None:
        self.complaints.append(f"{self._entries[name].place}: {text}")


def _split(keys: str) -> list[str]:
    """Keys by one name each: `[` is also called left_square_bracket."""
    return [_name(key.strip()) for key in keys.split(",") if key.strip()]


def _name(key: str) -> str:
    character = key_to_character(key) if key not in _WRITING | _OTHERS else None
    return character if character and character.isprintable() else key


def _is_key(key: str) -> bool:
    if len(key) == 1:
        return key.isprintable()
    *modifiers, base = key.split("+")
    is_known = len(base) == 1 or base in _WRITING | _OTHERS or key_to_character(base)
    return set(modifiers) <= _MODIFIERS and bool(is_known or base == "underscore")


def _writes(key: str) -> bool:
    return len(key) == 1 or key in _WRITING


def _is_beside(one: Place, other: Place) -> bool:
    """Whether both places count at the same time."""
    return {one, other} != {"prompt", "message"}


def _shown(key: str) -> str:
    *modifiers, base = key.split("+") if len(key) > 1 else [key]
    return "+".join([*modifiers, _SHOWN.get(base, base)])
