"""Schemas, grammars and regexes as values, and which tokens of real vocabularies they allow."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NewType, TypedDict

import llguidance
import numpy as np
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeinfer.constraining import Grammars, after_reasoning, grammar_of
from edgeinfer.engine.constraint import Matcher
from edgeinfer.errors import EdgeInferError, InvalidRequestError
from edgeinfer.gguf import GGUFFile
from edgeinfer.sampling.params import mask_words
from edgeinfer.text.closed_schema import closed
from edgeinfer.text.grammar import MOST_TEXT, Grammar
from edgeinfer.text.grammar_matcher import _MOST_KEPT
from edgeinfer.text.reply import THINK
from edgeinfer.text.schema_ends import check_ends
from edgeinfer.text.tokenizer import Tokenizer

from .models_for_tests import tiny_model
from .test_tokenizer import byte_pair, tokenizer_of


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """256 bytes, a few merges, two control tokens."""
    return _tokenizer(tiny_model(tmp_path_factory.mktemp("grammar")))


def _tokenizer(path: Path) -> Tokenizer:
    with GGUFFile.open(path) as file:
        return Tokenizer.from_metadata(file.metadata)


# -- values ----------------------------------------------------------------------------------------


class Mood(Enum):
    GOOD = "good"
    BAD = "bad"


@dataclasses.dataclass
class Part:
    name: str
    size: float


@dataclasses.dataclass
class Thing:
    parts: list[Part]
    mood: Mood
    kind: Literal["a", "b"]
    note: str | None = None


class Row(TypedDict):
    x: int
    y: list[int]


class Node(pydantic.BaseModel):
    value: int
    children: list[Node] = []


@pydantic.dataclasses.dataclass
class Sized:
    n: int = pydantic.Field(ge=3, le=5)


def schema_in(grammar: Grammar) -> Any:
    return json.loads(grammar.text)["grammars"][0]["json_schema"]


@pytest.mark.parametrize("kind", [Thing, Row, Node, Sized, list[Part], dict[str, int]])
def test_types_are_schemas_without_other_keys(kind: Any) -> None:
    schema = schema_in(Grammar.of_schema(kind))
    objects = [each for each in walk(schema) if "properties" in each]
    assert all(each["additionalProperties"] is False for each in objects)
    assert objects or kind == dict[str, int]


def walk(schema: Any) -> Any:
    if isinstance(schema, dict):
        yield schema
    for each in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(each, (dict, list)):
            yield from walk(each)


def test_what_a_pydantic_dataclass_demands_is_kept() -> None:
    assert schema_in(Grammar.of_schema(Sized))["properties"]["n"]["maximum"] == 5


def test_types_of_every_make_are_schemas() -> None:
    """Also those of pydantic inside of what only msgspec knows, and of pydantic 1."""

    @dataclasses.dataclass
    class Holds:
        node: Node

    for kind in (list[Node], Node | None, Thing | Part, Holds, pydantic.TypeAdapter(Node)):
        schema = schema_in(Grammar.of_schema(kind))
        found = [each for each in walk(schema) if "properties" in each]
        assert found and all(each["additionalProperties"] is False for each in found)
    optional = [{"type": "integer"}, {"type": "null"}]
    assert schema_in(Grammar.of_schema(int | None))["anyOf"] == optional
    assert schema_in(Grammar.of_schema(NewType("Count", int)))["type"] == "integer"


class OfPydantic1:
    """What a model of pydantic 1 has."""

    __fields__ = {"a": "int"}

    @classmethod
    def schema(cls) -> Any:
        return {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize("kind", ["Minimum", "Maximum"])
def test_bounds_of_draft_4_are_out_where_a_flag_says_so(kind: str) -> None:
    bound, flag = kind.lower(), f"exclusive{kind}"
    numbers = [{bound: 3, flag: each} for each in (True, False)]
    schema = {"anyOf": numbers, "properties": {flag: {}}}
    found = schema_in(Grammar.of_schema(schema))
    assert found["anyOf"] == [{flag: 3}, {bound: 3}] and found["properties"] == {flag: {}}
    lone = {"properties": {"a": {"items": {"type": "number", flag: True}, bound: 3}}}
    said = rf"'{flag}': true at \$\.properties\.a\.items without '{bound}'"
    with pytest.raises(InvalidRequestError, match=said):
        Grammar.of_schema(lone)
    Grammar.of_schema(lone, lenient=True)
    # Older OpenAPI writes it beside every number; no bound is in.
    Grammar.of_schema({"type": "number", flag: False, "default": {flag: True}})


def test_a_long_schema_is_told_to_be_long() -> None:
    with pytest.raises(InvalidRequestError, match=r"^schema is 198,\d+ characters long; at most"):
        Grammar.of_schema({"enum": list(range(30_000))})


def test_a_model_of_pydantic_1_is_a_schema() -> None:
    schema = schema_in(Grammar.of_schema(OfPydantic1))
    assert schema["required"] == ["a"] and schema["additionalProperties"] is False


def test_a_class_without_a_schema_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequestError, match="no schema can be made"):
        Grammar.of_schema(random.Random)
    monkeypatch.delitem(sys.modules, "pydantic")
    with pytest.raises(InvalidRequestError, match="none that has one, as dataclasses have"):
        Grammar.of_schema(random.Random)


def test_a_schema_is_the_same_as_a_mapping_and_as_its_text() -> None:
    schema = {"type": "object", "properties": {"é": {"type": "integer"}}}
    assert Grammar.of_schema(schema) == Grammar.of_schema(json.dumps(schema))
    assert schema_in(Grammar.of_schema(True)) is True


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"a": {"items": {"contains": {}}}}}, r"'contains' at \$.properties.a.item"),
        ({"properties": {"not": {"not": {}}}}, r"'not' at \$.properties.not,"),
        ({"anyOf": [{}, {"uniqueItems": True}]}, r"'uniqueItems' at \$.anyOf\[1\]"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"if": {}}}}, r"'if' at \$.\$defs.a"),
        ({"x-guidance": {"lenient": True}, "contains": {}}, r"'contains' at \$,"),
        ({"properties": {"t": {"format": "ipv9"}}}, r"'format: ipv9' at \$.properties.t"),
        ({"extends": {}}, "'extends'"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "oneOf"),
        ({"type": "string", "pattern": "(?=a)b"}, "regex parse error"),
        ({"minimum": 3, "maximum": 1, "type": "integer"}, "Unsatisfiable"),
        ({"$ref": "http://elsewhere.org/x"}, "elsewhere"), ({"$ref": "#/nope"}, "nope"),
        ({"type": "strin"}, "strin"), (False, "false"), ("[1]", "must be a JSON schema"),
        ('{"type":', "no JSON"), (5, "must be a JSON schema"), ({"enum": {1, 2}}, "no JSON"),
        ({"a": float("nan")}, "no JSON"), (object(), "no JSON"), (Path, "no schema|path"),
        ({"enum": ["x" * MOST_TEXT]}, "at most"), ({"enum": ["\ud800"]}, "can't be used"),
        ('{"not":' * 5000 + "{}" + "}" * 5000, "levels deep"),
        ('{"items":' * 100 + "{}" + "}" * 100, "levels deep"),
    ],
)  # fmt: skip
def test_what_can_not_be_enforced_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        Grammar.of_schema(schema)
    assert caught.value.param == "schema"


FOR_EVER = {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "required": ["a"]}
AGAIN = {"$ref": "#/$defs/x"}


@pytest.mark.parametrize(
    ("schema", "at"),
    [
        ({"$ref": "#"}, r"\$ "), ({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}, r"\$ "),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, r"\$ "),
        ({"type": "array", "prefixItems": [True, {"$ref": "#"}], "minItems": 2.0}, r"\$ "),
        ({"items": AGAIN, "$defs": {"x": {"$ref": "#/$defs/y"}, "y": AGAIN}}, r"\$.items"),
        ({**AGAIN, "$defs": {"x": FOR_EVER}}, r"\$ "),
        ({"anyOf": [{"type": "null"}, AGAIN], "$defs": {"x": FOR_EVER}}, r"\$.anyOf\[1\]"),
        ({"properties": {"p": AGAIN}, "$defs": {"x": FOR_EVER}}, r"\$.properties.p"),
        ({"properties": {"a": {"$ref": "#/properties/a"}}}, r"\$.properties.a"),
        ({"properties": {"a/~%": {"$ref": "#/properties/a~1~0%25"}}}, r"\$.properties.a/~%"),
        ({"allOf": [{"type": "object"}, {"$ref": "#/allOf/1"}]}, r"\$ "),
    ],
)  # fmt: skip
def test_what_never_ends_is_refused(schema: Any, at: str) -> None:
    """What was made of it was no JSON, or went on to the limit."""
    with pytest.raises(InvalidRequestError, match=f"asks for at {at}.*never ends") as caught:
        Grammar.of_schema(schema)
    assert caught.value.param == "schema"


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        {"type": "array", "items": {"$ref": "#"}},
        {"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"$ref": "#"}}},
        {"type": "boolean", "$defs": {"x": FOR_EVER}},  # which nothing asks for
        {"enum": [{}], "properties": {"a": {"$ref": "#/properties/a"}}, "type": "object"},
    ],
)
def test_what_refers_to_itself_may_end(schema: Any) -> None:
    try:
        Grammar.of_schema(schema)
    except InvalidRequestError as error:
        assert "never ends" not in str(error)


def test_whether_a_schema_ends_takes_no_time() -> None:
    names = [f"a{i}" for i in range(1500)]
    chained = {name: {"$ref": f"#/properties/{after}"} for name, after in itertools.pairwise(names)}
    wide = {name: {"$ref": f"#/properties/{names[i // 2]}"} for i, name in enumerate(names) if i}
    for named in (chained, dict(reversed(chained.items())), wide):
        named = {**named, names[0] if named is wide else names[-1]: {"type": "null"}}
        begun = time.thread_time()
        check_ends({"type": "object", "properties": named, "required": names}, "schema")
        assert time.thread_time() - begun < 5


def test_what_a_schema_only_says_of_itself_is_no_error() -> None:
    notes = {"title": "t", "default": {"not": 1}, "examples": [{"contains": 2}], "$comment": "if"}
    Grammar.of_schema({"type": "object", "properties": {"if": {"type": "string"}}, **notes})


@pytest.mark.parametrize(
    ("regex", "message"),
    [("(?!a)b", "look-around"), ("(a)\\1", "backreferences"), ("a{2,", "unclosed"), (5, "must be")],
)
def test_regexes_that_are_refused(regex: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        Grammar.of_regex(regex)
    assert caught.value.param == "regex"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "root ::= x", 'root ::= "a', 'start: "a', "stop: /a/", 'root ::= "a" (', "{}", '{"a":1}',
        "start: " + "(" * 5000 + '"a"' + ")" * 5000, "root ::= " + "(" * 5000 + '"a"' + ")" * 5000,
        "start: <|nope|>", "\ud800", "x" * (MOST_TEXT + 1), "[]", '{"grammars":[]}', "::=",
    ],
)  # fmt: skip
def test_grammars_that_are_refused(tiny: Tokenizer, text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Grammars().compile(Grammar.of_text(text), tiny)
    assert caught.value.param == "grammar"


def test_two_of_them_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="schema and regex are given") as caught:
        grammar_of({"schema": {}, "regex": "a"})
    assert caught.value.param == "regex"


def test_without_the_package_one_line_says_what_to_install() -> None:
    code = """
