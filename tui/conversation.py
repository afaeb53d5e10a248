"""A conversation: a tree of messages, of which one branch is on show.

Knows nothing of widgets or models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeinfer.tui.records import Attachment, Header, Node, tags_of
from edgeinfer.tui.store import Store

if TYPE_CHECKING:
    from edgeinfer import Message

TITLE_LENGTH = 60


class Conversation:
    """Every change is written to the store at once; the first message creates the row."""

    def __init__(self, store: Store, model: str = "", system: str | None = None) -> None:
        self.id: int | None = None
        self.title = self.tags = ""
        self.model, self.system = model, system
        self.leaf: int | None = None
        self._store = store
        self._nodes: dict[int, Node] = {}
        self._children: dict[int | None, list[int]] = {}

    @classmethod
    def load(cls, store: Store, id: int) -> Conversation | None:
        """A stored one; an answer that a crash cut off is marked as stopped.

        None when it was deleted; raises EdgeInferError where the file can't be read.
        """
        header = store.conversation(id)
        if header is None:
            return None
        found = cls(store, header.model, header.system)
        found.id, found.title, found.tags = id, header.title, header.tags
        for node in store.messages(id):
            if node.parent not in found._nodes:  # as a cycle would have it
                node.parent = None
            found._insert(node)
            if node.state == "partial":
                node.state = "stopped"
                found.save(node)
        found.leaf = header.leaf if header.leaf in found._nodes else max(found._nodes, default=None)
        return found

    # -- looking ---------------------------------------------------------------------------------

    def branch(self) -> list[Node]:
        """The messages on show, first to last."""
        nodes: list[Node] = []
        at = self.leaf
        while at is not None and at in self._nodes:
            nodes.append(self._nodes[at])
            at = self._nodes[at].parent
        return nodes[::-1]

    def nodes(self) -> list[Node]:
        """All messages of all branches, oldest first."""
        return list(self._nodes.values())

    def node(self, id: int) -> Node:
        return self._nodes[id]

    def place(self, node: Node) -> tuple[int, int]:
        """Which of how many alternatives a message is, from 1."""
        siblings = self._children[node.parent]
        return siblings.index(node.id) + 1, len(siblings)

    def leaves(self) -> list[Node]:
        """The ends of all branches, oldest first."""
        return [node for node in self._nodes.values() if node.id not in self._children]

    def last(self, role: str) -> Node | None:
        """The last message of that role on the branch on show."""
        return next((node for node in reversed(self.branch()) if node.role == role), None)

    def for_model(self) -> list[Message]:
        """The branch as the model reads it, the unfinished answer left out.

        A question that failed without a word is out, too: one that was too long would be it again.
        """
        messages: list[Message] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for node in self.branch():
            if node.role == "assistant" and not node.content and node.state == "failed":
                if messages and messages[-1]["role"] == "user":
                    messages.pop()
            elif node.state != "partial" and (node.role != "assistant" or node.content):
                messages.append({"role": node.role, "content": full_text(node)})
        return messages

    # -- changing --------------------------------------------------------------------------------

    def ask(self, text: str, attachments: tuple[Attachment, ...], parent: int | None) -> Node:
        """Add a user's message after `parent`; beside others if it has children."""
        if self.id is None:
            self.title = self.title or title_of(text, attachments)
            self.id = self._store.add_conversation(self.title, self.model, self.system)
        return self._add(Node(0, parent, "user", text, attachments=attachments))

    def answer(self, parent: int) -> Node:
        """Add an empty answer that is being written."""
        return self._add(Node(0, parent, "assistant", "", state="partial"))

    def save(self, node: Node) -> None:
        """Write what a message has become."""
        assert self.id is not None
        self._store.update_message(self.id, node)

    def keep(self) -> None:
        """Write all of it, also where others have deleted it."""
        if self.id is not None:
            header = Header(self.title, self.model, self.system, self.leaf, self.tags)
            self._store.keep_anew(self.id, header, self._nodes.values())

    def show(self, leaf: int | None) -> None:
        """Make the branch that ends there the one on show."""
        self.leaf = leaf
        self._update(leaf=leaf)

    def switch(self, node: Node, step: int) -> bool:
        """Show the branch through the next alternative of `node`; False if there is none."""
        siblings = self._children[node.parent]
        index = siblings.index(node.id) + step
        if not 0 <= index < len(siblings):
            return False
        at = siblings[index]
        while at in self._children:
            at = self._children[at][-1]
        self.show(at)
        return True

    def rename(self, title: str) -> None:
        self.title = title
        self._update(title=title)

    def set_tags(self, text: str) -> None:
        self.tags = tags_of(text)
        self._update(tags=self.tags)

    def set_system(self, system: str | None) -> None:
        self.system = system
        self._update(system=system)

    def set_model(self, model: str) -> None:
        self.model = model
        self._update(model=model)

    def _update(self, **columns: Any) -> None:
        if self.id is not None:
            self._store.update_conversation(self.id, **columns)

    def _add(self, node: Node) -> Node:
        assert self.id is not None
        self._store.add_message(self.id, node)
        self._insert(node)
        self.leaf = node.id
        return node

    def _insert(self, node: Node) -> None:
        self._nodes[node.id] = node
        self._children.setdefault(node.parent, []).append(node.id)


def full_text(node: Node) -> str:
    """A message with its attached texts."""
    files = [f'<file name="{each.name}">\n{each.text}\n</file>' for each in node.attachments]
    return "\n\n".join([*files, node.content] if node.content else files)


def title_of(text: str, attachments: tuple[Attachment, ...] = ()) -> str:
    """A conversation's title, from its first message."""
    line = " ".join(text.split()) or ", ".join(each.name for each in attachments) or "Untitled"
    if len(line) <= TITLE_LENGTH:
        return line
    return line[:TITLE_LENGTH].rsplit(" ", 1)[0] + "…"
