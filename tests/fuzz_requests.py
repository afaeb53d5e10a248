"""Requests that nobody means: those of every API with fields, bytes, headers and paths changed.

Knows nothing of servers.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from .test_server_fields import DEEP, HI, ODD, REQUESTS, places

CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
Random = random.Random


class Sent(NamedTuple):
    """A request as it goes out."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Literal(str):
    """A value as it is spelled, which may be no JSON."""


LITERALS = [Literal(each) for each in (
    "NaN", "-Infinity", "1e999", "1e-400", "-0", "00", "1" * 400, "-" + "9" * 5000,
    '"\\ud800"', '"\\u0000"', '{"a":1,"a":2}', "[" * 900 + "]" * 900,
    '{"a":' * 300 + "1" + "}" * 300, "18446744073709551616", '"\ufeff"', "truth", "[", '"',
)]  # fmt: skip
WORDS = [
    "", "auto", "none", "required", "json", "text", "tool", "assistant", "system", "function", "-1",
    "5m", "<|im_end|>", "\ud83d", "thinking", "tool_result", "(a|b)*", "x" * 3000,
]  # fmt: skip
NUMBERS = [0, 1, -1, 0.5, 1e-300, 1e308, -1e308, 5e-324, 2**31, 2**63, 2**64]
PATTERNS = [
    "a*", "(a|b)*c", "[a-z]{1,5}", "(", "]", "a{1000000}", "((a{100}){100}){100}", "(?=a)", "\\1",
    "\\p{L}+", "(.*a){20}", "(a?){50}a{50}", "", "\x00", "\ud800", "^a$", "a|" * 500 + "a", "(a*)*",
    "[\\s\\S]*(foo|bar)[\\s\\S]{300}",
]  # fmt: skip
GRAMMARS = [
    'start: "a"', 'root ::= "a"', "root ::= root", 'root ::= root root | "a"', "start: /(/",
    'start: ""', 'root ::= ("a" | "b"){1000000}', "start: @x", "start: <[5]>", "start: <[999999]>",
    "{}", '{"grammars":[]}', "start: A\nA: /a/{1,99999}", 'start: %json {"type":"object"}',
    "root ::= " + "(" * 2000 + '"a"' + ")" * 2000, 'start: "a"? ' * 300, "\x00", "\ud800",
    "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(3000)) + '\na3000: "x"',
]  # fmt: skip
KEYWORDS: dict[str, list[Any]] = {
    "type": ["object", "array", "string", "number", "integer", "null", ["string", "null"], [], "x"],
    "required": [["a"], ["zz"], [], ["a", "a"], [1], "a"],
    "enum": [[], ["a", "b"], [1, 1.0, True], [None], [{"a": [1]}], list(range(500))],
    "const": [1, "a", None, {"a": 1}], "pattern": PATTERNS, "minimum": NUMBERS, "maximum": NUMBERS,
    "multipleOf": NUMBERS, "minLength": NUMBERS, "maxItems": NUMBERS, "minItems": NUMBERS,
    "format": ["date", "email", "uuid", "ipv6", "bogus", 5], "default": [1],
    "$ref": ["#", "#/$defs/a", "#/properties/a", "#/", "x", 5, "http://example.com/x"],
    "x-guidance": [{"lenient": True}, {"whitespace_pattern": "("}, 5],
}  # fmt: skip
OF_SCHEMAS = ("items", "additionalProperties", "not", "if", "then", "propertyNames", "contains")
HEADERS: dict[str, list[str]] = {
    "content-type": ["text/plain", "application/json; charset=utf-16", "multipart/form-data", ""],
    "content-encoding": ["gzip", "identity", "Identity", "", "br"],
    "anthropic-version": ["2023-06-01"], "session-id": ["a", "\xff", "x" * 1000],
    "inference-header-content-length": ["5", "0", "-1", "x", "99999999999999", "\xb2"],
    "accept": ["text/event-stream", "x"], "expect": ["100-continue", "x"],
    "origin": ["http://localhost:3000", "null"],
    "authorization": ["Bearer", "Bearer x", "Basic eA=="],
}  # fmt: skip
ENDS = ("", "/", "//", "?x=1", "?model=%ff", "/%00", "/../x", "%2f")
METHODS = ("POST",) * 40 + ("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE")


