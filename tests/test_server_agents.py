"""What agents send, in their forms and our words: a turn reads only what is new to the model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeinfer.server.prefix_care import steady
from edgeinfer.text.chat import ChatTemplate

from .server_for_tests import LOAD, N_CTX, Running, running, small_model

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
SHELL = {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]}
SYSTEM = "You mend programs in the folder that you are in. Say little and look twice. " * 8
PAGE = 32


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With real answers, and pages that later prompts begin with."""
    path = small_model(tmp_path_factory.mktemp("agents"))
    with running([("tiny", path)], load=dict(LOAD, device="cpu", slots=4)) as found:
        yield found


# -- lines that change ----------------------------------------------------------------------------


def claude(turn: int, header: str, *more: Any) -> dict[str, Any]:
    """A request as Claude Code makes it: a header of its own before its rules."""
    return {
        "model": "claude-x", "max_tokens": 3, "temperature": 0,
        "system": [
            {"type": "text", "text": header},
            {"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral"}},
        ],
        "messages": [{"role": "user", "content": "Why does the second test fail?"}, *more],
        "tools": [{"name": "shell", "description": "Runs a command.", "input_schema": SHELL}],
        "thinking": {"type": "adaptive"}, "metadata": {"user_id": f"user_1_session_{turn // 9}"},
    }  # fmt: skip


