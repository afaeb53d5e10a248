"""Parses Markdown as chat models write it: with formulas, bare addresses and lines that break.

Knows nothing of how it is drawn. What CommonMark would drop is kept: backslashes that escape no
markup, definitions of links, addresses as they are written.
"""

from __future__ import annotations

import re
from functools import cache

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.tree import SyntaxTreeNode

_INLINE_FORMULA = re.compile(
    r"\$\$(?:[^$\\]|\\.)+\$\$"
    r"|\$(?=[^\s$])(?:[^$\\\n]|\\.)*(?<=\S)\$(?![0-9$])"  # no dollars of a price list
    r"|\\\(.+?\\\)|\\\[.+?\\\]",
    re.DOTALL,
)
_OPENING = re.compile(r"\$\$|\\\[|\\begin\{(\w+\*?)\}")
_CLOSINGS = {"$$": "$$", "\\[": "\\]"}
_ESCAPABLE = frozenset("`*_#+-.>~|<$!")  # what can be markup; other backslashes are meant
_SCHEME = re.compile(r"(?:^|[^a-z0-9])(https?|ftp|file)$", re.IGNORECASE)
_ADDRESS = re.compile(r"://[^\s<>\"`|]+")
_DEEPEST = 100


def parse(text: str) -> SyntaxTreeNode:
    """The tree; `formula` and `formula_block` are node types of our own."""
    return SyntaxTreeNode(_parser().parse(text))


@cache
def _parser() -> MarkdownIt:
    # Tags are shown as they are written.
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": _DEEPEST})
    parser.enable(["strikethrough", "table"])
    # A line under a paragraph is a rule, and a definition is text: links to it may be elsewhere.
    parser.disable(["lheading", "reference"])
    parser.block.ruler.before(
        "table", "formula", _formula_block, {"alt": ["paragraph", "blockquote", "list"]}
    )
    parser.inline.ruler.before("escape", "formula", _formula)
    parser.inline.ruler.at("escape", _escape)
    parser.inline.ruler.before("escape", "address", _address)
    parser.normalizeLink = parser.normalizeLinkText = str  # type: ignore[method-assign,assignment]
    parser.validateLink = bool  # type: ignore[method-assign,assignment]
    return parser


def _formula_block(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """Lines from `$$`, `\\[` or `\\begin{…}` to what closes it."""
    line = state.src[state.bMarks[start] + state.tShift[start] : state.eMarks[start]]
    opening = None if state.is_code_block(start) else _OPENING.match(line)
    if opening is None:
        return False
    name = opening[1]
    closing = f"\\end{{{name}}}" if name else _CLOSINGS[opening[0]]
    rest = line[opening.end() :]
    last = start
    while closing not in rest:
        last += 1
        if last >= end or state.sCount[last] < state.blkIndent:
            return False
        rest = state.src[state.bMarks[last] : state.eMarks[last]]
    if rest.rpartition(closing)[2].strip(" .,;:"):
        return False  # a sentence goes on: the rule for formulas within lines has it
    if not silent:
        token = state.push("formula_block", "", 0)
        token.content = state.getLines(start, last + 1, state.blkIndent, False)
        state.line = last + 1
    return True


def _formula(state: StateInline, silent: bool) -> bool:
    found = None
    if state.src[state.pos] in "$\\":
        found = _INLINE_FORMULA.match(state.src, state.pos, state.posMax)
    if found is None:
        return False
    if not silent:
        state.push("formula", "", 0).content = found[0]
    state.pos = found.end()
    return True


def _escape(state: StateInline, silent: bool) -> bool:
    """A backslash goes where it keeps a character from being markup, or breaks the line."""
    at = state.pos
    if state.src[at] != "\\" or at + 1 >= state.posMax:
        return False
    char = state.src[at + 1]
    if char == "\n":
        state.pos += 1
        return True
    if not silent:
        state.pending += char if char in _ESCAPABLE else f"\\{char}"
    state.pos += 2
    return True


def _address(state: StateInline, silent: bool) -> bool:
    """A bare address is taken whole: underscores in it are no emphasis."""
    if state.src[state.pos] != ":" or state.linkLevel > 0:
        return False
    scheme = _SCHEME.search(state.pending)
    found = _ADDRESS.match(state.src, state.pos, state.posMax) if scheme else None
    if scheme is None or found is None:
        return False
    rest = found[0].rstrip("*_~.,;:!?'")
    while rest.endswith((")", "]")) and rest.count(rest[-1]) > rest.count("(["[rest[-1] == "]"]):
        rest = rest[:-1].rstrip("*_~.,;:!?'")
    if len(rest) < 4:
        return False
    if not silent:
        state.pending = state.pending[: -len(scheme[1])]
        state.push("address", "", 0).content = scheme[1] + rest
    state.pos += len(rest)
    return True
