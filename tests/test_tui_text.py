"""The parts of the TUI that know no widgets: blocks, history file, tree, completions, export."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
from pathlib import Path

import pytest

from edgeinfer import EdgeInferError, InvalidModelError
from edgeinfer.tui.archive import clear_history
from edgeinfer.tui.clipboard import osc52
from edgeinfer.tui.completions import Sources, complete
from edgeinfer.tui.conversation import Conversation, full_text, title_of
from edgeinfer.tui.entries import RunningEntry, blocks_of
from edgeinfer.tui.export import export
from edgeinfer.tui.files import FoundFile, match
from edgeinfer.tui.gauge import Readings, context_bar, sparkline
from edgeinfer.tui.look import Look
from edgeinfer.tui.palette import DARK, LIGHT, Palette
from edgeinfer.tui.params import parse_param
from edgeinfer.tui.records import Attachment, Node
from edgeinfer.tui.rows import Row
from edgeinfer.tui.schema import _STEPS
from edgeinfer.tui.splitter import Splitter, split
from edgeinfer.tui.store import FILE_NAME, Store

MARKDOWN = """# Title

Some *text* with `code`.

1. one

   still one
2. two

- a

- b

```python
def f():

    return 1
```
after

| a | b |
|---|---|
| 1 | 2 |

~~~
```
inside
~~~

1. x

   ```
   in a list

   ```
end"""


def pieces(text: str) -> list[tuple[str, str]]:
    return [(piece.kind, piece.text) for piece in split(text)]


def test_closed_pieces_are_whole() -> None:
    found = pieces(MARKDOWN)
    assert ("text", "# Title") in found
    assert ("text", "1. one\n\n   still one\n2. two") in found
    assert ("text", "- a\n\n- b") in found
    assert ("code", "def f():\n\n    return 1") in found
    assert ("code", "```\ninside") in found
    assert any(kind == "text" and "in a list" in text for kind, text in found)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_pieces_do_not_depend_on_how_the_text_comes(size: int) -> None:
    splitter = Splitter()
    found = []
    for start in range(0, len(MARKDOWN), size):
        found += splitter.push(MARKDOWN[start : start + size])
        splitter.tail()
    found += splitter.flush()
    assert [(piece.kind, piece.text) for piece in found] == pieces(MARKDOWN)


def test_an_open_code_block_does_not_show_its_closing_fence() -> None:
    splitter = Splitter()
    splitter.push("```py\nx = 1\n``")
    tail = splitter.tail()
    assert tail is not None and (tail.kind, tail.text, tail.language) == ("code", "x = 1", "py")


def test_running_entry_ends_as_the_finished_message_looks() -> None:
    running = RunningEntry(1)
    for letter in MARKDOWN:
        running.push(letter, "", 0.0)
    running.finish("note", "", 0.0)
    whole = blocks_of(Node(1, None, "assistant", MARKDOWN), "note")
    assert [(b.kind, b.text) for b in running.blocks] == [(b.kind, b.text) for b in whole]


def test_text_of_a_model_loses_its_escape_sequences() -> None:
    evil = "a\x1b]52;c;aGk=\x07b\x1b[31mc\x9b2J\x00d \u202egnp"
    running = RunningEntry(1)
    for letter in evil:
        running.push(letter, letter, 0.0)
    running.finish("", "", 0.0)
    shown = "".join(block.text for block in running.blocks)
    stored = Node(2, None, "assistant", evil, reasoning=evil, details={"error": evil})
    user = Node(3, None, "user", evil, attachments=(Attachment("f\x1b[31m", evil),))
    for block in [*blocks_of(stored, ""), *blocks_of(user, "")]:
        shown += block.text + "".join(block.notes)
    assert not any(ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 for c in shown)
    assert "\u202e" not in shown


def shown(rows: list[Row]) -> str:
    """What the terminal gets."""
    return "\n".join("".join(segment.text for segment in row.segments) for row in rows)


@pytest.mark.parametrize("theme", [DARK, LIGHT])
@pytest.mark.parametrize("width", [20, 56, 96])
def test_no_line_is_wider_than_asked(theme: object, width: int) -> None:
    look = Look(Palette.of(theme))  # type: ignore[arg-type]
    text = MARKDOWN + "\n\n" + "word" * 50 + "\n\n漢字" + "漢" * 80 + "\n\n- x\n  - " + "y " * 60
    for block in blocks_of(Node(1, None, "assistant", text, reasoning="hm " * 90), "n"):
        block.is_folded = False
        for row in block.draw(look, width):
            assert sum(segment.cell_length for segment in row.segments) <= width


