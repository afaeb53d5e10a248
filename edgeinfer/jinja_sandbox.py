"""A Jinja environment in which a hostile chat template can't reach, hang or fill the machine.

Knows nothing of messages, models or tokens.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, Undefined, nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import MAX_RANGE, SandboxedEnvironment

MAX_SOURCE = 1 << 20
MAX_CHARS = 1 << 24
MAX_ITEMS = 1 << 20
MAX_WIDTH = 1000
MAX_BITS = 4096
SECONDS = 5.0

# A variable that no template can name: identifiers have no spaces.
_DEADLINE = "the deadline"
_LIMIT = "the template asks for more %s than a chat template needs"


class RaisedByTemplate(TemplateError):
    """The template called raise_exception."""


class LimitError(SecurityError):
    """The template would take too long or too much memory."""


def compile_template(source: str) -> Template:
    """Parse and compile; the loops of the template get a check of the clock."""
    if len(source) > MAX_SOURCE:
        raise LimitError(_LIMIT % f"source (over {MAX_SOURCE} characters)")
    environment = _Environment()
    tree = environment.parse(source)
    loops: list[nodes.For | nodes.Macro | nodes.CallBlock] = list(tree.find_all(nodes.For))
    loops += [*tree.find_all(nodes.Macro), *tree.find_all(nodes.CallBlock)]
    for loop in loops:
        loop.body.insert(0, _tick_node(loop.lineno))
    code = environment.compile(tree, filename="<template>")
    return Template.from_code(environment, code, environment.make_globals(None))


def render(template: Template, variables: Mapping[str, Any], *, seconds: float = SECONDS) -> str:
    """The template's text; raises what the template raises, or LimitError."""
    return template.render({**variables, _DEADLINE: time.monotonic() + seconds})


def error_line(error: BaseException) -> int | None:
    """The line of the template in which `error` arose."""
    if isinstance(error, TemplateSyntaxError):
        return error.lineno
    line, frame = None, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "<template>":
            line = frame.tb_lineno
        frame = frame.tb_next
    return line


class _Generator(CodeGenerator):
    """Sends `a ~ b` through the environment, which bounds it."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join_values((")
        for value in node.nodes:
            self.visit(value, frame)
            self.write(", ")
        self.write("))")


class _GenerationTag(Extension):
    """{% generation %} marks the assistant's text for training; here it is only a block."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(SandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset(["+", "*", "%", "**"])

    def __init__(self) -> None:
        # Folding constants would run the template's filters while it is compiled, unbounded.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_finalize,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
        )
        self.filters["tojson"] = _to_json
        self.filters["from_json"] = json.loads
        self.filters = {name: _bounded(name, f) for name, f in self.filters.items()}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        return "".join(_counted(parts))

    def join_values(self, values: Iterable[Any]) -> str:
        _weigh(values)
        return self.concat(map(str, values))

    def tick(self) -> str:
        return ""

    def call(
        __self,  # noqa: B902
        __context: Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if time.monotonic() > __context.parent[_DEADLINE]:
            raise LimitError(_LIMIT % "time")
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes, list, dict, tuple)):
            _check_call(__obj.__name__, (owner, *args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        form = super().wrap_str_format(value)
        if form is None:
            return None
        _check_format([value.__self__])
        return form

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)


def _tick_node(line: int) -> nodes.Stmt:
    tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
    return nodes.ExprStmt(tick).set_lineno(line)  # type: ignore[return-value]


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    if not isinstance(value, str):
        _weigh((value,))
    return value


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    # wraps() keeps the mark that makes Jinja pass the environment or the context first.
    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_call(name, (*args, *kwargs.values()))
        return function(*args, **kwargs)

    return bounded


def _check_call(name: str, values: tuple[Any, ...]) -> None:
    """Refuse a filter or method whose result could be far larger than what it is given."""
    n_chars = _weigh(values)
    if name != "format" and any(isinstance(v, int) and v > MAX_WIDTH for v in values[1:]):
        raise LimitError(_LIMIT % "width")
    texts = [v for v in values if isinstance(v, str)]
    if name == "replace" and len(texts) >= 3:
        grown = (texts[0].count(texts[1]) + 1) * len(texts[2])
    elif name == "join":
        n_items = sum(1 if isinstance(v, str) else _length(v) for v in values)
        grown = n_chars + max(map(len, texts), default=0) * n_items
        grown = max(grown, len(texts[0]) * len(texts[1]) if len(texts) > 1 else 0)
    elif name == "indent":
        grown = n_chars + n_chars * max([v for v in values[1:] if isinstance(v, int)], default=4)
    elif name == "format":
        _check_format(texts)
        grown = n_chars
    elif name == "translate":
        raise LimitError("the template calls translate, which has no bounds")
    else:
        grown = n_chars
    if grown > MAX_CHARS:
        raise LimitError(_LIMIT % "text")


def _length(value: Any) -> int:
    if isinstance(value, (str, list, tuple, dict)):
        return len(value)
    return MAX_RANGE if isinstance(value, Iterator) else 0


def _check_binop(operator: str, left: Any, right: Any) -> None:
    sized = (str, bytes, list, tuple)
    if operator == "%" and isinstance(left, (str, bytes)):
        _check_format([str(left)])
        _weigh((right,))
    elif operator == "+" and isinstance(left, sized) and isinstance(right, sized):
        if len(left) + len(right) > MAX_CHARS:
            raise LimitError(_LIMIT % "text")
    elif operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, sized) and isinstance(times, int):
                if len(value) * times > MAX_ITEMS:
                    raise LimitError(_LIMIT % "text")
            elif isinstance(value, int) and value.bit_length() > MAX_BITS:
                raise LimitError(_LIMIT % "digits")
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * right > MAX_BITS:
            raise LimitError(_LIMIT % "digits")


def _check_format(texts: Iterable[str]) -> None:
    if any(re.search(r"\d{4}|%[^a-zA-Z%]*\*|\{[^{}]*\{", text) for text in texts):
        raise LimitError(_LIMIT % "width")


def _counted(parts: Iterable[str]) -> Iterator[str]:
    n = 0
    for part in parts:
        n += len(part)
        if n > MAX_CHARS:
            raise LimitError(_LIMIT % f"text (over {MAX_CHARS} characters)")
        yield part


def _weigh(values: Iterable[Any]) -> int:
    """The characters in nested values; a list that holds itself many times over is refused."""
    n_chars = n_items = 0
    stack: list[Any] = [values] if isinstance(values, (list, tuple)) else list(values)
    while stack:
        value = stack.pop()
        n_items += 1
        if isinstance(value, str):
            n_chars += len(value)
        elif isinstance(value, (list, tuple)):
            n_items += len(value)
            stack += value
        elif isinstance(value, dict):
            n_items += len(value)
            stack += value.keys()
            stack += value.values()
        if n_items > MAX_ITEMS or n_chars > MAX_CHARS:
            raise LimitError(_LIMIT % "data")
    return n_chars


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, without the escapes for HTML that Jinja's own filter makes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=_json_default,
    )


def _json_default(value: Any) -> list[Any]:
    if isinstance(value, Undefined):
        raise TypeError("tojson was given an undefined value")
    return list(value)


def _raise_exception(message: object) -> str:
    raise RaisedByTemplate(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > 100:
        raise LimitError(_LIMIT % "text")
    return datetime.now().strftime(form)