import sys
sys.modules["llguidance"] = None
import edgeinfer.llm, edgeinfer.constraining as constraining
try:
    constraining.grammar_of({"regex": "a"})
except edgeinfer.InvalidRequestError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'edgeinfer[grammar]'" in done.stdout


# -- tokens ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tiny", "smollm2", "spm"])
def vocabulary(
    request: pytest.FixtureRequest,
    tiny: Tokenizer,
    data_file: Callable[[str], Path],
) -> tuple[Tokenizer, Grammars]:
    if request.param == "tiny":
        return tiny, Grammars()
    files = {
        "smollm2": "models/SmolLM2-135M-Instruct.Q4_1.gguf",
        "spm": "vocab/ggml-vocab-llama-spm.gguf",
    }
    return _tokenizer(data_file(files[request.param])), Grammars()


def allowed(matcher: Matcher, n_vocab: int, drafts: list[int] = []) -> list[set[int]]:  # noqa: B006
    masks = np.full((1 + len(drafts), mask_words(n_vocab)), 7, np.uint32)
    matcher.fill(masks, drafts)
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
    assert not bits[:, n_vocab:].any()
    return [set(np.flatnonzero(row).tolist()) for row in bits]


TEXTS = st.lists(
    st.text(st.sampled_from(' ab\n"\\1é日🎈<s>'), min_size=1, max_size=6), min_size=1, max_size=6
)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=TEXTS, dice=st.randoms(use_true_random=False))
def test_a_mask_has_the_tokens_that_go_on(
    vocabulary: tuple[Tokenizer, Grammars], texts: list[str], dice: Any
) -> None:
    """Of a finite language: each of several, or one where bytes and so tokens are certain."""
    tokenizer, grammars = vocabulary
    ids_of = _ids_by_piece(tokenizer)
    rules = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    matcher = grammars.compile(Grammar.of_text(rules), tokenizer).begin()
    language, done = {text.encode() for text in texts}, b""
    while not matcher.is_ended:
        (found,) = allowed(matcher, tokenizer.n_vocab)
        assert (found >= tokenizer.eog_ids) == (done in language)
        found -= tokenizer.eog_ids
        left = [text[len(done) :] for text in language if text.startswith(done)]
        starts = {text[:n] for text in left for n in range(1, len(text) + 1)}
        expected = {id for start in starts for id in ids_of.get(start, ())}
        assert found and found <= expected
        assert len(found) == 1 or found == expected
        token = dice.choice(sorted(found))
        matcher.advance(token)
        done += tokenizer.piece(token)
    assert done in language