def asked(seed: int) -> Sent:
    """The request of a number."""
    rng = Random(seed)
    path, body = rng.choice(MAKERS)(rng)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
        _change(rng, body)
    data = spelled(rng, body).encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:
        i = rng.randrange(len(data))
        data = data[:i] + rng.randbytes(rng.randrange(3)) + data[i + rng.randrange(2) :]
    if rng.random() < 0.02:
        data = data[: rng.randrange(len(data) + 1)]
    names = [name for name in HEADERS if rng.random() < 0.04]
    if rng.random() < 0.03:
        path = path.removeprefix("/v1") + rng.choice(ENDS)
    headers = {name: rng.choice(HEADERS[name]) for name in names}
    return Sent(rng.choice(METHODS), path, headers, data)


def spelled(rng: Random, value: Any) -> str:
    """JSON, with literals as they are and, now and then, a name twice."""
    if isinstance(value, Literal):
        return str(value)
    if isinstance(value, dict):
        members = [f"{json.dumps(name)}: {spelled(rng, each)}" for name, each in value.items()]
        if members and rng.random() < 0.02:
            members.append(rng.choice(members))
        return "{" + ", ".join(members) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(spelled(rng, each) for each in value) + "]"
    return json.dumps(value, ensure_ascii=rng.random() < 0.5)


def _change(rng: Random, body: Any) -> None:
    """Something else in one of its places, or nothing."""
    found = list(places(body))
    if not found:
        return
    at = rng.choice(found)
    inner = body
    for key in at[:-1]:
        inner = inner[key]
    if rng.random() < 0.15:
        del inner[at[-1]]
    else:
        of = rng.choice((ODD[:-4], LITERALS, WORDS, NUMBERS))
        inner[at[-1]] = copy.deepcopy(rng.choice(of))


# -- what is changed ------------------------------------------------------------------------------

Made = tuple[str, Any]


def schema(rng: Random, depth: int = 0) -> Any:
    """One that may be none."""
    if depth > 4 or rng.random() < 0.15:
        return rng.choice([True, False, {}, {"type": "string"}, {"$ref": "#"}, {"$ref": "#/x"}])
    made: dict[str, Any] = {}
    for _ in range(rng.randrange(1, 4)):
        kind = rng.randrange(4)
        if kind == 0:
            names = rng.sample(["a", "b", "", "é", "\ud800", "$ref", "^x", "("], rng.randrange(3))
            where = rng.choice(["properties", "$defs", "patternProperties"])
            made[where] = {name: schema(rng, depth + 1) for name in names}
        elif kind == 1:
            several = [schema(rng, depth + 1) for _ in range(rng.randrange(4))]
            made[rng.choice(["anyOf", "oneOf", "allOf", "prefixItems"])] = several
        elif kind == 2:
            made[rng.choice(OF_SCHEMAS)] = schema(rng, depth + 1)
        else:
            name = rng.choice(list(KEYWORDS))
            made[name] = copy.deepcopy(rng.choice(KEYWORDS[name]))
    return made


def _usual(rng: Random) -> Made:
    return copy.deepcopy(rng.choice(REQUESTS))


def _form(rng: Random) -> Made:
    found, asks = schema(rng), {"messages": HI, "max_tokens": 8}
    form = {"type": "json_schema", "schema": found}
    return rng.choice([
        (CHAT, {**asks, "response_format": {"type": "json_schema", "json_schema": form}}),
        (MESSAGES, {**asks, "output_config": {"format": form}}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 8, "text": {"format": form}}),
        ("/api/chat", {"model": "tiny", **asks, "format": found, "options": {"num_predict": 8}}),
        (TEXT, {"prompt": "a", "max_tokens": 8, "guided_regex": rng.choice(PATTERNS)}),
        (TEXT, {"prompt": "a", "max_tokens": 8, "guided_grammar": rng.choice(GRAMMARS)}),
        (CHAT, {**asks, "structured_outputs": {"choice": rng.sample(WORDS, 3)}}),
    ])  # fmt: skip


