"""Grammars and schemas that llguidance would not survive, or would not keep to."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeinfer.constraining import Grammars
from edgeinfer.errors import InvalidRequestError
from edgeinfer.text.grammar import MOST_TEXT, Grammar
from edgeinfer.text.pattern_size import n_counted, patterns_of
from edgeinfer.text.tokenizer import Tokenizer

from .test_grammar import accepts, allowed
from .test_grammar import tiny as tiny

ROOT = Path(__file__).resolve().parent.parent


def chain(n: int, rule: str, last: str) -> str:
    return "\n".join([rule.format(i, i + 1) for i in range(n)] + [last.format(n)])


@pytest.mark.parametrize(
    "make",
    [
        'Grammar.of_text("start: a0\\n" + chain(9000, "a{}: a{}", "a{}: /x/"))',
        'Grammar.of_text("start: A0\\n" + chain(9000, "A{}: A{}", "A{}: /x/"))',
        'Grammar.of_text("root ::= a0\\n" + chain(7000, "a{} ::= a{}", "a{} ::= [x]"))',
        'Grammar.of_schema({"$ref": "#/$defs/d0", "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"}'
        ' if i < 3000 else {} for i in range(3001)}})',
    ],
)  # fmt: skip
def test_no_chain_of_rules_ends_the_process(make: str) -> None:
    """Each goes down a level of the stack: eight megabytes held 2,600 of them."""
    code = f"""
from edgeinfer.constraining import Grammars
from edgeinfer.text.grammar import Grammar
from tests.test_grammar_limits import chain
from tests.test_tokenizer import byte_pair, tokenizer_of
print(Grammars().compile({make}, tokenizer_of(byte_pair())).begin().is_ended)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == "False\n", done.stderr[-500:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.of_regex("a?" * 60_000), "repetitions"),
        (lambda: Grammar.of_regex("((a{100}){100}){100}"), "counts in its patterns"),
        (lambda: Grammar.of_regex("a{1000000}"), "counts in its patterns to some 999,999"),
        (lambda: Grammar.of_text("start: /" + "a?" * 60_000 + "/"), "repetitions"),
        (lambda: Grammar.of_schema({"type": "string", "pattern": "a*" * 60_000}), "repetitions"),
        (lambda: Grammar.of_schema({"properties": {"a": {"multipleOf": 99_999_989}}}),
         r"'multipleOf' at \$.properties.a"),
        (lambda: Grammar.of_schema({"multipleOf": 10**400 + 1}), "'multipleOf' at"),
        (lambda: Grammar.of_schema({"items": {"minLength": 4000}}), r"'minLength' at \$.items"),
        (lambda: Grammar.of_schema({"type": "integer", "minimum": 2**53 + 1}), "'minimum' at"),
        (lambda: Grammar.of_schema({"items": {"maximum": -(10**400)}}), r"'maximum' at \$.items"),
    ],
)  # fmt: skip
def test_what_takes_without_end_is_refused(make: Callable[[], Grammar], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        make()


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar.of_text('start: A{1000}\nA: B{30}\nB: "x"'),
        Grammar.of_schema({"const": "x" * 30_000}),
    ],
    ids=range(2),
)  # fmt: skip
def test_what_repeats_without_end_is_not_kept(tiny: Tokenizer, grammar: Grammar) -> None:
    """Its first step took up to 230 MB, and each one seconds, in which nobody else went on."""
    with pytest.raises(InvalidRequestError, match=f"{grammar.param} can't be (used|kept to): "):
        Grammars().compile(grammar, tiny)


def test_what_must_follow_has_an_end_behind_a_choice_too(tiny: Tokenizer) -> None:
    many = Grammar.of_text('start: /[ab]/ A{1000}\nA: B{30}\nB: "x"')
    for looks_first in (False, True):
        matcher = Grammars().compile(many, tiny).begin()
        (found,) = allowed(matcher, tiny.n_vocab)
        matcher.advance(min(found))
        with pytest.raises(InvalidRequestError, match="can't be kept to: 30,000 tokens in a row"):
            matcher.forced(1) if looks_first else allowed(matcher, tiny.n_vocab)


def test_bounds_that_are_not_exact_are_narrowed(tiny: Tokenizer) -> None:
    """Numbers are read as 64 bits have them: of 2**53 + 1 there are two."""
    schema = {"type": "integer", "minimum": 2**53 - 2, "maximum": 2**63 - 1}
    grammar = Grammar.of_schema(schema)
    for number, is_right in ((2**53 - 3, False), (2**53 - 1, True), (2**53, True)):
        assert accepts(grammar, str(number), tiny) == is_right
    Grammar.of_schema({"type": "number", "multipleOf": 0.01, "minimum": -(10**30)})


