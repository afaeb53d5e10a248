"""Puts text on the clipboard: through the terminal, and through the system where it can.

Knows nothing of widgets.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Mapping

from edgeinfer.tui.settings import RunTool

_TOOLS = (
    ("pbcopy",), ("wl-copy",), ("xclip", "-selection", "clipboard"),
    ("xsel", "--clipboard", "--input"), ("clip.exe",),
)  # fmt: skip
_MOST_BYTES = 74_000  # terminals drop longer OSC 52 sequences


def osc52(text: str, *, in_tmux: bool) -> str:
    """The sequence that sets the clipboard; tmux passes it on when it is wrapped."""
    data = base64.b64encode(text.encode()[:_MOST_BYTES]).decode()
    sequence = f"\x1b]52;c;{data}\a"
    if in_tmux:
        return "\x1bPtmux;" + sequence.replace("\x1b", "\x1b\x1b") + "\x1b\\"
    return sequence


def is_in_tmux(environment: Mapping[str, str]) -> bool:
    return bool(environment.get("TMUX"))


def copy_with_tool(text: str, environment: Mapping[str, str], run_tool: RunTool) -> bool:
    """Hand the text to the system's clipboard tool, if there is one that works here."""
    usable = (tool for tool in _TOOLS if _is_usable(tool[0], environment))
    return any(run_tool(tool, text.encode()) for tool in usable)


def _is_usable(tool: str, environment: Mapping[str, str]) -> bool:
    if tool == "wl-copy" and not environment.get("WAYLAND_DISPLAY"):
        return False
    if tool in ("xclip", "xsel") and not environment.get("DISPLAY"):
        return False
    return tool != "pbcopy" or sys.platform == "darwin"
