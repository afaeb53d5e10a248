"""What commands of the table do beside messages: the prompt, the model, pages, stop and leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edgeinfer import EdgeInferError, one_line, reason_of
from edgeinfer.tui.files import from_shown, shown_name
from edgeinfer.tui.params import CONTEXT, PARAMS, SAMPLING, context_in_force, in_force, parse_param
from edgeinfer.tui.records import Draft
from edgeinfer.tui.settings_file import FILE_NAME

if TYPE_CHECKING:
    from edgeinfer.tui.app import ChatApp

_FIRST_RUN = (
    "Welcome. edgeinfer runs language models on this machine.\n"
    "Choose one to begin with, or type the path of a .gguf file."
)

# -- the prompt ----------------------------------------------------------------------------------


def send(app: ChatApp) -> None:
    """Run the command that is written, or send the message; what can't be done stays written."""
    from edgeinfer.tui.commands import parse

    prompt = app.composer.prompt
    if prompt.begins_line():
        return
    app.composer.attach_written()
    draft = app.composer.draft
    try:
        found = parse(draft.text)
    except ValueError as error:
        app.say(str(error), "warning")
        return
    if found is not None:
        prompt.remember(draft.text.strip())
        prompt.set_text("")
        command, argument = found
        command(app, argument)
    elif draft.is_empty:
        return
    elif app.editing is not None and app.session.model is None:
        app.say("the model is not there yet", "warning")
    elif app.composer.reading:
        name = app.composer.reading[0]
        app.say(f"{name} is still read: wait, or delete its name to send without it", "warning")
    else:
        text = draft.text.strip()
        prompt.remember(draft.text.rstrip() if text.startswith("/") else text)
        app.composer.show(Draft())
        app.submit(Draft(text, draft.attachments))


def newline(app: ChatApp) -> None:
    app.composer.prompt.insert("\n")


def undo_writing(app: ChatApp) -> None:
    app.composer.undo()


def write_in_editor(app: ChatApp) -> None:
    """Go on writing in $VISUAL or $EDITOR; undo brings back what was written before."""
    from edgeinfer.tui import editor

    prompt = app.composer.prompt
    try:
        text = editor.write_in_editor(app, prompt.text)
    except EdgeInferError as error:
        app.say(str(error), "error")
        return
    if text != prompt.text:
        prompt.set_text(text)


def open_settings(app: ChatApp) -> None:
    """Edit the settings file; a new one has every command's keys to change."""
    from edgeinfer.tui import editor

    path = app.settings.data_folder / FILE_NAME
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(app.keys.template(), "utf-8")
        complaint = editor.open_in_editor(app, path)
    except (OSError, EdgeInferError) as error:
        why = reason_of(error)
        app.say(f"{path}: {why}", "error")
        return
    app.read_settings()
    app.say("\n".join(filter(None, [complaint, *app.complaints])) or f"{path} counts", "warning")


# -- stop and leave ------------------------------------------------------------------------------


def stop(app: ChatApp) -> None:
    """Stop the answer; else leave what is edited or marked; twice with neither: clear."""
    prompt = app.composer.prompt
    if app.stop():
        app.recall()
    elif app.editing is not None:
        app.end_edit()
    elif app.transcript.selected is None and not app.screen.selections and prompt.text:
        if app.is_again("stop"):
            prompt.set_text("")
            app.say(f"cleared; {app.keys.label('undo-writing', 'prompt')} brings it back")
        else:
            app.say(f"{app.keys.label('stop')} again clears the prompt")
    app.screen.clear_selection()
    app.transcript.select(None)
    app.composer.prompt.focus()
    app.refresh_hint()


def interrupt(app: ChatApp) -> None:
    """Copy what is marked with the mouse; else stop the answer; twice in a row: leave."""
    text = app.screen.get_selected_text() or app.composer.prompt.selected_text
    if text:
        app.copy_to_clipboard(text)
        app.screen.clear_selection()
    elif app.stop():
        app.recall()
    elif app.is_again("interrupt"):
        app.exit()
    else:
        app.say(f"{app.keys.label('interrupt', 'always')} again leaves")


def suspend(app: ChatApp) -> None:
    """Stop until the shell goes on with it; where no shell can, nothing happens."""
    app.suspend_for_shell()


def leave(app: ChatApp) -> None:
    app.exit()


def end_of_input(app: ChatApp) -> None:
    """Leave, as shells do, where nothing is written or waits; else delete what follows."""
    if app.composer.draft.is_empty and not app.session.queue:
        app.exit()
    else:
        app.composer.prompt.action_delete_right()


# -- the model -----------------------------------------------------------------------------------


def load_model(app: ChatApp, path: str) -> None:
    """Load it in the background; an answer runs until the model changes."""
    if app.session.loader is not None:
        app.say("another model is loading; this one comes after it")
    app.session.load(path if app.session.is_served else from_shown(path))
    app.refresh_title()
    app.refresh_hint()


