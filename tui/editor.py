"""A text or a file in the user's own editor, which has the terminal meanwhile."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from textual.app import SuspendNotSupported

from edgeinfer import EdgeInferError, reason_of

if TYPE_CHECKING:
    from edgeinfer.tui.terminal_app import TerminalApp

_MOST_BYTES = 4 << 20
_AT_ONCE_SECONDS = 1.0


def write_in_editor(app: TerminalApp, text: str) -> str:
    """What becomes of a text; EdgeInferError where that can't be told, which says why."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="edgeinfer-"))
        file = folder / "prompt.md"
        file.write_bytes(f"{text}\n".encode("utf-8", "surrogatepass"))
    except OSError as error:
        raise EdgeInferError(f"no file for the editor can be made ({reason_of(error)})") from error
    start = time.monotonic()
    try:
        complaint = open_in_editor(app, file)
    except EdgeInferError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    written = _read(file)
    if written == text and not complaint and time.monotonic() - start < _AT_ONCE_SECONDS:
        # One with a window of its own may be open still; what it writes is not deleted.
        complaint = f"the editor came back at once: it may need --wait; {file} stays"
    else:
        shutil.rmtree(folder, ignore_errors=True)
    if complaint:
        app.say(complaint, "warning")
    return written


def open_in_editor(app: TerminalApp, file: Path) -> str:
    """Until the editor ends; a complaint about how, "" for none. EdgeInferError: it can't start."""
    command = editor_command(app.settings.environment)
    try:
        with app.suspend():
            code = app.settings.run_editor(command, file)
    except SuspendNotSupported as error:
        raise EdgeInferError("this terminal can't be given to an editor") from error
    except OSError as error:
        raise EdgeInferError(
            f"{command[0]} can't be started ({reason_of(error)}); VISUAL or EDITOR names "
            "another editor"
        ) from error
    return f"{command[0]} ended with {code}" if code else ""


def editor_command(environment: Mapping[str, str]) -> list[str]:
    """VISUAL or EDITOR, with their arguments, else what the system has."""
    for name in ("VISUAL", "EDITOR"):
        value = environment.get(name, "").strip()
        if value:
            break
    else:
        return ["notepad" if os.name == "nt" else "vi"]
    if os.path.isfile(value):  # a path with spaces
        return [value]
    try:
        words = shlex.split(value, posix=os.name != "nt")
    except ValueError as error:
        raise EdgeInferError(f"{name} can't be read ({error}): {value}") from error
    return [word.strip('"') if os.name == "nt" else word for word in words]


def _read(file: Path) -> str:
    """What the editor has left, without the line end after the last line."""
    try:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is gone")
        if file.stat().st_size > _MOST_BYTES:
            raise EdgeInferError(f"{file} is over {_MOST_BYTES >> 20} MB and stays there")
        text = file.read_bytes().decode("utf-8", "surrogatepass")
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeInferError(f"what the editor wrote can't be read ({error})") from error
    return text.replace("\r\n", "\n").removesuffix("\n")
