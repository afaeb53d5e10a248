"""The slash commands: their names, their help, and what each does to the chat.

Knows nothing of widgets beyond the app's own methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeinfer import EdgeInferError
from edgeinfer.tui import actions
from edgeinfer.tui.export import export
from edgeinfer.tui.params import PARAMS, parse_param

if TYPE_CHECKING:
    from edgeinfer.tui.commands import ChatCommands


@dataclass(frozen=True, slots=True)
class Command:
    """`run(app, argument)`; `hint` shows what the argument is."""

    name: str
    hint: str
    help: str
    run: Callable[[ChatCommands, str], None]


def run_command(app: ChatCommands, text: str) -> None:
    """Run `/name argument`."""
    name, _, argument = text[1:].partition(" ")
    name = _ALIASES.get(name.lower(), name.lower())
    command = next((each for each in COMMANDS if each.name == name), None)
    if command is None:
        app.say(f"no command /{name}; /help lists them", "warning")
    else:
        command.run(app, argument.strip())


def arguments(app: ChatCommands, name: str) -> list[tuple[str, str]]:
    """What can follow a command."""
    if name == "model":
        return [(each.path, each.name) for each in app.model_choices() if each.path]
    if name == "params":
        return [(f"{param.name} ", param.help) for param in PARAMS]
    if name == "theme":
        return [(theme, "") for theme in app.theme_names()]
    if name == "export":
        return [("md", "Markdown"), ("json", "everything that is known")]
    return []


def _model(app: ChatCommands, argument: str) -> None:
    if argument:
        app.load_model(argument)
    else:
        app.action_models()


def _system(app: ChatCommands, argument: str) -> None:
    conversation = app.session.conversation
    if not argument:
        current = conversation.system
        app.say(f"system: {current}" if current else "no system message; /system TEXT sets one")
        return
    conversation.set_system(None if argument in ("-", "none", "off") else argument)
    app.say("the system message counts from the next answer on")


def _params(app: ChatCommands, argument: str) -> None:
    if not argument:
        app.action_params()
        return
    name, _, value = argument.replace("=", " ").partition(" ")
    try:
        app.session.sampling[name] = parse_param(name, value)
    except ValueError as error:
        app.say(str(error), "warning")
        return
    app.say(f"{name} = {value.strip() or 'the model’s default'}, from the next answer on")


def _clear(app: ChatCommands, argument: str) -> None:
    app.action_new()


def _retry(app: ChatCommands, argument: str) -> None:
    app.action_retry()


def _edit(app: ChatCommands, argument: str) -> None:
    actions.edit(app, app.session.conversation.last("user"))


def _undo(app: ChatCommands, argument: str) -> None:
    actions.undo(app)


def _branch(app: ChatCommands, argument: str) -> None:
    actions.choose_branch(app)


def _save(app: ChatCommands, argument: str) -> None:
    conversation = app.session.conversation
    if conversation.id is None:
        app.say("nothing to save yet", "warning")
    elif app.session.store.path is None:
        app.say("this chat keeps no history (--no-history); /export writes a file", "warning")
    else:
        if argument:
            conversation.rename(argument)
        if app.session.notice:
            conversation.keep()
        app.refresh_title()
        if app.session.notice:
            app.say(app.session.notice, "error")
        else:
            app.say(f"saved as “{conversation.title}”")


def _load(app: ChatCommands, argument: str) -> None:
    if not argument:
        app.action_history()
        return
    found = app.session.store.search(argument, limit=1)
    if found:
        actions.open_conversation(app, found[0].id)
    else:
        app.say(app.session.notice or f"no conversation with “{argument}”", "warning")


def _export(app: ChatCommands, argument: str) -> None:
    try:
        path = export(app.session.conversation, argument, app.settings.folder)
    except EdgeInferError as error:
        app.say(str(error), "error")
        return
    app.say(f"written: {path}")


def _copy(app: ChatCommands, argument: str) -> None:
    app.action_copy_code() if argument == "code" else app.action_copy_answer()


def _theme(app: ChatCommands, argument: str) -> None:
    if argument in app.theme_names():
        app.theme = argument
        app.session.store.set_preference("theme", argument)
    else:
        app.action_change_theme()


def _stats(app: ChatCommands, argument: str) -> None:
    app.action_stats()


def _help(app: ChatCommands, argument: str) -> None:
    app.action_help()


def _quit(app: ChatCommands, argument: str) -> None:
    app.exit()


_ALIASES = {"exit": "quit", "bye": "quit"}  # what other chats call it

COMMANDS = (
    Command("model", "[path]", "switch to another model", _model),
    Command("system", "[text]", "set the system message, - for none", _system),
    Command("params", "[name value]", "sampling: temperature, top_p, …", _params),
    Command("clear", "", "begin a new conversation", _clear),
    Command("retry", "", "answer again", _retry),
    Command("edit", "", "edit the last message, in a new branch", _edit),
    Command("undo", "", "take the last exchange back", _undo),
    Command("branch", "", "choose among the branches", _branch),
    Command("save", "[title]", "name the conversation; it is saved as you go", _save),
    Command("load", "[words]", "open a conversation from history", _load),
    Command("export", "[md|json] [path]", "write the conversation to a file", _export),
    Command("copy", "[code]", "copy the last answer or code block", _copy),
    Command("theme", "[name]", "colours, light or dark", _theme),
    Command("stats", "", "speed, context and memory in numbers", _stats),
    Command("help", "", "keys and commands", _help),
    Command("quit", "", "leave", _quit),
)
