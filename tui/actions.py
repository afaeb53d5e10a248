"""What can be done with a message or a conversation, whichever key or command asks for it.

Knows nothing of how things are drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from edgeinfer import EdgeInferError
from edgeinfer.tui.branch_screen import BranchScreen
from edgeinfer.tui.conversation import Conversation
from edgeinfer.tui.probabilities_screen import ProbabilitiesScreen
from edgeinfer.tui.records import Node
from edgeinfer.tui.splitter import split

if TYPE_CHECKING:
    from edgeinfer.tui.commands import ChatCommands


def selected(app: ChatCommands) -> Node | None:
    """The message that is marked."""
    entry = app.transcript.selected
    ids = {node.id: node for node in app.session.conversation.branch()}
    return ids.get(entry) if entry is not None else None


def selected_answer(app: ChatCommands) -> Node | None:
    """The marked answer, the answer to the marked message, or the last one."""
    node = selected(app)
    branch = app.session.conversation.branch()
    if node is not None and node.role == "user":
        after = [n for n in branch if n.parent == node.id]
        node = after[0] if after else None
    return node or app.session.conversation.last("assistant")


def copy(app: ChatCommands, node: Node | None) -> None:
    if node is None or not node.content:
        app.say("nothing to copy yet", "warning")
    else:
        app.copy_to_clipboard(node.content)


def copy_code(app: ChatCommands, node: Node | None) -> None:
    """The last code block of a message."""
    blocks = [piece.text for piece in split(node.content) if piece.kind == "code"] if node else []
    if blocks:
        app.copy_to_clipboard(blocks[-1])
    else:
        app.say("no code in this answer", "warning")


def edit(app: ChatCommands, node: Node | None) -> None:
    """Put an earlier message into the prompt; sending it begins a branch."""
    if node is None or node.role != "user":
        app.say("only your own messages can be edited", "warning")
        return
    app.editing = node
    app.transcript.select(None)
    app.composer.prompt.set_text(node.content)
    app.composer.prompt.focus()
    app.refresh_hint()


def retry(app: ChatCommands, answer: Node | None) -> None:
    """Write another answer, in a branch beside the one there is."""
    if answer is None:
        app.say("there is no answer yet", "warning")
        return
    app.stop()
    if app.session.model is None:
        app.say("the model is not there yet", "warning")
    elif app.session.retry(answer):
        app.show_conversation()
        app.start_answer()


def switch_branch(app: ChatCommands, node: Node | None, step: int) -> None:
    """Show the alternative before or after a message."""
    if node is None:
        return
    app.stop()
    conversation = app.session.conversation
    depth = [each.id for each in conversation.branch()].index(node.id)
    if conversation.switch(node, step):
        app.show_conversation()
        app.transcript.select(conversation.branch()[depth].id)
    else:
        app.say("no other branch there")


def choose_branch(app: ChatCommands) -> None:
    conversation = app.session.conversation
    leaves = conversation.leaves()
    if len(leaves) < 2:
        app.say("there is one branch only: edit a message or answer again to begin another")
        return

    def show(leaf: int | None) -> None:
        if leaf is not None:
            app.stop()
            conversation.show(leaf)
            app.show_conversation()

    app.push_screen(BranchScreen(leaves, conversation.leaf), show)


def undo(app: ChatCommands) -> None:
    app.stop()
    node = app.session.undo()
    if node is None:
        app.say("nothing to take back", "warning")
        return
    app.show_conversation()
    app.say("taken back; /branch still has it")


def open_conversation(app: ChatCommands, id: int | None) -> None:
    """Show a stored conversation, or a new one."""
    app.stop()
    session = app.session
    try:
        found = Conversation.load(session.store, id) if id is not None else None
    except EdgeInferError as error:
        app.say(str(error), "error")
        return
    if id is not None and found is None:
        app.say("that conversation was deleted in another window", "warning")
        return
    session.queue.clear()
    system = session.settings.system
    session.conversation = found or Conversation(session.store, system=system)
    session.readings.clear_context()
    session.n_dropped = 0
    app.editing = None
    app.show_conversation()
    app.composer.show_queue([])
    app.composer.prompt.focus()


def show_probabilities(app: ChatCommands) -> None:
    node = selected_answer(app)
    logprobs = cast("list[object]", node.details.get("logprobs", [])) if node else []
    if logprobs:
        app.push_screen(ProbabilitiesScreen(logprobs))
    else:
        app.say("no probabilities were kept; /params logprobs 5 keeps them from the next answer on")


def toggle_thinking(app: ChatCommands, node: Node | None) -> None:
    running = app.session.running
    entry = running.node.id if running and node is None else node.id if node else None
    if entry is None or not app.transcript.toggle_thinking(entry):
        app.say("no thoughts in this answer")