def test_a_header_that_changes_costs_nothing(cached: Running) -> None:
    def ask(i: int, *more: Any) -> Any:
        header = f"x-anthropic-billing-header: cc_version=2.1.{i}; cch={i * 7919:05x};"
        return cached.post(MESSAGES, claude(i, header, *more)).json()

    first = ask(1)
    usage = first["usage"]
    n_first = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert n_first > 300
    call = {"type": "tool_use", "id": "toolu_123456789", "name": "shell", "input": {"cmd": "ls"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_123456789", "content": "a.py b.py"}
    second = ask(
        2,
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
        {"role": "system", "content": "Token usage: 1200/200000; 198800 remaining"},
    )["usage"]
    assert second["cache_read_input_tokens"] >= n_first
    assert second["input_tokens"] < 160


@pytest.mark.parametrize(
    "line",
    [
        "Token usage: {}234/200000; {}766 remaining",
        "You have {}01,234 tokens left in this window.",
        "Current time is 12:0{}:5{}.",
        "The current date and time: 2026-11-28 09:1{}",
    ],
)
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_a_line_that_changes_costs_the_last_turn(cached: Running, line: str, path: str) -> None:
    """It says what it said, behind the history instead of before it."""
    question = f"Which of them is slow? {line} {path}"

    def ask(i: int, *more: Any) -> tuple[int, int]:
        told = [{"role": "system", "content": f"{line.format(i, i)}\n{SYSTEM}"}]
        told += [{"role": "user", "content": question}, *more]
        if path == CHAT:
            usage = cached.post(path, {"messages": told, "max_tokens": 3}).json()["usage"]
            return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
        usage = cached.post(path, {"input": told, "max_output_tokens": 3}).json()["usage"]
        return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]

    n_first, _ = ask(1)
    reminder = 2 * len("\n\n<system-reminder>\n\n</system-reminder>[assistant]") + len(line)
    _, n_cached = ask(2, {"role": "assistant", "content": "b"}, {"role": "user", "content": "?"})
    assert n_cached >= n_first - reminder > 500


def test_what_is_moved_and_what_is_not() -> None:
    def moved(system: str, *more: Any) -> list[str]:
        user = {"role": "user", "content": "hi"}
        return [m["content"] for m in steady([{"role": "system", "content": system}, user, *more])]

    told = "hi\n\n<system-reminder>\nTokens left: 5\n</system-reminder>"
    assert moved("rules\nTokens left: 5\nmore") == ["rules\nmore", told]
    assert moved("Tokens left: 5") == [told]
    assert moved("X-Anthropic-Billing-Header: cch=1;\n\nrules") == ["rules", "hi"]
    for system in (
        "You may use 200000 tokens. Say so when few are left.",  # it is a rule
        "Ask for the current time, and for tokens left, where it matters.",  # no number
        "Tokens left: " + "5" * 300,  # no line of a counter
        "rules",
    ):
        assert moved(system) == [system, "hi"]
    begun = {"role": "assistant", "content": "Well,"}  # an answer to go on with
    assert moved("rules\nTokens left: 5", begun) == ["rules\nTokens left: 5", "hi", "Well,"]
    untouched = [{"role": "user", "content": "Tokens left: 5"}]
    assert steady(untouched) == untouched and steady([]) == []


def test_prompts_can_be_left_as_they_are_sent(tmp_path: Path) -> None:
    header = "x-anthropic-billing-header: cch=1;"
    path = small_model(tmp_path)
    with running([("tiny", path)], has_prefix_care=False) as found:
        with found.replying("x") as prompts:
            found.post(MESSAGES, claude(1, header))
        assert header in prompts[0]
        sent: Any = [
            {"role": "system", "content": "Tokens left: 5"},
            {"role": "user", "content": "x"},
        ]
        shown = found.post("/apply-template", {"messages": sent}).json()["prompt"]
        assert shown == "[system]Tokens left: 5[user]x[assistant]"


STRICT = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system speaks first') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
NO_SYSTEM = STRICT.replace(" and not loop.first", "")


@pytest.mark.parametrize(
    ("source", "front"), [(STRICT, "<system>S<user>a"), (NO_SYSTEM, "<user>S\na")]
)
def test_what_the_system_says_later_stays_in_its_place(source: str, front: str) -> None:
    """Nothing before it changes, also where a template has the system speak first alone."""
    chat: Any = [
        {"role": "system", "content": "S"}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"}, {"role": "system", "content": "late"},
    ]  # fmt: skip
    template = ChatTemplate(source)
    try:
        begun = template.render(chat[:3])
        whole = template.render(chat)
    finally:
        template.close()
    assert begun == f"{front}<assistant>b" and whole.startswith(begun)
    assert whole == f"{begun}<user><system-reminder>\nlate\n</system-reminder>"


# -- beginnings that are kept ---------------------------------------------------------------------


@pytest.mark.parametrize("family", [{}, {"arch": "qwen35", "n_layers": 4}], ids=["llama", "qwen35"])
@pytest.mark.parametrize("hint", ["none", "key", "header", "tools"])
def test_side_requests_leave_a_session_alone(tmp_path: Path, family: Any, hint: str) -> None:
    """On a plan so small that titles would take its place, had it no hint."""
    path = small_model(tmp_path, **family)
    tool = {"type": "function", "function": {"name": "shell", "parameters": SHELL}}
    more: Any = {"key": {"prompt_cache_key": "s"}, "tools": {"tools": [tool]}}.get(hint, {})
    headers = {"session-id": "s"} if hint == "header" else {}
    load: Any = dict(LOAD, n_ctx=1024, slots=1, kept_tokens=256, device="cpu")
    with running([("tiny", path)], load=load) as found:

        def ask(messages: Any, **fields: Any) -> Any:
            body = {"messages": messages, "max_tokens": 1, "temperature": 0, **fields}
            reply = found.post(CHAT, body, headers=headers if "title" not in str(messages) else {})
            return reply.json()

        session = [{"role": "user", "content": "Where is the fault? " * 22}]
        first = ask(session, **more)
        for i in range(4):
            ask([{"role": "user", "content": f"{i} give it a title " * 16}])
        answer = first["choices"][0]["message"]["content"] or ""
        session += [{"role": "assistant", "content": answer}, {"role": "user", "content": "and?"}]
        usage = ask(session, **more)["usage"]
    n_cached, n_first = (
        usage["prompt_tokens_details"]["cached_tokens"],
        first["usage"]["prompt_tokens"],
    )
    if hint == "none":
        assert n_cached < n_first // 2
    else:
        assert n_cached >= n_first - len("[assistant]")


# -- how much of a prompt was not read ------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "find"),
    [
        (CHAT, {"messages": 0}, lambda r: (
            r["usage"]["prompt_tokens"], r["usage"]["prompt_tokens_details"]["cached_tokens"])),
        ("/v1/completions", {"prompt": 0, "max_tokens": 2}, lambda r: (
            r["usage"]["prompt_tokens"], r["usage"]["prompt_tokens_details"]["cached_tokens"])),
        (RESPONSES, {"input": 0, "max_output_tokens": 2}, lambda r: (
            r["usage"]["input_tokens"], r["usage"]["input_tokens_details"]["cached_tokens"])),
        (MESSAGES, {"messages": 0}, lambda r: (
            r["usage"]["input_tokens"] + r["usage"]["cache_read_input_tokens"],
            r["usage"]["cache_read_input_tokens"])),
    ],
)  # fmt: skip
def test_each_api_tells_it(
    cached: Running, path: str, body: Any, find: Callable[[Any], tuple[int, int]]
) -> None:
    text = f"Tell me of {path}. " * 10
    values = {"prompt": text, "input": text, "messages": [{"role": "user", "content": text}]}
    body = {name: values.get(name, value) for name, value in body.items()}
    body = {"max_tokens": 2, "temperature": 0, "model": "tiny"} | body
    first, second = (find(cached.post(path, body).json()) for _ in range(2))
    assert first[0] == second[0] > 150
    assert first[1] < PAGE and second[1] >= first[0] - 1


