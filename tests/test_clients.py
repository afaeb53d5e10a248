"""Clients that people use, each in a conversation with a tool: a call, its result, an answer.

And those that ask for answers of a type, or for embeddings.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeinfer.options import LoadOptions

from .server_for_tests import LOAD, Running, running, small_model

pytestmark = [pytest.mark.slow, pytest.mark.network]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
ANSWER = "It is sunny."
# None of them is to look for prices or to report to its maker.
QUIET = {
    **os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "LANGSMITH_TRACING": "false",
}  # fmt: skip
PACKAGES = (
    "langchain-openai", "langchain-anthropic", "langchain-ollama", "litellm", "openai-agents",
    "instructor", "pydantic-ai-slim[openai]",
)  # fmt: skip

LANGCHAIN = """
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool

@tool
def weather(city: str) -> str:
    "Says what the weather is."
    return f"sunny in {city}"

def talk(model):
    model = model.bind_tools([weather])
    messages = [HumanMessage("How is the weather?")]
    first = sum_up(model.stream(messages))
    (call,) = first.tool_calls
    assert call["args"] == {"city": "Köln"}, call
    messages += [first, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])]
    return model.invoke(messages).text

def sum_up(chunks):
    whole = None
    for chunk in chunks:
        whole = chunk if whole is None else whole + chunk
    return whole
"""
SCRIPTS = {
    "langchain-openai": LANGCHAIN + """
from langchain_openai import ChatOpenAI
print(talk(ChatOpenAI(model="m", base_url=URL + "/v1", api_key="x")))
""",
    "langchain-openai responses": LANGCHAIN + """
from langchain_openai import ChatOpenAI
print(talk(ChatOpenAI(model="m", base_url=URL + "/v1", api_key="x", use_responses_api=True)))
""",
    "langchain-anthropic": LANGCHAIN + """
from langchain_anthropic import ChatAnthropic
print(talk(ChatAnthropic(model="m", base_url=URL, api_key="x")))
""",
    "langchain-ollama": LANGCHAIN + """
from langchain_ollama import ChatOllama
print(talk(ChatOllama(model="tiny", base_url=URL)))
""",
    "litellm": """
import json, litellm
schema = {"type": "object", "properties": {"city": {"type": "string"}}}
function = {"name": "weather", "parameters": schema}
asked = dict(model="openai/m", api_base=URL + "/v1", api_key="x",
             tools=[{"type": "function", "function": function}])
