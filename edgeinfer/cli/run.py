"""The command `run`: one answer to stdout, as text or as JSON."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from edgeinfer.cli.console import Output, note, show_json
from edgeinfer.cli.input import read_prompt
from edgeinfer.cli.models import advise_after
from edgeinfer.cli.opening import follow, open_model, open_on_server, server_of
from edgeinfer.cli.options import (
    common_flags,
    input_flags,
    load_flags,
    load_options,
    sampling_flags,
    sampling_options,
    url_flags,
)

if TYPE_CHECKING:
    from edgeinfer.chat_model import ChatStream
    from edgeinfer.llm import LLM
    from edgeinfer.remote.model import RemoteStream
    from edgeinfer.stream import Stream


_MOST_TOKENS = 2048  # of an answer, unless -n says otherwise


@click.command("run", epilog="Example: edgeinfer run qwen3-4b 'Why is the sky blue?'")
@click.argument("model", required=False)
@input_flags
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--raw", is_flag=True, help="Continue the text as it is, without chat template.")
@click.option("as_json", "--json", is_flag=True, help="One JSON object instead of the text.")
@url_flags
@load_flags
@sampling_flags
@common_flags
def command(
    model: str | None,
    words: tuple[str, ...],
    prompt: str | None,
    files: tuple[str, ...],
    system: str | None,
    raw: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Answer one prompt: TEXT, what is piped in, and files, in this order.

    `cat notes.txt | edgeinfer run MODEL 'Sum this up:'`. A - in place of TEXT or a file says where
    stdin belongs; </dev/null leaves it out. Without -n an answer ends after 2,048 tokens.
    """
    if raw and system is not None:
        raise click.UsageError("--system needs the chat template, --raw leaves it out")
    server = server_of(flags)
    if raw and server is not None:
        raise click.UsageError("--raw needs the model here; the server of --url has the template")
    text = _read(model, words, prompt, files, raw)
    is_limited = flags["max_tokens"] is None
    if is_limited:
        flags["max_tokens"] = _MOST_TOKENS
    sampling = sampling_options(flags)
    if server is not None:
        with open_on_server(server, model) as answering:
            with answering.stream_chat(_conversation(system, text), **sampling) as answer:
                follow(answer, None if as_json else Output(), place=server.place)
            _tell_why_it_ended(answer, is_limited, answering.n_ctx)
            if as_json:
                show_json(_told_json(answer, text, system, flags))
        return
    with open_model(model, flags, templates=not raw) as llm:
        if raw:
            stream = llm.stream(text, **sampling)
        else:
            stream = llm.stream_chat(_conversation(system, text), **sampling)
        with stream:
            follow(stream, None if as_json else Output())
        slides = stream.request.overflow == "slide"  # such a context is never full
        _tell_why_it_ended(stream, is_limited, None if slides else llm.n_ctx)
        if model is None:
            advise_after(llm.runtime.model.file.path)
        if as_json:
            show_json(_answer_json(llm, stream, text, system, raw, flags))


def _read(
    model: str | None,
    words: tuple[str, ...],
    prompt: str | None,
    files: tuple[str, ...],
    raw: bool,
) -> str:
    """The prompt; UsageError for an empty one, but that a model may continue nothing."""
    is_question = model is not None and " " in model and not model.endswith(".gguf")
    if is_question and not words and not os.path.exists(str(model)):
        raise click.UsageError(f"no model is called {model!r}; a prompt without MODEL needs -p")
    text = read_prompt(words, prompt, files)
    if not text.strip() and not (raw and "" in (prompt, *words)):
        raise click.UsageError("the prompt is empty: nothing was given, or came through the pipe")
    return text


def _tell_why_it_ended(stream: ChatStream, is_limited: bool, n_ctx: int | None) -> None:
    """A line where an answer ended that nobody had asked to end there."""
    answer = stream.completion
    if answer.finish_reason != "length":
        return
    n_tokens = answer.usage.completion_tokens
    if is_limited and n_tokens == _MOST_TOKENS:
        note(f"(stopped after {n_tokens:,} tokens; -n -1 goes on to the end, -n N to another)")
    elif n_ctx and answer.usage.prompt_tokens + n_tokens >= n_ctx:
        note(f"(stopped: the context of {n_ctx:,} tokens is full; -c N makes it longer)")


def _conversation(system: str | None, text: str) -> list[Any]:
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, {"role": "user", "content": text}]


def _answer_json(
    llm: LLM, stream: Stream, prompt: str, system: str | None, raw: bool, flags: dict[str, Any]
) -> dict[str, Any]:
    from dataclasses import asdict

    from edgeinfer.replay import Recording

    answer = stream.completion
    return {
        "text": answer.text,
        "reasoning": answer.reasoning,
        "stop": answer.stop,
        **asdict(answer.usage),
        "seed": answer.seed,
        "model": answer.model,
        "prompt": prompt,
        "system": system,
        "raw": raw,
        "load": load_options(flags),
        "sampling": sampling_options(flags),
        **Recording.of(llm, stream).as_json(),
        "timings": asdict(answer.timings),
    }


def _told_json(
    stream: RemoteStream, prompt: str, system: str | None, flags: dict[str, Any]
) -> dict[str, Any]:
    """What came from a server; `usage` and `timings` as it told them, null where it did not."""
    answer = stream.completion
    return {
        "text": answer.text,
        "reasoning": answer.reasoning,
        "finish_reason": answer.finish_reason,
        "model": answer.model,
        "prompt": prompt,
        "system": system,
        "sampling": sampling_options(flags),
        "usage": stream.told.usage,
        "timings": stream.told.timings,
    }