def test_ollama_counts_the_whole_prompt(cached: Running) -> None:
    """However much of it was read before, as Ollama does."""
    body = {"model": "tiny", "prompt": "Once upon a time there was a count. " * 9, "stream": False}
    body |= {"options": {"num_predict": 2}}
    first, second = (cached.post("/api/generate", body).json() for _ in range(2))
    assert first["prompt_eval_count"] == second["prompt_eval_count"] > 250


# -- Codex ----------------------------------------------------------------------------------------


def message(role: str, text: str, number: int) -> dict[str, Any]:
    part = {"type": "input_text", "text": text}
    return {"type": "message", "id": f"msg_{number}", "role": role, "content": [part]}


CODEX: dict[str, Any] = {
    "model": "tiny", "stream": True, "tool_choice": "auto", "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"}, "store": False, "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "01a2-thread", "client_metadata": {"session_id": "01a2-thread"},
    "input": [
        message("developer", "You write and mend programs.", 1),
        message("developer", "<skills_instructions>none</skills_instructions>", 2),
        message("user", "<environment_context><cwd>/w</cwd></environment_context>", 3),
        message("user", "say hello", 4),
    ],
    "tools": [
        {"type": "function", "name": "exec_command", "description": "Runs it.", "strict": False,
         "parameters": SHELL},
        {"type": "namespace", "name": "agents", "description": "Others.", "tools": [
            {"type": "function", "name": "spawn_agent", "parameters": {"type": "object"}}]},
        {"type": "web_search", "external_web_access": False},
    ],
}  # fmt: skip
HEADERS = {
    "session-id": "01a2-thread", "thread-id": "01a2-thread", "originator": "codex_exec",
    "x-codex-window-id": "01a2-thread:0", "accept": "text/event-stream",
    "accept-encoding": "zstd,gzip",
}  # fmt: skip


def test_codex_calls_a_tool_and_goes_on(server: Running) -> None:
    """Both requests of a turn as Codex 0.171 makes them, and what it needs of the replies."""
    call = '<tool_call>\n{"name": "exec_command", "arguments": {"cmd": "echo hi"}}\n</tool_call>'
    with server.replying(f"<think>\nI try it.\n</think>\n\n{call}", "It said hi.") as prompts:
        first = server.post(RESPONSES, CODEX, headers=HEADERS)
        assert first.headers["content-type"].startswith("text/event-stream")
        items = [each["item"] for each in _events(first.text, "response.output_item.done")]
        thought, called = items
        assert (thought["type"], called["type"]) == ("reasoning", "function_call")
        assert called["name"] == "exec_command" and called["arguments"] == '{"cmd": "echo hi"}'
        (ended,) = _events(first.text, "response.completed")
        assert ended["response"]["id"] and ended["response"]["usage"]["total_tokens"]
        second = copy.deepcopy(CODEX)
        second["input"] += [
            {**thought, "encrypted_content": None},
            {key: called[key] for key in ("type", "status", "id", "name", "arguments", "call_id")},
            {"type": "function_call_output", "id": "fco_1", "call_id": called["call_id"],
             "output": "Chunk ID: 1\nhi\n"},
        ]  # fmt: skip
        done = server.post(RESPONSES, second, headers=HEADERS)
        (said,) = _events(done.text, "response.output_item.done")
        assert said["item"]["content"][0]["text"] == "It said hi."
    tools = "exec_command" in prompts[0] and "spawn_agent" in prompts[0]
    assert tools and "web_search" not in prompts[0]
    assert prompts[0].count("[system]") == 1
    assert prompts[1].startswith(prompts[0])  # so that all of it is in the cache
    assert '(I try it.)exec_command{"cmd": "echo hi"}' in prompts[1]
    assert prompts[1].endswith("[tool]Chunk ID: 1\nhi\n[assistant]")


def test_codex_learns_that_its_context_is_full(server: Running) -> None:
    long = copy.deepcopy(CODEX)
    long["input"].append(message("user", "x" * N_CTX, 5))
    reply = server.post(RESPONSES, long, headers=HEADERS)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"


def _events(text: str, kind: str) -> list[Any]:
    frames = [frame.split("\n") for frame in text.removesuffix("\n\n").split("\n\n")]
    found = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    return [each for each in found if each["type"] == kind]