messages = [{"role": "user", "content": "How is the weather?"}]
first = litellm.completion(messages=messages, **asked).choices[0].message
(call,) = first.tool_calls
assert json.loads(call.function.arguments) == {"city": "Köln"}
messages += [first.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
chunks = litellm.completion(messages=messages, stream=True, **asked)
print("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
""",
    "openai-agents": """
import asyncio
from agents import Agent, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI
set_tracing_disabled(True)

@function_tool
def weather(city: str) -> str:
    assert city == "Köln"
    return "sunny"

client = AsyncOpenAI(base_url=URL + "/v1", api_key="x")
agent = Agent("a", tools=[weather], model=OpenAIResponsesModel("m", client))
print(asyncio.run(Runner.run(agent, "How is the weather?")).final_output)
""",
    "pydantic-ai": """
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
agent = Agent(OpenAIChatModel("m", provider=OpenAIProvider(base_url=URL + "/v1", api_key="x")))

@agent.tool_plain
def weather(city: str) -> str:
    assert city == "Köln"
    return "sunny"

print(agent.run_sync("How is the weather?").output)
""",
    "instructor": """
import instructor, openai
from pydantic import BaseModel

class weather(BaseModel):
    city: str

bare = openai.OpenAI(base_url=URL + "/v1", api_key="x")
client = instructor.from_openai(bare, mode=instructor.Mode.TOOLS)
asked = dict(model="m", messages=[{"role": "user", "content": "Where?"}])
assert client.chat.completions.create(response_model=weather, **asked).city == "Köln"
print(bare.chat.completions.create(**asked).choices[0].message.content)
""",
}  # fmt: skip


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter with the clients; EDGEINFER_TEST_CLIENTS names one that is there already."""
    if there := os.environ.get("EDGEINFER_TEST_CLIENTS"):
        return there
    folder = tmp_path_factory.mktemp("clients")
    venv.create(folder, with_pip=True)
    python = str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True, timeout=1800)
    return python


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running([("tiny", small_model(tmp_path_factory.mktemp("clients")))]) as found:
        yield found


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_client_calls_a_tool(served: Running, python: str, tmp_path: Path, name: str) -> None:
    script = tmp_path / "talk.py"
    script.write_text(f"URL = {served.url!r}\n{SCRIPTS[name]}", encoding="utf-8")
    with served.replying(CALL, ANSWER) as prompts:
        done = subprocess.run(
            [python, script], env=QUIET, capture_output=True, text=True, timeout=120
        )
    print(done.stderr[-3000:], file=sys.stderr)
    assert done.stdout.strip() == ANSWER
    assert len(prompts) == 2 and (name == "instructor" or "sunny" in prompts[1])


# A model that knows nothing answers: whatever it says is of the type, or the client raises.
VERDICT = """
from typing import Literal
from pydantic import BaseModel, ConfigDict

class Verdict(BaseModel):
    model_config = ConfigDict(extra="forbid")  # or whoever knows nothing adds to it without end
    kind: Literal["yes", "no"]
    is_sure: bool

def check(found):
    assert isinstance(found, Verdict), found
"""
STRUCTURE = {
    "langchain-openai": """
from langchain_openai import ChatOpenAI
for is_responses in (False, True):
    model = ChatOpenAI(
        model="m", base_url=URL + "/v1", api_key="x", use_responses_api=is_responses
    )
    for method in ("json_schema", "function_calling"):
        check(model.with_structured_output(Verdict, method=method).invoke("Is it?"))
    check(model.with_structured_output(Verdict, method="function_calling", strict=True).invoke("?"))
""",
    "langchain-anthropic": """
from langchain_anthropic import ChatAnthropic
model = ChatAnthropic(model="m", base_url=URL, api_key="x")
for method in ("function_calling", "json_schema"):
    check(model.with_structured_output(Verdict, method=method).invoke("Is it?"))
""",
    "langchain-ollama": """
from langchain_ollama import ChatOllama
model = ChatOllama(model="m", base_url=URL)
check(model.with_structured_output(Verdict).invoke("Is it?"))
""",
    "litellm": """
import litellm
litellm.enable_json_schema_validation = True
messages = [{"role": "user", "content": "Is it?"}]
for model, base in (("openai/m", URL + "/v1"), ("ollama_chat/m", URL)):
    found = litellm.completion(
        model=model, api_base=base, api_key="x", messages=messages, response_format=Verdict
    )
    check(Verdict.model_validate_json(found.choices[0].message.content))
""",
    "openai-agents": """
import asyncio
from agents import (
    Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
set_tracing_disabled(True)
called = []

@function_tool
def weather(city: Literal["Rome", "Paris"]) -> str:
    called.append(city)
    return "sunny"

client = AsyncOpenAI(base_url=URL + "/v1", api_key="x")
for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
    settings, model = ModelSettings(tool_choice="required"), kind("m", client)
    agent = Agent("a", tools=[weather], model=model, output_type=Verdict, model_settings=settings)
    check(asyncio.run(Runner.run(agent, "Is it?", max_turns=50)).final_output)
    assert called.pop()
""",
    "pydantic-ai": """
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
provider = OpenAIProvider(base_url=URL + "/v1", api_key="x")
for kind in (OpenAIChatModel, OpenAIResponsesModel):
    for output in (Verdict, NativeOutput(Verdict)):
        check(Agent(kind("m", provider=provider), output_type=output).run_sync("Is it?").output)
""",
    "instructor": """
import instructor, openai
bare = openai.OpenAI(base_url=URL + "/v1", api_key="x")
for mode in ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"):
    client = instructor.from_openai(bare, mode=instructor.Mode[mode])
    messages = [{"role": "user", "content": "Is it?"}]
    check(client.chat.completions.create(
        model="m", messages=messages, response_model=Verdict, max_retries=0
    ))
""",
}  # fmt: skip


@pytest.fixture(scope="module")
def random_answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = small_model(tmp_path_factory.mktemp("structure"))
    with running([("tiny", path)], load={"device": "cpu", "slots": 2, "n_ctx": 2048}) as found:
        yield found


@pytest.mark.parametrize("name", STRUCTURE)
def test_a_client_asks_for_a_type(
    random_answers: Running, python: str, tmp_path: Path, name: str
) -> None:
    script = tmp_path / "ask.py"
    source = f"URL = {random_answers.url!r}\n{VERDICT}{STRUCTURE[name]}print('done')\n"
    script.write_text(source, encoding="utf-8")
    done = subprocess.run([python, script], env=QUIET, capture_output=True, text=True, timeout=120)
    print(done.stderr[-3000:], file=sys.stderr)
    assert done.stdout.strip() == "done"


EMBEDDING = {
    "langchain-openai": """
from langchain_openai import OpenAIEmbeddings
model = OpenAIEmbeddings(
    model="m", base_url=URL + "/v1", api_key="x", check_embedding_ctx_length=False
)
found = model.embed_documents(TEXTS)
assert found[0] == model.embed_query(TEXTS[0])
""",
    "langchain-ollama": """
from langchain_ollama import OllamaEmbeddings
found = OllamaEmbeddings(model="m", base_url=URL).embed_documents(TEXTS)
""",
    "litellm": """
import litellm
asked = dict(api_base=URL + "/v1", api_key="x", encoding_format="float")
reply = litellm.embedding(model="openai/m", input=TEXTS, **asked)
found = [each["embedding"] for each in reply.data]
""",
    "ollama": """
import ollama
found = [list(each) for each in ollama.Client(URL).embed("m", TEXTS).embeddings]
""",
    "litellm ollama": """
import litellm
reply = litellm.embedding(model="ollama/m", input=TEXTS, api_base=URL)
found = [each["embedding"] for each in reply.data]
""",
}


@pytest.mark.parametrize("name", EMBEDDING)
def test_a_client_asks_for_embeddings(python: str, tmp_path: Path, name: str) -> None:
    texts = ["some words", "others"]
    script = tmp_path / "embed.py"
    # The reference has not the same bits for a text alone.
    load: LoadOptions = {**LOAD, "device": "cpu", "pooling": "mean"}
    head = f"import json\nURL, TEXTS = {{!r}}, {texts!r}\n"
    with running([("m", small_model(tmp_path))], load=load) as served:
        source = f"{head.format(served.url)}{EMBEDDING[name]}print(json.dumps(found))\n"
        script.write_text(source, encoding="utf-8")
        done = subprocess.run(
            [python, script], env=QUIET, capture_output=True, text=True, timeout=120
        )
        print(done.stderr[-3000:], file=sys.stderr)
        np.testing.assert_array_equal(np.float32(json.loads(done.stdout)), served.llm.embed(texts))
