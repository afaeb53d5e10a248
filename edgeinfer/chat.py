"""Messages to prompt text through the model's chat template, and replies into reasoning and text.

Knows nothing of how tokens are made, only of something that turns marked text into ids.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from typing_extensions import Required, TypedDict

from .errors import InvalidModelError, InvalidRequestError, TemplateError

if TYPE_CHECKING:
    from jinja2 import Template

_TEMPLATE_KEY = "tokenizer.chat_template"
_RESERVED = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")


@runtime_checkable
class _LazyArray(Protocol):
    def tolist(self) -> list[Any]: ...


class Message(TypedDict, total=False):
    """One turn, in the form that chat APIs share."""

    role: Required[str]
    content: Required[str | Sequence[Mapping[str, Any]] | None]
    reasoning_content: str
    name: str
    tool_calls: Sequence[Mapping[str, Any]]
    tool_call_id: str


class ChatTokenizer(Protocol):
    """What `encode_chat` asks of a tokenizer."""

    special_texts: tuple[str, ...]

    def encode_marked(
        self, text: str, restore: Mapping[int, str | None], *, bos: bool | None = None
    ) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a template can do with a conversation, found by rendering some."""

    system_role: bool
    string_content: bool
    typed_content: bool
    object_arguments: bool


class ChatTemplate:
    """A chat template; `tool_source` is the one to use when tools are given."""

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        name: str = "",
        tool_source: str | None = None,
    ) -> None:
        self.source, self.name = source, name
        self.bos_token, self.eos_token = bos_token, eos_token
        self._for_tools: ChatTemplate | None = None
        if tool_source is not None:
            self._for_tools = ChatTemplate(
                tool_source, bos_token=bos_token, eos_token=eos_token, name=f"{name} tool_use"
            )

    @classmethod
    def from_metadata(cls, meta: Mapping[str, Any], override: str | None = None) -> ChatTemplate:
        """The file's template, or `override`: the name of one, or a file that holds one."""
        own = _own_templates(meta)
        texts = _token_texts(meta)
        bos, eos = (
            _special(meta, texts, "bos_token_id", 1),
            _special(meta, texts, "eos_token_id", 2),
        )
        if override is not None:
            name, source = override, _chosen(override, own)
        elif "default" in own:
            name, source = "the file's own", own["default"]
        else:
            name = _fallback_name(meta, texts)
            source = BUILT_IN[name]
        tool_source = own.get("tool_use") if override is None else None
        return cls(source, bos_token=bos, eos_token=eos, name=name, tool_source=tool_source)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_args: Any,
    ) -> str:
        """The prompt text; TemplateError names the line of the template that failed."""
        return self._render(messages, tools, add_generation_prompt, template_args, _unchanged)

    @cached_property
    def capabilities(self) -> Capabilities:
        """Found once per template, by rendering conversations that contain a needle."""
        return _probe(self._try)

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        template_args: Mapping[str, Any],
        hide: _Hide,
    ) -> str:
        if tools and self._for_tools is not None:
            return self._for_tools._render(
                messages, tools, add_generation_prompt, template_args, hide
            )
        if tools is not None and not all(isinstance(tool, Mapping) for tool in tools):
            raise InvalidRequestError("a tool is not an object", param="tools")
        for name in template_args:
            if name in _RESERVED:
                raise InvalidRequestError(
                    f"{name!r} can't be a template argument", param="template_args"
                )
        plain = _checked(messages)
        more = {"tools": list(tools) if tools else None, **template_args}
        more = {key: hide(value, "") for key, value in copy.deepcopy(more).items()}
        more["add_generation_prompt"] = add_generation_prompt
        fitted = _fitted(plain, self.capabilities, self.source)
        text, error = self._attempt(_hidden(fitted, hide), more)
        if error is not None:
            # Some templates insist on user and assistant by turns, the system text within.
            text, _ = self._attempt(_hidden(_by_turns(fitted), hide), more)
        if text is None:
            assert error is not None
            raise error
        self._check_tools(tools, text)
        return text

    def _attempt(
        self, messages: list[dict[str, Any]], more: Mapping[str, Any]
    ) -> tuple[str | None, TemplateError | None]:
        from . import jinja_sandbox

        now = datetime.now()
        variables: dict[str, Any] = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "documents": None,
            "date_string": now.strftime("%d %b %Y"),
            "datetime": now.strftime("%b %d %Y"),
            **more,
            "messages": messages,
        }
        # Templates are programs from strangers: whatever they raise is a template error.
        try:
            return jinja_sandbox.render(self._compiled, variables), None
        except TemplateError as error:
            return None, error
        except Exception as error:
            return None, self._error(error, jinja_sandbox.error_line(error))

    @cached_property
    def _compiled(self) -> Template:
        from . import jinja_sandbox

        try:
            return jinja_sandbox.compile_template(self.source)
        except Exception as error:
            raise self._error(error, jinja_sandbox.error_line(error)) from error

    def _error(self, error: Exception, line: int | None) -> TemplateError:
        where = f" line {line}" if line is not None else ""
        what = str(error) or type(error).__name__
        return TemplateError(
            f"chat template ({self.name or 'unnamed'}){where}: {what}; "
            "--chat-template NAME|FILE chooses another",
            line=line,
        )

    def _try(self, messages: list[dict[str, Any]]) -> str:
        text, _ = self._attempt(messages, {"tools": None, "add_generation_prompt": True})
        return text or ""

    def _check_tools(self, tools: Sequence[Mapping[str, Any]] | None, text: str) -> None:
        names = [str(tool.get("function", tool).get("name", "")) for tool in tools or ()]
        if names and not any(name in text for name in names):
            raise InvalidRequestError(
                f"the chat template ({self.name or 'unnamed'}) does not tell the model of tools; "
                "leave them out or choose another with --chat-template NAME|FILE",
                param="tools",
            )