@functools.cache
def _ids_by_piece(tokenizer: Tokenizer) -> dict[bytes, list[int]]:
    """The tokens that are text."""
    found: dict[bytes, list[int]] = {}
    for id in range(tokenizer.n_vocab):
        if not tokenizer.is_control(id) and id not in tokenizer.eog_ids:
            found.setdefault(tokenizer.piece(id), []).append(id)
    return found


def test_drafts_have_masks_and_leave_no_trace(vocabulary: tuple[Tokenizer, Grammars]) -> None:
    tokenizer, grammars = vocabulary
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "number"}}}}
    compiled = grammars.compile(Grammar.of_schema(schema), tokenizer)
    text = '{"a": [1, 2.5, 33, -4e5]}'
    ids, matcher, n = tokenizer.encode_middle(text), compiled.begin(), tokenizer.n_vocab
    one_by_one = []
    for id in ids:
        one_by_one += allowed(matcher, n)
        if id not in one_by_one[-1]:  # a text that people write otherwise than what is certain
            break
        matcher.advance(id)
    taken = ids[: len(one_by_one) - 1]
    drafted = compiled.begin()
    for _ in range(2):
        assert allowed(drafted, n, taken) == one_by_one
    wrong = allowed(drafted, n, [*taken[:1], min(tokenizer.eog_ids), *taken[1:]])
    assert wrong[:2] == one_by_one[:2] and not any(wrong[2:])
    assert allowed(drafted, n) == one_by_one[:1]


