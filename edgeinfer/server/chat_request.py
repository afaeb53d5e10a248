"""The body of a chat completion to a request; other endpoints take chats in this form, too."""

from __future__ import annotations

from typing import Any

from edgeinfer.server.custom_tools import as_arguments
from edgeinfer.server.errors import Json
from edgeinfer.server.fields import Fields
from edgeinfer.server.openai import (
    count_of,
    sampling_of,
    template_args,
    text_content,
    tools_of,
)
from edgeinfer.server.requests import Chat, Request, conversation, function_tool
from edgeinfer.server.structure import of_chat

_MOST_LOGPROBS = 128
_NOT_HERE = {
    "chat_template": "the model's own is used; serve --chat-template takes another",
    "echo": "an answer is what follows a conversation",
}


def read_chat(body: Fields) -> Request:
    body.refuse(_NOT_HERE)
    sampling = sampling_of(body, "max_completion_tokens", "max_tokens", "n_predict")
    if body.flag("logprobs", bool(body.get("top_logprobs"))):
        sampling["logprobs"] = body.integer("top_logprobs", 0, 0, _MOST_LOGPROBS)
    if body.get("modalities") not in (None, [], ["text"]):
        raise body.wrong("modalities", "['text']: answers here are nothing else")
    effort = body.text("reasoning_effort") if "reasoning_effort" in body else None
    tools = tools_of(body.objects("tools"))
    tools += map(function_tool, body.objects("functions"))
    arguments = template_args(body, effort)
    if documents := body.objects("documents"):
        arguments["documents"] = [each.values for each in documents]
    chat = Chat(
        messages=conversation([_message(each) for each in body.objects("messages")]),
        tools=tools,
        tool_choice=_tool_choice(body),
        parallel_tool_calls=body.flag("parallel_tool_calls", True) and not is_of_functions(body),
        template_args=arguments,
        continues=_continues(body),
    )
    return Request(
        model=body.text("model"),
        chat=chat,
        sampling=sampling,
        structure=of_chat(body),
        n=count_of(body),
        ignores_eos=body.flag("ignore_eos"),
    )


def is_of_functions(body: Fields) -> bool:
    """Whether a client knows no tools, but functions, of which an answer calls one."""
    return "functions" in body and not body.get("tools")


def _tool_choice(body: Fields) -> Any:
    """`function_call` was its name before; a form may leave it empty."""
    given = body.get("tool_choice")
    return body.get("function_call") if given in (None, "") else given


def _continues(body: Fields) -> bool:
    """As vLLM asks for it, or Mistral and DeepSeek in the message itself."""
    last = next(reversed(body.objects("messages")), Fields({}))
    name = "continue_final_message"
    is_asked = body.flag(name)
    if is_asked and body.flag("add_generation_prompt"):
        raise body.wrong("add_generation_prompt", f"false where {name} is true")
    if not is_asked and not body.flag("add_generation_prompt", True):
        raise body.wrong("add_generation_prompt", f"true, unless {name} is")
    return is_asked or last.flag("prefix")


def _message(given: Fields) -> Json:
    message: Json = {
        "role": given.text("role"),
        "content": text_content(given.get("content"), "messages"),
    }
    if not message["role"]:
        raise given.wrong("role", "who speaks, such as 'user'")
    reasoning = given.text("reasoning_content") or given.text("reasoning")
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls := given.objects("tool_calls"):
        message["tool_calls"] = [_call(each) for each in calls]
    if "function_call" in given:
        called = given.object("function_call")
        id = called.text("name")
        message["tool_calls"] = [_call(Fields({"id": id, "function": called.values}))]
    for name in ("name", "tool_call_id"):
        if name in given:
            message[name] = given.text(name)
    if message["role"] == "function":  # of which there was one at a time, known by its name
        message |= {"role": "tool", "tool_call_id": given.text("name")}
    return message


def _call(given: Fields) -> Json:
    function = given.object("function")
    arguments = function.get("arguments")
    if "custom" in given:  # of a tool that takes a text
        function = given.object("custom")
        arguments = as_arguments(function.text("input"))
    return {
        "id": given.text("id"),
        "type": "function",
        "function": {
            "name": function.text("name"),
            "arguments": arguments
            if isinstance(arguments, dict)
            else function.text("arguments", "{}"),
        },
    }
