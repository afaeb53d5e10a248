"""The file of settings that people write: sections of `name = value`, each with its line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeinfer import reason_of

FILE_NAME = "settings.ini"
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A value, and `place`, where it stands, for complaints."""

    value: str
    place: str


def read_settings(path: Path) -> tuple[dict[str, dict[str, Entry]], list[str]]:
    """Entries by section and name; complaints about lines that say nothing. No file: neither."""
    try:
        if not path.exists():
            return {}, []
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return {}, [f"{path} is no file of settings"]
        text = path.read_bytes().decode("utf-8-sig", "replace")
    except OSError as error:
        return {}, [f"{path} can't be read ({reason_of(error)})"]
    sections: dict[str, dict[str, Entry]] = {}
    complaints: list[str] = []
    section = ""
    for n, line in enumerate(text.splitlines(), 1):
        place, line = f"{path.name}, line {n:,}", line.strip()
        name, equals, value = (part.strip() for part in line.partition("="))
        if not line or line[0] in "#;":
            continue
        if line[0] == "[" and line[-1] == "]":
            section = line[1:-1].strip().lower()
        elif not equals:
            complaints.append(f"{place}: neither [section] nor name = value: {line[:40]}")
        elif name in sections.setdefault(section, {}):
            complaints.append(f"{place}: {name} is there already, which counts")
        else:
            sections[section][name] = Entry(value.strip("\"'"), place)
    return sections, complaints
