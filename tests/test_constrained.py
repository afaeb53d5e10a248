"""Answers that must follow a schema, a grammar or a regex: what they are, on every device."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeinfer import LLM, EdgeInferError, InvalidRequestError, Recording
from edgeinfer.cli.main import main
from edgeinfer.engine.step_costs import StepCosts
from edgeinfer.text.grammar_matcher import GrammarMatcher

from .models_for_tests import tiny_model
from .test_drafting import always

SPEC: Any = dict(seed=3, max_tokens=120, temperature=0.9)
WHERE: dict[str, dict[str, Any]] = {
    "cpu": dict(device="cpu"),
    "shim": dict(device="shim"),
    "cpu + shim": dict(device="shim", gpu_layers=1),
    "law": dict(device="law"),
}
WORDS = {"type": "string", "maxLength": 8}
THING = {
    "type": "object",
    "properties": {
        "name": WORDS,
        "kind": {"enum": ["a", "b", None]},
        "parts": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99},
                  "maxItems": 3},
    },
    "required": ["name", "kind", "parts"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("constrained")
    return tiny_model(folder, arch="qwen3", qk_norm=True, n_ctx=512, n_layers=3)


def opened(path: Path, where: str, **options: Any) -> LLM:
    if "shim" in where and shutil.which("g++") is None:
        pytest.skip("no g++ to compile the CUDA kernels for processors")
    given: dict[str, Any] = dict(n_ctx=256, threads=2, slots=2)
    return LLM(path, **given | WHERE[where] | options)


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with opened(path, "cpu") as llm:
        yield llm


WAYS: list[dict[str, Any]] = [
    dict(schema=THING), dict(regex="[a-c]{3,30}", temperature=0.0),
    dict(schema=THING, temperature=0.7, repeat_penalty=1.3, min_p=0.2, logprobs=2),
    dict(grammar='root ::= ("x" | "yz")+ "."', mirostat=2, logit_bias={ord("x"): 2.0}),
    dict(schema=THING, dry_multiplier=0.5, top_k=3, typical_p=0.6),
    dict(regex="(ab|cd|[e-z]{2}){4}", overflow="slide", xtc_probability=1.0),
]  # fmt: skip


@pytest.mark.parametrize("where", list(WHERE))
def test_every_device_gives_the_same_tokens(path: Path, llm: LLM, where: str) -> None:
    with opened(path, where) as other:
        for way in WAYS[: None if where == "shim" else 3]:
            options = SPEC | way | (dict(max_tokens=25) if where == "law" else {})
            expected = llm.generate("of what", **options)
            found = other.generate("of what", **options)
            assert found.token_ids == expected.token_ids and found.stop == expected.stop
            assert found.logprobs == expected.logprobs


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_guesses_change_no_token(
    llm: LLM, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = llm.generate("ab ab ab", **SPEC | way | dict(speculation=False))
    monkeypatch.setattr(StepCosts, "of", lambda *_: 1.0)
    guessed = llm.generate("ab ab ab", **SPEC | way | dict(speculation=True))
    assert (guessed.token_ids, guessed.stop) == (plain.token_ids, plain.stop)
    assert guessed.logprobs == plain.logprobs
    assert "schema" not in way or guessed.timings.proposed_tokens > 0


def test_guesses_of_a_models_own_block_change_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model(tmp_path, arch="qwen35", n_layers=8, drafts=True, n_ctx=512)
    with LLM(path, n_ctx=256, drafts=True) as llm:
        plain = llm.generate("hello", schema=THING, speculation=False, **SPEC)
        always(monkeypatch, 0.999)
        guessed = llm.generate("hello", schema=THING, speculation=True, **SPEC)
        assert guessed.token_ids == plain.token_ids
        assert guessed.timings.proposed_tokens > 0
        jsonschema.validate(json.loads(guessed.text), THING)


def test_what_a_grammar_forces_is_guessed_and_right(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepCosts, "of", lambda *_: 1.0)
    answer = llm.generate("x", grammar='start: "what has to be said" [" twice"]', **SPEC)
    assert re.fullmatch("what has to be said( twice)?", answer.text)
    assert answer.timings.accepted_tokens == answer.timings.proposed_tokens >= 10


# -- beside others ---------------------------------------------------------------------------------


def test_answers_side_by_side_are_those_alone(llm: LLM) -> None:
    asked = [dict(way) for way in WAYS] + [dict(), dict(temperature=0.0)]
    alone = [llm.generate("one", **SPEC | way) for way in asked]
    streams = [llm.stream("one", **SPEC | way) for way in asked]
    together = [stream.run() for stream in streams]
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]


def test_answers_to_one_prompt_have_grammars_of_their_own(llm: LLM) -> None:
    options = {**SPEC, "seed": None, "schema": THING}
    for answer in llm.generate_batch(["same"] * 6, **options):
        jsonschema.validate(json.loads(answer.text), THING)


def test_who_gives_way_and_is_computed_again_has_the_same_tokens(path: Path) -> None:
    options = SPEC | dict(regex="[a-z ]{100}")
    with LLM(path, n_ctx=128, threads=1, slots=1) as llm:
        alone = llm.generate("b" * 12, **options)
        slow = llm.stream("b" * 12, **options)
        for _ in range(20):
            next(slow)
        first = llm.generate("c" * 90, priority=5, max_tokens=30)
        assert first.usage.completion_tokens
        assert slow.run().token_ids == alone.token_ids
        assert re.fullmatch("[a-z ]{100}", alone.text)


def test_a_cancelled_answer_frees_its_place(llm: LLM) -> None:
    stream = llm.stream("x", **SPEC | dict(regex="[a-z]+", max_tokens=None))
    for _, _ in zip(range(5), stream, strict=False):
        pass
    stream.close()
    assert stream.completion.finish_reason in ("cancelled", "length", "stop")
    assert llm.generate("x", regex="ok", **SPEC).text == "ok"


# -- how it ends -----------------------------------------------------------------------------------


def test_no_answer_ends_before_its_grammar(llm: LLM) -> None:
    eager = SPEC | dict(logit_bias={257: 1e9})
    assert llm.generate("x", **eager).token_ids == ()
    answer = llm.generate("x", regex="[a-z]{5,9}", **eager)
    assert len(answer.text) == 5 and (answer.finish_reason, answer.stop) == ("stop", 257)
    assert answer.text.islower()


def test_an_answer_that_can_not_go_on_is_over(llm: LLM) -> None:
    answer = llm.generate("x", regex="abc|abd", **SPEC)
    assert answer.text in ("abc", "abd") and answer.finish_reason == "stop"
    assert answer.stop is None


def test_a_limit_cuts_it_and_a_stop_string_ends_it(llm: LLM) -> None:
    cut = llm.generate("x", regex="[a-z]{50}", **SPEC | dict(max_tokens=7))
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 7)
    whole = llm.generate("x", regex="[a-z]{20}z.*", **SPEC)
    ended = llm.generate("x", regex="[a-z]{20}z.*", stop=whole.text[4:6], **SPEC)
    assert (ended.finish_reason, ended.text) == ("stop", whole.text[:4])


def test_what_leaves_no_token_is_an_error_of_its_answer(llm: LLM) -> None:
    banned = {ord(c): -np.inf for c in "abc"}
    other = llm.stream("other", **SPEC)
    with pytest.raises(EdgeInferError, match="grammar allows"):
        llm.generate("x", regex="x[abc]{3}", logit_bias=banned, **SPEC)
    assert other.run().token_ids == llm.generate("other", **SPEC).token_ids


def test_what_a_matcher_gives_up_on_is_an_error_of_its_answer(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = llm.stream("other", **SPEC)
    many = {"type": "object", "properties": {f"p{i}": WORDS for i in range(1500)}}
    with pytest.raises(EdgeInferError, match="can't be kept to: .*max is 2000"):
        llm.generate("x", schema=many, **SPEC)
    fill = GrammarMatcher.fill

    def fail(self: GrammarMatcher, masks: Any, drafts: Any) -> None:
        fill(self, masks, drafts)
        raise OSError("given up")

    monkeypatch.setattr(GrammarMatcher, "fill", fail)
    with pytest.raises(OSError, match="given up"):
        llm.generate("x", regex="[a-z]+", **SPEC)
    assert other.run().token_ids == llm.generate("other", **SPEC).token_ids


@pytest.mark.parametrize(
    "given", [dict(schema=THING, regex="a"), dict(grammar="start: /a/", schema=THING)]
)
def test_two_are_refused(llm: LLM, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="an answer follows one of them"):
        llm.generate("x", **given)


# -- logits that callers edit ----------------------------------------------------------------------


def test_edited_logits_are_masked(llm: LLM) -> None:
    def prefer(step: Any) -> None:
        if step.logits is not None:
            step.logits[[ord("q"), ord("c")]] = 1e4, 1e3

    answer = llm.generate("x", regex="[abc]{6}", on_step=prefer, **SPEC)
    assert answer.text == "cccccc"


# -- chats -----------------------------------------------------------------------------------------


def test_reasoning_is_free_and_the_answer_is_not(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n{# </think> #}"
    path = tiny_model(tmp_path, n_ctx=512, chat_template=template)
    ends = b"</think>"

    def close(step: Any) -> None:
        """Reasons for 12 tokens."""
        at = step.position + len(step.token_ids) - 1 - start
        if step.logits is not None and 12 <= at < 12 + len(ends):
            step.logits[ends[at - 12]] = 1e4

    with LLM(path, n_ctx=512, threads=1) as llm:
        start = len(llm.stream_chat("hi", max_tokens=1).prompt_ids) - 1
        answer = llm.chat("hi", schema=THING, on_step=close, **SPEC | dict(logit_bias={60: -99}))
        assert answer.reasoning and "</think>" not in answer.text
        jsonschema.validate(json.loads(answer.text), THING)
        alike = llm.chat("hi", regex="[a-z]{4}", on_step=close, **SPEC | dict(logit_bias={60: -99}))
        assert re.fullmatch("[a-z]{4}", alike.text)


# -- properties ------------------------------------------------------------------------------------

NAMES = st.text('abé "\\', min_size=1, max_size=3)
LEAVES = st.one_of(
    st.just({"type": "boolean"}), st.just({"type": "null"}),
    st.tuples(st.integers(-50, 5), st.integers(5, 500)).map(
        lambda ends: {"type": "integer", "minimum": ends[0], "maximum": ends[1]}
    ),
    st.integers(0, 4).map(lambda n: {"type": "string", "maxLength": n}),
    st.sampled_from(["^a+b?$", "[0-9]{3}", "^(x|yz)*$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern, "maxLength": 12}
    ),
    st.lists(st.one_of(NAMES, st.integers(-9, 9), st.booleans(), st.none()), min_size=1, max_size=3)
    .map(lambda values: {"enum": values}),
    NAMES.map(lambda value: {"const": value}),
    st.sampled_from(["date", "uuid", "ipv4"]).map(lambda name: {"type": "string", "format": name}),
)  # fmt: skip


def _object(given: tuple[dict[str, Any], bool]) -> dict[str, Any]:
    properties, are_all_required = given
    required = [name for i, name in enumerate(properties) if are_all_required or i % 2]
    made = {"type": "object", "properties": properties, "required": required}
    return {**made, "additionalProperties": False}


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(st.dictionaries(NAMES, inner, max_size=3), st.booleans()).map(_object),
        st.tuples(inner, st.integers(0, 2)).map(
            lambda each: {"type": "array", "items": each[0], "maxItems": each[1]}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each}),
        st.lists(inner, min_size=1, max_size=2).map(
            lambda each: {"type": "array", "prefixItems": each, "items": False, "minItems": 1}
        ),
    ),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, seed=st.integers(0, 99), temperature=st.sampled_from([0.0, 1.0]))
def test_an_answer_of_a_random_model_is_valid(
    llm: LLM, schema: dict[str, Any], seed: int, temperature: float
) -> None:
    options: Any = dict(schema=schema, seed=seed, temperature=temperature, max_tokens=200)
    answer = llm.generate("x", speculation=False, **options)
    assert llm.generate("x", speculation=True, **options).token_ids == answer.token_ids
    if answer.finish_reason == "stop":
        jsonschema.validate(json.loads(answer.text), schema)
    else:  # cut, and so far the beginning of JSON
        assert answer.finish_reason == "length" and len(answer.token_ids) == 200


# -- from outside ----------------------------------------------------------------------------------


@dataclass
class Point:
    x: int
    y: int


def test_an_answer_may_be_of_a_type(llm: LLM) -> None:
    made = llm.generate("x", schema=Point, **SPEC | dict(top_k=1, logit_bias={ord("0"): -99}))
    assert set(json.loads(made.text)) == {"x", "y"} or made.finish_reason == "length"


def test_a_recording_keeps_what_an_answer_had_to_be(llm: LLM, tmp_path: Path) -> None:
    stream = llm.stream("x", schema=THING, **SPEC)
    stream.run()
    file = tmp_path / "answer.json"
    recording = Recording.of(llm, stream)
    file.write_text(json.dumps(recording.as_json()))
    assert Recording.read(file) == recording
    assert recording.replay(llm).is_equal
    plain = llm.stream("x", **SPEC)
    plain.run()
    assert "grammar" not in Recording.of(llm, plain).as_json()["replay"]


@pytest.fixture
def run(path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`edgeinfer run MODEL x --raw` with flags: exit code, stdout, stderr."""

    def call(*flags: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        asked = ["run", path, "x", "--raw", "-c", 256, "--seed", 3, "-n", 100, *flags]
        with pytest.raises(SystemExit) as ended:
            main([str(each) for each in asked])
        return (int(str(ended.value.code)), *capfd.readouterr())

    return call


def test_a_command_reads_schemas_and_grammars_from_files(run: Any, tmp_path: Path) -> None:
    schema, rules = tmp_path / "thing.json", tmp_path / "rules.gbnf"
    schema.write_text(json.dumps(THING))
    rules.write_text('root ::= "ab" [0-9]+ "."')
    code, out, _ = run("--schema", schema)
    assert code == 0
    jsonschema.validate(json.loads(out), THING)
    code, out, _ = run("--grammar", rules)
    assert code == 0 and re.fullmatch(r"ab[0-9]+\.\n", out)
    code, out, _ = run("--regex", "(yes|no) thanks", "--json")
    assert code == 0 and json.loads(out)["text"] in ("yes thanks", "no thanks")


def test_a_command_refuses_before_it_loads(run: Any, tmp_path: Path) -> None:
    wrong, binary = tmp_path / "wrong.json", tmp_path / "x.json"
    wrong.write_text('{"items": {"contains": {}}}')
    binary.write_bytes(b"\0\1\2" * 50)
    for flags, message in (
        (("--schema", wrong), "'contains' at $.items"),
        (("--schema", tmp_path / "none.json"), "none.json"), (("--schema", binary), "is not text"),
        (("--schema", tmp_path), "directory"), (("--grammar", wrong), "can't be used"),
        (("--regex", "("), "can't be used"),
        (("--regex", "a", "--schema", wrong), "'contains' at $.items"),
    ):  # fmt: skip
        code, out, err = run(*flags)
        assert (code != 0, out) == (True, "")
        assert message in err and "context" not in err and "Traceback" not in err


def test_a_started_tokenizer_is_no_part_of_other_starts() -> None:
    """What grammars need is imported by those that have one."""
    import subprocess
    import sys

    code = "import edgeinfer.llm, sys; print('llguidance' in sys.modules, "
    code += "'edgeinfer.text.grammar' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# -- a trained model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(data_file: Callable[[str], Path]) -> Iterator[LLM]:
    with LLM(data_file("models/SmolLM2-135M-Instruct.Q4_1.gguf"), n_ctx=1024) as llm:
        yield llm


def _named(**properties: Any) -> dict[str, Any]:
    made = {"type": "object", "properties": properties, "required": list(properties)}
    return {**made, "additionalProperties": False}


TEXT, NUMBER, WHOLE = {"type": "string", "maxLength": 40}, {"type": "number"}, {"type": "integer"}
LIST = {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 4}
TREE = {"$ref": "#/$defs/node", "$defs": {"node": _named(
    name=TEXT, children={"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
)}}  # fmt: skip
TRAINED: dict[str, Any] = {
    "flat": _named(name=TEXT, age={"type": "integer", "minimum": 0, "maximum": 150}),
    "nested": _named(person=_named(name=TEXT, home=_named(street=TEXT, city=TEXT))),
    "enum": _named(colour={"enum": ["red", "green", "blue"]}, size={"enum": [1, 2, None]}),
    "union": _named(value={"anyOf": [WHOLE, TEXT, {"type": "null"}]}),
    "types": _named(value={"type": ["string", "null"], "maxLength": 20}),
    "list": _named(items=LIST),
    "list of objects": _named(rows={"type": "array", "items": _named(x=WHOLE, y=WHOLE),
                                    "minItems": 2, "maxItems": 3}),
    "tuple": {"type": "array", "prefixItems": [TEXT, WHOLE], "items": False, "minItems": 2},
    "pattern": _named(phone={"type": "string", "pattern": r"^\([0-9]{3}\) [0-9]{3}-[0-9]{4}$"}),
    "part of a pattern": _named(code={"type": "string", "pattern": "[A-Z]{3}", "maxLength": 10}),
    "date": _named(born={"type": "string", "format": "date"}),
    "time": _named(at={"type": "string", "format": "date-time"}),
    "numbers": _named(half={"type": "number", "minimum": 0, "maximum": 1}, by={"multipleOf": 5,
                      "type": "integer", "minimum": 0, "maximum": 100}),
    "optional": {"type": "object", "properties": {"a": WHOLE, "b": TEXT}, "minProperties": 1,
                 "additionalProperties": False},
    "map": {"type": "object", "patternProperties": {"^[A-Z][a-z]{1,8}$": {"type": "integer",
            "minimum": 0, "maximum": 150}}, "additionalProperties": False, "maxProperties": 3},
    "recursion": TREE,
    "expression": {"$ref": "#/$defs/e", "$defs": {"e": {"anyOf": [WHOLE, _named(
        op={"enum": ["+", "*"]}, left={"$ref": "#/$defs/e"}, right={"$ref": "#/$defs/e"})]}}},
    "tagged": {"oneOf": [_named(kind={"const": "cat"}, lives=WHOLE),
                         _named(kind={"const": "dog"}, name=TEXT)]},
    "all of": {"allOf": [{"type": "object", "properties": {"a": WHOLE}, "required": ["a"]},
                         {"properties": {"b": TEXT}, "required": ["b"]}],
               "maxProperties": 2},
    "scalar": {"enum": ["yes", "no", "maybe"]},
}  # fmt: skip
IN_CI = ("nested", "pattern", "tagged")


# A small model repeats itself for ever where nothing bounds a value, so it is told what to write.
COPIED = {
    "recursion": '{"name": "Ann", "children": [{"name": "Ben", "children": []}]}',
    "expression": '{"op": "+", "left": 1, "right": {"op": "*", "left": 2, "right": 3}}',
}
EXAMPLE = "Make up an example, as JSON: someone called Ann, and her family."


def _check(llm: LLM, name: str, seed: int) -> None:
    schema = TRAINED[name]
    prompt = f"Copy this JSON: {COPIED[name]}" if name in COPIED else EXAMPLE
    answer = llm.chat(prompt, schema=schema, seed=seed, max_tokens=500)
    assert answer.finish_reason == "stop", answer.text
    found = json.loads(answer.text)
    jsonschema.validate(found, schema, format_checker=jsonschema.FormatChecker(["date"]))
    assert name != "time" or re.fullmatch(r"[0-9-]{10}T[0-9:.]{8,}(Z|[+-][0-9:]{5})", found["at"])


@pytest.mark.parametrize("name", IN_CI)
def test_a_trained_model_answers_by_a_schema(trained: LLM, name: str) -> None:
    _check(trained, name, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_model_answers_by_every_schema(trained: LLM, name: str) -> None:
    assert len(TRAINED) == 20
    for seed in range(5):
        _check(trained, name, seed)