def test_forced_tokens_are_those_of_the_masks(vocabulary: tuple[Tokenizer, Grammars]) -> None:
    tokenizer, grammars = vocabulary
    rules = Grammar.of_text('start: "the weather" (" is good" | " is bad")')
    matcher = grammars.compile(rules, tokenizer).begin()
    while forced := matcher.forced(8):
        assert matcher.count_possible(forced) == len(forced)
        for id, found in zip(forced, allowed(matcher, tokenizer.n_vocab, forced), strict=False):
            assert found == {id}
        for id in forced:
            matcher.advance(id)
    assert not matcher.is_ended


def test_a_grammar_is_compiled_once(vocabulary: tuple[Tokenizer, Grammars]) -> None:
    tokenizer, grammars = vocabulary
    assert grammars.compile(Grammar.of_regex("ab"), tokenizer) is grammars.compile(
        Grammar.of_regex("ab"), tokenizer
    )


def test_compiled_grammars_are_kept_by_number_and_length(tiny: Tokenizer) -> None:
    """The latest ones: what they take is no part of a plan."""
    grammars = Grammars()

    def compiled(*names: str) -> list[object]:
        return [grammars.compile(Grammar.of_regex(name), tiny) for name in names]

    names = [f"a{n}" for n in range(_MOST_KEPT + 1)]
    first, *others = compiled(*names)
    assert compiled(*names[1:]) == others and compiled(names[0]) != [first]
    short = compiled("short")
    text, other = ("[abc]" + each * 115 for each in "bc")  # with choices on the way
    long = compiled(text * 1000)
    assert compiled(text * 1000) == long and compiled("short") == short
    compiled(other * 900)
    assert compiled("short") == short and compiled(text * 1000) != long


