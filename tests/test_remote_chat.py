"""The chat on a server: a real one, and one that is hostile or dies."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeinfer.cli.opening import follow
from edgeinfer.cli.plain_chat import talk
from edgeinfer.remote.address import read_address
from edgeinfer.remote.server import Server
from edgeinfer.tui.export import as_json
from edgeinfer.tui.model_screen import ModelScreen
from edgeinfer.tui.params_screen import ParamsScreen
from edgeinfer.tui.store import FILE_NAME

from .fake_api import DONE, FakeApi, delta, fake_api, frame, reply, reset, stream
from .server_for_tests import LOAD, N_CTX, Running, running, small_model
from .test_tui_chat import Chat, drive
from .waiting import halting, wait_until

KEY = "sk-secret-0123456789"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running([("tiny", small_model(tmp_path_factory.mktemp("remote")))]) as found:
        yield found


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with fake_api() as found:
        yield found


def at(url: str, key: str | None = None) -> Server:
    return Server(read_address(url, key))


def drive_on(server: Server, body: Any, **settings: Any) -> None:
    """The chat with what `edgeinfer chat --url` gives it."""
    from edgeinfer.tui.launch import _on_server
    from edgeinfer.tui.settings import ChatSettings

    given = _on_server(ChatSettings(data_folder=Path("/nowhere"), open_model=None), server)  # type: ignore[arg-type]
    names = ("open_model", "list_models", "last_model", "memory_now", "finds_titles", "server")
    drive(body, path=None, **{name: getattr(given, name) for name in names}, **settings)


# -- a real server -------------------------------------------------------------------------------


def test_a_real_server_answers_as_it_was_made_to(server: Running) -> None:
    model = at(server.url).open()
    assert model.name == f"tiny at {server.url[7:]}"
    assert (model.n_ctx, model.tells_progress) == (N_CTX, True)
    said = "<think>hm</think>\x1b[31mgrüß€ 🙂"
    with server.replying(said) as prompts:
        events = list(model.stream_chat("what?", seed=4))
    assert "what?" in prompts[0]
    assert [event.type for event in events][0] == "prompt_progress"
    answer = events[-1].completion  # type: ignore[union-attr]
    assert (answer.reasoning, answer.text) == ("hm", "\x1b[31mgrüß€ 🙂")
    assert answer.usage.completion_tokens == len(server.llm.tokenize(said))
    assert answer.usage.prompt_tokens > 0 and answer.seed == 4


def test_the_same_seed_gives_what_the_model_says_itself(server: Running) -> None:
    told = at(server.url).open().stream_chat("hello", seed=3, max_tokens=12, logprobs=2)
    events = list(told)
    here = server.llm.chat("hello", seed=3, max_tokens=12, logprobs=2)
    assert (told.completion.text, told.completion.finish_reason) == (here.text, "length")
    assert told.completion.usage.prompt_tokens == here.usage.prompt_tokens
    assert here.logprobs is not None and told.completion.logprobs is not None
    assert [round(each.logprob, 4) for each in told.completion.logprobs] == [
        round(each.logprob, 4) for each in here.logprobs
    ]
    assert events[-1].type == "done"


def test_a_stopped_answer_frees_its_slot(server: Running) -> None:
    model = at(server.url).open()
    with halting(server.llm):
        answer = model.stream_chat("hello", logit_bias={257: -1000})  # without its end
        while next(answer).type != "delta":
            pass
        assert server.llm.runtime.engine.n_running == 1
        answer.close()
        wait_until(lambda: not server.service.answers, "the end of an answer that nobody reads")
    server.wait_until_idle()
    assert answer.completion.finish_reason == "cancelled"


def test_a_long_chat_goes_on_in_a_short_context(tmp_path: Path) -> None:
    turns: list[Any] = []
    for i in range(12):
        turns += [{"role": "user", "content": f"{i} " * 30}]
        turns += [{"role": "assistant", "content": "yes " * 15}]
    turns = turns[:-1]
    with running([("tiny", small_model(tmp_path))], load={**LOAD, "n_ctx": 256}) as short:
        model = at(short.url).open()
        answer = model.stream_chat(turns, overflow="drop-turns", max_tokens=2)
        list(answer)
        assert answer.dropped_turns > 0
        assert answer.completion.usage.prompt_tokens < 256
        again = model.stream_chat(turns, overflow="drop-turns", max_tokens=2)
        list(again)  # how long texts are is known by now: there is room for an answer
        assert again.dropped_turns >= answer.dropped_turns
        assert again.completion.usage.prompt_tokens < 256 * 0.85
        with pytest.raises(Exception, match="the context at .* holds 256; shorten it"):
            list(model.stream_chat(turns, max_tokens=2))


def test_a_key_opens_a_server_that_asks_for_one(tmp_path: Path) -> None:
    with running([("tiny", small_model(tmp_path))], api_keys=(KEY,)) as locked:
        with pytest.raises(Exception, match="asks for an API key .*set EDGEINFER_API_KEY"):
            at(locked.url).open()
        with pytest.raises(Exception, match="does not take this API key") as caught:
            at(locked.url, "sk-another-9876543210").open()
        assert "9876543210" not in str(caught.value)
        list(at(locked.url, KEY).open().stream_chat("x", max_tokens=1))


def test_commands_on_a_server(server: Running, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgeinfer"]
    with server.replying("four"):
        done = subprocess.run(
            [*command, "run", "--url", server.url, "--json", "-p", "2 and 2?"],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0 and '"text": "four"' in done.stdout, done.stderr
        assert '"prompt_tokens"' in done.stdout
        done = subprocess.run(
            [*command, "chat", "--plain", "--url", server.url],
            input="hi\n/stats\n", capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.stdout == "four\n"
    assert f"context {N_CTX} tokens" in done.stderr and "1 turns" in done.stderr
    assert "planned" not in done.stderr and "memory" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--url", NOWHERE, "-c", "512"], "-c: how a model is loaded is set where it runs"),
        (["--api-key", KEY], "--api-key is for the server of --url"),
        (["--url", "x://y"], "is no URL of a server"),
        (["--url", NOWHERE], "nothing listens at 127.0.0.1:9"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(flags: list[str], why: str) -> None:
    command = [sys.executable, "-m", "edgeinfer", "chat", "--plain", *flags]
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=300)
    assert done.returncode in (1, 2) and why in done.stderr
    assert KEY not in done.stderr and "Traceback" not in done.stderr


# -- on the screen -------------------------------------------------------------------------------


def test_the_chat_on_a_real_server(server: Running, tmp_path: Path) -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        place = server.url[7:]
        assert f"tiny at {place}" in chat.screen_text
        assert f"{place} runs it, on this machine." in chat.screen_text
        assert f"0 of {N_CTX:,}" in chat.screen_text
        with server.replying("blue"):
            await chat.ask("the sea?")
        assert "blue" in chat.shown and f"from {place}" in chat.shown
        details = chat.app.session.conversation.branch()[-1].details
        assert details["server"] == place and details["model"] == f"tiny at {place}"
        assert details["n_tokens"] > 0 and "seed" not in details
        assert place in as_json(chat.app.session.conversation)
        await chat.send("/stats")
        assert "memory" not in chat.screen_text and "Planned" not in chat.screen_text
        await chat.press("escape")
        await chat.send("/params")
        assert isinstance(chat.app.screen, ParamsScreen)
        assert "server’s own" in chat.screen_text and "context" not in chat.screen_text[200:-200]
        await chat.press("escape")
        await chat.send("/params context 4096")
        assert "is set where the model runs" in chat.screen_text

    drive_on(at(server.url), body, folder=tmp_path)
    assert server.url[7:].encode() in (tmp_path / FILE_NAME).read_bytes()


def test_models_are_chosen_among_the_servers(api: FakeApi, tmp_path: Path) -> None:
    ids = ["first", "se\x1b[2Jcond", "org/third.gguf"]
    api.models = reply({"data": [{"id": id, "max_model_len": 4096} for id in ids]})
    api.answers = [stream(delta(content="yes"), delta("stop"), DONE)]

    async def body(chat: Chat) -> None:
        await chat.until(lambda: isinstance(chat.app.screen, ModelScreen))
        assert "has 3 models and none was named" in chat.screen_text
        assert "\x1b" not in chat.screen_text and "context 4,096" in chat.screen_text
        await chat.press("down", "enter")
        await chat.idle()
        await chat.ask("hi")
        assert api.bodies()[-1]["model"] == ids[1]
        await chat.press("f3")
        await chat.press("down", "enter")
        await chat.idle()
        await chat.ask("hi")
        assert api.bodies()[-1]["model"] == ids[2]
        assert "third.gguf at" in chat.screen_text and "\x1b" not in chat.screen_text
        await chat.send("/model other")
        await chat.idle()
        api.answers = [reply({"error": {"message": "no such model"}}, "404 Not Found")]
        await chat.ask("hi")
        assert "has no model other" in chat.shown and "org/third.gguf" in chat.shown

    drive_on(at(api.url), body, folder=tmp_path)

    async def again(chat: Chat) -> None:
        await chat.until(lambda: isinstance(chat.app.screen, ModelScreen))
        assert "other" not in chat.screen_text

    drive_on(at(api.url), again, folder=tmp_path)


def test_a_server_that_dies_takes_nothing_with_it(api: FakeApi, tmp_path: Path) -> None:
    api.answers = [
        stream(delta(content="so \x1b]0;title\x07far"), reset),
        reply({"error": {"message": f"key {KEY} \x1b[2Jis bad"}}, "401 Unauthorized"),
        stream(delta(content="back"), delta("stop"), DONE),
    ]

    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("first")
        assert "so far" in chat.shown and "broke off before the end" in chat.shown
        await chat.ask("second")
        assert "does not take this API key" in chat.shown and "[the key] is bad" in chat.shown
        await chat.ask("third")
        assert "back" in chat.shown
        sent = [each["content"] for each in api.bodies()[-1]["messages"]]
        assert sent == ["first", "so \x1b]0;title\x07far", "third"]
        texts = [node.content for node in chat.app.session.conversation.branch()]
        assert texts == ["first", sent[1], "second", "", "third", "back"]

    drive_on(at(api.url, KEY), body, folder=tmp_path)
    kept = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"second" in kept and KEY.encode() not in kept


def test_a_server_that_is_not_there_can_be_asked_again(api: FakeApi, tmp_path: Path) -> None:
    up, api.models = api.models, reply({"error": "starting"}, "503 Service Unavailable")
    api.answers = [stream(delta(content="yes"), delta("stop"), DONE)]

    async def body(chat: Chat) -> None:
        await chat.press(*"typed")
        await chat.until(lambda: chat.app.session.loader is None)
        if isinstance(chat.app.screen, ModelScreen):  # it had failed before the first letter
            await chat.press("escape")
        assert "is not ready" in chat.screen_text or chat.app.composer.prompt.text
        api.models = up
        await chat.press("f3")
        await chat.until(lambda: "ask it again" in chat.screen_text)
        text = chat.app.composer.prompt.text
        await chat.press("enter")
        await chat.idle()
        assert chat.app.composer.prompt.text == text
        await chat.ask("hi")
        assert "yes" in chat.shown

    drive_on(at(api.url), body, folder=tmp_path)


def test_escape_stops_an_answer_and_closes_its_connection(api: FakeApi) -> None:
    api.answers = [stream(delta(content="first "), *[frame(delta(content="word ")), 0.02] * 5000)]

    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.send("go on")
        await chat.until(lambda: "first" in chat.shown)
        assert "tok/s" not in chat.screen_text  # nobody knows how many tokens an event is
        await chat.press("escape")
        await chat.until(lambda: api.has_lost_clients)
        assert "stopped · from 127.0.0.1" in chat.shown and "tokens" not in chat.shown

    drive_on(at(api.url), body)


def test_a_plain_chat_goes_on_where_an_answer_broke_off(
    api: FakeApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeinfer.cli.line_input import LineInput

    api.answers = [
        stream(delta(content="so far")), stream(delta(content="yes"), delta("stop"), DONE)
    ]  # fmt: skip
    read = iter(["first", "second", "/stats", None])
    monkeypatch.setattr(LineInput, "__init__", lambda self, history: None)
    monkeypatch.setattr(LineInput, "next", lambda self: next(read))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    talk(at(api.url).open(), None, {}, follow)
    said = capsys.readouterr()
    assert said.out == "so far\nyes\n"
    assert "broke off before the end" in said.err and "1 turns" in said.err
    assert "tok/s" not in said.err


def test_what_went_wrong_in_an_answer_is_a_line_of_its_own(
    api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgeinfer.cli.main import main

    api.answers = [stream(delta(content="so far"))]
    with pytest.raises(SystemExit) as end:
        main(["run", "--url", api.url, "m", "-p", "hi"])
    said = capsys.readouterr()
    assert end.value.code == 1 and said.out == "so far\n"
    assert said.err.splitlines()[-1].startswith("edgeinfer: ")