def test_counts_are_whole_and_can_be_kept(tiny: Tokenizer) -> None:
    """JSON's 2.0 is 2; letters that are counted without end would take all states there may be."""
    text = Grammar.of_schema({"type": "string", "minLength": 2.0, "maxLength": 3.0})
    many = Grammar.of_schema({"type": "array", "items": {"const": 1}, "maxItems": 2.0})
    for grammar, value, is_right in (
        (text, "a", False), (text, "abc", True), (text, "abcd", False),
        (many, [1, 1], True), (many, [1, 1, 1], False),
        (Grammar.of_schema({"type": "string", "maxLength": 10**9}), "a" * 2999, True),
    ):  # fmt: skip
        assert accepts(grammar, json.dumps(value), tiny) == is_right


@pytest.mark.parametrize(
    ("pattern", "n"),
    [
        ("a", 0), (".*", 0), ("a{5}", 4), ("a{2,5}", 4), ("a{,5}", 4), ("a{3,}", 2), ("(ab){5}", 8),
        (".{5}", 36), ("[^a]{5}", 36), ("[a-z]{5}", 4), ("[a-zà]{5}", 36), ("é{5}", 8),
        (r"\w{5}", 240), (r"[\w.-]{5}", 240), (r"\p{Lu}{5}", 132), (r"\x{e9}{5}", 4), (r"\.{5}", 4),
        (r"\{{5}", 4), (r"\\{5}", 4), ("[]{5}]{5}", 4), ("[^]{5}]{5}", 36), (r"[\]a]{5}", 4),
        ("[a[b-c]d]{5}", 4), ("(?:ab){5}", 8), ("(?P<n>ab){5}", 8), ("(?<n>ab){5}", 8),
        ("(?i)a{5}", 4), ("(?i:a){5}", 4), ("(a{3}){3}", 8), ("(a|bc){3}", 6), ("a{2}b{3}", 3),
        ("a{b}", 0), ("{5}", 0), ("a)b{5}", 4), ("(a", 0), ("[a", 0), ("\\", 0), ("a{0}", 0),
        ("(.{100},){100}", 891 + 99 * 901),
    ],
)  # fmt: skip
def test_what_a_pattern_counts_is_known(pattern: str, n: int) -> None:
    assert n_counted(pattern) == n


COUNTING: list[tuple[str, bool]] = [
    (r".{0,9000}", False), (r".{0,3000}", True), (r"\w{0,700}", False), (r"\w{0,590}", True),
    (r"[^\n]{1,5000}", False), (r"[a-z]{0,9000}", True), (r"\d{5000}", False),
    (r"\p{L}{0,1300}", False), (r"([^,]{0,100},){0,100}", False), (r"([^,]{0,50},){0,50}", True),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "is_kept"), COUNTING)
def test_what_counts_too_far_is_refused_before_an_answer(pattern: str, is_kept: bool) -> None:
    """It ran out of states in the middle of one."""
    makers: list[tuple[str, Callable[[], Grammar]]] = [
        ("regex", lambda: Grammar.of_regex(pattern)),
        ("schema", lambda: Grammar.of_schema({"properties": {"a": {"pattern": f"^{pattern}$"}}})),
        ("grammar", lambda: Grammar.of_text(f'start: "/a" X "/"\nX: /{pattern}/')),
    ]
    for param, make in makers:
        if is_kept:
            make()
            continue
        with pytest.raises(InvalidRequestError, match="counts in its patterns to some") as error:
            make()
        assert error.value.param == param


@pytest.mark.parametrize("letter", ["a", "é"])
@pytest.mark.parametrize("pattern", [r".{0,3000}", r"\w{0,590}", r"\D{0,1800}", r"[^,]{0,3800}"])
def test_what_is_taken_is_kept_to_the_end(tiny: Tokenizer, pattern: str, letter: str) -> None:
    matcher = Grammars().compile(Grammar.of_regex(pattern), tiny).begin()
    tokens = tiny.encode_middle(letter) * 3800
    mask = np.zeros((1, -(-tiny.n_vocab // 32)), np.uint32)
    for token in tokens:
        matcher.fill(mask, [])
        if not mask[0][token >> 5] >> np.uint32(token & 31) & np.uint32(1):
            break
        matcher.advance(token)


def test_many_words_to_choose_from_count_nothing() -> None:
    Grammar.of_regex("|".join(f"word {i}" for i in range(12_000)))


@pytest.mark.parametrize("part", ["(", "[", "(?a", "a{9", "/", '"', "\\", "(a{9}", "[^]", "{,"])
def test_no_pattern_takes_long_to_look_at(part: str) -> None:
    pattern = part * (MOST_TEXT // len(part))
    begun = time.process_time()
    n_counted(pattern)
    assert len(list(patterns_of(pattern))) <= len(pattern)
    assert time.process_time() - begun < 10
    assert n_counted("a{" + "9" * 5000 + "}") == 0  # which is refused by what reads it
