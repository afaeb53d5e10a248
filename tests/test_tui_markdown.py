"""Markdown as models write it: everything but the markup itself is seen."""

from __future__ import annotations

import html
import re
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgeinfer.tui.entries import RunningEntry, blocks_of
from edgeinfer.tui.look import Look
from edgeinfer.tui.palette import DARK, Palette
from edgeinfer.tui.splitter import split
from edgeinfer.tui.store import Node

LOOK = Look(Palette.of(DARK))


def drawn(text: str, width: int = 76) -> str:
    """The rows of an answer, as the terminal shows them."""
    rows = [
        row for block in blocks_of(Node(1, None, "assistant", text), "")
        for row in block.draw(LOOK, width)
    ]  # fmt: skip
    lines = ["".join(s.text for s in row.segments)[2:].rstrip() for row in rows]
    return "\n".join(lines).strip("\n")


def copied(text: str) -> str:
    blocks = blocks_of(Node(1, None, "assistant", text), "")
    parts = []
    for block in blocks:
        block.draw(LOOK, 40)
        parts.append(block.copied(0, len(block.shown)))
    return "\n\n".join(parts)


@pytest.mark.parametrize(
    "text",
    [
        r"The roots are \[ x_1 = \frac{-b \pm \sqrt{b^2}}{2*a*c} \] as \(a_1*b*c\) says.",
        "\\[\na\n=\n- b_1 * c * d\n\\]", "$$\nx &= 1 \\\\\n\n\\end $$".replace("\n\n", "\n"),
        "\\begin{align*}\nx &= *y* \\\\\n- 1 &= 2\n\\end{align*}", r"$a_1*b_1*c$ and $$x*y*z$$.",
        r"\\server\share C:\\temp a\\b", r"\{1, 2\} \% \& \, \; \alpha \text{x}", "\\( open",
        "It costs $5 and $6, or *not*.".replace("*", ""), "roses are red\nviolets are blue\n  end",
        "https://x.y/_a_/*b*?q=~~c~~#d_e", "[1]: http://defined.example/a", "line\n---\nunder",
        "<think>", "</think>", "<div class='a'>*</div>".replace("*", ""), "a <br> b", "a < b > c",
        "1) one", "3. three", "* star".replace("*", "•"), "AT&T &c; x&y", "| not | a table |",
        "a\n===\nb",
    ],
)  # fmt: skip
def test_what_is_no_markup_is_shown_as_written(text: str) -> None:
    shown = "\n".join(line.strip() for line in text.split("\n"))
    found = re.sub("─+", "---", drawn(text, 200))
    assert found == text or found.replace("\n\n", "\n") == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (r"\*not\* \_emphasis\_ \# 1\. \`x\` \$5", "*not* _emphasis_ # 1. `x` $5"),
        ("![a cat](http://x.y/cat.png)", "a cat (http://x.y/cat.png)"),
        ("![](http://x.y/cat.png)", "http://x.y/cat.png"),
        ('[here](http://x.y/ä_b_c "Title")', 'here (http://x.y/ä_b_c "Title")'),
        ("<http://x.y/a_b_>", "http://x.y/a_b_"),
        ("[http://x.y](http://x.y)", "http://x.y"),
        ("[![alt](i.png)](http://x.y)", "alt (i.png) (http://x.y)"),
        ("**https://x.y/a_(b)**, (https://x.y/c).", "https://x.y/a_(b), (https://x.y/c)."),
        ("a  \nb\\\nc\nd", "a\nb\nc\nd"),
        ("> one\n> two", "▌ one\n▌ two"),
        ("- a\n  - b\n\n    c\n- [ ] d", "• a\n  • b\n\n    c\n• [ ] d"),
        ("7. a\n8. b\n   - c", "7. a\n8. b\n   • c"),
        ("- ", "•"),
        ("x &lt;b&gt; &amp; y", "x <b> & y"),
        ("| a | b |\n|---|--:|\n| x<br>y | 10 |", "a    b\n──────\nx   10\ny"),
        ("~~gone~~ **bold** *it* `co*de*`", "gone bold it co*de*"),
    ],
)
def test_markup_is_drawn(text: str, shown: str) -> None:
    assert drawn(text) == shown