def encode_chat(
    tokenizer: ChatTokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **template_args: Any,
) -> list[int]:
    """Prompt ids in which only the template makes control tokens: messages stay text.

    Assistant turns keep their <think> tags, since templates look for them.
    """
    hiding = _Hiding(tokenizer.special_texts, [template.source, messages, tools, template_args])
    text = template._render(messages, tools, add_generation_prompt, template_args, hiding)
    return tokenizer.encode_marked(hiding.without_escapes(text), hiding.restore)


class ReasoningSplitter:
    """Splits a reply that comes in parts into reasoning and text.

    Reasoning is what stands between the tags at the very beginning; `starts_open` says that the
    prompt has opened it already (see `opens_reasoning`).
    """

    def __init__(
        self, *, starts_open: bool = False, tags: tuple[str, str] = ("<think>", "</think>")
    ) -> None:
        self._open, self._close = tags
        self._starts_open = starts_open
        self._state = "start"
        self._held = ""
        self._empty = True

    def push(self, text: str) -> tuple[str, str]:
        """The reasoning and the text that are certain by now."""
        self._held += text
        if self._state == "start":
            self._begin()
        reasoning = self._reason() if self._state == "reasoning" else ""
        if self._state == "between":
            self._held = self._held.lstrip()
            self._state = "text" if self._held else "between"
        shown = ""
        if self._state == "text":
            shown, self._held = self._held, ""
        return reasoning, shown

    def flush(self) -> tuple[str, str]:
        """What was held back, once no more can come."""
        held, self._held = self._held, ""
        in_reasoning = self._state == "reasoning" or (self._state == "start" and self._starts_open)
        return (held.rstrip(), "") if in_reasoning else ("", held)

    def _begin(self) -> None:
        text = self._held.lstrip()
        if text.startswith(self._open):
            self._held, self._state = text[len(self._open) :], "reasoning"
        elif not self._open.startswith(text):
            self._state = "reasoning" if self._starts_open else "text"

    def _reason(self) -> str:
        if self._empty:
            self._held = self._held.lstrip()
        at = self._held.find(self._close)
        if at >= 0:
            self._state = "between"
            reasoning, self._held = self._held[:at].rstrip(), self._held[at + len(self._close) :]
            return reasoning
        n = next(n for n in range(len(self._close), -1, -1) if self._held.endswith(self._close[:n]))
        sure = self._held[: len(self._held) - n].rstrip()
        self._held = self._held[len(sure) :]
        self._empty = self._empty and not sure
        return sure