def test_a_grammar_whose_lexer_is_spent_is_compiled_anew(
    tiny: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All answers by one share its states: after some of them every other had failed."""
    limits = llguidance.LLParserLimits(max_lexer_states=400, verbose_errors=False)
    monkeypatch.setattr("edgeinfer.text.grammar_matcher.limits", lambda: limits)
    grammar, grammars, chance = (
        Grammar.of_regex("(a|b)*a" + "(a|b)" * 12),
        Grammars(),
        random.Random(1),
    )
    n_failed = 0
    for _ in range(60):
        matcher = grammars.compile(grammar, tiny).begin()
        try:
            for _ in range(30):
                allowed(matcher, tiny.n_vocab)
                matcher.advance(tiny.encode(chance.choice("ab"), bos=False)[0])
        except EdgeInferError as error:
            assert "too many states" in str(error)
            n_failed += 1
            assert grammars.compile(grammar, tiny) is not matcher._grammar  # type: ignore[attr-defined]
    assert 1 <= n_failed < 30


@pytest.mark.parametrize("ends", [[], [0], [1, 2]])
@pytest.mark.parametrize("lacks", ["", "b", "q"])
def test_odd_vocabularies(ends: list[int], lacks: str) -> None:
    """No end, or several; characters that no token has; texts of two tokens; a padded one."""
    words = ["<end>", "<stop>", "<halt>", "ab", "a", "b", "c", "▁c", "", "<0x61>", "q", "ab"[::-1]]
    words = [f"[{word}]" if word == lacks else word for word in words]
    meta = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": [0.0] * len(words),
        "tokenizer.ggml.token_type": [1, 1, 1, 1, 1, 1, 1, 1, 5, 6, 1, 1],
        "tokenizer.ggml.eos_token_id": ends[0] if ends else len(words),
    }  # fmt: skip
    if ends[1:]:
        meta["tokenizer.ggml.eos_token_ids"] = ends
    tokenizer = tokenizer_of(meta)
    n_vocab = 64  # of a model with more rows than tokens; here also a bit more than words hold
    matcher = Grammars().compile(Grammar.of_regex("(ab c|ab{0,3}c)"), tokenizer).begin()
    done = b""
    while not matcher.is_ended:
        (found,) = allowed(matcher, n_vocab)
        found -= tokenizer.eog_ids
        assert found and max(found) < len(words)
        matcher.advance(max(found))
        done += tokenizer.piece(max(found))
    assert done in (b"ab c", b"abc", b"abbc", b"abbbc", b"ac")


def test_a_vocabulary_without_an_end_of_any_size() -> None:
    for n in (257, 287, 288, 289):
        extra = tuple(f"<x{i}>" for i in range(n - 257))
        tokenizer = tokenizer_of(byte_pair(extra, eos_token_id=n))
        assert tokenizer.n_vocab == n and not tokenizer.eog_ids
        matcher = Grammars().compile(Grammar.of_regex("ab|abc"), tokenizer).begin()
        seen = []
        while not matcher.is_ended and len(seen) < 9:
            (found,) = allowed(matcher, n)
            seen.append(max(found))
            matcher.advance(seen[-1])
        assert b"".join(map(tokenizer.piece, seen)) == b"abc"


def test_what_no_token_spells_is_refused_or_ends() -> None:
    meta = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a"]}
    tokenizer = tokenizer_of(meta)
    with pytest.raises(InvalidRequestError, match="regex can't be used"):
        Grammars().compile(Grammar.of_regex("b"), tokenizer)
    matcher = Grammars().compile(Grammar.of_regex("ab"), tokenizer).begin()
    with pytest.raises(EdgeInferError, match="can't be kept to"):
        for _ in range(3):
            (found,) = allowed(matcher, 4)
            matcher.advance(min(found))


# -- reasoning -------------------------------------------------------------------------------------


def accepts(grammar: Grammar, text: str, tokenizer: Tokenizer) -> bool:
    matcher = Grammars().compile(grammar, tokenizer).begin()
    ids = tokenizer.encode_middle(text)
    if matcher.count_possible(ids) < len(ids):
        return False
    for id in ids:
        matcher.advance(id)
    return allowed(matcher, tokenizer.n_vocab)[0] >= tokenizer.eog_ids


@pytest.mark.parametrize(
    ("end", "text", "is_right"),
    [
        ("<think>\n", "so be it: no</think>\n\nyes", True), ("<think>\n", "</think>yes", True),
        ("<think>\n", "yes", False), ("<think>", "yes</think>", False),
        ("<think>\n\n</think>\n\n", "yes", True), ("<think>\n\n</think>\n\n", "</think>yes", False),
        ("assistant\n", "yes", True), ("assistant\n", "<think>yes</think>yes", False),
    ],
)  # fmt: skip
def test_a_grammar_begins_after_reasoning(
    tiny: Tokenizer, end: str, text: str, is_right: bool
) -> None:
    regex = Grammar.of_regex("yes|no")
    grammar = after_reasoning(regex, (THINK,), end, "... </think> ...", tiny)
    assert accepts(grammar, text, tiny) == is_right


# -- what is hostile -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"}, {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"type": "string", "pattern": "(a{1000}){1000}"},
        {"type": "string", "pattern": "(.*a){40}"},
        {"type": "string", "pattern": "^(.*a.{20}){5}$"},
        {"type": "string", "pattern": "|".join(f".*{c}.{{30}}{d}" for c in "abcde" for d in "xy")},
        {"type": "string", "minLength": 10**9}, {"type": "array", "minItems": 10**9},
        {"anyOf": [{"type": "string", "pattern": "|".join(f"[a-z]{{{i}}}x" for i in range(500))}]},
        {"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for i in range(6)]} for j in range(6)]},
        {"$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)}
         | {"d60": {"type": "string"}}, "$ref": "#/$defs/d0"},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}},
    ],
)  # fmt: skip
def test_hostile_schemas_end_soon(tiny: Tokenizer, schema: Any) -> None:
    """Refused when compiled, or by the matcher; else it goes on for as long as anyone likes."""
    begun = time.thread_time()
    try:
        matcher = Grammars().compile(Grammar.of_schema(schema), tiny).begin()
        for id in b'{"a1": "aaaaaaaaaa':
            (found,) = allowed(matcher, tiny.n_vocab)
            matcher.advance(id if id in found else min(found))
    except EdgeInferError as error:
        assert "can't" in str(error) or "at most" in str(error)
    assert time.thread_time() - begun < 10  # half a second at rest


OBJECT: Any = {"type": "object", "properties": {"a": {"type": "integer"}}}
OPEN: list[Any] = [
    {"type": "object"},
    {**OBJECT, "additionalProperties": {"type": "string"}},
    {**OBJECT, "patternProperties": {"^b": {}}},
    {**OBJECT, "required": ["b"]},  # which is not listed
    {"allOf": [OBJECT, {"type": "object", "properties": {"b": {}}}]},
    {**OBJECT, "anyOf": [{"properties": {"b": {}}, "required": ["b"]}, {"required": ["a"]}]},
    {"$defs": {"x": OBJECT}, "$ref": "#/$defs/x", "required": ["b"]},
]


@pytest.mark.parametrize("schema", OPEN, ids=str)
def test_objects_stay_open_where_the_schema_says_more(schema: Any) -> None:
    assert closed(schema) == schema


def test_objects_have_the_keys_that_are_listed() -> None:
    named = {"properties": {"properties": OBJECT, "required": OBJECT, "not": {"type": "null"}}}
    whole = {
        "$defs": {"x": OBJECT},
        "anyOf": [{"$ref": "#/$defs/x"}, {"type": "array", "items": OBJECT}],
    }
    inner = {**OBJECT, "additionalProperties": False}
    assert closed(OBJECT) == inner and closed([OBJECT, True]) == [inner, True]
    assert closed(whole)["$defs"]["x"] == closed(whole)["anyOf"][1]["items"] == inner
    assert closed(named)["properties"] == {
        "properties": inner, "required": inner, "not": {"type": "null"},
    }  # fmt: skip
    assert closed(named)["additionalProperties"] is False
    value = {"enum": [OBJECT], "const": OBJECT, "default": OBJECT}
    assert closed(value) == value
