"""What the mouse selects is seen, and what is seen is what is copied."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from textual.geometry import Offset

from edgeinfer.tui.blocks import Block
from edgeinfer.tui.entries import blocks_of
from edgeinfer.tui.look import Look
from edgeinfer.tui.palette import DARK, Palette
from edgeinfer.tui.rows import clusters, wrapped
from edgeinfer.tui.store import Node
from tests.test_tui_chat import Chat, drive
from tests.tui_engine import Script, ScriptedModel

LOOK = Look(Palette.of(DARK))
LONG = "https://example.org/" + "a_long/path/" * 14 + "end?q=1&r=[2]"
CODE = "def f(x):\n\treturn {  # " + "a comment that is wider than the screen " * 4 + "\n\n    }"
WIDE = "你好，世界。这是一个很长的句子，会换行的。" * 4 + "Latin 한국어 👨‍👩‍👧 é👍🏽 end"  # noqa: RUF001
TEXT = (
    f"First **words** of\nan answer.\n\n{WIDE}\n\n- item one\n- item two is long {'word ' * 30}\n\n"
    f"See {LONG} there.\n\n```py\n{CODE}\n```\n\n| a | b |\n|---|---|\n| 1 | x y |\n"
)


def place(chat: Chat, text: str, *, last: bool = False) -> Offset:
    """The cell in the transcript of the first or last character of a text on the screen."""
    top = chat.app.transcript.region.y
    for y, line in enumerate(chat.screen_text.split("\n")):
        if y >= top and text in line:
            start = line.index(text)
            cell = cell_len(line[: start + len(text)]) - 1 if last else cell_len(line[:start])
            return Offset(cell, y - top)
    raise AssertionError(f"{text!r} is not on the screen:\n{chat.screen_text}")


def marked(chat: Chat) -> str:
    """The text on the screen that has the ground of a selection."""
    style = chat.app.screen.get_component_rich_style("screen--selection")
    found = []
    for strip in chat.app.screen._compositor.render_strips(chat.app.size):
        runs = [s for s in strip if s.style and s.style.bgcolor == style.bgcolor]
        assert all(run.style.color != style.bgcolor for run in runs), "it hides the text"
        row = [run.text for run in runs]
        found.append("".join(row))
    return "\n".join(row for row in found if row)


async def drag(chat: Chat, start: Offset, *stops: Offset) -> None:
    transcript = chat.app.transcript
    await chat.pilot.mouse_down(transcript, offset=start)
    for stop in stops:
        await chat.pilot.hover(transcript, offset=stop)
    await chat.settle()


def copied(chat: Chat) -> str:
    return chat.app.screen.get_selected_text() or ""


def answered(
    body: Callable[[Chat], Awaitable[None]],
    text: str = TEXT,
    size: tuple[int, int] = (70, 60),
) -> None:
    async def run(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("my question")
        await body(chat)

    drive(run, ScriptedModel([Script(text)]), size=size)


def test_a_selection_is_seen_while_it_is_dragged_and_after() -> None:
    async def body(chat: Chat) -> None:
        await drag(chat, place(chat, "words"), place(chat, "words", last=True))
        assert marked(chat) == copied(chat) == "words"
        end = place(chat, "an answer", last=True)
        await chat.pilot.hover(chat.app.transcript, offset=end)
        await chat.settle()
        assert marked(chat) == copied(chat) == "words of\nan answer"
        await chat.pilot.mouse_up(chat.app.transcript, offset=end)
        await chat.settle()
        assert marked(chat) == "words of\nan answer"
        await chat.press("ctrl+c")
        await chat.settle()
        assert chat.app.clipboard == "words of\nan answer" and marked(chat) == ""

    answered(body)


def test_a_selection_across_blocks_is_what_was_written() -> None:
    async def body(chat: Chat) -> None:
        # From the last line upwards, past both ends of the text.
        end = place(chat, "x y", last=True)
        start = place(chat, "my question") - (3, 0)
        await drag(chat, end + (20, 0), start)
        text = copied(chat)
        assert text == (
            f"my question\n\nFirst words of\nan answer.\n\n{WIDE}\n\n- item one\n"
            f"- item two is long {'word ' * 30}".rstrip()
            + f"\n\nSee {LONG} there.\n\n{CODE}\n\na\tb\n1\tx y"
        )
        shown = marked(chat)
        for part in ("my question", "item one", "def f(x):", "x y"):
            assert part in shown
        assert "copy" not in shown and "tok/s" not in shown and "▌" not in shown

    answered(body)


@pytest.mark.parametrize("text", ["世界", "👨‍👩‍👧", "é👍🏽 end"])  # noqa: RUF001
def test_wide_and_joined_characters_are_taken_whole(text: str) -> None:
    async def body(chat: Chat) -> None:
        start, end = place(chat, text), place(chat, text, last=True)
        await drag(chat, start, end)
        assert marked(chat) == copied(chat) == text
        wide = start + (1, 0)  # the second half of the first character, where it has one
        await drag(chat, wide if cell_len(text[0]) == 2 else start, end)
        assert marked(chat) == copied(chat) == text

    answered(body)


@pytest.mark.parametrize(
    ("at", "clicks", "text"),
    [
        ("example.org", 2, LONG), ("answer.", 2, "answer"),
        ("item two", 3, f"- item two is long {'word ' * 30}"),
        ("example.org", 3, f"See {LONG} there."), ("return", 3, CODE.split("\n")[1]),
    ],
)  # fmt: skip
def test_two_clicks_take_a_word_and_three_a_line(at: str, clicks: int, text: str) -> None:
    async def body(chat: Chat) -> None:
        await chat.pilot.click(chat.app.transcript, offset=place(chat, at), times=clicks)
        await chat.settle()
        assert copied(chat) == text.rstrip() or copied(chat) == text
        assert marked(chat)

    answered(body)


def test_a_selection_scrolls_on_and_stays_on_its_text() -> None:
    text = "\n\n".join(f"paragraph number {i}" for i in range(60))

    async def body(chat: Chat) -> None:
        transcript = chat.app.transcript
        bottom = place(chat, "number 59", last=True)
        await drag(chat, bottom, Offset(bottom.x, -2))
        await chat.until(lambda: "paragraph number 20\n" in copied(chat))
        await chat.pilot.mouse_up(transcript, offset=(bottom.x, 0))
        await chat.settle()
        found = copied(chat)
        assert found.endswith("number 58\n\nparagraph number 59")
        for size in ((40, 20), (100, 30)):
            await chat.pilot.resize_terminal(*size)
            await chat.settle()
            assert copied(chat) == found
        transcript.scroll_home(animate=False)
        await chat.settle()
        assert copied(chat) == found and "number 0 " in chat.screen_text

    answered(body, text, size=(60, 20))


def test_a_selection_stays_while_the_answer_goes_on() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.send("my question")
        await chat.until(lambda: "word" in chat.shown)
        await drag(chat, place(chat, "question"), place(chat, "question", last=True))
        await chat.pilot.mouse_up(chat.app.transcript, offset=place(chat, "question", last=True))
        top = chat.app.transcript.scroll_offset.y
        n = len(chat.shown)
        await chat.until(lambda: len(chat.shown) > n + 200)
        assert marked(chat) == copied(chat) == "question"
        assert chat.app.transcript.scroll_offset.y == top
        await chat.press("escape")
        await chat.settle()
        assert not copied(chat)

    drive(body, ScriptedModel([Script("word\n\n" * 3 + "word " * 900, seconds=0.01)]))


# -- properties ----------------------------------------------------------------------------------

PIECES = st.sampled_from(
    ["word", " ", "  ", "\n", "\t", "漢字", "。", "é", "👨‍👩‍👧", "한", "x" * 30, "*", "`", "_",  # noqa: RUF001
     "- ", "1. ", "\n\n", "\n> ", "| a | b |\n|--|--|\n| c |\n",
     "https://x.y/_z_", "\\[", "$", "🇩🇪"]
)  # fmt: skip
SOURCES = st.lists(PIECES, max_size=30).map("".join)


@settings(max_examples=80, deadline=None)
@given(SOURCES, st.sampled_from(["user", "code", "text", "failure"]), st.integers(6, 60))
def test_every_cell_of_a_block_shows_the_text_it_points_at(
    source: str, kind: str, width: int
) -> None:
    block = Block(kind, source, 1)  # type: ignore[arg-type]
    for row in block.draw(LOOK, width):
        line = "".join(segment.text for segment in row.segments)
        for at, start, end in row.spans:
            part = block.shown[start:end]
            before = next(i for i in range(len(line) + 1) if cell_len(line[:i]) >= at)
            drawn = line[before : before + len(part)]
            # A bullet stands for the mark that was written, beside the numbers of other lists.
            assert drawn == part or re.fullmatch(r"([\s*+-]|\d+[.)])*", part)
    if kind != "text":
        assert block.copied(0, len(block.shown)) == source
        points = [span for row in block.rows or [] for span in row.spans]
        unseen = set(range(len(block.shown))) - {i for _, s, e in points for i in range(s, e)}
        assert all(block.shown[i].isspace() for i in unseen)


@settings(max_examples=80, deadline=None)
@given(SOURCES.filter(lambda text: "\n" not in text), st.integers(2, 40))
def test_wrapping_loses_no_character_and_cuts_no_cluster(text: str, width: int) -> None:
    rows, at = wrapped(text, width), 0
    edges = {0, *(end for _, end in clusters(text))}
    for start, end in rows:
        assert not text[at:start].strip() and (start in edges or not text[start:].strip())
        assert cell_len(text[start:end].expandtabs(4)) <= width or "\t" in text
        at = end
    assert not text[at:].strip()


def test_a_message_is_copied_the_same_however_wide_the_screen_is() -> None:
    node = Node(1, None, "assistant", TEXT, reasoning="a\n\tthought", details={"error": "b " * 60})
    found = set()
    for width in (12, 30, 56, 96):
        parts = []
        for block in blocks_of(node, ""):
            block.is_folded = False
            block.draw(LOOK, width)
            parts.append(block.copied(0, len(block.shown)))
        found.add("\n".join(parts))
    assert len(found) == 1 and "a\n\tthought" in found.pop()