def opens_reasoning(prompt: str, tag: str = "<think>") -> bool:
    """True when the prompt ends inside reasoning that the reply continues."""
    return prompt.rstrip().endswith(tag)


# Messages, as the template wants them


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if not messages or isinstance(messages, (str, bytes)):
        raise InvalidRequestError("a chat needs at least one message", param="messages")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequestError(f"message {i} has no role", param="messages")
        plain: dict[str, Any] = copy.deepcopy(dict(message))
        plain["content"] = _joined(plain.get("content"), i)
        checked.append(plain)
    return checked


def _joined(content: Any, i: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, Sequence) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequestError(
                f"message {i} has content of type {kind!r}; text is supported", param="messages"
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _fitted(messages: list[dict[str, Any]], can: Capabilities, source: str) -> list[dict[str, Any]]:
    for message in messages:
        if message["role"] == "developer" and "developer" not in source:
            message["role"] = "system"
        if isinstance(message.get("tool_calls"), Sequence):
            message["tool_calls"] = [
                _with_arguments(call, can.object_arguments) for call in message["tool_calls"]
            ]
    if not can.system_role:
        messages = _system_folded(messages)
    if can.typed_content and not can.string_content:
        for message in messages:
            message["content"] = [{"type": "text", "text": message["content"]}]
    return messages


def _with_arguments(call: Any, as_object: bool) -> Any:
    if not isinstance(call, Mapping):
        return call
    if "function" in call:
        return {**call, "function": _with_arguments(call["function"], as_object)}
    arguments = call.get("arguments")
    if as_object and isinstance(arguments, str):
        try:
            return {**call, "arguments": json.loads(arguments)}
        except ValueError:
            return call
    if not as_object and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return call


def _system_folded(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The system text moved to the front of the first user message."""
    system = [m["content"] for m in messages if m["role"] == "system"]
    rest = [dict(m) for m in messages if m["role"] != "system"]
    if not system:
        return rest
    user = next((m for m in rest if m["role"] == "user"), None)
    if user is None:
        return [{"role": "user", "content": "\n".join(system)}, *rest]
    user["content"] = "\n".join([*system, user["content"]])
    return rest


def _by_turns(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if any(not isinstance(m["content"], str) for m in messages):
        return messages
    turns: list[dict[str, Any]] = []
    for message in _system_folded(messages):
        if turns and message["role"] == turns[-1]["role"] and message["role"] != "tool":
            turns[-1] = {**turns[-1], **message}
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{message['content']}"
        else:
            turns.append(dict(message))
    return turns


def _probe(attempt: Callable[[list[dict[str, Any]]], str]) -> Capabilities:
    needle = "needle-7f3a"
    user = {"role": "user", "content": "hello"}
    part = {"type": "text", "text": needle}
    typed = attempt([{"role": "user", "content": [part]}])
    function = {"name": "look", "arguments": {"word": needle}}
    call = {"id": "call00001", "type": "function", "function": function}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "call00001", "name": "look", "content": "found"}
    called = attempt([user, turn, result])
    return Capabilities(
        system_role=needle in attempt([{"role": "system", "content": needle}, user]),
        string_content=needle in attempt([{"role": "user", "content": needle}]),
        # A template that prints the list itself has not understood it.
        typed_content=needle in typed and "'text'" not in typed and '"text"' not in typed,
        object_arguments=needle in called and "{'word'" not in called,
    )


# Text that stays text

_Hide = Callable[[Any, str], Any]
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "model")
_THINK_TAGS = ("<think>", "</think>")


def _unchanged(value: Any, role: str) -> Any:
    return value


def _hidden(messages: list[dict[str, Any]], hide: _Hide) -> list[dict[str, Any]]:
    hidden = []
    for message in copy.deepcopy(messages):
        role = message.pop("role")
        shown = role if role in _KNOWN_ROLES else hide(role, "")
        hidden.append({"role": shown, **{k: hide(v, role) for k, v in message.items()}})
    return hidden


class _Hiding:
    """Puts a mark inside whatever is spelled like a special token, and says how to undo it.

    Marks are private-use characters that occur nowhere in the conversation or the template.
    """

    def __init__(self, specials: tuple[str, ...], conversation: Any) -> None:
        texts: list[str] = []
        _map_strings(conversation, lambda text: texts.append(text) or text)  # type: ignore[func-returns-value]
        seen = "\n".join(texts)
        private = map(chr, range(0xE000, 0xF900))
        free = (c for c in private if c not in seen and _escape(c) not in seen)
        self._mark = next(free)
        self._specials = [s for s in specials if len(s) > 1]
        self._begins = {s[:n] for s in self._specials for n in range(1, len(s))}
        self._ends = {s[-n:] for s in self._specials for n in range(1, len(s))}
        self._longest = max(map(len, self._specials), default=1)
        self._stand_ins = {ord(s): next(free) for s in specials if len(s) == 1}
        self.restore: dict[int, str | None] = {ord(self._mark): None}
        self.restore |= {ord(c): chr(s) for s, c in self._stand_ins.items()}

    def __call__(self, value: Any, role: str) -> Any:
        keep = _THINK_TAGS if role == "assistant" else ()
        specials = [s for s in self._specials if s not in keep]
        return _map_strings(
            value,
            lambda text: self._edges(self._inside(text, specials)),
            lambda key: self._inside(key, specials),
        )

    def without_escapes(self, text: str) -> str:
        """A template that writes JSON in ASCII has spelled the marks out."""
        for character in map(chr, self.restore):
            text = text.replace(_escape(character), character)
        return text

    def _inside(self, text: str, specials: Sequence[str]) -> str:
        text = text.translate(self._stand_ins)
        for special in specials:
            # One pass leaves overlaps: "aaa" holds "aa" twice.
            while special in text:
                text = text.replace(special, special[0] + self._mark + special[1:])
        return text

    def _edges(self, text: str) -> str:
        """Break the ends that the template's own text next to them could complete."""
        core = text.strip()
        if not core:
            return text
        before, _, after = text.partition(core)
        for n in range(min(self._longest, len(core)), 0, -1):
            if core[-n:] in self._begins:
                core = core[: len(core) - n + 1] + self._mark + core[len(core) - n + 1 :]
                break
        for n in range(min(self._longest, len(core)), 0, -1):
            if core[:n] in self._ends:
                core = core[: n - 1] + self._mark + core[n - 1 :]
                break
        return before + core + after


def _escape(character: str) -> str:
    return f"\\u{ord(character):04x}"


def _map_strings(
    value: Any, change: Callable[[str], str], change_key: Callable[[str], str] | None = None
) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        keys = [(change_key or change)(k) if isinstance(k, str) else k for k in value]
        values = [_map_strings(v, change, change_key) for v in value.values()]
        return dict(zip(keys, values, strict=True))
    if isinstance(value, (list, tuple)):
        return [_map_strings(v, change, change_key) for v in value]
    return value


# Where templates come from


def _own_templates(meta: Mapping[str, Any]) -> dict[str, str]:
    prefix = _TEMPLATE_KEY + "."
    found = {key[len(prefix) :]: value for key, value in meta.items() if key.startswith(prefix)}
    if _TEMPLATE_KEY in meta:
        found["default"] = meta[_TEMPLATE_KEY]
    for name, source in found.items():
        if isinstance(source, bytes):
            found[name] = source.decode(errors="replace")
        elif not isinstance(source, str):
            key = _TEMPLATE_KEY if name == "default" else prefix + name
            raise InvalidModelError(f"{type(source).__name__} where a string is needed", field=key)
    return {name: source for name, source in found.items() if source}


def _chosen(override: str, own: Mapping[str, str]) -> str:
    if override in own:
        return own[override]
    if override in BUILT_IN:
        return BUILT_IN[override]
    names = ", ".join(sorted({*own, *BUILT_IN}))
    try:
        return Path(override).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidRequestError(
            f"no chat template {override!r}: neither a file that can be read nor one of {names}",
            param="chat_template",
        ) from error


def _fallback_name(meta: Mapping[str, Any], texts: Sequence[str]) -> str:
    for token, name in _SIGNS:
        if token in texts:
            return name
    title = f"{meta.get('general.name', '')} {meta.get('general.basename', '')}".lower()
    for words, name in _TITLES:
        if all(word in title for word in words):
            return name
    raise TemplateError(
        "the file has no chat template and none fits its vocabulary; it may be a base model: "
        f"use it without chat, or choose with --chat-template {'|'.join(BUILT_IN)}|FILE"
    )


def _special(meta: Mapping[str, Any], texts: Sequence[str], name: str, spm_default: int) -> str:
    default = spm_default if meta.get("tokenizer.ggml.model") == "llama" else None
    id = meta.get(f"tokenizer.ggml.{name}", default)
    return texts[id] if isinstance(id, int) and 0 <= id < len(texts) else ""


def _token_texts(meta: Mapping[str, Any]) -> Sequence[str]:
    key = "tokenizer.ggml.tokens"
    value = meta.get(key, ())
    items = value.tolist() if isinstance(value, _LazyArray) else value
    if isinstance(items, (str, bytes)) or not isinstance(items, Sequence):
        raise InvalidModelError(f"{type(value).__name__} where an array is needed", field=key)
    if items and isinstance(items[0], bytes):
        return [item.decode(errors="replace") for item in items]
    return items


# A token that gives away the format its model was trained on.
_SIGNS = (
    ("<|im_start|>", "chatml"),
    ("<|start_header_id|>", "llama3"),
    ("<start_of_turn>", "gemma"),
    ("<|end|>", "phi3"),
    ("[INST]", "mistral"),
)

_TITLES = (
    (("zephyr",), "zephyr"),
    (("tinyllama", "chat"), "zephyr"),
    (("llama-2", "chat"), "llama2"),
    (("mistral", "instruct"), "mistral"),
)

BUILT_IN: Mapping[str, str] = {
    "chatml": """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
""",
    "llama3": """\
{{- bos_token }}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{{- message.content.strip() + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
""",
    "gemma": """\
{{- bos_token }}
{%- for message in messages -%}
{%- if message.role == 'system' %}{{ raise_exception('no system role') }}{% endif -%}
{%- set role = 'model' if message.role == 'assistant' else message.role -%}
{{ '<start_of_turn>' + role + '\\n' + message.content.strip() + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif -%}
""",
    "phi3": """\
{{- bos_token }}
{%- for message in messages -%}
{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif -%}
""",
    "mistral": """\
{{- bos_token }}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{ '[INST] ' + message.content + ' [/INST]' }}
{%- elif message.role == 'assistant' -%}
{{ message.content + eos_token }}
{%- else -%}
{{ raise_exception('no ' + message.role + ' role') }}
{%- endif -%}
{%- endfor -%}
""",
    "llama2": """\
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- set ns.system = '<<SYS>>\\n' + message.content + '\\n<</SYS>>\\n\\n' -%}
{%- elif message.role == 'user' -%}
{{ bos_token + '[INST] ' + ns.system + message.content + ' [/INST]' }}
{%- set ns.system = '' -%}
{%- else -%}
{{ ' ' + message.content + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}
""",
    "zephyr": """\
{%- for message in messages -%}
{{ '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif -%}
""",
}
