"""A conversation to prompt text, through the model's chat template.

Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, TypeAlias

from edgeinfer.errors import InvalidRequestError, Keyword, TemplateError
from edgeinfer.gguf import Metadata
from edgeinfer.text.call_ids import with_short_ids
from edgeinfer.text.chat_templates import (
    BUILT_IN,
    choose_template,
    fallback_name,
    own_template,
)
from edgeinfer.text.fitting import (
    Capabilities,
    after_user,
    by_turns,
    described,
    fit,
    late_system_folded,
    probe,
)
from edgeinfer.text.messages import Conversation, Message
from edgeinfer.text.template_engine import Budget, LimitError, RenderError, TemplateEngine

_Hide: TypeAlias = "Callable[[Any, str], Any]"
_HERE = "\U0010ffff"  # stands for no character, and is no mark of those that hide
_DROPS_LAST = "the chat template does not show the last message, so it can't be continued"
_ROLES = ("system", "developer", "user", "assistant", "tool")
_KNOWN_ROLES = (*_ROLES, "function", "ipython", "model")
_MOST_ROLES = 16  # of other names in one conversation: each is tried
_KEPT_ROLES, _LONGEST_KEPT = 64, 100  # letters; what was found of others is not kept


def _unchanged(value: Any, role: str) -> Any:
    return value


class ChatTemplate:
    """A chat template; `tool_source` is the one to use when tools are given.

    It is rendered by `engine`, which `close` ends; each has its own if none is given.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        name: str = "",
        tool_source: str | None = None,
        engine: TemplateEngine | None = None,
    ) -> None:
        self.source, self.name = source, name
        self.bos_token, self.eos_token = bos_token, eos_token
        self._engine = TemplateEngine() if engine is None else engine
        self._found: tuple[Capabilities, list[Any] | None] | None = None
        self._shown_roles: dict[str, bool] = {}
        self._for_tools: ChatTemplate | None = None
        if tool_source is not None:
            self._for_tools = ChatTemplate(
                tool_source,
                bos_token=bos_token,
                eos_token=eos_token,
                name=f"{name} tool_use",
                engine=self._engine,
            )

    @classmethod
    def from_metadata(
        cls,
        meta: Metadata,
        override: str | None = None,
        *,
        source: str | None = None,
        texts: Sequence[str] = (),
        bos_token: str = "",
        eos_token: str = "",
        engine: TemplateEngine | None = None,
    ) -> ChatTemplate:
        """The file's template, or `override`: the name of one, or a file that holds one.

        `source` is the text of that where it was read before. `texts` are those of the vocabulary;
        `bos_token` and `eos_token` two of them.
        """
        if override is not None:
            name, text = override, choose_template(override, meta) if source is None else source
        elif found := own_template(meta):
            name, text = "the file's own", found
        else:
            name = fallback_name(meta, texts)
            text = BUILT_IN[name]
        tool_source = own_template(meta, "tool_use") if override is None else None
        return cls(
            text,
            bos_token=bos_token,
            eos_token=eos_token,
            name=name,
            tool_source=tool_source,
            engine=engine,
        )

    def close(self) -> None:
        """End the process that renders; rendering again starts another."""
        self._engine.close()

    def render(
        self,
        messages: Iterable[Message],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_args: Any,
    ) -> str:
        """The prompt text; TemplateError names the line of the template that failed."""
        chat = Conversation.of(messages, tools, template_args)
        return self.render_chat(chat, add_generation_prompt=add_generation_prompt)

    def source_of(self, chat: Conversation) -> str:
        """The text of the template that shows a conversation: there may be one for tools."""
        template = self._for_tools if chat.tools and self._for_tools is not None else self
        return template.source

    @cached_property
    def capabilities(self) -> Capabilities:
        """Found once per template, by rendering conversations that contain a needle.

        TemplateError says that the template takes too long or too much memory.
        """
        return self._probed(Budget())[0]

    def look(self) -> None:
        """Find its `capabilities` now; what the system lacks for that may be there for a chat."""
        try:
            self.capabilities  # noqa: B018
        except TemplateError as error:
            if isinstance(error.__cause__, RenderError):  # its own
                raise

    def render_chat(
        self,
        chat: Conversation,
        hide: _Hide = _unchanged,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """`render` of what is checked; `hide(value, role)` gives what the template gets instead.

        All renders together keep to one budget.
        """
        if chat.continues:
            return self._begun(chat, hide)
        if chat.tools and self._for_tools is not None:
            return self._for_tools.render_chat(
                chat, hide, add_generation_prompt=add_generation_prompt
            )
        budget = Budget()
        capabilities, no_tools = self._probed(budget)
        self._check_roles(chat.messages, budget)
        self._check_documents(chat.arguments)
        if chat.tools and not capabilities.tools:
            chat = chat.with_tools_told()
        shown = {key: hide(value, "") for key, value in chat.arguments.items()}
        shown |= {"tools": hide(chat.tools, "") or no_tools}
        shown |= {"add_generation_prompt": add_generation_prompt}
        fitted = fit(chat.messages, capabilities, self.source)
        if chat.tools and not capabilities.calls_first:
            fitted = after_user(fitted)
        text, error = self._attempt(_hidden(fitted, hide), shown, budget)
        if error is not None and (tools := described(chat.tools)) != chat.tools:
            shown |= {"tools": hide(tools, "")}
            text, error = self._attempt(_hidden(fitted, hide), shown, budget)
        if error is not None and (named := with_short_ids(fitted)) != fitted:
            fitted = named
            text, error = self._attempt(_hidden(fitted, hide), shown, budget)
        if error is not None:  # some templates go through the arguments of calls
            told = fit(chat.messages, capabilities, self.source, tells_odd_calls=True)
            if (told := with_short_ids(told)) != fitted:
                fitted = told
                text, error = self._attempt(_hidden(fitted, hide), shown, budget)
        if error is not None and (folded := late_system_folded(fitted)) != fitted:
            text, _ = self._attempt(_hidden(folded, hide), shown, budget)
        for answers_tools in (False, True):
            if error is not None and text is None:
                # Some templates insist on user and assistant by turns, the system text within.
                turns = by_turns(
                    fitted,
                    joins_calls=capabilities.text_with_calls,
                    answers_tools=answers_tools,
                )
                text, _ = self._attempt(_hidden(turns, hide), shown, budget)
        if text is None:
            assert error is not None
            raise error
        return text

    def _check_roles(self, messages: Sequence[Mapping[str, Any]], budget: Budget) -> None:
        """InvalidRequestError for a role whose messages the template leaves out without a word."""
        odd = {message["role"] for message in messages}.difference(_ROLES)
        advice = f"take one of {', '.join(_ROLES)}"
        if len(odd) > _MOST_ROLES:
            raise InvalidRequestError(
                f"messages have {len(odd)} roles of other names, at most {_MOST_ROLES} work; "
                f"{advice}",
                param="messages",
            )
        for role in sorted(odd):
            if not self._shows(role, budget):
                raise InvalidRequestError(
                    f"the model's chat template shows no message of role {role[:100]!r}; {advice}",
                    param="messages",
                )

    def _check_documents(self, arguments: Mapping[str, Any]) -> None:
        """InvalidRequestError for documents that the template does not know of."""
        if arguments.get("documents") and "documents" not in self.source:
            raise InvalidRequestError(
                "documents are given, and the model's chat template shows none; put them into a "
                "message",
                param="documents",
            )

    def _shows(self, role: str, budget: Budget) -> bool:
        """Whether messages of a role are in what the template makes of them; found once."""
        if (kept := self._shown_roles.get(role)) is not None:
            return kept
        capabilities, no_tools = self._probed(budget)
        said = [{"role": "user", "content": "hello"}, {"role": role, "content": _HERE}]
        more = {"tools": no_tools, "add_generation_prompt": False}
        text, _ = self._attempt(fit(said, capabilities, self.source), more, budget)
        is_shown = text is None or _HERE in text  # what fails is told of with the conversation
        if len(role) <= _LONGEST_KEPT:
            if len(self._shown_roles) >= _KEPT_ROLES:
                self._shown_roles.clear()
            self._shown_roles[role] = is_shown
        return is_shown

    def _begun(self, chat: Conversation, hide: _Hide) -> str:
        """A conversation as far as the text goes that its last message has."""
        marked = chat.with_last_ending(_HERE)
        text = self.render_chat(marked, hide, add_generation_prompt=False)
        begun, is_shown, _ = text.rpartition(_HERE)
        if not is_shown:
            raise TemplateError(_DROPS_LAST)
        return begun

    def _attempt(
        self, messages: list[dict[str, Any]], more: Mapping[str, Any], budget: Budget
    ) -> tuple[str | None, TemplateError | None]:
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
        try:
            return self._engine.render(self.source, variables, budget), None
        except LimitError as error:
            raise _failed(self.name, error) from error
        except RenderError as error:
            return None, _failed(self.name, error)

    def _probed(self, budget: Budget) -> tuple[Capabilities, list[Any] | None]:
        """What the template can do, and what it takes for "no tools": a few fail on None."""
        if self._found is None:

            def attempt(messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
                more = {"tools": tools or no_tools, "add_generation_prompt": True}
                return self._attempt(messages, more, budget)[0] or ""

            no_tools: list[Any] | None = None
            hello = [{"role": "user", "content": "hello"}]
            if not attempt(hello):
                no_tools = []
                no_tools = [] if attempt(hello) else None
            self._found = probe(attempt), no_tools
        return self._found


def read_template(override: str, meta: Metadata, engine: TemplateEngine) -> str:
    """The text of the template of that name, or in that file, which `engine` can compile."""
    source = choose_template(override, meta)
    try:
        engine.check(source)
    except RenderError as error:
        raise _failed(override, error) from error
    return source


def _failed(name: str, error: RenderError) -> TemplateError:
    where = f" line {error.line}" if error.line is not None else ""
    return TemplateError(
        f"chat template ({name or 'unnamed'}){where}: {error}",
        advice=(Keyword("chat_template"), " NAME|FILE chooses another"),
        line=error.line,
    )


def _hidden(messages: list[dict[str, Any]], hide: _Hide) -> list[dict[str, Any]]:
    hidden = []
    for message in messages:
        role = message["role"]
        shown = {key: hide(value, role) for key, value in message.items() if key != "role"}
        hidden.append({"role": role if role in _KNOWN_ROLES else hide(role, ""), **shown})
    return hidden
