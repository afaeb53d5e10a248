"""Answers and calls that must be as a request says, through each API's own client."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import ollama
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field

from edgeinfer.errors import InvalidRequestError

from .server_for_tests import Running, running, small_model

pytest.importorskip("llguidance", reason="pip install 'edgeinfer[grammar]'")

HI: Any = [{"role": "user", "content": "hi"}]
DEVICES = {"small": "reference", "real": "cpu"}


class Answer(BaseModel):
    """What a random model can say in a few tokens."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["yes", "no", 'say "maybe"']
    count: int = Field(ge=0, le=99)
    parts: list[bool] = Field(max_length=2)


class Short(BaseModel):
    """Of what Anthropic's client leaves in a schema."""

    kind: Literal["yes", "no"]
    is_sure: bool


SCHEMA = Answer.model_json_schema()
PARAMETERS = {
    "type": "object",
    "properties": {"mode": {"enum": ["on", "off"]}, "level": {"type": "integer", "maximum": 9}},
    "required": ["mode"],
    "additionalProperties": False,
}
NOT = {"type": "object", "properties": {"x": {"not": {"type": "null"}}}}


def tool(name: str = "set_lamp", parameters: Any = PARAMETERS, **more: Any) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS: Any = [tool(), tool("get-time", {"type": "object", "additionalProperties": False})]


@pytest.fixture(scope="module", params=["small", "real"])
def served(request: Any, tmp_path_factory: pytest.TempPathFactory, data_file: Any) -> Any:
    if request.param == "real":
        path = data_file("models/SmolLM2-135M-Instruct.Q4_1.gguf")
    else:
        path = small_model(tmp_path_factory.mktemp("structure"))
    load: Any = {"device": DEVICES[request.param], "slots": 2, "n_ctx": 2048}
    with running([("tiny", path)], load=load) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def claude(served: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key="x", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def llama(served: Running) -> Iterator[ollama.Client]:
    found = ollama.Client(host=served.url)
    yield found
    found._client.close()


def content(served: Running, path: str = "/v1/chat/completions", **body: Any) -> str:
    usual = {"prompt": "hi"} if path == "/v1/completions" else {"messages": HI}
    reply = served.post(path, {**usual, "max_tokens": 300, "seed": 5, **body})
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    assert choice["finish_reason"] == "stop"
    return choice.get("text") or choice["message"]["content"]


# -- answers --------------------------------------------------------------------------------------


def test_openai_parses_chats_and_responses(client: OpenAI) -> None:
    chat = client.chat.completions.parse(model="x", messages=HI, response_format=Answer, seed=1)
    assert isinstance(chat.choices[0].message.parsed, Answer)
    with client.chat.completions.stream(model="x", messages=HI, response_format=Answer) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Answer)
    response = client.responses.parse(model="x", input="hi", text_format=Answer)
    assert isinstance(response.output_parsed, Answer)
    assert response.text is not None and response.text.format is not None
    assert response.text.format.type == "json_schema"


def test_anthropic_parses_messages(claude: anthropic.Anthropic) -> None:
    message = claude.messages.parse(model="x", max_tokens=300, messages=HI, output_format=Short)
    assert isinstance(message.parsed_output, Short)
    given: Any = {"output_format": {"type": "json_schema", "schema": SCHEMA}}
    before = claude.messages.create(model="x", max_tokens=300, messages=HI, extra_body=given)
    assert before.content[0].type == "text"
    Answer.model_validate_json(before.content[0].text)


