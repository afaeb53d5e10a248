"""The flags that commands share: each is the API keyword with hyphens.

Knows nothing of what commands do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from edgeinfer.cli.numbers import Whole
from edgeinfer.errors import InvalidRequestError, Keyword
from edgeinfer.parameters import ANSWER, LOAD, Parameter

if TYPE_CHECKING:
    from edgeinfer.options import LoadOptions, Sampling

F = TypeVar("F", bound=Callable[..., Any])

# Short forms and second names; every other flag is the keyword alone.
_SPELLINGS = {
    "n_ctx": ("-c", "--ctx", "--n-ctx"),
    "threads": ("-t", "--threads"),
    "max_tokens": ("-n", "--max-tokens"),
    "temperature": ("--temperature", "--temp"),
    "speculation": ("--speculation/--no-speculation",),
    "drafts": ("--drafts/--no-drafts",),
}
_NO_LIMIT = -1  # of tokens, as a flag spells it
_MORE_HELP = {"max_tokens": " -1: no limit."}
_METAVARS = {
    "memory": "2G|80%", "kv_type": "TYPE[/TYPE]", "device": "auto|cpu|cuda[:N,...]|reference|law",
    "gpu_layers": "N|auto", "pre": "NAME", "chat_template": "NAME|FILE", "stop": "TEXT",
    "stop_token_ids": "ID", "schema": "FILE", "grammar": "FILE", "regex": "REGEX",
}  # fmt: skip
_KIND_METAVARS = {int: "INTEGER", float: "NUMBER"}
_NOT_FLAGS = (
    "download", "progress", "dry_sequence_breakers", "min_keep", "logit_bias", "logprobs",
    "naive", "residuals", "n_stable", "continue_last", "priority", "on_step", "watch",
    "reasoning_budget",
)  # fmt: skip
LOAD_NAMES = tuple(name for name in LOAD if name not in _NOT_FLAGS)
SAMPLING_NAMES = tuple(name for name in ANSWER if name not in _NOT_FLAGS)


class FileName(click.Path):
    """The name of a file; an empty one would mean the folder that a person is in."""

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> Any:
        if value == "":
            self.fail("the name is empty; is a variable not set?", param, context)
        return super().convert(value, param, context)


_GRAMMARS = ("schema", "grammar", "regex")


def _grammar(name: str, value: str) -> str:
    """What an answer must be, from a file but for a regex, checked before a model is loaded."""
    from edgeinfer.cli.input import read_file
    from edgeinfer.constraining import grammar_of

    text = value if name == "regex" else read_file(value)
    grammar_of({name: text})
    return text


def as_flag(keyword: Keyword) -> str:
    """A keyword that an error advises, as it is typed here."""
    name, value = keyword
    flag = _SPELLINGS.get(name, ("--" + name.replace("_", "-"),))[0]
    if isinstance(value, tuple):  # of K and V
        value = "/".join(value)
    return flag if value is None else f"{flag} {value}"


def _flag(parameter: Parameter) -> Callable[[F], F]:
    """The flag of a parameter; its value is checked before anything is loaded."""

    def check(context: click.Context, flag: click.Parameter, value: Any) -> Any:
        if value in (None, ()):
            return value
        if parameter.name == "kv_type" and "/" in value:
            value = tuple(value.split("/", 1))
        if parameter.name == "max_tokens" and value == str(_NO_LIMIT):
            return _NO_LIMIT
        try:
            if parameter.name in _GRAMMARS:
                return _grammar(parameter.name, value)
            return parameter.parse(value) if isinstance(value, str) else parameter.check(value)
        except InvalidRequestError as error:
            raise click.BadParameter(str(error), context, flag) from None

    name = parameter.name
    shape: dict[str, Any] = {"metavar": _METAVARS.get(name) or _KIND_METAVARS.get(parameter.kind)}
    if parameter.choices:
        shape = {"type": click.Choice(parameter.choices)}
    elif parameter.kind is bool:
        shape = {"default": None}
    elif name in ("stop", "stop_token_ids"):
        shape |= {"multiple": True, "type": Whole() if name == "stop_token_ids" else str}
    spellings = _SPELLINGS.get(name, ("--" + name.replace("_", "-"),))
    text = parameter.help + _MORE_HELP.get(name, "")
    return click.option(name, *spellings, help=text, callback=check, **shape)


_LOAD = (
    *(_flag(LOAD[name]) for name in LOAD_NAMES),
    click.option("-y", "--yes", is_flag=True, help="Fetch a model that is not here, unasked."),
)
_SAMPLING = tuple(_flag(ANSWER[name]) for name in SAMPLING_NAMES)


json_flag = click.option("as_json", "--json", is_flag=True, help="One JSON object.")


def load_flags(command: F) -> F:
    """How the model is loaded."""
    return _with(command, _LOAD)


def sampling_flags(command: F) -> F:
    """How tokens are picked, and when to end."""
    return _with(command, _SAMPLING)


def common_flags(command: F) -> F:
    """What every command has."""
    flag = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
    return flag(command)


def url_flags(command: F) -> F:
    """Where the model runs, if not here."""
    url = click.option(
        "--url",
        metavar="URL",
        help="Ask a server that speaks OpenAI's API; MODEL is its name there.",
    )
    key = click.option(
        "--api-key", metavar="KEY", help="For that server; else EDGEINFER_API_KEY, OPENAI_API_KEY."
    )
    return _with(command, (url, key))


def input_flags(command: F) -> F:
    """Where text comes from."""
    words = click.argument("words", metavar="[TEXT]", nargs=-1)
    prompt = click.option(
        "-p", "--prompt", metavar="TEXT", help="The text, which may also follow MODEL."
    )
    file = click.option(
        "files", "-f", "--file", multiple=True, type=FileName(), help="Append this file."
    )
    return _with(command, (words, prompt, file))


def _with(command: F, flags: tuple[Callable[[F], F], ...]) -> F:
    for flag in reversed(flags):
        command = flag(command)
    return command


def load_options(flags: dict[str, Any]) -> LoadOptions:
    """Those that were set on the command line."""
    return cast("LoadOptions", _given(flags, LOAD_NAMES))


def sampling_options(flags: dict[str, Any]) -> Sampling:
    """Those that were set on the command line."""
    return cast("Sampling", _given(flags, SAMPLING_NAMES))


def _given(flags: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    unset = {"max_tokens": (None, _NO_LIMIT)}
    return {
        name: flags[name] for name in names if flags.get(name) not in unset.get(name, (None, ()))
    }
