"""The whole history as one file: written, read again, refused; named, tagged and cleared."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeinfer import EdgeInferError
from edgeinfer.cli.main import commands
from edgeinfer.tui.archive import export_history, import_history
from edgeinfer.tui.conversation import Conversation
from edgeinfer.tui.export import as_json
from edgeinfer.tui.records import Attachment, Draft
from edgeinfer.tui.store import FILE_NAME, Store
from tests.test_tui_chat import Chat, drive
from tests.test_tui_faults import flat
from tests.tui_engine import Script, ScriptedModel


def filled(store: Store) -> Conversation:
    """Two branches, an attachment, thoughts and facts."""
    conversation = Conversation(store, "A model", "Be brief.")
    question = conversation.ask("Where?", (Attachment("a.txt", "text of a", 3),), None)
    for text in ("Here.", "There."):
        answer = conversation.answer(question.id)
        answer.content, answer.reasoning, answer.state = text, "Hm.", "done"
        answer.details = {"seed": 7, "logprobs": [["H", -0.5, []]]}
        conversation.save(answer)
    conversation.rename("A \ud800title 天气")
    conversation.set_tags("#work, travel work")
    return conversation


def whole(store: Store) -> list[Any]:
    """All that is kept, but for the numbers of messages."""
    found: list[Any] = []
    for each in store.recent():
        conversation = Conversation.load(store, each.id)
        assert conversation is not None
        order = {node.id: i for i, node in enumerate(conversation.nodes())}
        nodes = [
            (order.get(n.parent or 0), n.role, n.content, n.reasoning, n.state, n.details,
             [(a.name, a.text) for a in n.attachments]) for n in conversation.nodes()
        ]  # fmt: skip
        header = (each.id, each.title, each.tags, each.model, conversation.system)
        found.append((header, store.times(each.id), order.get(conversation.leaf or 0), nodes))
    return found


def test_what_is_exported_is_imported_once_with_all_its_branches(tmp_path: Path) -> None:
    store, file = Store(tmp_path / FILE_NAME), tmp_path / "all.json"
    filled(store)
    Conversation(store).ask("another", (), None)
    assert export_history(store, file) == 2
    with pytest.raises(FileExistsError):
        export_history(store, file)
    if os.name == "posix":
        (tmp_path / "ring").symlink_to("ring")
        with suppress(EdgeInferError):  # newer versions of Python put the file there
            export_history(store, tmp_path / "ring")
    assert import_history(store, file) == (0, 2)
    other = Store(tmp_path / "other.db")
    filled(other)
    assert import_history(other, file) == (2, 2) and import_history(other, file) == (0, 2)
    assert whole(store) == sorted(whole(other), key=lambda one: -one[1][1])[-2:]
    assert other.search("#travel")[0].tags == "work travel" and other.search("天气")
    store.close()
    other.close()


def test_one_exported_conversation_is_imported_as_a_line(tmp_path: Path) -> None:
    store, file = Store(None), tmp_path / "one.json"
    file.write_bytes(as_json(filled(Store(None))).encode("utf-8", "replace"))
    assert import_history(store, file) == (1, 1)
    ((_, _, leaf, nodes),) = whole(store)
    assert leaf == 1 and [node[:3] for node in nodes] == [
        (None, "user", "Where?"), (0, "assistant", "There.")
    ]  # fmt: skip


GOOD = {
    "format": "edgeinfer history", "version": 1,
    "conversations": [{"messages": [{"id": 1, "parent": None, "role": "user", "content": "x"}]}],
}  # fmt: skip


def changed(change: Callable[[Any], object]) -> bytes:
    value = json.loads(json.dumps(GOOD))
    change(value)
    return json.dumps(value).encode()


def in_message(**fields: Any) -> bytes:
    return changed(lambda value: value["conversations"][0]["messages"][0].update(fields))


def in_conversation(**fields: Any) -> bytes:
    return changed(lambda value: value["conversations"][0].update(fields))


REFUSED = {
    b"": "no JSON", b"\xff\xfe": "no JSON", b"[" * 100_000: "no JSON", b"5": "holds 5",
    b"{}": "format", b'{"format": 1}': "format", changed(lambda v: v.update(version=2)): "knows 1",
    changed(lambda v: v.update(version=True)): "version is True",
    changed(lambda v: v.update(version=1.0)): "version is 1.0",
    changed(lambda v: v.update(conversations=5)): "conversations of it is 5",
    changed(lambda v: v.update(conversations=[5])): "conversation 1 is 5",
    changed(lambda v: v["conversations"].append({"messages": []})): "conversation 2 has no mess",
    in_message(role="system"): "role of message 1 of conversation 1 is 'system'",
    in_message(role=5): "role of message 1", in_message(content=[]): "content of message 1",
    in_message(state="odd"): "state of message 1", in_message(id=-1): "id of message 1",
    in_message(id=True): "id of message 1", in_message(parent=1): "parent of message 1",
    in_message(attachments=[5]): "attachment of message 1",
    in_message(attachments=[{"name": 5}]): "name of message 1",
    in_conversation(leaf=9): "leaf of conversation 1", in_conversation(id=1 << 70): "id of conv",
    in_conversation(begun=float("nan")): "begun of conversation 1", in_conversation(tags=5): "tags",
    in_conversation(title=5): "title of conversation 1",
}  # fmt: skip


def test_any_other_file_is_refused_with_the_place_and_changes_nothing(tmp_path: Path) -> None:
    store, file = Store(tmp_path / FILE_NAME), tmp_path / "hostile.json"
    for data, why in REFUSED.items():
        file.write_bytes(data)
        with pytest.raises(EdgeInferError, match="can't be imported") as caught:
            import_history(store, file)
        assert why in str(caught.value), data[:80]
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(EdgeInferError, match="it is no file"):
            import_history(store, path)
    assert store.recent() == [] and store.notice(None) == ""
    file.write_bytes(changed(lambda value: None))
    assert import_history(store, file) == (1, 1)
    store.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
KEYS = st.sampled_from(
    "id parent role content state reasoning attachments seed logprobs tok_s error title".split()
)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(KEYS, JSON), st.dictionaries(KEYS, JSON))
def test_no_value_of_a_file_does_harm(
    tmp_path_factory: pytest.TempPathFactory, conversation: dict[str, Any], message: dict[str, Any]
) -> None:
    file = tmp_path_factory.mktemp("any") / "any.json"
    message = {"role": "user", "content": "x", **message}
    file.write_text(json.dumps({**conversation, "messages": [message]}), encoding="utf-8")
    store = Store(None)
    try:
        import_history(store, file)
    except EdgeInferError:
        assert store.recent() == []
    else:
        assert len(whole(store)) == 1
    assert store.notice(None) == ""
    store.close()


def test_the_command_lists_names_exports_and_clears_only_when_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEINFER_HOME", str(tmp_path))

    def run(*words: str, **options: Any) -> Result:
        return CliRunner().invoke(commands, ["history", *words], **options)

    with pytest.raises(EdgeInferError, match="no history yet"):
        run("--list", catch_exceptions=False)
    store = Store(tmp_path / "data" / FILE_NAME)
    id = str(filled(store).id)
    store.close()
    assert (
        run("--rename", id, "New\x1b[2J name").exit_code == 0 == run("--tag", id, "a b").exit_code
    )
    listed = run("--list").output
    assert id in listed and "3 messages  New name #a #b" in listed and "\x1b" not in listed
    for number in ("1", "x", "9" * 30, "-1"):
        with pytest.raises(EdgeInferError, match="no conversation"):
            run("--rename", number, "x", catch_exceptions=False)
    file = str(tmp_path / "all.json")
    assert "exported 1 conversations" in run("--export", file).output
    with pytest.raises(EdgeInferError, match="-y replaces it"):
        run("--export", file, catch_exceptions=False)
    assert "exported 1" in run("--export", file, "-y").output
    refused = run("--clear")
    assert refused.exit_code == 2 and "-y deletes unasked" in refused.output
    assert "imported 0 conversations; 1 were here already" in run("--import", file).output
    assert "deleted 1 conversations" in run("--clear", "-y").output
    assert "imported 1 conversations" in run("--import", file).output
    assert run("--list", "--clear").exit_code == 2


def test_the_screen_names_tags_and_exports_and_a_chat_begins_with_what_was_left(
    tmp_path: Path,
) -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("apples")
        await chat.press("ctrl+o")
        await chat.settle()
        await chat.press("ctrl+r", *"!", "enter", "ctrl+t", *"#fruit", "enter", "ctrl+e")
        await chat.settle()
        assert "apples! #fruit" in chat.screen_text and "1 conversations written" in flat(chat)
        await chat.press("ctrl+r", *"x", "escape", *"#fru")
        await chat.settle()
        assert "apples! #fruit" in chat.screen_text
        await chat.press("escape", "escape")  # more of them close nothing else
        await chat.settle()
        assert "apples!" in chat.screen_text.splitlines()[1]
        chat.app.composer.show(Draft("half a", (Attachment("pasted", "a text", 2),)))
        chat.app.exit()

    async def again(chat: Chat) -> None:
        await chat.idle()
        assert chat.app.composer.draft == Draft("half a", (Attachment("pasted", "a text", 2),))
        assert chat.app.session.take_draft() == Draft()  # once

    for each in (body, again):
        drive(each, ScriptedModel([Script("yes")]), folder=tmp_path)
    (file,) = tmp_path.glob("edgeinfer-*.json")
    assert '"fruit"' in file.read_text(encoding="utf-8")