def test_ollama_takes_a_format(llama: ollama.Client) -> None:
    chat = llama.chat(model="x", messages=HI, format=SCHEMA)
    Answer.model_validate_json(chat.message.content or "")
    parts = llama.generate(model="x", prompt="hi", format=SCHEMA, stream=True)
    Answer.model_validate_json("".join(part.response for part in parts))
    raw = llama.generate(model="x", prompt="hi", raw=True, format=SCHEMA)
    Answer.model_validate_json(raw.response)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_other_servers_fields_are_known(served: Running, path: str) -> None:
    gbnf = 'root ::= ("ab" | "cd") "!"\n'
    inner = {"schema": SCHEMA, "name": "answer"}
    for body in (
        {"response_format": {"type": "json_schema", "json_schema": inner}},
        {"response_format": {"type": "json_schema", "json_schema": {**inner, "strict": True}}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"json_schema": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
    ):
        Answer.model_validate_json(content(served, path, **body))
    for body in ({"guided_choice": ["a.b", "c|d"]}, {"structured_outputs": {"choice": ["c|d"]}}):
        assert content(served, path, **body) in ("a.b", "c|d")
    assert content(served, path, guided_regex="[a-c]{3}").strip("abc") == ""
    assert content(served, path, grammar=gbnf, temperature=0.0).endswith("!")
    assert content(served, path, structured_outputs={"grammar": 'start: "x" "y"?'})[0] == "x"


def test_any_object_is_one(served: Running) -> None:
    body = {"messages": HI, "max_tokens": 40, "response_format": {"type": "json_object"}}
    reply = served.post("/v1/chat/completions", body).json()["choices"][0]
    assert reply["message"]["content"].startswith("{")
    if reply["finish_reason"] == "stop":
        assert isinstance(json.loads(reply["message"]["content"]), dict)


# -- calls ----------------------------------------------------------------------------------------


def check(name: str, arguments: Any) -> None:
    assert name in ("set_lamp", "get-time")
    if name == "set_lamp":
        assert arguments.pop("mode") in ("on", "off") and arguments.pop("level", 0) <= 9
    assert arguments == {}


def test_required_and_named_calls(client: OpenAI) -> None:
    ask: Any = {"model": "x", "messages": HI, "tools": TOOLS, "max_tokens": 200}
    for choice in ("required", {"type": "function", "function": {"name": "set_lamp"}}):
        chat = client.chat.completions.create(**ask, tool_choice=choice, parallel_tool_calls=False)
        (call,) = chat.choices[0].message.tool_calls or ()
        assert call.type == "function" and chat.choices[0].finish_reason == "tool_calls"
        check(call.function.name, json.loads(call.function.arguments))
        assert choice == "required" or call.function.name == "set_lamp"
    allowed: Any = {"mode": "required", "tools": [tool("get-time")]}
    chat = client.chat.completions.create(
        **ask, tool_choice={"type": "allowed_tools", "allowed_tools": allowed}
    )
    assert {c.function.name for c in chat.choices[0].message.tool_calls or ()} == {"get-time"}


def test_no_stop_string_ends_a_call_that_is_demanded(client: OpenAI) -> None:
    """Agents send the same ones with each request; what spells a call is no text."""
    ask: Any = {"model": "x", "messages": HI, "tools": TOOLS, "max_tokens": 200}
    named = {"type": "function", "function": {"name": "set_lamp"}}
    chat = client.chat.completions.create(**ask, tool_choice=named, stop=["\n", "<", "o", '"'])
    (call,) = chat.choices[0].message.tool_calls or ()
    assert call.type == "function" and not chat.choices[0].message.content
    check(call.function.name, json.loads(call.function.arguments))


def test_what_is_cut_off_of_a_call_that_is_demanded_is_no_text(client: OpenAI) -> None:
    ask: Any = {"model": "x", "messages": HI, "tools": TOOLS, "tool_choice": "required"}
    for n in (1, 2, 5, 9):
        chat = client.chat.completions.create(**ask, max_tokens=n)
        stream = client.chat.completions.create(**ask, max_tokens=n, stream=True)
        told = "".join(each.choices[0].delta.content or "" for each in stream if each.choices)
        assert not chat.choices[0].message.content and told == ""
        assert chat.choices[0].finish_reason == "length"


def test_responses_call_what_they_must(client: OpenAI) -> None:
    flat: Any = [{"type": "function", "strict": True, **each["function"]} for each in TOOLS]
    response = client.responses.create(
        model="x", input="hi", tools=flat, tool_choice="required", parallel_tool_calls=False
    )
    (item,) = response.output
    assert item.type == "function_call" and response.tools[0].strict
    check(item.name, json.loads(item.arguments))


def test_anthropic_calls_any_or_one(claude: anthropic.Anthropic) -> None:
    tools: Any = [{"name": each["function"]["name"], "input_schema": each["function"]["parameters"]}
                  for each in TOOLS]  # fmt: skip
    ask: Any = {"model": "x", "max_tokens": 200, "messages": HI, "tools": tools}
    for choice in ({"type": "any"}, {"type": "tool", "name": "set_lamp"}):
        message = claude.messages.create(
            **ask, tool_choice={**choice, "disable_parallel_tool_use": True}
        )
        (block,) = message.content
        assert block.type == "tool_use" and message.stop_reason == "tool_use"
        check(block.name, block.input)


def test_tools_and_a_format_give_either(served: Running, client: OpenAI) -> None:
    ask: Any = {"model": "x", "messages": HI, "tools": TOOLS, "response_format": Answer}
    for seed in range(4):
        chat = client.chat.completions.parse(
            **{**ask, "tools": [tool(strict=True)]}, seed=seed, max_tokens=250
        )
        message = chat.choices[0].message
        for call in message.tool_calls or ():
            check(call.function.name, json.loads(call.function.arguments))
        assert message.tool_calls or isinstance(message.parsed, Answer)


def test_a_strict_tool_is_called_by_its_schema(served: Running, client: OpenAI) -> None:
    """Also where the model chooses to call it; a bias makes it begin a call."""
    tokenizer = served.llm.runtime.tokenizer
    begun = {str(id): 40.0 for id in tokenizer.encode("<tool_call>", bos=False)}
    chat = client.chat.completions.create(
        model="x",
        messages=HI,
        tools=[tool(strict=True)],
        logit_bias=begun,  # type: ignore[arg-type]
        max_tokens=60,
        temperature=0.0,
    )
    for call in chat.choices[0].message.tool_calls or ():
        if chat.choices[0].finish_reason != "length":
            check(call.function.name, json.loads(call.function.arguments))


TWO_CALLS = '<tool_call>{"name": "get-time", "arguments": {}}</tool_call>' * 2


def test_one_call_at_most(served: Running) -> None:
    body = {"messages": HI, "tools": TOOLS}
    with served.replying("Well. " + TWO_CALLS):
        both = served.post("/v1/chat/completions", body).json()["choices"][0]
        one = served.post("/v1/chat/completions", {**body, "parallel_tool_calls": False}).json()
    assert len(both["message"]["tool_calls"]) == 2
    (call,) = one["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "get-time", "arguments": "{}"}
    assert one["choices"][0]["message"]["content"] == "Well."


# -- refusals -------------------------------------------------------------------------------------


def test_what_cannot_be_enforced_is_named(
    client: OpenAI, claude: anthropic.Anthropic, llama: ollama.Client
) -> None:
    named: Any = {"name": "a", "schema": NOT}
    with pytest.raises(openai.BadRequestError, match=r"'not' at \$\.properties\.x") as caught:
        client.chat.completions.create(
            model="x", messages=HI, response_format={"type": "json_schema", "json_schema": named}
        )
    assert caught.value.param == "response_format.json_schema.schema"
    text: Any = {"format": {"type": "json_schema", **named}}
    with pytest.raises(openai.BadRequestError, match="'not'") as caught:
        client.responses.create(model="x", input="hi", text=text)
    assert caught.value.param == "text.format.schema"
    output: Any = {"format": {"type": "json_schema", "schema": NOT}}
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format\.schema has 'not'"):
        claude.messages.create(model="x", max_tokens=9, messages=HI, output_config=output)
    with pytest.raises(ollama.ResponseError, match="format has 'not'"):
        llama.chat(model="x", messages=HI, format=NOT)
    with pytest.raises(openai.BadRequestError, match=r"tools\.bad\.parameters has 'not'"):
        client.chat.completions.create(
            model="x", messages=HI, tools=[tool("bad", NOT, strict=True)]
        )


def test_a_schema_that_need_not_be_kept_to_is_no_error(client: OpenAI) -> None:
    chat = client.chat.completions.create(
        model="x", messages=HI, tools=[tool("bad", NOT)], tool_choice="required", max_tokens=30
    )
    (choice,) = chat.choices  # whatever comes behind the call, or where it is cut
    assert choice.message.tool_calls or choice.finish_reason == "length"


def test_a_form_that_proves_too_large_is_told_by_its_field(served: Running) -> None:
    """Also where the answer has begun."""
    many = 'start: /[bc]/ A{600}\nA: B{30}\nB: "q7"'
    body = {"prompt": "hi", "guided_grammar": many}
    whole = served.post("/v1/completions", body)
    streamed = served.post("/v1/completions", {**body, "stream": True}).text
    events = [json.loads(each[6:]) for each in streamed.split("\n\n") if "{" in each]
    assert whole.status_code == 400
    for error in (whole.json()["error"], events[-1]["error"]):
        assert error["param"] == "guided_grammar" and error["type"] == "invalid_request_error"
        assert error["message"].startswith("guided_grammar can't be kept to: ")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "maybe", "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": {"name": "other"}, "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}, "tools": TOOLS}, "tool_choice"),
        ({"parallel_tool_calls": "no", "tools": TOOLS}, "parallel_tool_calls"),
        ({"tools": [tool("a", {"type": "string"})], "tool_choice": "required"}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"guided_regex": "(?=x)"}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a"], "grammar": 'start: "a"'}, "grammar"),
        ({"json_schema": {"type": "strin"}}, "json_schema"),
        ({"json_schema": 3}, "json_schema"),
    ],
)
def test_wrong_fields_are_named(served: Running, body: Any, param: str) -> None:
    reply = served.post("/v1/chat/completions", {"messages": HI, **body})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == param, error