def choose_model(app: ChatApp, title: str = "") -> None:
    """Let one be chosen; `title` says why, where nobody asked."""
    from edgeinfer.tui.model_screen import ModelScreen

    current = app.session.last_path
    is_without = app.session.model is None and app.session.loader is None
    if is_without and not app.session.is_served:
        title = title or _FIRST_RUN

    def take(path: str | None) -> None:
        if path is not None:
            load_model(app, path)

    choices, held = app.model_choices(), _held(app)
    app.push_screen(
        ModelScreen(app.settings, choices, app.downloads, title, current, freed=held), take
    )


def switch_model(app: ChatApp, path: str) -> None:
    load_model(app, path) if path else choose_model(app)


def model_values(app: ChatApp) -> list[tuple[str, str]]:
    shown = one_line if app.session.is_served else shown_name
    return [(shown(each.path), each.name) for each in app.model_choices() if each.path]


def set_params(app: ChatApp, argument: str) -> None:
    """`name value`, or a form."""
    name, _, value = argument.replace("=", " ").partition(" ")
    if name == CONTEXT.name and (server := app.settings.server) is not None:
        app.say(f"the context length is set where the model runs, at {server.place}", "warning")
        return
    if not name or (name == CONTEXT.name and value.strip()):
        _show_params(app, value.strip() or None)
        return
    sampling = app.session.sampling
    try:
        if name != CONTEXT.name:
            sampling = {**sampling, name: parse_param(name, value)}
    except ValueError as error:
        app.say(str(error), "warning")
        return
    app.session.sampling = sampling
    app.say(_in_words(app, name))


def _in_words(app: ChatApp, name: str) -> str:
    session = app.session
    if name == CONTEXT.name:
        now = context_in_force(session.n_ctx, session.model)
        return f"context: {now.value} tokens, {now.source}"
    now = in_force(name, session.sampling, session.model, is_served=session.is_served)
    return f"{name} = {now.value} ({now.source}), from the next answer on"


def _show_params(app: ChatApp, context: str | None) -> None:
    from edgeinfer.tui.params_screen import ChatParams, ParamsScreen

    session = app.session
    given = ChatParams(session.sampling, session.n_ctx)

    def take(params: ChatParams | None) -> None:
        if params is None:
            return
        session.sampling, before = dict(params.sampling), session.n_ctx
        session.n_ctx = params.n_ctx
        path = session.loader.path if session.loader is not None else session.path
        is_so = session.model is not None and session.model.n_ctx == params.n_ctx
        if path and params.n_ctx != before and not is_so:
            load_model(app, path)
            app.say("the model is opened anew with another context; the conversation stays")
        else:
            app.say("changed, from the next answer on")

    app.push_screen(
        ParamsScreen(
            given, session.model, _room_check(app), context=context, is_served=session.is_served
        ),
        take,
    )


def _room_check(app: ChatApp) -> Callable[[int], None]:
    """Raises where a context length has no room, once the open model has given back its own."""
    plan_model, model, path = app.settings.plan_model, app.session.model, app.session.path
    held = _held(app)

    def check(n_ctx: int) -> None:
        if plan_model is not None and model is not None:
            plan_model(path, n_ctx=n_ctx, freed=held)

    return check


def _held(app: ChatApp) -> dict[str, int]:
    """Bytes by memory that the open model gives back; it may not have taken all it planned yet."""
    model = app.session.model
    if model is None or model.plan is None:
        return {}
    held = {pool.name: pool.total_bytes for pool in model.plan.pools}
    host = model.plan.host
    return {**held, host.name: min(host.total_bytes, app.settings.memory_now() or host.total_bytes)}


def param_values(app: ChatApp) -> list[tuple[str, str]]:
    params = SAMPLING if app.session.is_served else PARAMS
    return [(f"{param.name} ", param.help) for param in params]


# -- the screen ----------------------------------------------------------------------------------


def set_theme(app: ChatApp, name: str) -> None:
    if name in app.theme_names():
        app.theme = name
        app.session.store.set_preference("theme", name)
    elif name:
        app.say(f"no theme {name}; there are {', '.join(app.theme_names())}", "warning")
    else:
        app.search_themes()


def show_stats(app: ChatApp) -> None:
    from edgeinfer.tui.pages import stats_page
    from edgeinfer.tui.text_screen import TextScreen

    page = stats_page(app.session, app.settings.memory_now(), app.palette)
    app.push_screen(TextScreen("Statistics", page))


def show_help(app: ChatApp) -> None:
    from edgeinfer.tui.pages import help_page
    from edgeinfer.tui.text_screen import TextScreen

    page = help_page(app.keys, app.complaints, app.settings.data_folder / FILE_NAME, app.palette)
    app.push_screen(TextScreen("Keys and commands", page))


def open_palette(app: ChatApp) -> None:
    from textual.command import CommandPalette

    app.push_screen(CommandPalette())


def scroll_home(app: ChatApp) -> None:
    app.transcript.scroll_home(animate=False)


def turn_page(app: ChatApp, direction: int) -> None:
    transcript = app.transcript
    transcript.scroll_relative(y=direction * (transcript.size.height - 2), animate=False)


def follow(app: ChatApp) -> None:
    app.transcript.follow()
