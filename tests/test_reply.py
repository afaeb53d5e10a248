"""What a reader sees of token ids: stop strings, reasoning, and control tokens that stay hidden."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeinfer.errors import InvalidRequestError
from edgeinfer.text.chat import ChatTemplate
from edgeinfer.text.reply import (
    THINK,
    AnswerText,
    Piece,
    ReasoningSplitter,
    StopFinder,
    Tags,
    opened_tags,
    reasoning_tags,
)
from edgeinfer.text.tokenizer import Tokenizer
from edgeinfer.text.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED

from .models_for_tests import metadata_of

MISTRAL = Tags("[THINK]", "[/THINK]")
# Tokens after the 256 bytes: (spelling, type).
SPECIALS = [
    ("<|im_end|>", CONTROL),
    ("<|im_start|>", CONTROL),
    ("[THINK]", CONTROL),
    ("[/THINK]", CONTROL),
    ("<think>", CONTROL),
    ("</think>", CONTROL),
    ("<mark>", USER_DEFINED),
    ("<unused>", UNUSED),
]
ID = {text: 256 + i for i, (text, _) in enumerate(SPECIALS)}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    spelled = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}
    meta = metadata_of(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": [spelled[b] for b in range(256)] + list(ID),
            "tokenizer.ggml.token_type": [NORMAL] * 256 + [kind for _, kind in SPECIALS],
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.eos_token_id": ID["<|im_end|>"],
        }
    )
    return Tokenizer.from_metadata(meta)


def read(
    tokenizer: Tokenizer,
    text: str,
    *stops: str,
    splitter: ReasoningSplitter | None = None,
    last: int | None = None,
) -> AnswerText:
    """An answer whose tokens are those of `text`, in which control tokens are spelled."""
    answer = AnswerText.open(tokenizer, stops, splitter)
    shown, reasoning = "", ""
    tokens = tokenizer.encode(text, bos=False, parse_special=True)
    for delta in (
        d for deltas in [*_until_stop(answer, tokens), answer.flush(last)] for d in deltas
    ):
        shown += delta.text
        reasoning += delta.reasoning
    assert (shown, reasoning) == (answer.text, answer.reasoning)
    return answer


def _until_stop(answer: AnswerText, tokens: Sequence[int]) -> Any:
    for token in tokens:
        yield answer.push(token)
        if answer.stop is not None:
            return


# -- stop strings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one<|im_start|>two", "<|im_start|>", "one"),
        ("one<|im_start|>\nfoo two", "<|im_start|>\nfoo", "one"),
        ("one two<|im_start|>", "two<|im_start|>", "one "),
        ("a<|im_start|>[THINK]b", "<|im_start|>[THINK]", "a"),
        ("one<|im_start|><|im_start|>x", "<|im_start|>x", "one"),
        ("one<mark>two", "<mark>", "one"),
        ("a<|im_start|>b stop", "stop", "ab "),
    ],
)
def test_a_stop_string_matches_a_control_token(
    tokenizer: Tokenizer, text: str, stop: str, shown: str
) -> None:
    answer = read(tokenizer, text, stop)
    assert (answer.text, answer.stop) == (shown, stop)


def test_a_stop_string_matches_any_token_that_is_not_shown(tokenizer: Tokenizer) -> None:
    answer = AnswerText.open(tokenizer, ("b<unused>",), None)
    for token in (ord("a"), ord("b"), ID["<unused>"]):
        answer.push(token)
    assert (answer.text, answer.stop) == ("a", "b<unused>")


@pytest.mark.parametrize("text", ["one<|im_start|>two", "one<|im_start|>\nfoo two"])
def test_the_same_spelling_as_text_matches_too(tokenizer: Tokenizer, text: str) -> None:
    stop = text[3 : text.index("two")].rstrip(" ")
    answer = AnswerText.open(tokenizer, (stop,), None)
    for token in tokenizer.encode(text, bos=False):
        answer.push(token)
        if answer.stop:
            break
    assert (answer.text, answer.stop) == ("one", stop)


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("ab<|im_start|>cd", "bc"),  # what a hidden token separates is not adjacent
        ("a<|im_start|>b", "im"),  # nor is a part of its spelling there
        ("a<|im_start|>b", "|>b"),
        ("a<|im_start|>b", "a<"),
        ("a<|im_start|>", "<|im_start|>x"),
    ],
)
def test_a_control_token_matches_whole_or_not_at_all(
    tokenizer: Tokenizer, text: str, stop: str
) -> None:
    answer = read(tokenizer, text, stop)
    assert (answer.text, answer.stop) == (text.replace("<|im_start|>", ""), None)


def test_the_token_that_ends_an_answer_may_complete_a_stop_string(tokenizer: Tokenizer) -> None:
    answer = read(tokenizer, "one two", "two<|im_end|>", last=ID["<|im_end|>"])
    assert (answer.text, answer.stop) == ("one ", "two<|im_end|>")
    answer = read(tokenizer, "one two", "two<|im_end|>x", last=ID["<|im_end|>"])
    assert (answer.text, answer.stop) == ("one two", None)


def test_a_hidden_token_does_not_break_a_character(tokenizer: Tokenizer) -> None:
    first, *rest = "€".encode()
    answer = AnswerText.open(tokenizer, ("x",), None)
    for token in (first, ID["<|im_start|>"], *rest):
        answer.push(token)
    answer.flush()
    assert answer.text == "€"


# A small alphabet: texts, and the control tokens <c> and <>, which look like text.
_PIECES = st.one_of(
    st.text("ab<>c", max_size=5).map(Piece),
    st.sampled_from([Piece("<c>", is_control=True), Piece("<>", is_control=True)]),
)


def find_stop(pieces: list[Piece], stops: list[str]) -> tuple[str, str | None]:
    """By definition: symbols one by one, a control token being one."""
    symbols = [
        symbol
        for piece in pieces
        for symbol in ([piece] if piece.is_control else [Piece(c) for c in piece.text])
    ]
    for end in range(len(symbols) + 1):
        starts = [
            (start, stop)
            for start in range(end)
            for stop in stops
            if "".join(symbol.text for symbol in symbols[start:end]) == stop
        ]
        if starts:
            start, stop = min(starts)
            return _shown(symbols[:start]), stop
    return _shown(symbols), None


def _shown(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces if not piece.is_control)


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(_PIECES, max_size=8),
    stops=st.lists(st.text("ab<>c", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_stop_does_not_depend_on_where_text_is_cut(pieces: list[Piece], stops: list[str]) -> None:
    finder, shown, found = StopFinder(stops), "", None
    for n, piece in enumerate(pieces, 1):
        emitted, found = finder.push(piece)
        shown += _shown(emitted)
        if found:
            break
        assert len(_shown(pieces[:n])) - len(shown) < max(map(len, stops))
    assert (shown + _shown(finder.flush()), found) == find_stop(pieces, stops)


def test_stop_split_over_tokens() -> None:
    finder = StopFinder(["</s>", "User:"])

    def push(text: str) -> tuple[str, str | None]:
        pieces, found = finder.push(Piece(text))
        return _shown(pieces), found

    assert push("Hi <") == ("Hi ", None)
    assert push("/") == ("", None)
    assert push("b> Us") == ("</b> ", None)
    assert push("er: no") == ("", "User:")
    assert StopFinder([]).push(Piece("<")) == ([Piece("<")], None)
    with pytest.raises(InvalidRequestError):
        StopFinder([""])


def test_many_stop_strings_cost_a_token_no_more_than_few() -> None:
    """Each was looked for by itself: 0.18 s a token with 100,000, which a request may have."""
    stops = [f"<{i}>" for i in range(100_000)] + ["a" * n + "b" for n in range(1, 300)]
    finder, begun = StopFinder(stops), time.thread_time()
    for i in range(100):
        assert finder.push(Piece(f" a<{i}"))[1] is None
    pieces, found = finder.push(Piece("9999>"))
    assert (_shown(pieces), found) == ("<999999>", None) and time.thread_time() - begun < 5
    assert finder.push(Piece("aaaaab")) == ([], "aaaaab")
    assert finder.push(Piece("<7>>")) == ([], "<7>")


# -- reasoning -----------------------------------------------------------------------------------


def split(parts: list[Piece], opened: Tags | None = None) -> tuple[str, str]:
    splitter = ReasoningSplitter((THINK, MISTRAL), opened)
    pairs = [splitter.push(part) for part in parts] + [splitter.flush()]
    return "".join(r for r, _ in pairs), "".join(t for _, t in pairs)


REPLIES = [
    ("<think>\nfirst\n</think>\n\nthen", None, ("first", "then")),
    ("first</think>then", THINK, ("first", "then")),
    ("<think>first</think>then", THINK, ("first", "then")),
    ("plain <think>not</think>", None, ("", "plain <think>not</think>")),
    ("\n <thin air", None, ("", "\n <thin air")),
    ("<think>never ends </thin", None, ("never ends </thin", "")),
    ("never ends", THINK, ("never ends", "")),
    ("<think>\n\n</think>\n\nthen", None, ("", "then")),
    ("<think>a\n\nb </ c</think>d </think> e", None, ("a\n\nb </ c", "d </think> e")),
    ("", None, ("", "")),
    ("<thi", None, ("", "<thi")),
    ("[THINK]first[/THINK]then", None, ("first", "then")),
    ("[THINK]a</think>b[/THINK]then", None, ("a</think>b", "then")),
    ("first[/THINK]then", MISTRAL, ("first", "then")),
    ("[THOUGHT]", None, ("", "[THOUGHT]")),
]


@pytest.mark.parametrize(("reply", "opened", "expected"), REPLIES)
def test_reasoning_is_split_wherever_text_is_cut(
    reply: str, opened: Tags | None, expected: tuple[str, str]
) -> None:
    assert split([Piece(reply)], opened) == expected
    assert split(list(map(Piece, reply)), opened) == expected
    for at in range(len(reply)):
        assert split([Piece(reply[:at]), Piece(reply[at:])], opened) == expected


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "shown"),
    [
        ("<think>\na b\n</think>\n\nc", None, "a b", "c"),
        ("[THINK]a[/THINK]b", None, "a", "b"),
        ("\n<think>a</think>b", None, "a", "b"),
        ("a </think> b", THINK, "a", "b"),
        ("</think>b", THINK, "", "b"),
        ("a[/THINK] b", MISTRAL, "a", "b"),
        ("one [THINK]a[/THINK] two", None, "a", "one two"),  # it can't be meant as text
        ("[THINK]a[/THINK]b[THINK]c[/THINK]d", None, "ac", "bd"),
        ("[THINK]a<|im_start|>b[/THINK]c", None, "ab", "c"),
        ("<|im_start|>[THINK]a[/THINK]<|im_start|> b", None, "a", "b"),
        ("[THINK]a", None, "a", ""),
        ("a</think>b", None, "", "ab"),
    ],
)
def test_reasoning_tags_may_be_control_tokens(
    tokenizer: Tokenizer, text: str, opened: Tags | None, reasoning: str, shown: str
) -> None:
    splitter = ReasoningSplitter(reasoning_tags("", tokenizer), opened)
    answer = read(tokenizer, text, splitter=splitter)
    assert (answer.reasoning, answer.text) == (reasoning, shown)


def test_a_tag_in_text_does_not_go_on_behind_a_control_token() -> None:
    hidden = Piece("<c>", is_control=True)
    assert split([Piece("<th"), hidden, Piece("ink>a")]) == ("", "<think>a")
    assert split([Piece("<think>a</th"), hidden, Piece("ink>b")]) == ("a</think>b", "")


_PARTS = st.one_of(
    st.sampled_from(["<think>", "</think>", "[THINK]", "<th", "ink>", "</th", "a", " ", "\n"]).map(
        Piece
    ),
    st.sampled_from(["<think>", "</think>", "[THINK]", "[/THINK]", "<c>"]).map(
        lambda text: Piece(text, is_control=True)
    ),
)


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(_PARTS, max_size=8), opened=st.sampled_from([None, THINK, MISTRAL]))
def test_reasoning_does_not_depend_on_where_text_is_cut(
    parts: list[Piece], opened: Tags | None
) -> None:
    joined: list[Piece] = []
    for part in parts:
        if joined and not joined[-1].is_control and not part.is_control:
            joined[-1] = Piece(joined[-1].text + part.text)
        else:
            joined.append(part)
    characters = [
        piece for part in parts for piece in ([part] if part.is_control else map(Piece, part.text))
    ]
    found = split(parts, opened)
    assert found == split(joined, opened) == split(characters, opened)
    # Nothing is lost but tags and the space beside them.
    n_letters = sum(part.text.count("a") for part in parts if not part.is_control)
    assert "".join(found).count("a") == n_letters


def test_reasoning_streams() -> None:
    splitter = ReasoningSplitter()
    assert splitter.push(Piece("<think>one two")) == ("one two", "")
    assert splitter.push(Piece(" three</")) == (" three", "")
    assert splitter.push(Piece("think>\nfour")) == ("", "four")
    assert splitter.push(Piece(" five")) == ("", " five")


def test_tags_are_those_that_the_model_names(tokenizer: Tokenizer) -> None:
    assert reasoning_tags("", tokenizer) == (THINK, MISTRAL)
    assert Tags("<thought>", "</thought>") in reasoning_tags("x.split('</thought>')", tokenizer)


def test_prompt_that_opens_reasoning(data_file: Callable[[str], Path]) -> None:
    source = data_file("templates/deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja").read_text()
    prompt = ChatTemplate(source).render([{"role": "user", "content": "Hi"}])
    assert bool(opened_tags(prompt)) == prompt.rstrip().endswith("<think>")
    assert opened_tags("<|Assistant|><think>\n") == THINK
    assert opened_tags("x <think> y") is None
    assert opened_tags("[INST]x[/INST][THINK]", (THINK, MISTRAL)) == MISTRAL


def test_reasoning_and_stop_are_found_in_the_same_text(tokenizer: Tokenizer) -> None:
    text = "<think>ab c</think>\n\ndone STO"
    answer = read(tokenizer, text, "STOP", splitter=ReasoningSplitter())
    assert (answer.reasoning, answer.text, answer.stop) == ("ab c", "done STO", None)
    answer = read(tokenizer, text, "</think>", splitter=ReasoningSplitter())
    assert (answer.reasoning, answer.text, answer.stop) == ("ab c", "", "</think>")
