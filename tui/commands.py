"""The table of commands: how each is typed, which keys mean it, what it says of itself and does.

Slash commands, the palette, keys, the help page and hints are made from it; a settings file may
give a command other keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from edgeinfer.tui import actions, controls

if TYPE_CHECKING:
    from edgeinfer.tui.app import ChatApp

# Where keys count: while writing, while a message is marked, at both, or over dialogs too.
Place: TypeAlias = Literal["prompt", "message", "main", "always"]
Values: TypeAlias = "Callable[[ChatApp], list[tuple[str, str]]]"


def _no_values(app: ChatApp) -> list[tuple[str, str]]:
    return []


@dataclass(frozen=True, slots=True)
class Command:
    """A row of the table. `keys` are separated by commas.

    `run` takes the app, and what follows the name where there is an `argument`: that shows what
    may follow, `values` completes it. `hint` is the word for it while a message is marked.
    """

    name: str
    group: str
    help: str
    run: Callable[..., None]
    keys: str = ""
    place: Place = "main"
    argument: str = ""
    is_typed: bool = True
    hint: str = ""
    values: Values = _no_values

    def __call__(self, app: ChatApp, argument: str = "") -> None:
        """Do it."""
        self.run(app, argument) if self.argument else self.run(app)


def _key(
    name: str, group: str, help: str, keys: str, run: Callable[..., None], **more: Any
) -> Command:
    """A command that only keys mean."""
    return Command(name, group, help, run, keys, is_typed=False, **more)


_WRITE, _ANSWER, _MARKED = "Writing", "Answers", "A marked message"
_TALK, _MODEL, _CHAT = "Conversations", "Model", "The chat"

COMMANDS = (
    _key("send", _WRITE, "send; while an answer runs: let it wait its turn", "enter",
         controls.send, place="prompt"),
    _key("newline", _WRITE, "new line; \\ before enter begins one too",
         "shift+enter,alt+enter,ctrl+j", controls.newline, place="prompt"),
    Command("editor", _WRITE, "go on writing in $VISUAL or $EDITOR", controls.write_in_editor,
            "ctrl+g"),
    _key("undo-writing", _WRITE, "undo what was written or cleared", "ctrl+underscore,alt+z",
         controls.undo_writing, place="prompt"),
    _key("stop", _ANSWER, "stop, and keep what there is; twice: clear the prompt", "escape",
         controls.stop),
    Command("retry", _ANSWER, "answer again", actions.retry, "ctrl+r,f5,r", hint="again"),
    Command("copy", _ANSWER, "copy the last answer, or its last code", actions.copy,
            "ctrl+y,f6,c,y", argument="[code]", hint="copy",
            values=lambda app: [("code", "the last code block")]),
    _key("copy-code", _ANSWER, "copy the last code block", "ctrl+b,f7,b", actions.copy_code),
    Command("thoughts", _ANSWER, "show or hide the thoughts", actions.toggle_thinking,
            "ctrl+t,t"),
    Command("probabilities", _ANSWER, "how sure the model was of each token",
            actions.show_probabilities, "p", "message", hint="probabilities"),
    _key("mark", _MARKED, "mark the last message, or the one before", "ctrl+up,f8", actions.mark),
    _key("previous", _MARKED, "the message before", "up,k", partial(actions.move_mark, step=-1),
         place="message"),
    _key("next", _MARKED, "the message after", "down,j", partial(actions.move_mark, step=1),
         place="message"),
    _key("branch-before", _MARKED, "the branch before", "left,[",
         partial(actions.switch_branch, step=-1), place="message", hint="branch"),
    _key("branch-after", _MARKED, "the branch after", "right,]",
         partial(actions.switch_branch, step=1), place="message", hint="branch"),
    Command("edit", _MARKED, "edit your last message, or the marked one, in a new branch",
            actions.edit, "e", "message", hint="edit"),
    _key("top", _MARKED, "to the beginning", "home", controls.scroll_home, place="message"),
    Command("clear", _TALK, "begin a new conversation", actions.begin_anew, "ctrl+n"),
    Command("load", _TALK, "history: open, search, export", actions.load, "ctrl+o,f2",
            argument="[words]"),
    Command("undo", _TALK, "take the last exchange back", actions.undo),
    Command("branch", _TALK, "choose among the branches", actions.choose_branch),
    Command("save", _TALK, "name the conversation; it is saved as you go", actions.save,
            argument="[title]"),
    Command("export", _TALK, "write the conversation to a file", actions.export_conversation,
            argument="[md|json] [path]",
            values=lambda app: [("md", "Markdown"), ("json", "everything that is known")]),
    Command("model", _MODEL, "switch to another model", controls.switch_model, "ctrl+l,f3",
            argument="[path]", values=controls.model_values),
    Command("system", _MODEL, "set the system message, - for none", actions.set_system,
            argument="[text]"),
    Command("params", _MODEL, "sampling: temperature, top_p, …", controls.set_params,
            "f4", argument="[name value]", values=controls.param_values),
    Command("stats", _MODEL, "speed, context and memory in numbers", controls.show_stats),
    _key("palette", _CHAT, "command palette", "ctrl+p", controls.open_palette),
    Command("theme", _CHAT, "colours, light or dark", controls.set_theme, argument="[name]",
            values=lambda app: [(name, "") for name in app.theme_names()]),
    _key("page-up", _CHAT, "scroll up", "pageup", partial(controls.turn_page, direction=-1)),
    _key("page-down", _CHAT, "scroll down", "pagedown", partial(controls.turn_page, direction=1)),
    _key("follow", _CHAT, "to the end; follow the answer again", "ctrl+end,end",
         controls.follow),
    _key("interrupt", _CHAT, "copy what is selected, or stop; twice: leave", "ctrl+c",
         controls.interrupt, place="always"),
    _key("suspend", _CHAT, "to the shell, until `fg`", "ctrl+z", controls.suspend,
         place="always"),
    Command("help", _CHAT, "keys and commands", controls.show_help, "f1"),
    Command("settings", _CHAT, "other keys: settings.ini in $EDITOR", controls.open_settings),
    _key("end-of-input", _CHAT, "leave, where nothing is written", "ctrl+d",
         controls.end_of_input, place="prompt"),
    Command("quit", _CHAT, "leave", controls.leave, "ctrl+q", "always"),
)  # fmt: skip

TYPED = {command.name: command for command in COMMANDS if command.is_typed}
_ALIASES = {"exit": "quit", "bye": "quit", "new": "clear"}  # what other chats call it


def typed(name: str) -> Command | None:
    """The command of that name after a slash."""
    return TYPED.get(_ALIASES.get(name.lower(), name.lower()))


def parse(text: str) -> tuple[Command, str] | None:
    """A command and its argument, None for a message; ValueError for what may be meant as one.

    A path, a comment and what begins with a space are messages.
    """
    found = re.fullmatch(r"/([A-Za-z][\w-]*|$)(?:\s+(.*))?", text.rstrip(), re.DOTALL)
    if found is None:
        return None
    name, argument = found[1], (found[2] or "").strip()
    command, as_it_is = typed(name), "with a space before it, it is a message"
    if command is None:
        near = nearest(name, TYPED)
        raise ValueError(f"no command /{name};{near and f' did you mean /{near}?'} {as_it_is}")
    if argument and not command.argument:
        raise ValueError(f"/{name} takes nothing after it; {as_it_is}")
    return command, argument


def nearest(name: str, names: Iterable[str]) -> str:
    """The name that may have been meant, "" for none."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(name, names, 1)), "")
