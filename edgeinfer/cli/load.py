"""The command `load`: what users of a server would feel, of any server with OpenAI's API."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeinfer.cli.console import note, noted_if_silent, show, show_json
from edgeinfer.cli.numbers import Number, Whole
from edgeinfer.cli.options import FileName, common_flags, json_flag

if TYPE_CHECKING:
    from edgeinfer.load.generator import Measured, Settings
    from edgeinfer.load.traffic import Conversation, Shape
    from edgeinfer.remote.address import Address

_MOST_LENGTH = 1 << 20  # tokens
_MOST_WRITTEN = 1 << 20  # conversations; a file of more would not be read
_SECONDS = Number(0, 1e6)


def _range(context: click.Context, flag: click.Parameter, value: str) -> tuple[int, int]:
    """A number, or two with a hyphen between: the least and the most."""
    low, dash, high = value.partition("-")
    ends = (low, high) if dash else (low,)
    if not all(each.isdecimal() and each.isascii() and len(each) < 20 for each in ends):
        raise click.BadParameter(f"{value!r} is no range; give one such as 20-200", context, flag)
    found = int(low), int(ends[-1])
    if not 1 <= found[0] <= found[1] <= _MOST_LENGTH:
        raise click.BadParameter(
            f"{value!r} begins below 1, falls, or ends above {_MOST_LENGTH}", context, flag
        )
    return found


def _object(context: click.Context, flag: click.Parameter, value: str) -> dict[str, Any]:
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"it is no JSON: {error}", context, flag) from None
    if not isinstance(found, dict):
        raise click.BadParameter("it must be a JSON object", context, flag)
    return found


_RANGE: Any = {"metavar": "LOW-HIGH", "callback": _range}


def _traffic_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Who asks what."""
    for flag in (
        click.option("--traffic", type=FileName(exists=True, dir_okay=False, path_type=Path),
                     help="Conversations recorded in this file, instead of made ones."),
        click.option("--write-traffic", type=FileName(dir_okay=False, path_type=Path),
                     help="Write the conversations to this file, and end."),
        click.option("--seed", type=Whole(0), default=1, show_default=True),
        click.option("--turns", **_RANGE, default="1-6", show_default=True,
                     help="Requests of a conversation."),
        click.option("--user-tokens", **_RANGE, default="20-200", show_default=True),
        click.option("--answer-tokens", **_RANGE, default="30-300", show_default=True),
        click.option("--think", type=_SECONDS, default=5.0, show_default=True,
                     help="Seconds between an answer and what follows it."),
        click.option("--systems", type=Whole(1, 1 << 20), default=4, show_default=True,
                     help="Different system prompts."),
        click.option("--system-tokens", type=Whole(0, _MOST_LENGTH), default=500,
                     show_default=True),
        click.option("--shared/--not-shared", default=True, show_default=True,
                     help="Whether conversations have system prompts in common."),
    )[::-1]:  # fmt: skip
        command = flag(command)
    return command


@click.command("load", epilog="Example: edgeinfer load http://127.0.0.1:8080 --rate 0.5 --rate 1")
@click.argument("url")
@click.option("--model", default="", help="Its name there; else the first that the server lists.")
@click.option(
    "rates", "--rate", type=Number(0, 1e6, min_open=True), multiple=True,
    help="Requests a second, on average [1]; several are run one after the other.",
)  # fmt: skip
@click.option(
    "--users", type=Whole(1, 1 << 16),
    help="Instead of a rate: so many ask without pauses.",
)  # fmt: skip
@click.option("--seconds", type=Number(0, 1e6, min_open=True), default=60.0,
              show_default=True, help="How long requests come.")  # fmt: skip
@click.option("--head-start", type=_SECONDS, default=0.0, show_default=True,
              help="Seconds of conversations before, which go on.")  # fmt: skip
@click.option("--warmup", type=_SECONDS, default=0.0, help="Seconds at first that don't count.")
@click.option("--drain", type=_SECONDS, default=60.0, show_default=True,
              help="Seconds that the last answers may take.")  # fmt: skip
@click.option("--deadline", type=Number(0, 1e6, min_open=True), default=600.0,
              show_default=True, help="Seconds that an answer may take.")  # fmt: skip
@click.option("--max-in-flight", type=Whole(1, 1 << 16), default=1024, show_default=True)
@click.option("--retries", type=Whole(0, 100), default=2, show_default=True,
              help="After 429 and 503.")  # fmt: skip
