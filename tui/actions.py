"""What can be done with a message or a conversation: what commands of the table do.

Knows nothing of how things are drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from edgeinfer import EdgeInferError
from edgeinfer.tui.conversation import Conversation
from edgeinfer.tui.records import Node
from edgeinfer.tui.splitter import split

if TYPE_CHECKING:
    from edgeinfer.tui.app import ChatApp

# -- a message -----------------------------------------------------------------------------------


def selected(app: ChatApp) -> Node | None:
    """The message that is marked."""
    entry = app.transcript.selected
    ids = {node.id: node for node in app.session.conversation.branch()}
    return ids.get(entry) if entry is not None else None


def selected_answer(app: ChatApp) -> Node | None:
    """The marked answer, the answer to the marked message, or the last one."""
    node = selected(app)
    branch = app.session.conversation.branch()
    if node is not None and node.role == "user":
        after = [n for n in branch if n.parent == node.id]
        node = after[0] if after else None
    return node or app.session.conversation.last("assistant")


def mark(app: ChatApp) -> None:
    """Mark the last message, or go to the one before; one marked with the mouse stays."""
    is_first = not app.has_mark and selected(app) is not None
    app.set_focus(app.transcript)
    move_mark(app, 0 if is_first else -1)


def move_mark(app: ChatApp, step: int) -> None:
    app.transcript.select_next(step)
    app.refresh_hint()


def copy(app: ChatApp, argument: str) -> None:
    """A message, or `code`: its last code block."""
    node = selected(app) or app.session.conversation.last("assistant")
    if argument == "code":
        copy_code(app)
    elif node is None or not node.content:
        app.say("nothing to copy yet", "warning")
    else:
        app.copy_to_clipboard(node.content)


def copy_code(app: ChatApp) -> None:
    node = selected_answer(app)
    blocks = [piece.text for piece in split(node.content) if piece.kind == "code"] if node else []
    if blocks:
        app.copy_to_clipboard(blocks[-1])
    else:
        app.say("no code in this answer", "warning")


def edit(app: ChatApp) -> None:
    """Put an earlier message into the prompt; sending it begins a branch."""
    node = selected(app) or app.session.conversation.last("user")
    if node is None or node.role != "user":
        app.say("only your own messages can be edited", "warning")
        return
    app.transcript.select(None)
    app.begin_edit(node)


def retry(app: ChatApp) -> None:
    """Write another answer, in a branch beside the one there is."""
    answer = selected_answer(app)
    if answer is None:
        app.say("there is no answer yet", "warning")
        return
    if app.session.model is None:
        app.say("the model is not there yet", "warning")
        return
    app.stop()
    if app.session.retry(answer):
        app.show_conversation()
        app.start_answer()


def show_probabilities(app: ChatApp) -> None:
    from edgeinfer.tui.probabilities_screen import ProbabilitiesScreen

    node = selected_answer(app)
    logprobs = cast("list[object]", node.details.get("logprobs", [])) if node else []
    if logprobs:
        app.push_screen(ProbabilitiesScreen(logprobs))
    else:
        app.say("no probabilities were kept; /params logprobs 5 keeps them from the next answer on")


def toggle_thinking(app: ChatApp) -> None:
    """Of the marked message, else of the running or the last answer."""
    session = app.session
    last = session.running.node if session.running else session.conversation.last("assistant")
    node = selected(app) or last
    if node is None or not app.transcript.toggle_thinking(node.id):
        app.say("no thoughts in this answer")


# -- branches ------------------------------------------------------------------------------------


def switch_branch(app: ChatApp, step: int) -> None:
    """Show the alternative before or after the marked message."""
    node = selected(app)
    if node is None:
        return
    conversation = app.session.conversation
    at, n_branches = conversation.place(node)
    if not 1 <= at + step <= n_branches:
        app.say("no other branch there")
        return
    app.halt()
    depth = [each.id for each in conversation.branch()].index(node.id)
    conversation.switch(node, step)
    app.show_conversation()
    app.transcript.select(conversation.branch()[depth].id)
    app.refresh_hint()


def choose_branch(app: ChatApp) -> None:
    from edgeinfer.tui.branch_screen import BranchScreen

    conversation = app.session.conversation
    leaves = conversation.leaves()
    if len(leaves) < 2:
        app.say("there is one branch only: edit a message or answer again to begin another")
        return

    def show(leaf: int | None) -> None:
        if leaf is not None:
            app.halt()
            conversation.show(leaf)
            app.show_conversation()

    app.push_screen(BranchScreen(leaves, conversation.leaf), show)


# -- the conversation ----------------------------------------------------------------------------


def undo(app: ChatApp) -> None:
    if app.session.conversation.last("user") is None:
        app.say("nothing to take back", "warning")
        return
    app.halt()
    app.session.undo()
    app.show_conversation()
    app.say("taken back; /branch still has it")


def open_conversation(app: ChatApp, id: int | None) -> None:
    """Show a stored conversation, or a new one; what waits or is edited goes into the prompt."""
    session = app.session
    if id is not None and id == session.conversation.id:
        return
    try:
        found = Conversation.load(session.store, id) if id is not None else None
    except EdgeInferError as error:
        app.say(str(error), "error")
        return
    if id is not None and found is None:
        app.say("that conversation was deleted in another window", "warning")
        return
    app.halt()
    app.end_edit()
    system = session.settings.system
    session.conversation = found or Conversation(session.store, system=system)
    session.readings.clear_context()
    session.n_dropped = 0
    app.show_conversation()
    app.composer.prompt.focus()


def begin_anew(app: ChatApp) -> None:
    open_conversation(app, None)


def load(app: ChatApp, words: str) -> None:
    """Open the conversation that has the words, or choose one."""
    from edgeinfer.tui.history_screen import HistoryScreen

    session = app.session
    found = session.store.search(words, limit=1) if words else []
    if found:
        open_conversation(app, found[0].id)
    elif words:
        app.say(session.notice or f"no conversation with “{words}”", "warning")
    else:

        def take(id: int | None) -> None:
            app.refresh_title()
            if id is not None:
                open_conversation(app, id)

        screen = HistoryScreen(session.store, session.conversation, app.settings.folder)
        app.push_screen(screen, take)


def save(app: ChatApp, title: str) -> None:
    conversation = app.session.conversation
    if conversation.id is None:
        app.say("nothing to save yet", "warning")
    elif app.session.store.path is None:
        app.say("this chat keeps no history (--no-history); /export writes a file", "warning")
    else:
        if title:
            conversation.rename(title)
        if app.session.notice:
            conversation.keep()
        app.refresh_title()
        if app.session.notice:
            app.say(app.session.notice, "error")
        else:
            app.say(f"saved as “{conversation.title}”")


def export_conversation(app: ChatApp, argument: str) -> None:
    from edgeinfer.tui.export import export

    conversation, folder = app.session.conversation, app.settings.folder
    try:
        path = export(conversation, argument, folder, replaces=argument == app.refused)
    except FileExistsError as error:
        app.refused = argument
        app.say(f"{error} is there already; the same command again replaces it", "warning")
    except EdgeInferError as error:
        app.say(str(error), "error")
    else:
        app.refused = ""
        app.say(f"written: {path}")


def set_system(app: ChatApp, text: str) -> None:
    """Show the system message, set it, or take it away."""
    conversation = app.session.conversation
    if not text:
        current = conversation.system
        app.say(f"system: {current}" if current else "no system message; /system TEXT sets one")
        return
    conversation.set_system(None if text in ("-", "none", "off") else text)
    app.say("the system message counts from the next answer on")
