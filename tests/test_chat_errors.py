"""Errors in the chat's words: no keyword of the API where a person reads, and what to do here."""

from __future__ import annotations

import pickle
import re
import sys
from pathlib import Path

import pytest

from edgeinfer import LLM, ClosedError, ContextLengthError, EdgeInferError, plan
from edgeinfer.cli.line_input import LineInput
from edgeinfer.cli.main import main
from edgeinfer.cli.options import as_flag
from edgeinfer.cli.plain_chat import talk
from edgeinfer.engine.cache import CacheLayout
from edgeinfer.engine.generation import check_length, public_error
from edgeinfer.errors import Keyword
from edgeinfer.hub.discovery import find_model
from edgeinfer.tui.errors import in_chat

from .models_for_tests import tiny_model
from .test_tui_chat import Chat, drive
from .tui_engine import Script, ScriptedModel

KEYWORD = re.compile(r"\b(n_ctx|max_tokens|slots?|overflow=|\w+=)|slot\(s\)|`edgeinfer|pull ")
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("words"), n_ctx=4096, chat_template=TEMPLATE)


def raised(call: object) -> EdgeInferError:
    with pytest.raises(EdgeInferError) as caught:
        call()  # type: ignore[operator]
    return caught.value


def test_every_error_of_room_says_what_to_do_in_the_chat(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEINFER_HOME", str(tmp_path))
    errors = {
        raised(lambda: check_length(5000, 4096)): "5,000 tokens to read, and the context holds",
        raised(lambda: plan(path, n_ctx=2**30, memory="2G")): "would fit: /params context",
        raised(lambda: plan(path, memory="1M")): "smaller model with /model",
        raised(lambda: CacheLayout.of("slide", 32)): "/params context makes it longer",
        public_error(MemoryError()): "memory ran out. Close other programs",
        ClosedError("the engine failed"): "/model opens it again",
        raised(lambda: find_model("qwen3-4b")): "not on this machine; /model shows",
        raised(lambda: find_model("qwen3-4bb")): "did you mean qwen3-4b",
        raised(lambda: find_model("no/such.gguf")): "/model shows",
        MemoryError(): "unexpected MemoryError; /retry",
        ZeroDivisionError("a\nb"): "unexpected ZeroDivisionError: a b; /retry",
    }
    for error, part in errors.items():
        text = in_chat(error)
        assert part in text, text
        assert not KEYWORD.search(text), text
    too_long = ContextLengthError("n_ctx", n_tokens=1, n_ctx=1)
    assert "drop-turns" not in in_chat(too_long)
    assert "drop-turns" in in_chat(too_long, drops_turns=False)


def test_an_overflow_in_the_chat() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("hi")
        assert "this is too long: 9,000 tokens" in chat.shown
        assert not KEYWORD.search(chat.shown)
        await chat.ask("again")
        assert "unexpected MemoryError" in chat.shown  # which has no words of its own

    length = ContextLengthError("raise n_ctx", n_tokens=9000, n_ctx=8192)
    drive(body, ScriptedModel([Script(error=length), Script(error=MemoryError())]))


def test_an_overflow_in_the_plain_chat(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["long " * 400, "/stats", None])
    monkeypatch.setattr(LineInput, "__init__", lambda self, history: None)
    monkeypatch.setattr(LineInput, "next", lambda self: next(lines))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    with LLM(path, device="reference", n_ctx=256) as llm:
        talk(llm, None, {}, lambda stream, output: None)
    told = capsys.readouterr().err
    assert "this is too long" in told and "a larger -c" in told and "no answer yet" in told
    assert not KEYWORD.search(told)


def test_advice_is_spelled_by_whoever_shows_it() -> None:
    advice = ("raise ", Keyword("n_ctx"), " or use ", Keyword("overflow", "slide"))
    error = ContextLengthError("too long", advice=advice, n_tokens=9)
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert str(each) == "too long; raise n_ctx or use overflow='slide'"
        assert each.spelled(as_flag) == "too long; raise -c or use --overflow slide"
        assert each.found == "too long" and each.n_tokens == 9


def test_the_command_names_its_flags(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, advice in (
        (
            ("-c", "64", "-p", "long " * 300),
            "raise -c or shorten the prompt",
        ),
        (("-c", "2147483000", "-p", "x", "--memory", "2G"), "for 2147483000 tokens of context"),
        (("-c", "64", "-p", "x", "--overflow", "slide"), "raise -c or use --overflow error"),
    ):
        with pytest.raises(SystemExit):
            main(["run", str(path), "--device", "reference", *arguments])
        told = capfd.readouterr().err
        assert advice in told and not KEYWORD.search(told.partition("edgeinfer: ")[2]), told
