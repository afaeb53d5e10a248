"""Which key does what: of the app, and of a marked message.

Knows nothing of what the actions do.
"""

from __future__ import annotations

from textual.binding import Binding, BindingType

APP_KEYS: list[Binding] = [
    Binding("escape", "escape", "Stop", id="stop"),
    Binding("ctrl+c", "interrupt", "Copy or stop", priority=True, id="interrupt"),
    Binding("ctrl+n", "new", "New conversation", priority=True, id="new"),
    Binding("ctrl+o", "history", "History", priority=True, id="history"),
    Binding("ctrl+l", "models", "Model", priority=True, id="models"),
    Binding("ctrl+g", "params", "Sampling", priority=True, id="params"),
    Binding("ctrl+r", "retry", "Answer again", priority=True, id="retry"),
    Binding("ctrl+y", "copy_answer", "Copy answer", priority=True, id="copy_answer"),
    Binding("ctrl+b", "copy_code", "Copy code", priority=True, id="copy_code"),
    Binding("ctrl+t", "thinking", "Thoughts", priority=True, id="thinking"),
    Binding("ctrl+up", "mark", "Mark a message", priority=True, id="mark"),
    Binding("ctrl+end", "follow", "Follow", priority=True, id="follow"),
    Binding("pageup", "page(-1)", "Scroll up", priority=True, id="page_up"),
    Binding("pagedown", "page(1)", "Scroll down", priority=True, id="page_down"),
    Binding("f1", "help", "Keys", priority=True, id="help"),
]

# Priority keys come before those of a dialog, where they mean nothing.
MAIN_ACTIONS = frozenset(key.action.partition("(")[0] for key in APP_KEYS)

MESSAGE_KEYS: list[BindingType] = [
    Binding("up,k", "app.move_mark(-1)", "Previous message"),
    Binding("down,j", "app.move_mark(1)", "Next message"),
    Binding("left,left_square_bracket", "app.branch(-1)", "Previous branch"),
    Binding("right,right_square_bracket", "app.branch(1)", "Next branch"),
    Binding("c,y", "app.copy_answer", "Copy"),
    Binding("b", "app.copy_code", "Copy code"),
    Binding("e", "app.edit", "Edit"),
    Binding("r", "app.retry", "Answer again"),
    Binding("p", "app.probabilities", "Probabilities"),
    Binding("t", "app.thinking", "Thoughts"),
    Binding("home", "scroll_home", "Top"),
    Binding("end", "app.follow", "End"),
]
