"""What an answer must be, from the keywords of its request: by schema, grammar or regex.

Knows nothing of prompts; where an answer has none of them nothing here is imported.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import InvalidRequestError
from edgeinfer.text.grammar import Grammar
from edgeinfer.text.reply import Tags
from edgeinfer.text.tokenizer import Tokenizer

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


# -- reasoning -------------------------------------------------------------------------------------


def after_reasoning(
    grammar: Grammar, known: tuple[Tags, ...], end: str, template: str, tokenizer: Tokenizer
) -> Grammar:
    """The grammar for what follows reasoning, of which nothing is asked.

    `end` is that of the prompt. Where that opens reasoning, or the model may do so with a token of
    its own, it is free up to the tag that closes it; else the grammar begins at once.
    """
    end = end.rstrip()
    if all(tag in template for tag in ("<|start|>", "<|channel|>", "<|message|>")):
        return grammar.after(_HARMONY)
    for tags in known:
        if end.endswith(tags.close):
            return grammar
        if end.endswith(tags.open):
            return grammar.after(_rules(f"start: {_reasoning(tags, tokenizer)} @answer", tags))
    for tags in known:
        if tokenizer.special_id(tags.open) is not None and tags.close in template:
            opened = lark_tag(tags.open, tokenizer)
            reasoning = _reasoning(tags, tokenizer)
            return grammar.after(_rules(f"start: ({opened} {reasoning})? @answer", tags))
    return grammar


# Messages to other channels come before the last one.
_HARMONY = r"""
start: thought* "<|channel|>final" "<|constrain|>json"? "<|message|>" @answer
thought: "<|channel|>" ("analysis" | "commentary") "<|message|>" text "<|start|>assistant"
text[suffix="<|end|>"]: /(.|\n)*/
"""


def lark_tag(text: str, tokenizer: Tokenizer) -> str:
    """A tag in Lark: the control token that is spelled so, else text, whose tokens don't matter."""
    id = tokenizer.special_id(text)
    if id is not None and tokenizer.is_control(id):
        return f"<[{id}]>"
    return json.dumps(text)


def _reasoning(tags: Tags, tokenizer: Tokenizer) -> str:
    closed = lark_tag(tags.close, tokenizer)
    return f"/(.|\\n)*/ {closed} SPACE" if closed.startswith("<") else "reasoning SPACE"


def _rules(start: str, tags: Tags) -> str:
    rules = [start, "SPACE: /[ \\t\\r\\n]{0,4}/"]
    if "reasoning" in start:
        rules.append(f"reasoning[suffix={json.dumps(tags.close)}]: /(.|\\n)*/")
    return "\n".join(rules)
