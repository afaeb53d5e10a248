"""Short texts around the conversation: below answers, in the prompt's frame, on an empty screen.

Knows nothing of widgets.
"""

from __future__ import annotations

from typing import Literal

from rich.text import Text

from edgeinfer import one_line
from edgeinfer.tui.blocks import Block
from edgeinfer.tui.keys import Keys
from edgeinfer.tui.palette import Palette
from edgeinfer.tui.records import Node, Summary
from edgeinfer.tui.session import Session
from edgeinfer.tui.settings import ChatServer


def answer_note(node: Node, place: tuple[int, int]) -> str:
    """How an answer came about; its place among the branches when there are others."""
    if node.role == "user":
        return _branch(place)
    details, parts = node.details, []
    if details.get("n_tokens"):
        parts.append(f"{details['n_tokens']:,} tokens")
    if details.get("tok_s"):
        parts.append(f"{details['tok_s']:.1f} tok/s")
    if details.get("finish") == "repeats":
        parts.append("stopped: it repeats itself")
    elif node.state == "stopped":
        parts.append("stopped")
    elif details.get("finish") == "length":
        # A server's may be that of its context.
        raises = "" if details.get("server") else ", /params raises it"
        parts.append(f"cut off at the limit{raises}")
    if details.get("server"):
        parts.append(f"from {one_line(details['server'])}")
    if _branch(place):
        parts.append(_branch(place))
    return " · ".join(parts)


def _branch(place: tuple[int, int]) -> str:
    at, n = place
    return f"‹ {at} of {n} ›" if n > 1 else ""


def dropped_block(n: int) -> Block:
    turns = f"{n} oldest turns are" if n > 1 else "oldest turn is"
    text = f"the context is full: the {turns} not read any more"
    return Block("notice", text, 0)


def hint(
    session: Session, keys: Keys, *, is_editing: bool, marked: Literal["keys", "mouse"] | None
) -> tuple[str, str]:
    """Title and subtitle of the prompt's frame; `marked` is what a message is marked with."""
    send, stop = keys.label("send", "prompt"), keys.label("stop")
    if marked == "keys":
        return "", f"{keys.hints()} · {stop} back"
    if marked == "mouse":
        return "", f"{keys.label('copy')} copy · {keys.label('mark')} more · {stop} back"
    if is_editing:
        return "editing an earlier message", f"{send} ask anew · {stop} leave it as it was"
    if session.running is not None:
        return "", f"{stop} stop · {send} queue"
    if session.loader is not None:
        return "", f"{send} queue until the model is ready"
    return "", f"/ commands · @ files · {keys.label('help') or '/help'} keys"


def _whereabouts(server: ChatServer | None) -> str:
    if server is None:
        return "It runs on this machine; nothing you write leaves it."
    if server.is_here:
        return f"{server.place} runs it, on this machine."
    return f"{server.place} runs it: what you write is sent there."


def welcome(session: Session, keys: Keys, last: Summary | None, palette: Palette) -> Text:
    """What an empty conversation shows."""
    name = session.model.name if session.model is not None else ""
    text = Text(justify="center")
    server = session.settings.server
    if session.loader is not None:
        text.append("The model is on its way. You can write already.", palette.muted)
    elif session.model is None:
        text.append(f"No model yet: {keys.label('model') or '/model'} chooses one.", palette.muted)
    else:
        text.append(f"{one_line(name)}\n\n", f"bold {palette.accent}")
        text.append(_whereabouts(server), palette.muted)
    if last is not None:
        title = one_line(last.title)
        short = title if len(title) <= 40 else title[:39] + "…"
        key = keys.label("load") or "/load"
        text.append(f"\n\n{key}  resume “{short}”", palette.muted)
    return text
