"""Grammars of calls: whatever one accepts is read back as calls with arguments that are valid.

Replies are walked token by token over the bytes and the control tokens, by the masks of llguidance.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeinfer.constraining import checked
from edgeinfer.errors import InvalidRequestError
from edgeinfer.results import ToolCall
from edgeinfer.text.call_finder import CallFinder
from edgeinfer.text.call_formats import call_format
from edgeinfer.text.call_grammar import ANSWER, OfferedTool, call_grammar
from edgeinfer.text.grammar import Grammar

from .call_signs import DSML, SIGNS

llguidance = pytest.importorskip("llguidance", reason="pip install 'edgeinfer[grammar]'")
jsonschema = pytest.importorskip("jsonschema", reason="pip install jsonschema")

EXAMPLES = 5  # of each spelling
MORE = 60  # where there is time
SPELLINGS = {
    **SIGNS,
    "coder": "<tool_call><function=<parameter=",
    "glm": "<tool_call><arg_key>",
    "function": "<function=",
    "mistral-args": "[TOOL_CALLS][ARGS]",
    "deepseek-fenced": "<｜tool▁call▁begin｜>```json",
}
PATIENT: Any = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much],
}


class Bytes:
    """A vocabulary of the 256 bytes and control tokens, as llguidance takes one."""

    def __init__(self, controls: Sequence[str]) -> None:
        self.controls = {text: 256 + i for i, text in enumerate(controls)}
        self.eos_token_id = 256 + len(controls)
        self.bos_token_id = None
        self.tokens = [bytes([i]) for i in range(256)]
        self.tokens += [b"\xff" + text.encode() for text in (*controls, "<eos>")]
        self.special_token_ids = list(range(256, len(self.tokens)))
        wrapper = llguidance.TokenizerWrapper(self)
        self.lt = llguidance.LLTokenizer(wrapper, eos_token=self.eos_token_id)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)

    def read(self, tokens: Sequence[int], finder: CallFinder) -> str:
        """The text of a reply; the finder gets it piece by piece."""
        text, held = "", b""
        names = {id: text for text, id in self.controls.items()}
        deltas = []
        for token in tokens:
            if token < 256:
                held += bytes([token])
                continue
            deltas += finder.push(held.decode())
            deltas += finder.push(names[token], is_control=True)
            held = b""
        deltas += finder.push(held.decode())
        deltas += finder.end(was_cut=False)
        return text.join(delta.text for delta in deltas)


def matcher(grammar: str, vocabulary: Bytes) -> Any:
    found = llguidance.LLMatcher(vocabulary.lt, grammar)
    assert not found.is_error(), f"{found.get_error()}\n{grammar}"
    return found


CLOSERS = set(b'"}])>\n')


def walk(found: Any, vocabulary: Bytes, seed: int, most: int = 600) -> list[int] | None:
    """A reply that is accepted, drawn at random; None where it would be longer than `most`."""
    rng, tokens = random.Random(seed), list[int]()
    while len(tokens) < most:
        mask = found.compute_bitmask()
        allowed = [i for i in range(len(vocabulary.tokens)) if mask[i // 8] >> (i % 8) & 1]
        assert allowed, (bytes(t for t in tokens if t < 256), found.get_error())
        closers = [i for i in allowed if i in CLOSERS or i >= 256]
        hurry = 0.2 + 0.8 * len(tokens) / most
        token = rng.choice(closers if closers and rng.random() < hurry else allowed)
        if token == vocabulary.eos_token_id:
            return tokens
        tokens.append(token)
        assert found.consume_token(token)
        if found.is_stopped():
            return tokens
    return None


def calls_of(
    spelling: str, tools: Sequence[Mapping[str, Any]], vocabulary: Bytes, tokens: Sequence[int]
) -> tuple[str, tuple[ToolCall, ...]]:
    finder = CallFinder(call_format(SPELLINGS[spelling]), tools)
    return vocabulary.read(tokens, finder), finder.done


def check(calls: Sequence[ToolCall], tools: Sequence[Mapping[str, Any]]) -> None:
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    for call in calls:
        arguments = json.loads(call.arguments)
        assert isinstance(arguments, dict)
        jsonschema.Draft202012Validator(schemas[call.name]).validate(arguments)


# -- any tools ------------------------------------------------------------------------------------

KEYS = st.sampled_from(["a", "city", "two_words", "größe", "x1"])
NAMES = st.sampled_from(["get", "get_all", "get-it", "mcp__a.b", "wetter_ü", "x"])
SCALARS = st.one_of(
    st.builds(
        lambda kind, note: {"type": kind, "description": note},
        st.sampled_from(["string", "integer", "number", "boolean", "null"]),
        st.text(max_size=5),
    ),
    st.just({"type": "string", "minLength": 1, "maxLength": 4}),
    st.just({"type": "string", "enum": ["a b", 'q"u', "</x>", "é\\n"]}),
    st.just({"enum": [1, "two", None, True, {"k": [2.5]}]}),
    st.just({"const": "fixed"}),
    st.just({"type": "integer", "minimum": -3, "exclusiveMaximum": 12}),
    st.just({"type": ["string", "null"]}),
    st.just({}),
)


def objects(inner: Any) -> Any:
    return st.builds(
        lambda properties, required: {
            "type": "object",
            "properties": properties,
            "required": [name for name in properties if name in required],
            "additionalProperties": False,
        },
        st.dictionaries(KEYS, inner, max_size=3),
        st.sets(KEYS),
    )


VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.builds(
            lambda items, least: {
                "type": "array",
                "items": items,
                "minItems": least,
                "maxItems": 3,
            },
            inner,
            st.integers(0, 2),
        ),
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
        objects(inner),
    ),
    max_leaves=4,
)
TOOLS = st.lists(
    st.tuples(NAMES, objects(VALUES)), min_size=1, max_size=3, unique_by=lambda t: t[0]
)


def tool(name: str, parameters: Any, strict: bool = True) -> dict[str, Any]:
    function = {"name": name, "parameters": parameters, "strict": strict}
    return {"type": "function", "function": function}


def offered(tools: Sequence[Mapping[str, Any]]) -> list[OfferedTool]:
    return [each for each in map(OfferedTool.of, tools) if each is not None]


def vocabulary_of(spelling: str, has_controls: bool) -> Bytes:
    return Bytes(sorted(call_format(SPELLINGS[spelling]).controls) if has_controls else [])


VOCABULARIES = {(s, c): vocabulary_of(s, c) for s in SPELLINGS for c in (False, True)}


def see_that_calls_are_valid(
    spelling: str, tools: Any, has_controls: bool, is_single: bool, seed: int
) -> None:
    """Of a reply that consists of them."""
    vocabulary = VOCABULARIES[spelling, has_controls]
    grammar = call_grammar(
        SPELLINGS[spelling],
        offered(tools),
        vocabulary.controls.get,
        is_required=True,
        is_single=is_single,
    )
    tokens = walk(matcher(grammar, vocabulary), vocabulary, seed)
    if tokens is None:
        return
    text, calls = calls_of(spelling, tools, vocabulary, tokens)
    shown = bytes(t if t < 256 else 0 for t in tokens).decode()
    assert text.strip() == "" and calls, shown
    assert len(calls) == 1 or not is_single, shown
    check(calls, tools)


ANY_REPLY = (TOOLS, st.booleans(), st.booleans(), st.integers(0, 2**32))


@pytest.mark.parametrize("spelling", SPELLINGS)
@settings(max_examples=EXAMPLES, **PATIENT)
@given(*ANY_REPLY)
def test_what_is_required_is_calls_and_they_are_valid(
    spelling: str, drawn: Any, has_controls: bool, is_single: bool, seed: int
) -> None:
    tools = [tool(*each) for each in drawn]
    see_that_calls_are_valid(spelling, tools, has_controls, is_single, seed)


@pytest.mark.slow
@pytest.mark.parametrize("spelling", SPELLINGS)
@settings(max_examples=MORE, **PATIENT)
@given(*ANY_REPLY)
def test_many_more_of_them_are_valid(
    spelling: str, drawn: Any, has_controls: bool, is_single: bool, seed: int
) -> None:
    tools = [tool(*each) for each in drawn]
    see_that_calls_are_valid(spelling, tools, has_controls, is_single, seed)


# Regular expressions, quotes, markers, words of the formats, other scripts, and a long one.
NAMES_TO_TRY = [
    "a.*b", "(z)|y", "[q]", 'a"b', "a'b", "日本", "a b", "a>b", "a<b", "a{b}", "a:b", "a\\b",
    "</tool_call>", "<|end|>", "functions.x", "class", "1st", "a-b", "a\nb", " lead", "😀", "%json",
    "@answer", "to=y", "x" * 300, "get ::= x",
]  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_any_name_is_called_or_refused(spelling: str) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    refused = []
    for seed, name in enumerate(NAMES_TO_TRY):
        tools = [tool(name, parameters), tool("other", parameters)]
        try:
            see_that_calls_are_valid(spelling, tools, seed % 2 == 0, True, seed)
        except InvalidRequestError as error:
            assert error.param == "tools" and "its name" in str(error)
            refused.append(name)
    assert (" lead" in refused) == (spelling != "kimi")  # behind a dot it is one
    assert "a-b" not in refused and "functions.x" not in refused


NODE = {
    "type": "object",
    "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["next"],
    "additionalProperties": False,
}
SCHEMAS: list[Any] = [
    {"type": "object", "properties": {"n": {"$ref": "#/$defs/node"}}, "required": ["n"],
     "$defs": {"node": NODE}},
    {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
    {"type": "object", "properties": {"self": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
     "required": ["self"], "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "properties": {"m": {"type": "object", "additionalProperties": False}}},
    {"type": "object", "properties": {"e": {"enum": ["a", 1, None, True, [1, "x"], {"k": "v"}]}},
     "required": ["e"]},
    {"type": "object", "properties": {"e": {"enum": []}}, "required": ["e"]},
    {},
    {"properties": {"x": {"type": "string"}}},
    {"type": ["object", "null"], "properties": {"x": {"type": "string"}}},
    {"type": "string"},
    {"type": "object", "properties": {"s": {"type": "string", "pattern": "^[a-z]{2}/?$"}},
     "required": ["s"]},
    {"type": "object", "properties": {"s": {"type": "string", "pattern": "^a|b$"}},
     "required": ["s"]},
    {"type": "object", "properties": {"s": {"type": "string", "format": "date"}},
     "required": ["s"]},
    {"type": "object", "properties": {"s": {"type": "string", "minLength": 2, "maxLength": 3}},
     "required": ["s"]},
    {"type": "object", "properties": {"s": {"type": "string", "minLength": -1}}},
    {"type": "object", "properties": {"s": {"not": {}}}},
    {"type": "object", "properties": {"s": {"$ref": "https://localhost/y"}}},
    {"type": "object", "properties": {"s": "no schema"}},
    {"type": "object", "properties": {"s": True, "f": False}},
    {"type": "object", "properties": ["a"]},
    {"type": "object", "properties": {"we ird:key}": {"type": "integer"}, "": {"type": "null"}},
     "required": ["we ird:key}", ""]},
    {"type": "object", "properties": {"s": {"type": "array", "minItems": 2, "maxItems": 1}},
     "required": ["s"]},
    {"type": "object", "properties": {"s": {"oneOf": [{"type": "null"}, {"type": "boolean"}]}}},
    {"type": "object", "properties": {"s": {"const": 'a\nb"c\\d</parameter>'}}, "required": ["s"]},
    {"type": "object", "properties": {"s": {"type": "string", "pattern": r"^a\\/b$"}},
     "required": ["s"]},
    {"type": "object", "properties": {"s": {"type": "string", "enum": ["a", "bb"], "maxLength": 1}},
     "required": ["s"]},
    {"type": "object", "properties": {"n": {"$ref": "#node"}}, "required": ["n"],
     "$defs": {"node": {"$anchor": "node", "type": "integer"}}},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a", "b"]},
]  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_any_schema_is_kept_to_or_refused(spelling: str) -> None:
    n_kept = 0
    for seed, schema in enumerate(SCHEMAS):
        try:
            (found,) = map(checked, [tool("get", schema)])
            tools = [tool("get", found.parameters)]
            see_that_calls_are_valid(spelling, tools, seed % 2 == 0, True, seed)
            n_kept += 1
        except InvalidRequestError as error:
            assert error.param in ("tools", "tools.get.parameters")
    assert n_kept >= 10


# -- replies that need not be calls ---------------------------------------------------------------

PREFIXES = st.sampled_from(
    ["", "Well, ", "\n\n", "{", '{"name": "get", "arguments": {"b": 1}}', '{"name": "get", "x"',
     '{"parameters": {}, "name": "get"}', '{"n\\u0061me": "get"}', '[{"name": "get"}]',
     "<tool_call>", "a <tool_call>\n", '<tool_call>{"name": "get"', "<function=get>{", "<funct",
     '<|python_tag|>{"name": "get"}', "[TOOL_CALLS]get[ARGS]{", '[TOOL_CALLS][{"name": "get"',
     "<|channel|>final<|message|>Hi", "<|channel|>commentary to=functions.get<|message|>{",
     "<|channel|>analysis<|message|>So <|end|><|start|>assistant<|channel|>",
     "<｜tool▁call▁begin｜>get<｜tool▁sep｜>{", "<｜tool▁calls▁begin｜>",
     f'<{DSML}invoke name="get">',
     f"<{DSML}function_calls>\n", "<|tool_call_start|>[get(", "<|tool_call>call:get{",
     "<start_function_call>call:", '<|tool_call|>[{"name"']
)  # fmt: skip


def begun(found: Any, vocabulary: Bytes, prefix: str, as_text: bool) -> list[int]:
    """The tokens of a text as far as the grammar has it; control tokens may be spelled out."""
    tokens: list[int] = []
    while prefix:
        ids = [id for text, id in vocabulary.controls.items() if prefix.startswith(text)]
        ids = [] if as_text else ids
        taken = ids[:1] or list(prefix[0].encode())
        if found.validate_tokens(taken) < len(taken):
            break
        found.consume_tokens(taken)
        tokens += taken
        names = [text for text, id in vocabulary.controls.items() if id in ids[:1]]
        prefix = prefix[len(names[0]) if names else 1 :]
    return tokens


@pytest.mark.parametrize("spelling", SPELLINGS)
@settings(max_examples=2 * EXAMPLES, **PATIENT)
@given(TOOLS, PREFIXES, st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_in_text_calls_are_valid_too(
    spelling: str,
    drawn: Any,
    prefix: str,
    as_text: bool,
    has_controls: bool,
    is_single: bool,
    seed: int,
) -> None:
    tools = [tool(*each) for each in drawn]
    vocabulary = VOCABULARIES[spelling, has_controls]
    grammar = call_grammar(
        SPELLINGS[spelling],
        offered(tools),
        vocabulary.controls.get,
        is_required=False,
        is_single=is_single,
    )
    found = matcher(grammar, vocabulary)
    tokens = begun(found, vocabulary, prefix, as_text)
    rest = walk(found, vocabulary, seed)
    if rest is None:
        return
    _, calls = calls_of(spelling, tools, vocabulary, tokens + rest)
    assert len(calls) <= 1 or not is_single
    check(calls, tools)


SHORT = {
    "type": "object",
    "properties": {"kind": {"enum": ["yes", "no"]}, "name": {"const": "get"}},
    "required": ["kind", "name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("has_tools", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_reply_is_calls_or_an_answer_by_a_schema(spelling: str, has_tools: bool) -> None:
    parameters = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    tools = [tool("get", {**parameters, "additionalProperties": False})] if has_tools else []
    kinds = set()
    for seed in range(12):
        vocabulary = VOCABULARIES[spelling, seed % 2 == 0]
        ask: Any = {"is_required": False, "is_single": True, "has_answer": True}
        rules = call_grammar(SPELLINGS[spelling], offered(tools), vocabulary.controls.get, **ask)
        grammar = Grammar.of_schema(SHORT).after(rules, ANSWER)
        tokens = walk(matcher(grammar.text, vocabulary), vocabulary, seed)
        if tokens is None:
            continue
        text, calls = calls_of(spelling, tools, vocabulary, tokens)
        check(calls, tools)
        if not calls:
            jsonschema.Draft202012Validator(SHORT).validate(json.loads(text))
        kinds.add(bool(calls))
    assert kinds == ({True, False} if has_tools else {False})


EXCLUSIVE = {"type": "integer", "minimum": 0, "exclusiveMinimum": True, "maximum": 1}  # draft 4


@pytest.mark.parametrize("spelling", ["hermes", "coder", "lfm2", "gemma"])
def test_bounds_of_tools_are_read_as_those_of_answers(spelling: str) -> None:
    """A flag that a bound is out was passed over."""
    schema = {"type": "object", "properties": {"n": EXCLUSIVE}, "required": ["n"]}
    tools = [tool("get", schema)]
    vocabulary = VOCABULARIES[spelling, True]
    grammar = call_grammar(
        SPELLINGS[spelling],
        [checked(each) for each in tools],
        vocabulary.controls.get,
        is_required=True,
        is_single=True,
    )
    for seed in range(8):
        tokens = walk(matcher(grammar, vocabulary), vocabulary, seed)
        assert tokens is not None
        _, (call,) = calls_of(spelling, tools, vocabulary, tokens)
        assert json.loads(call.arguments) == {"n": 1}