def test_a_table_that_the_parser_would_cut_is_shown_whole() -> None:
    text = "| a | b |\n|---|---|\n| 1 | 2 | three | four |"
    assert "three" in drawn(text) and "four" in drawn(text)
    many = "|" + "column |" * 30 + "\n|" + "---|" * 30 + "\n|" + "value |" * 30
    assert drawn(many, 40).replace("\n", "").count("value") == 30
    deep = ">" * 150 + " far down"
    assert "far down" in drawn(deep)


@pytest.mark.parametrize("fence", ["```", "~~~", "````"])
def test_code_is_shown_and_copied_as_written(fence: str) -> None:
    code = "def f():\n\treturn r'\\[*x*]'  # `a` $b$ <br>\n\n\n    x"
    text = f"Look:\n{fence}python title=a.py\n{code}\n{fence}\nDone"
    found = drawn(text)
    assert "title=a.py" in found and "r'\\[*x*]'  # `a` $b$ <br>" in found
    assert copied(text) == f"Look:\n\n{code}\n\nDone"
    assert code in copied(f"{fence}\n{code}")
    plain = code.expandtabs(4)
    nested = "\n".join(f"  {line}" if line else "" for line in plain.split("\n"))
    assert plain in copied(f"- item\n\n  {fence}py\n{nested}\n  {fence}\n")


def test_what_streams_in_is_never_hidden_for_long() -> None:
    """At every moment the words so far are seen, an unfinished fence or formula included."""
    text = "A \\[ x_1\n= y \\] and\n```py\ncode = 1\n```\n\n| a | b |\n|--|--|\n| c |\n\n- end **bo"
    running = RunningEntry(1)
    for i, char in enumerate(text, 1):
        running.push(char, "", 0.0)
        rows = [row for block in running.blocks for row in block.draw(LOOK, 60)]
        seen = Counter(c for row in rows for s in row.segments for c in s.text if c.isalnum())
        assert not Counter(c for c in text[:i] if c.isalnum()) - seen, text[:i]


ATOMS = st.sampled_from(
    "word Ünï 漢字 * ** _ ` `` ``` ~~~ [ ]( ) ![ < > \\ \\[ \\] \\( \\) $ $$ $5 &amp; & http://x.y/_z_"
    ' <br> <b> ~~ --- === \\begin{a} \\end{a} = : ! ^ é 🎉 "t"'.split()
    + [" ", "  ", "\n", "\n\n", "\n    ", "\t", "# ", "- ", "1. ", "12) ", "> ", "| ", "[a]: b"]
    + ["|\n|---|---|\n"]
)
SOURCES = st.lists(ATOMS, max_size=25).map("".join)
# All that may be consumed: what marks text up, and is no letter or digit.
MARKUP = set("*_`~#-+>|[]()<!\"'=\\:$.&;")


def unseen(text: str) -> Counter[str]:
    """The characters of a source that its drawing does not show."""
    source = html.unescape(re.sub("<br>", "", text))
    shown = Counter(c for c in drawn(text, 50) if not c.isspace())
    return Counter(c for c in source if not c.isspace()) - shown


@settings(max_examples=150, deadline=None)
@given(SOURCES)
@example("| a | b |\n|---|---|\n| c | d | e |")
def test_every_character_is_seen_but_markup(text: str) -> None:
    assert set(unseen(text)) <= MARKUP, text


@settings(max_examples=80, deadline=None)
@given(SOURCES)
def test_pieces_hold_every_line(text: str) -> None:
    pieces = "".join(piece.text + piece.language for piece in split(text))
    lost = Counter(c for c in text if c.isalnum()) - Counter(c for c in pieces if c.isalnum())
    assert not lost


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None)
@given(SOURCES)
def test_every_character_is_seen_but_markup_at_length(text: str) -> None:
    assert set(unseen(text)) <= MARKUP, text