def test_tags_and_links_stay_visible() -> None:
    look = Look(Palette.of(DARK))
    text = shown(look.prose("<b>bold</b> [here](http://evil.example)\n\n<div>x</div>", 80).rows)
    assert "<b>" in text and "http://evil.example" in text and "<div>x</div>" in text


def test_every_part_has_its_colour() -> None:
    palette = Palette.of(DARK)
    look = Look(palette)
    colors = {}
    text = "# Title\n\ntext\n\n```py\nx\n```\n\n| head |\n|---|\n| cell |"
    for block in blocks_of(Node(1, None, "assistant", text, reasoning="hm"), "note"):
        for row in block.draw(look, 60):
            for segment in row.segments:
                if segment.text.strip() and segment.style and segment.style.color:
                    colors[segment.text.split()[0][:5]] = segment.style.color.name
                    bold = segment.style.bold
                    assert bold or segment.text.strip() not in ("Title", "head")
    wanted = {"Title": palette.accent, "py": palette.muted, "note": palette.muted}
    wanted |= {"▸": palette.muted, "────": palette.faint}
    assert {name: colors.get(name, "").upper() for name in wanted} == wanted


def test_every_estimate_is_near_the_height() -> None:
    look = Look(Palette.of(DARK))
    for block in blocks_of(Node(1, None, "assistant", MARKDOWN * 3), ""):
        block.estimate(80)
        guess = block.height
        assert abs(len(block.draw(look, 80)) - guess) <= 4


# -- history -------------------------------------------------------------------------------------


def filled(store: Store) -> Conversation:
    conversation = Conversation(store, "model")
    first = conversation.ask("Where is the ocean?", (), None)
    answer = conversation.answer(first.id)
    answer.content, answer.state = "Downhill from **everywhere**.", "done"
    conversation.save(answer)
    return conversation


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX files")
def test_history_belongs_to_its_owner(tmp_path: Path) -> None:
    store = Store(tmp_path / "data" / FILE_NAME)
    filled(store)
    for file in (tmp_path / "data").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    store.close()


def test_search_finds_words_and_beginnings_and_forgets_what_is_deleted(tmp_path: Path) -> None:
    store = Store(tmp_path / FILE_NAME)
    conversation = filled(store)
    assert [s.title for s in store.search("everywh")] == ["Where is the ocean?"]
    assert [s.id for s in store.search("OCEAN downhill ")] == []  # all words in one message
    assert store.search('"quoted" AND * ocean(')[:0] == []
    assert store.search("nothing") == []
    assert "everywhere" in store.search("everywhere")[0].snippet
    assert conversation.id is not None
    store.delete_conversation(conversation.id)
    assert store.search("everywhere") == [] and store.messages(conversation.id) == []
    store.close()


def test_a_partial_answer_survives_a_crash(tmp_path: Path) -> None:
    store = Store(tmp_path / FILE_NAME)
    conversation = filled(store)
    question = conversation.ask("And then?", (), conversation.leaf)
    answer = conversation.answer(question.id)
    answer.content = "Then it"
    conversation.save(answer)
    # The process dies here: nothing is closed.
    again = Store(tmp_path / FILE_NAME)
    assert conversation.id is not None
    found = Conversation.load(again, conversation.id)
    assert found is not None
    assert [(n.content, n.state) for n in found.branch()][-1] == ("Then it", "stopped")
    assert again.search("Then")
    again.close()
    store.close()


def test_branches() -> None:
    conversation = filled(Store(None))
    first = conversation.branch()[0]
    other = conversation.ask("Where are the hills?", (), None)
    answer = conversation.answer(other.id)
    answer.state = "done"
    assert conversation.place(other) == (2, 2)
    assert len(conversation.leaves()) == 2
    assert conversation.switch(other, -1)
    assert [node.id for node in conversation.branch()][0] == first.id
    assert not conversation.switch(first, -1)
    assert conversation.switch(first, 1)
    assert conversation.leaf == answer.id


def test_what_the_model_reads() -> None:
    conversation = filled(Store(None))
    conversation.set_system("Be brief.")
    note = Attachment("a.txt", "text of a")
    question = conversation.ask("Look", (note,), conversation.leaf)
    conversation.answer(question.id)
    messages = conversation.for_model()
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert "text of a" in str(messages[-1]["content"]) and "a.txt" in full_text(question)


