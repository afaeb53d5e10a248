"""How the reply to a chat is read: what is reasoning, what is a call, and what it must be.

Knows nothing of engines. What a chat has no use for is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from edgeinfer.text.reply import FindsCalls, ReasoningSplitter, opened_tags, reasoning_tags
from edgeinfer.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgeinfer.engine.constraint import Constraint
    from edgeinfer.text.grammar import Grammar
    from edgeinfer.text.tool_choice import ToolChoice


class Reading(NamedTuple):
    """Without a `splitter` the reply is no chat's, but continues a text.

    `limit` makes of a constraint one that closes reasoning, too.
    """

    splitter: ReasoningSplitter | None
    finder: FindsCalls | None
    grammar: Grammar | None
    limit: Callable[[Constraint | None], Constraint] | None = None


def chosen_tools(
    tools: Sequence[Mapping[str, Any]], choice: Any, parallel: bool | None
) -> ToolChoice | None:
    """What of the tools may be called; None where there are none."""
    if not tools and (choice is None or isinstance(choice, str) and choice in ("auto", "none")):
        return None
    from edgeinfer.text.tool_choice import ToolChoice

    return ToolChoice.of(tools, choice, parallel)


def reading(
    tokenizer: Tokenizer,
    template: str,
    prompt_end: str,
    choice: ToolChoice | None,
    answer: Grammar | None,
    budget: int | None = None,
) -> Reading:
    """For a reply that follows a prompt's end, and has an `answer` by a grammar or none.

    Its reasoning has at most `budget` tokens.
    """
    from edgeinfer.text.call_finder import call_finder  # 2 ms that starts do without

    tags = reasoning_tags(template, tokenizer)
    opened, limit = opened_tags(prompt_end, tags), None
    splitter = ReasoningSplitter(tags, opened)
    if budget is not None:
        from edgeinfer.reasoning_budget import ReasoningBudget

        limit = partial(ReasoningBudget, budget, tokenizer, tags, opened)
    told = choice.told if choice is not None else []
    is_single = choice is not None and choice.is_single
    has_text = choice is None or not choice.is_required
    finder = call_finder(template, told, most=1 if is_single else None, has_text=has_text)
    if answer is None and (choice is None or choice.is_free):
        return Reading(splitter, finder, None, limit)
    from edgeinfer.constraining import after_reasoning, reply_grammar

    grammar = reply_grammar(answer, choice, template, tokenizer)
    if grammar is not None:
        grammar = after_reasoning(grammar, tags, prompt_end, template, tokenizer)
    return Reading(splitter, finder, grammar, limit)
