"""What an answer must be, from the keywords of its request: by schema, grammar or regex.

Knows nothing of prompts; where an answer has none of them nothing here is imported.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import InvalidRequestError
from edgeinfer.text.call_formats import call_format
from edgeinfer.text.call_grammar import ANSWER, OfferedTool, call_grammar
from edgeinfer.text.grammar import Grammar, check_installed
from edgeinfer.text.grammar_limits import narrowed
from edgeinfer.text.reply import Tags
from edgeinfer.text.tokenizer import Tokenizer
from edgeinfer.text.tool_choice import ToolChoice

if TYPE_CHECKING:
    from edgeinfer.text.grammar_matcher import CompiledGrammar, GrammarCompiler

KEYWORDS = ("schema", "grammar", "regex")


def grammar_of(given: Mapping[str, Any]) -> Grammar | None:
    """What a request's keywords ask for; InvalidRequestError for two of them."""
    names = [name for name in KEYWORDS if name in given]
    if len(names) > 1:
        raise InvalidRequestError(
            f"{' and '.join(names)} are given; an answer follows one of them", param=names[1]
        )
    if not names:
        return None
    makers: dict[str, Callable[[Any], Grammar]]
    makers = {"schema": Grammar.of_schema, "grammar": Grammar.of_text, "regex": Grammar.of_regex}
    (name,) = names
    return makers[name](given[name])


class Grammars:
    """Grammars for the vocabulary of one model, which is taken in with the first of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._compiler: GrammarCompiler | None = None

    def compile(self, grammar: Grammar, tokenizer: Tokenizer) -> CompiledGrammar:
        """InvalidRequestError where it is too large."""
        with self._lock:
            if self._compiler is None:
                from edgeinfer.text.grammar_matcher import GrammarCompiler

                self._compiler = GrammarCompiler(tokenizer)
        return self._compiler.compile(grammar)


# -- calls of tools --------------------------------------------------------------------------------


def reply_grammar(
    answer: Grammar | None, choice: ToolChoice | None, template: str, tokenizer: Tokenizer
) -> Grammar | None:
    """What a reply must be: calls as `choice` has them, else text, or an `answer` by a grammar."""
    callable = choice.callable if choice is not None else []
    if not callable and call_format(template).whole_reply is None:
        return answer
    check_installed()
    is_required = choice is not None and choice.is_required
    rules = call_grammar(
        template,
        [checked(tool) for tool in callable],
        partial(_control_id, tokenizer),
        is_required=is_required,
        is_single=choice is not None and choice.is_single,
        has_answer=answer is not None,
    )
    if answer is None or is_required:
        return Grammar.of_rules(rules, "tools")
    return answer.after(rules, ANSWER)


def checked(tool: Mapping[str, Any]) -> OfferedTool:
    """A schema that can't be enforced is refused where it is strict, else any object will do."""
    offered = OfferedTool.of(tool)
    assert offered is not None  # what has no name can't be chosen
    schema, param = json.dumps(offered.parameters), f"tools.{offered.tool.name}.parameters"
    if not _can_enforce(schema, param, offered.is_strict):
        return offered._replace(parameters={"type": "object"})
    return offered._replace(parameters=narrowed(offered.parameters))


@lru_cache(maxsize=512)  # clients send the same tools with each request
def _can_enforce(schema: str, param: str, is_strict: bool) -> bool:
    try:
        Grammar.of_schema(schema, param, lenient=not is_strict)
    except InvalidRequestError:
        if is_strict:
            raise
        return False
    return True


def _control_id(tokenizer: Tokenizer, text: str) -> int | None:
    id = tokenizer.special_id(text)
    return id if id is not None and tokenizer.is_control(id) else None


# -- reasoning -------------------------------------------------------------------------------------


def after_reasoning(
    grammar: Grammar, known: tuple[Tags, ...], end: str, template: str, tokenizer: Tokenizer
) -> Grammar:
    """The grammar for what follows reasoning, of which nothing is asked.

    `end` is that of the prompt. Where that opens reasoning, or the model may do so with a token of
    its own, it is free up to the tag that closes it; else the grammar begins at once.
    """
    end = end.rstrip()
    if call_format(template).whole_reply is not None:
        return grammar  # it has the reasoning in it
    for tags in known:
        if end.endswith(tags.close):
            return grammar
        if end.endswith(tags.open):
            return grammar.after(_rules(f"start: {_reasoning(tags, tokenizer)} @reply", tags))
    for tags in known:
        if tokenizer.special_id(tags.open) is not None and tags.close in template:
            opened = lark_tag(tags.open, tokenizer)
            reasoning = _reasoning(tags, tokenizer)
            return grammar.after(_rules(f"start: ({opened} {reasoning})? @reply", tags))
    return grammar


def lark_tag(text: str, tokenizer: Tokenizer) -> str:
    """A tag in Lark: the control token that is spelled so, else text, whose tokens don't matter."""
    id = _control_id(tokenizer, text)
    return json.dumps(text) if id is None else f"<[{id}]>"


def _reasoning(tags: Tags, tokenizer: Tokenizer) -> str:
    closed = lark_tag(tags.close, tokenizer)
    return f"/(.|\\n)*/ {closed} SPACE" if closed.startswith("<") else "reasoning SPACE"


def _rules(start: str, tags: Tags) -> str:
    rules = [start, "SPACE: /[ \\t\\r\\n]{0,4}/"]
    if "reasoning" in start:
        rules.append(f"reasoning[suffix={json.dumps(tags.close)}]: /(.|\\n)*/")
    return "\n".join(rules)