@click.option("--ignore-eos", is_flag=True, help="Answers as long as they may be, where it works.")
@click.option(
    "body",
    "--body",
    metavar="JSON",
    callback=_object,
    default="{}",
    help="More fields of requests.",
)
@click.option("--api-key", metavar="KEY", help="Else EDGEINFER_API_KEY, OPENAI_API_KEY.")
@click.option("--plot", type=FileName(dir_okay=False, path_type=Path), help="Draw a picture.")
@_traffic_flags
@json_flag
@common_flags
@click.pass_context
def command(context: click.Context, /, url: str, **flags: Any) -> None:
    """Put a load on a server with OpenAI's API.

    Conversations come by chance, whether or not earlier requests were answered, and what one took
    counts from when it was due. Lengths of texts and answers are log-normal between their limits.
    A percentile is one of the values (nearest rank): of fewer than 20 the p95 is the slowest.
    """
    from edgeinfer.load.plot import check_plot
    from edgeinfer.load.traffic import write_traffic
    from edgeinfer.remote.address import read_address

    if flags["rates"] and flags["users"]:
        raise click.UsageError("--rate and --users are two kinds of load: give one")
    try:
        json.dumps([flags["model"], flags["body"]], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise click.UsageError("--model or --body has characters that are not Unicode") from None
    if flags["warmup"] >= flags["seconds"]:
        raise click.UsageError("--warmup is not shorter than --seconds: nothing would count")
    if flags["write_traffic"]:
        rate = _conversation_rates(flags)[0]
        n = max(1, round(rate * flags["seconds"]))
        if n > _MOST_WRITTEN:
            raise click.UsageError(f"{n:,} conversations are too many to write: lower --seconds")
        write_traffic(flags["write_traffic"], list(islice(_conversations(flags), n)))
        return
    address = read_address(url, flags["api_key"])
    if flags["plot"]:
        check_plot(flags["plot"])
    rates = _conversation_rates(flags)  # reads --traffic, before a server is asked
    runs: list[Measured] = []
    try:
        asyncio.run(_measure(address, flags, rates, runs))
    except KeyboardInterrupt:
        note("stopped; this is what was measured until then")
        _report(address, runs, flags)
        context.exit(130)
    _report(address, runs, flags)


def _conversations(flags: dict[str, Any]) -> Iterator[Conversation]:
    from edgeinfer.load.traffic import read_traffic, repeated, synthetic

    if flags["traffic"]:
        return repeated(read_traffic(flags["traffic"]))
    return synthetic(_shape(flags), flags["seed"])


def _shape(flags: dict[str, Any]) -> Shape:
    from edgeinfer.load.traffic import Shape

    return Shape(
        flags["systems"], flags["system_tokens"], flags["turns"], flags["user_tokens"],
        flags["answer_tokens"], flags["think"],
    )  # fmt: skip


def _conversation_rates(flags: dict[str, Any]) -> list[float]:
    """Of requests and of conversations: those have several."""
    from edgeinfer.load.traffic import read_traffic

    if flags["traffic"]:
        recorded = read_traffic(flags["traffic"])
        n_turns = sum(len(each.turns) for each in recorded) / len(recorded)
    else:
        n_turns = sum(flags["turns"]) / 2
    return [rate / n_turns for rate in flags["rates"] or (1.0,)]


def _settings(flags: dict[str, Any], model: str) -> Settings:
    from edgeinfer.load.generator import Settings

    return Settings(
        model=model,
        n_users=flags["users"] or 0,
        seconds=flags["seconds"],
        head_start=0.0 if flags["users"] else flags["head_start"],
        warmup=flags["warmup"],
        drain=flags["drain"],
        deadline=flags["deadline"],
        most_in_flight=flags["max_in_flight"],
        n_retries=flags["retries"],
        shares_prompts=flags["shared"],
        seed=flags["seed"],
        body=flags["body"],
        ignores_eos=flags["ignore_eos"],
    )


async def _measure(
    address: Address, flags: dict[str, Any], rates: list[float], runs: list[Measured]
) -> None:
    from edgeinfer.load.generator import Generator, find_model, tokens_per_word
    from edgeinfer.load.http_client import Client
    from edgeinfer.load.traffic import Texts

    with contextlib.closing(Client(address)) as client:
        with noted_if_silent(address.place):
            model = flags["model"] or await find_model(client)
            settings = _settings(flags, model)
            texts = Texts(await tokens_per_word(client, settings))
        for rate in rates:
            asked = replace(settings, rate=rate)
            generator = Generator(client, asked, _conversations(flags), texts, address.is_local)
            runs.append(generator.measured)
            if not flags["as_json"]:
                note(f"{len(runs)}: {settings.seconds:.0f} s of requests to {address.place} ...")
            await generator.run()


def _report(address: Address, runs: list[Measured], flags: dict[str, Any]) -> None:
    from edgeinfer.bench.tables import table
    from edgeinfer.load.plot import Series, write_plot
    from edgeinfer.load.summary import (
        HEADER,
        end_to_end_seconds,
        first_token_seconds,
        notes,
        row,
        summary,
    )

    runs = [each for each in runs if each.ended]
    found = [summary(each) for each in runs]
    if flags["as_json"]:
        show_json({"url": address.place, "seed": flags["seed"], "runs": found})
    elif found:
        for line in table(HEADER, [row(each) for each in found]):
            show(line)
        for i, each in enumerate(found, 1):
            for line in notes(each):
                show(f"{i}: {line}" if len(found) > 1 else line)
    if flags["plot"] and found:
        series = [
            Series(row(one)[0], first_token_seconds(each.records, each.ended),
                   end_to_end_seconds(each.records, each.ended))
            for one, each in zip(found, runs, strict=True)
        ]  # fmt: skip
        write_plot(flags["plot"], series, f"{address.place}, seed {flags['seed']}")
