"""Messages to prompt text, and to token ids, through the model's chat template.

Knows nothing of how tokens are made, only of something that turns marked text into ids.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from .chat_templates import (
    BUILT_IN,
    choose_template,
    fallback_name,
    own_templates,
    special_text,
    token_texts,
)
from .errors import InvalidRequestError, TemplateError
from .messages import Capabilities, Message, by_turns, checked, fit, probe

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = [
    "BUILT_IN",
    "Capabilities",
    "ChatTemplate",
    "ChatTokenizer",
    "Message",
    "encode_chat",
]

_RESERVED = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")


class ChatTokenizer(Protocol):
    """What `encode_chat` asks of a tokenizer."""

    bos_id: int | None
    special_texts: tuple[str, ...]

    def encode_marked(
        self, text: str, restore: Mapping[int, str | None], *, bos: bool | None = None
    ) -> list[int]: ...


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
    def from_metadata(
        cls,
        meta: Mapping[str, Any],
        override: str | None = None,
        texts: Sequence[str] | None = None,
    ) -> ChatTemplate:
        """The file's template, or `override`: the name of one, or a file that holds one.

        `texts` is the vocabulary, where someone has read it already.
        """
        own = own_templates(meta)
        texts = token_texts(meta) if texts is None else texts
        bos, eos = (
            special_text(meta, texts, "bos_token_id", 1),
            special_text(meta, texts, "eos_token_id", 2),
        )
        if override is not None:
            name, source = override, choose_template(override, own)
        elif "default" in own:
            name, source = "the file's own", own["default"]
        else:
            name = fallback_name(meta, texts)
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

        def attempt(messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
            more = {"tools": tools or self._no_tools, "add_generation_prompt": True}
            return self._attempt(messages, more)[0] or ""

        return probe(attempt)

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
        if tools and not self.capabilities.tools:
            raise InvalidRequestError(
                f"the chat template ({self.name or 'unnamed'}) does not tell the model of tools; "
                "leave them out or choose another with --chat-template NAME|FILE",
                param="tools",
            )
        for name in template_args:
            if name in _RESERVED:
                raise InvalidRequestError(
                    f"{name!r} can't be a template argument", param="template_args"
                )
        plain = checked(messages)
        more = {"tools": list(tools) if tools else self._no_tools, **template_args}
        more = {key: hide(value, "") for key, value in copy.deepcopy(more).items()}
        more["add_generation_prompt"] = add_generation_prompt
        fitted = fit(plain, self.capabilities, self.source)
        text, error = self._attempt(_hidden(fitted, hide), more)
        if error is not None:
            # Some templates insist on user and assistant by turns, the system text within.
            text, _ = self._attempt(_hidden(by_turns(fitted), hide), more)
        if text is None:
            assert error is not None
            raise error
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

    @cached_property
    def _no_tools(self) -> list[Any] | None:
        """What the template takes for "no tools": a few fail on None."""
        hello = [{"role": "user", "content": "hello"}]
        kinds: tuple[list[Any] | None, ...] = (None, [])
        for nothing in kinds:
            if self._attempt(hello, {"tools": nothing, "add_generation_prompt": True})[0]:
                return nothing
        return None


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
    ids = tokenizer.encode_marked(hiding.without_escapes(text), hiding.restore)
    return ids[1:] if ids[:2] == [tokenizer.bos_id] * 2 else ids


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

        def note(text: str) -> str:
            texts.append(text)
            return text

        _map_strings(conversation, note)
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
