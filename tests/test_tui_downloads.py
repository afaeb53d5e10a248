"""Downloads in the chat: asked first, left running or cancelled, gone on from."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeinfer import DownloadError
from edgeinfer.tui.downloads import Downloads
from edgeinfer.tui.launch import _fetch
from edgeinfer.tui.model_screen import ModelScreen
from edgeinfer.tui.settings import ModelChoice

from .fake_hub import FakeHub
from .test_hub import DATA, REPO
from .test_tui_chat import Chat, drive
from .tui_engine import ScriptedModel

CHOICE = ModelChoice(REPO, None, len(DATA), "", "mit")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    monkeypatch.setenv("EDGEINFER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with FakeHub() as server:
        server.repos[REPO] = {"Tiny-Q4_K_M.gguf": DATA}
        server.hold, server.held_after = threading.Event(), 1 << 20
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server
        server.hold.set()


async def begin(chat: Chat) -> None:
    """Ask for the download, and say yes."""
    await chat.until(lambda: isinstance(chat.app.screen, ModelScreen))
    await chat.press("enter")
    await chat.until(lambda: f"{REPO} is 2 MB to download, licence mit" in chat.screen_text)
    await chat.press("enter")
    await chat.until(lambda: "1 MB of 2 MB" in chat.screen_text)


def run(
    body: Callable[[Chat], Awaitable[None]], model: str | None = None, **more: Any
) -> list[str]:
    """Drive a chat that can download one model; what it opened."""
    opened: list[str] = []

    def open_model(path: str, progress: Any) -> ScriptedModel:
        opened.append(path)
        return ScriptedModel()

    given = {"list_models": lambda: [CHOICE], "fetch": _fetch, **more}
    drive(body, path=model, open_model=open_model, **given)
    return opened


def test_a_download_is_cancelled_and_goes_on_from_what_has_come(server: FakeHub) -> None:
    async def body(chat: Chat) -> None:
        await begin(chat)
        await chat.press("ctrl+x")
        await chat.until(lambda: "cancelled at 50%" in chat.screen_text)
        assert chat.app.downloads.current is None and server.hold is not None
        server.hold.set()
        await chat.press("enter", "enter")
        await chat.idle()

    (opened,) = run(body)
    assert Path(opened).read_bytes() == DATA
    first, *later = server.bytes_asked()
    assert first is None and all(each and int(each[6:-1]) >= 1 << 20 for each in later)


def test_a_chat_that_ends_ends_its_download_and_says_so(server: FakeHub) -> None:
    downloads, end = Downloads(_fetch), time.monotonic() + 120
    started = downloads.start(REPO)
    assert started is not None and downloads.start("another") is None
    while started.share < 0.4 and time.monotonic() < end:
        time.sleep(0.01)
    told = downloads.close()
    assert told.startswith(f"the download of {REPO} was stopped at 50%; `edgeinfer pull {REPO}`")
    assert downloads.close() == "" and server.hold is not None
    server.hold.set()
    assert started.task.wait(120) and started.task.error is not None


def test_a_download_that_is_left_running_is_opened_where_no_model_is(server: FakeHub) -> None:
    async def body(chat: Chat) -> None:
        await begin(chat)
        await chat.press("escape")
        await chat.until(lambda: f"↓ {REPO} 50%" in chat.screen_text)
        server.hold.set()
        await chat.idle()
        assert "↓" not in chat.screen_text

    assert len(run(body)) == 1


def test_a_download_left_running_beside_a_model_is_said_and_not_opened(server: FakeHub) -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.send("/model")
        await begin(chat)
        await chat.press("escape")
        await chat.ask("answered meanwhile")
        await chat.send("/model")
        await chat.until(lambda: "esc leaves the download running" in chat.screen_text)
        await chat.press("escape")
        server.hold.set()
        await chat.until(lambda: f"{REPO} is here" in chat.screen_text)

    assert run(body, "scripted.gguf") == ["scripted.gguf"]


def test_a_download_that_fails_is_said_where_the_user_is() -> None:
    hold = threading.Event()

    def failing(name: str, note: Callable[[int, int], None]) -> str:
        note(1 << 20, 2 << 20)
        hold.wait(120)
        raise DownloadError("the disk is full")

    async def body(chat: Chat) -> None:
        await begin(chat)
        await chat.press("escape")
        hold.set()
        await chat.until(lambda: "failed: the disk is full" in chat.screen_text)
        await chat.send("/model")
        await chat.press("enter", "enter")
        await chat.until(lambda: "the download failed: the disk is full" in chat.screen_text)

    run(body, fetch=failing)