def test_a_question_that_failed_is_not_read_again() -> None:
    """One that was too long would be so for every question after it, and push out the rest."""
    conversation = filled(Store(None))
    before = conversation.for_model()
    for error in ("too long", "out of memory"):
        question = conversation.ask("word " * 9000, (), conversation.leaf)
        assert len(conversation.for_model()) == len(before) + 1
        answer = conversation.answer(question.id)
        answer.state, answer.details["error"] = "failed", error
    assert conversation.for_model() == before
    answer.content = "as far as it came"
    assert [m["role"] for m in conversation.for_model()[len(before) :]] == ["user", "assistant"]
    alone = Conversation(Store(None))  # as an import may make it
    alone.set_system("Be brief.")
    alone.id = 1
    alone._add(Node(0, None, "assistant", "", state="failed"))
    assert [m["role"] for m in alone.for_model()] == ["system"]


def test_old_files_are_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    db = sqlite3.connect(path)
    db.executescript(_STEPS[0] + "PRAGMA user_version = 1;")
    db.execute("INSERT INTO conversation (title, created, updated) VALUES ('old', 1, 1)")
    db.execute(
        "INSERT INTO message (role, content, state, created, conversation) "
        "VALUES ('user', 'ancient words', 'done', 1, 1)"
    )
    db.commit()
    db.close()
    store = Store(path)
    assert [s.title for s in store.search("ancient")] == ["old"]
    store.close()


def test_clear_history_deletes_every_file(tmp_path: Path) -> None:
    store = Store(tmp_path / FILE_NAME)
    filled(store)
    assert clear_history(tmp_path) == 1
    assert list(tmp_path.iterdir()) == [] and clear_history(tmp_path) == 0
    store.close()


def test_export(tmp_path: Path) -> None:
    conversation = filled(Store(None))
    markdown = export(conversation, "", tmp_path)
    assert "Downhill from **everywhere**." in markdown.read_text("utf-8")
    assert export(conversation, "", tmp_path) != markdown
    data = json.loads(export(conversation, "json x.json", tmp_path).read_text("utf-8"))
    assert [m["role"] for m in data["messages"]] == ["user", "assistant"]
    with pytest.raises(EdgeInferError):
        export(conversation, "md no/such/folder.md", tmp_path)


# -- small things --------------------------------------------------------------------------------


def test_completions() -> None:
    commands = (("model", "m"), ("params", "p"), ("editor", "o"), ("edit", "e"))
    files = [FoundFile("src/main.py", "/w/src/main.py"), FoundFile("a.md", "/w/a.md")]
    sources = Sources(
        commands, lambda name: [("temperature ", "")], lambda query: match(query, files)
    )
    assert [c.label for c in complete("/p", True, sources)] == ["/params"]
    assert [c.label for c in complete("/edit", True, sources)] == ["/edit", "/editor"]
    assert [c.text for c in complete("/params te", True, sources)] == ["temperature "]
    assert [c.file for c in complete("look at @mn", True, sources)] == [files[0]]
    assert complete("mail a@main", True, sources) == []
    assert complete("/model", False, sources) == []


def test_params() -> None:
    assert parse_param("temperature", "0.5") == 0.5 and parse_param("top_k", "") is None
    for name, text in (("temperature", "9"), ("top_k", "a"), ("nonsense", "1"), ("overflow", "x")):
        with pytest.raises(ValueError, match=r"\w"):
            parse_param(name, text)


def test_context_bar_has_a_glyph_for_each_kind() -> None:
    readings = Readings(n_ctx=100, n_prompt=40, n_cached=20, n_answer=10)
    bar = context_bar(readings, 20)
    assert [kind for _, kind in bar] == ["cached", "new", "answer", "free"]
    assert len({glyphs[0] for glyphs, _ in bar}) == 4
    assert sum(len(glyphs) for glyphs, _ in bar) == 20
    full = Readings(n_ctx=100, n_prompt=200, n_cached=0, n_answer=10)
    assert sum(len(glyphs) for glyphs, _ in context_bar(full, 20)) == 20


def test_sparkline() -> None:
    assert sparkline([1.0, 2.0]) == "▅█" and sparkline([]) == "" and sparkline([0.0]) == ""


def test_titles_are_short() -> None:
    assert title_of("word " * 100).endswith("…") and len(title_of("x" * 100)) <= 61
    assert title_of("", (Attachment("a.txt", ""),)) == "a.txt"


def test_the_clipboard_sequence_is_wrapped_for_tmux() -> None:
    assert osc52("hi", in_tmux=False) == "\x1b]52;c;aGk=\a"
    wrapped = "\x1bPtmux;\x1b\x1b]52;c;aGk=\a\x1b\\"
    assert osc52("hi", in_tmux=True) == f"\x1b]52;c;aGk=\a{wrapped}"


def test_errors_of_files_are_shown_without_control_characters() -> None:
    error = InvalidModelError("bad\x1b[31m", path="x")
    block = blocks_of(Node(1, None, "assistant", "", details={"error": str(error)}), "")[0]
    assert "\x1b" not in block.text
