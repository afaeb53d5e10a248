"""Puts text on the clipboard: through tools that can tell that it arrived, and the terminal.

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
# Into a buffer of tmux, which passes it on where it is told to; -w is new in 3.2.
_TMUX = (("tmux", "load-buffer", "-w", "-"), ("tmux", "load-buffer", "-"))
_MOST_BYTES = 74_000  # terminals drop longer OSC 52 sequences


def osc52(text: str, *, in_tmux: bool) -> str | None:
    """The sequence that sets the clipboard, which no terminal confirms; None for too much text.

    In tmux it comes twice: plain for `set-clipboard on`, wrapped for `allow-passthrough on`.
    """
    data = text.encode(errors="replace")
    if len(data) > _MOST_BYTES:
        return None
    sequence = f"\x1b]52;c;{base64.b64encode(data).decode()}\a"
    if in_tmux:
        return sequence + "\x1bPtmux;" + sequence.replace("\x1b", "\x1b\x1b") + "\x1b\\"
    return sequence


def is_in_tmux(environment: Mapping[str, str]) -> bool:
    return bool(environment.get("TMUX"))


def copy_with_tools(text: str, environment: Mapping[str, str], run_tool: RunTool) -> list[str]:
    """What has the text for certain: "tmux", "the clipboard", both or neither."""
    found = []
    if is_in_tmux(environment) and any(run_tool(tool, _bytes(text, "")) for tool in _TMUX):
        found.append("tmux")
    usable = (tool for tool in _TOOLS if _is_usable(tool[0], environment))
    if any(run_tool(tool, _bytes(text, tool[0])) for tool in usable):
        found.append("the clipboard")
    return found


def _bytes(text: str, tool: str) -> bytes:
    """Windows' tool would take UTF-8 for text of a code page."""
    return text.encode("utf-16-le" if tool == "clip.exe" else "utf-8", "replace")


def _is_usable(tool: str, environment: Mapping[str, str]) -> bool:
    if tool == "wl-copy" and not environment.get("WAYLAND_DISPLAY"):
        return False
    if tool in ("xclip", "xsel") and not environment.get("DISPLAY"):
        return False
    return tool != "pbcopy" or sys.platform == "darwin"