def _tools(rng: Random) -> Made:
    names = rng.choices(["f", "é", "a b", '"', "x" * 200, "\n", "f-1", "<|im_end|>"], k=2)
    function = {"name": names[0], "parameters": schema(rng), "strict": rng.random() < 0.5}
    tools = [{"type": "function", "function": function}, {"type": "custom", "name": names[1]}]
    named = {"type": "function", "function": {"name": "f"}}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"name": "f"}]}
    choice = rng.choice(["auto", "required", "none", "any", named, allowed])
    asks = {"messages": HI, "max_tokens": 8, "stream": rng.random() < 0.5}
    return rng.choice([
        (CHAT, {**asks, "tools": tools, "tool_choice": choice, "parallel_tool_calls": False}),
        (CHAT, {**asks, "functions": [function], "function_call": {"name": "f"}}),
        (MESSAGES, {**asks, "tools": [{"name": "f", "input_schema": function["parameters"]}],
                    "tool_choice": {"type": rng.choice(["auto", "any", "tool", "none"])}}),
    ])  # fmt: skip


def _talk(rng: Random) -> Made:
    arguments = ["{}", {}, "[1]", "null", "{'a':1", "5", {"a": {"b": [None]}}, '{"a":1e999}', DEEP]
    said = []
    for _ in range(rng.randrange(6)):
        turn: dict[str, Any] = {"role": rng.choice(WORDS[3:9]), "content": rng.choice(WORDS)}
        if rng.random() < 0.3:
            called = {"name": rng.choice(["f", "", None]), "arguments": rng.choice(arguments)}
            turn["tool_calls"] = [{"id": rng.choice(["1", "", None, 5]), "function": called}]
        for name, value in (("tool_call_id", "1"), ("name", "n"), ("prefix", True)):
            if rng.random() < 0.15:
                turn[name] = value
        said.append(turn)
    more = {"continue_final_message": rng.random() < 0.2, "stream": rng.random() < 0.5}
    body = {"model": "tiny", "messages": said, "max_tokens": 4, **more}
    return rng.choice([CHAT, "/apply-template", MESSAGES, "/api/chat"]), body


def _sampled(rng: Random) -> Made:
    names = ("temperature", "top_p", "top_k", "min_p", "typical_p", "mirostat", "mirostat_tau",
             "repeat_penalty", "repeat_last_n", "presence_penalty", "dry_multiplier", "dry_base",
             "dynatemp_range", "xtc_probability", "xtc_threshold", "top_n_sigma", "min_keep",
             "seed", "n", "logprobs", "max_tokens", "stop", "logit_bias", "stream",
             "echo")  # fmt: skip
    values = [*NUMBERS, True, "x", {"5": 1e308}, {"-1": 5}, ["a"], ""]
    kept = rng.sample(names, rng.randrange(1, 6))
    return TEXT, {"prompt": "hello", "max_tokens": 8} | {n: rng.choice(values) for n in kept}


def _texts(rng: Random) -> Made:
    given = rng.choice(["a", ["a", "b"], [1, 2], [[1], [2]], [], [""], [[]], [[10**9]], "x" * 2000,
                        ["a", [1]], "\ud800", None, ["a"] * 200])  # fmt: skip
    path = rng.choice(["/v1/embeddings", "/api/embed", TEXT, "/tokenize", "/detokenize"])
    names = ("input", "prompt", "content", "tokens")
    return path, {"model": "tiny", "max_tokens": 2, **dict.fromkeys(names, given)}


def _named(rng: Random) -> Made:
    path = rng.choice(["/api/chat", "/api/generate", "/api/show", "/models/load", "/models/unload",
                       "/api/v1/models/load", "/api/v1/models/unload", "/api/pull"])  # fmt: skip
    name = rng.choice(["tiny", "x", "", None, "../../etc/passwd", "a/b:Q4", "\x00", "x" * 5000])
    kept = rng.choice([None, 0, -1, "5m", "x", 1e308, "999999999999h", ".5s"])
    return path, {"model": name, "keep_alive": kept, "messages": [], "stream": rng.random() < 0.5}


def _tensors(rng: Random) -> Made:
    shape = rng.choice([[1], [2], [0], [1, 1], [-1], [2**31], [], "x", [1.0]])
    data = rng.choice([["a"], ["a", "b"], [["a"]], [], "a", [1], [None]])
    given = {"name": "text_input", "datatype": "BYTES", "shape": shape, "data": data}
    end = rng.choice(["infer", "generate", "generate_stream"])
    body = {"text_input": rng.choice(["a", "", ["a"], []]), "inputs": [given] * rng.choice([1, 2])}
    return f"/v2/models/tiny/{end}", {**body, "parameters": {"max_tokens": 2}}


MAKERS: tuple[Callable[[Random], Made], ...] = (
    _usual, _usual, _form, _tools, _talk, _sampled, _texts, _named, _tensors,
)  # fmt: skip