@pytest.fixture
def without_llguidance(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    yield


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_object"}},
        {"tools": TOOLS, "tool_choice": "required"},
        {"tools": [tool(strict=True)]},
    ],
)
def test_what_is_missing_is_said(served: Running, without_llguidance: None, body: Any) -> None:
    reply = served.post("/v1/chat/completions", {"messages": HI, **body})
    assert reply.status_code == 400
    assert "pip install 'edgeinfer[grammar]'" in reply.json()["error"]["message"]
    assert served.post("/v1/chat/completions", {"messages": HI, "max_tokens": 1}).is_success


def test_chats_in_python_call_what_they_must(served: Running) -> None:
    llm = served.llm
    one = llm.chat("hi", tools=TOOLS, tool_choice={"name": "set_lamp"}, seed=1, max_tokens=200)
    (call,) = one.tool_calls
    check(call.name, json.loads(call.arguments))
    batch = llm.chat_batch(
        ["hi", "ho"], tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=200
    )
    assert [len(each.tool_calls) for each in batch] == [1, 1]
    with pytest.raises(InvalidRequestError, match="tool_choice names 'x'"):
        llm.chat("hi", tools=TOOLS, tool_choice={"name": "x"})
    calling: Any = {"schema": Answer, "tool_choice": "required", "parallel_tool_calls": False}
    assert llm.chat("hi", tools=TOOLS, max_tokens=200, **calling).tool_calls
