"""The chat screen, driven without a terminal on a scripted model."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from textual import events
from textual.keys import _character_to_key
from textual.pilot import Pilot

from edgeinfer import EdgeInferError, InvalidModelError
from edgeinfer.engine.memory_plan import Pool
from edgeinfer.tui.app import ChatApp
from edgeinfer.tui.branch_screen import BranchScreen
from edgeinfer.tui.history_screen import HistoryScreen
from edgeinfer.tui.model_screen import ModelScreen
from edgeinfer.tui.params_screen import ParamsScreen
from edgeinfer.tui.probabilities_screen import ProbabilitiesScreen
from edgeinfer.tui.settings import ChatSettings, ModelChoice
from edgeinfer.tui.store import FILE_NAME, Store
from edgeinfer.tui.text_screen import TextScreen
from tests.tui_engine import Script, ScriptedModel, opener

CHARACTERS = {"backslash": "\\", "space": " "}  # of keys that are named
SLOW = Script("word " * 400, seconds=0.01, hold=threading.Event())  # it never ends by itself


class Chat:
    """An app and its pilot, with the waits that tests need."""

    def __init__(self, app: ChatApp, pilot: Pilot[None]) -> None:
        self.app, self.pilot = app, pilot

    async def press(self, *keys: str) -> None:
        """Keys as Textual's `press` names them, each once all before it have done their work."""
        assert self.app._driver is not None
        for key in keys:
            character = key if len(key) == 1 else CHARACTERS.get(key)
            name = _character_to_key(key) if character == key else key
            self.app._driver.send_message(events.Key(name, character))
            await self.settle()

    async def settle(self) -> None:
        """Until what has come is taken, done and drawn."""
        for _ in range(3):
            while self.app._typed or self.app._taking is not None:
                await asyncio.sleep(0.001)
            await self.pilot.pause(0)

    async def until(self, is_so: Callable[[], object], seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, "it did not happen in time"
            await self.pilot.pause(0.005)
        await self.settle()

    async def idle(self) -> None:
        await self.until(lambda: self.app.session.is_ready)

    async def send(self, text: str) -> None:
        self.app.composer.prompt.set_text(text)
        await self.settle()
        if self.app.composer.query_one("#completions").display:
            await self.press("escape")
        await self.press("enter")
        await self.settle()

    async def ask(self, text: str) -> None:
        await self.send(text)
        await self.idle()

    @property
    def shown(self) -> str:
        """All lines of the transcript."""
        transcript = self.app.transcript
        lines = range(transcript._list.n_lines)
        return "\n".join(
            "".join(segment.text for segment in transcript.segments_of(i)).rstrip() for i in lines
        )

    @property
    def screen_text(self) -> str:
        """What the terminal shows."""
        width, height = self.app.size
        strips = self.app.screen._compositor.render_strips(self.app.size)
        return "\n".join(strip.text for strip in strips)


def drive(
    body: Callable[[Chat], Awaitable[None]],
    model: ScriptedModel | None = None,
    size: tuple[int, int] = (100, 30),
    folder: Path | None = None,
    path: str | None = "scripted.gguf",
    **settings: Any,
) -> ScriptedModel:
    """Run `body` on a chat with a scripted model; without a folder no history is kept.

    `path` is what the chat opens at its start, None for no model.
    """
    model = model or ScriptedModel()
    given = {
        "data_folder": folder or Path("/nowhere"),
        "keeps_history": folder is not None,
        "open_model": opener(model),
        "model": path,
        "folder": folder or Path.cwd(),
        **settings,
    }

    async def run() -> None:
        app = ChatApp(ChatSettings(**given))
        async with app.run_test(size=size) as pilot:
            chat = Chat(app, pilot)
            # Textual's own looks whether the processor rests: up to a second beside an answer.
            with mock.patch("textual.pilot.wait_for_idle", lambda *_: chat.settle()):
                await body(chat)

    # An eighth of a second is long here; a busy machine finds files later than another.
    with (
        mock.patch("edgeinfer.tui.app._RATE", 50.0),
        mock.patch("edgeinfer.tui.files._PATIENCE_SECONDS", 20.0),
    ):
        asyncio.run(run())
    return model


def test_a_message_is_sent_and_its_answer_rendered() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.press(*"Hi", "enter")
        await chat.idle()
        assert "Title" in chat.shown and "#" not in chat.shown
        assert "print(1)" in chat.shown and "42.0 tok/s" in chat.shown
        assert "40 cached" in chat.screen_text and "Scripted 1B" in chat.screen_text

    model = drive(body, ScriptedModel([Script("# Title\n\n```py\nprint(1)\n```\n")]))
    assert model.asked == [[{"role": "user", "content": "Hi"}]]
    assert model.is_closed


def test_the_screen_is_up_while_the_model_loads_and_prompts_wait() -> None:
    hold = threading.Event()

    async def body(chat: Chat) -> None:
        await chat.until(lambda: chat.app.session.loader)
        await chat.until(lambda: "45%" in chat.screen_text)
        assert "loading weights" in chat.screen_text
        await chat.send("first")
        await chat.send("second")
        assert "next  first" in chat.screen_text
        hold.set()
        await chat.until(lambda: len(model.asked) == 2)
        await chat.idle()
        assert "next" not in chat.screen_text.split("first")[0]

    model = ScriptedModel()
    drive(body, model, open_model=opener(model, hold))
    assert [m[-1]["content"] for m in model.asked] == ["first", "second"]


def test_escape_stops_and_keeps_the_partial_answer(tmp_path: Path) -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.send("go")
        await chat.until(lambda: "word word" in chat.shown)
        await chat.press("escape")
        assert model.streams[0].is_closed.is_set() and chat.app.session.running is None
        assert "stopped" in chat.shown and "word word" in chat.shown
        node = chat.app.session.conversation.last("assistant")
        assert node is not None and node.state == "stopped"
        n = len(node.content)
        await chat.pilot.pause(0.3)
        assert len(node.content) == n
        await chat.send("again")

    model = ScriptedModel([SLOW, Script("ok")])
    drive(body, model, folder=tmp_path)
    assert "word word" in model.asked[1][1]["content"]


def test_escape_puts_waiting_prompts_back() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.send("go")
        await chat.send("one")
        await chat.send("two")
        await chat.press("escape")
        await chat.pilot.pause(0.2)
        assert chat.app.composer.prompt.text == "one\ntwo"
        assert chat.app.session.queue == []

    assert len(drive(body, ScriptedModel([SLOW])).asked) == 1


def test_backspace_takes_a_waiting_prompt_back() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.send("go")
        await chat.send("one")
        await chat.press("backspace")
        await chat.settle()
        assert chat.app.composer.prompt.text == "one" and not chat.app.session.queue

    drive(body, ScriptedModel([SLOW]))


def test_reading_a_prompt_shows_progress_and_can_be_stopped() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.send("long")
        await chat.until(lambda: "reading" in chat.screen_text)
        assert "of 4,000" in chat.screen_text
        await chat.press("escape")
        assert chat.app.session.running is None

    drive(body, ScriptedModel([Script(n_prompt=4000, n_cached=0, prompt_seconds=5)]))


def test_thoughts_fold_with_their_duration() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("why")
        assert "Thought for" in chat.shown and "deep" not in chat.shown
        await chat.press("ctrl+t")
        await chat.settle()
        assert "deep" in chat.shown
        await chat.press("ctrl+t")
        assert "deep" not in chat.shown

    drive(body, ScriptedModel([Script("so", reasoning="deep " * 30, seconds=0.01)]))


def test_an_error_of_the_model_is_shown_and_the_chat_goes_on() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("bad")
        assert "too long\n" in chat.shown + "\n"
        await chat.ask("good")
        assert "Hello from the script." in chat.shown

    drive(body, ScriptedModel([Script(error=EdgeInferError("too long")), Script()]))


def test_answer_again_makes_a_branch_and_arrows_switch() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("q")
        await chat.press("ctrl+r")
        await chat.until(lambda: "two" in chat.shown and chat.app.session.is_ready)
        assert "‹ 2 of 2 ›" in chat.shown and "one" not in chat.shown
        await chat.press("ctrl+up", "left")
        await chat.settle()
        assert "one" in chat.shown and "‹ 1 of 2 ›" in chat.shown
        await chat.press("right")
        assert "two" in chat.shown
        await chat.press("escape")
        await chat.send("/branch")
        assert isinstance(chat.app.screen, BranchScreen)
        await chat.press("up", "enter")
        await chat.settle()
        assert "one" in chat.shown

    drive(body, ScriptedModel([Script("one"), Script("two")]))


def test_an_earlier_message_is_edited_in_a_branch_of_its_own() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("first")
        await chat.ask("second")
        await chat.press("ctrl+up", "up", "up", "up", "e")
        await chat.settle()
        prompt = chat.app.composer.prompt
        assert prompt.text == "first" and "editing" in chat.screen_text
        await chat.press(*" new", "enter")
        await chat.idle()
        assert "second" not in chat.shown and "first new" in chat.shown
        assert len(chat.app.session.conversation.leaves()) == 2

    model = drive(body)
    assert model.asked[-1] == [{"role": "user", "content": "first new"}]


def test_escape_leaves_an_edit_alone() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("first")
        await chat.send("/edit")
        assert chat.app.editing is not None
        await chat.press("escape")
        assert chat.app.editing is None and chat.app.composer.prompt.text == ""

    drive(body)


def test_undo_and_clear() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("first")
        await chat.ask("second")
        await chat.send("/undo")
        assert "second" not in chat.shown and "first" in chat.shown
        await chat.send("/clear")
        assert chat.app.transcript.blocks == []
        await chat.ask("third")

    assert drive(body).asked[-1] == [{"role": "user", "content": "third"}]


def test_system_and_params_count_from_the_next_answer_on() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.send("/system Be brief")
        await chat.send("/params temperature 0.3")
        await chat.send("/params top_k=5")
        await chat.send("/params top_k nonsense")
        await chat.ask("q")
        await chat.press("f4")
        await chat.settle()
        assert isinstance(chat.app.screen, ParamsScreen)
        await chat.press("backspace", "backspace", "backspace", *"1.5", "enter")
        await chat.settle()
        await chat.ask("r")

    model = drive(body)
    assert model.asked[0][0] == {"role": "system", "content": "Be brief"}
    assert model.sampling[0] == {"overflow": "drop-turns", "temperature": 0.3, "top_k": 5}
    assert model.sampling[1]["temperature"] == 1.5


def test_slash_commands_complete() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.press(*"/the")
        await chat.settle()
        assert "/theme" in chat.screen_text
        await chat.press("tab")
        await chat.settle()
        assert chat.app.composer.prompt.text == "/theme "
        await chat.press(*"edge-l", "tab", "enter")
        await chat.settle()
        assert chat.app.theme == "edge-light"
        await chat.send("/nonsense")
        assert not chat.app.session.queue

    drive(body)


def test_every_command_has_a_use() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("q")
        for name in ("help", "stats", "model", "load", "params"):
            await chat.send(f"/{name}")
            assert len(chat.app.screen_stack) == 2, name
            if name == "stats":
                assert "20 tokens, 14 of them right (70%)" in chat.screen_text
            await chat.press("escape")
            await chat.settle()
        assert "70% guessed right" in chat.screen_text
        for name in ("save a title", "copy", "copy code", "system", "retry"):
            await chat.send(f"/{name}")
            await chat.idle()
        assert chat.app.session.conversation.title != ""
        await chat.send("/quit")

    drive(body, ScriptedModel([Script(n_guessed=20, n_guessed_right=14)]))


def test_a_file_is_attached_with_its_token_count(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("one two three")

    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.press(*"see @not", "tab")
        await chat.until(lambda: "3 tokens" in chat.screen_text)
        assert chat.app.composer.prompt.text == "see @notes.txt "
        await chat.press("enter")
        await chat.idle()
        assert "notes.txt · 3 tokens" in chat.shown
        await chat.press(*"@notes", "tab")
        await chat.press(*["backspace"] * 12)
        assert chat.app.composer.attachments == []

    model = drive(body, folder=tmp_path)
    content = model.asked[0][-1]["content"]
    assert "one two three" in content and content.endswith("see @notes.txt")


def test_a_long_paste_becomes_an_attachment() -> None:
    text = "paste " * 180_000

    async def body(chat: Chat) -> None:
        await chat.idle()
        start = time.thread_time()
        chat.app.post_message(events.Paste(text))
        await chat.until(lambda: "180,000 tokens" in chat.screen_text)
        assert time.thread_time() - start < 3  # else it would hang
        assert chat.app.composer.prompt.text == ""
        await chat.press("enter")
        await chat.idle()
        assert "pasted text 1" in chat.shown

    assert len(drive(body).asked[0][-1]["content"]) > len(text)


def test_a_short_paste_goes_into_the_prompt() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        chat.app.post_message(events.Paste("two\nlines"))
        await chat.settle()
        assert chat.app.composer.prompt.text == "two\nlines"
        assert chat.app.composer.prompt.size.height == 2

    drive(body)


def test_the_prompt_grows_and_remembers() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.press(*"a", "ctrl+j", *"b", "ctrl+j", *"c")
        await chat.settle()
        assert chat.app.composer.prompt.size.height == 3
        await chat.press("enter")
        await chat.idle()
        assert chat.app.composer.prompt.size.height == 1
        await chat.ask("later")
        await chat.press("up")
        assert chat.app.composer.prompt.text == "later"
        await chat.press("up")
        assert chat.app.composer.prompt.text == "a\nb\nc"
        await chat.press("down", "down", "down", "down")
        assert chat.app.composer.prompt.text == ""

    drive(body)


def test_conversations_are_found_opened_and_deleted(tmp_path: Path) -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        for text in ("about apples", "about pears"):
            await chat.ask(text)
            await chat.press("ctrl+n")
        await chat.press("ctrl+o")
        await chat.settle()
        assert isinstance(chat.app.screen, HistoryScreen)
        await chat.press(*"apples")
        await chat.settle()
        assert "about apples" in chat.screen_text and "about pears" not in chat.screen_text
        await chat.press("enter")
        await chat.settle()
        assert "about apples" in chat.shown
        await chat.press("ctrl+o", *"pears", "ctrl+d", "ctrl+d")
        await chat.settle()
        assert [s.title for s in chat.app.session.store.recent()] == ["about apples"]
        await chat.press("escape")
        await chat.send("/load apples")
        assert "about apples" in chat.shown

    drive(body, folder=tmp_path)
    assert (tmp_path / FILE_NAME).exists()


def test_no_history_writes_nothing(tmp_path: Path) -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("secret")
        assert "not kept" in chat.screen_text

    drive(body, data_folder=tmp_path, keeps_history=False)
    assert list(tmp_path.iterdir()) == []


def test_all_but_a_moment_of_a_running_answer_is_in_the_file(tmp_path: Path) -> None:
    """What another process would read there if this one were killed."""
    hold = threading.Event()

    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.send("go")
        running, other = chat.app.session.running, Store(tmp_path / FILE_NAME)
        assert running is not None
        await chat.until(lambda: running.node.content.endswith("hold "))  # it waits there
        at = other.recent(1)[0].id
        clock.append(clock[-1] + 0.2)
        await chat.until(lambda: other.messages(at)[1].content.endswith("hold "))
        assert [node.state for node in other.messages(at)] == ["done", "partial"]
        hold.set()
        await chat.idle()
        other.close()

    clock, words = [100.0], "word " * 100 + "hold on"
    times = SimpleNamespace(perf_counter=lambda: clock[-1], monotonic=time.monotonic)
    with mock.patch("edgeinfer.tui.session.time", times):
        drive(body, ScriptedModel([Script(words, seconds=0.008, hold=hold)]), folder=tmp_path)


def test_the_view_follows_until_the_reader_scrolls() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.send("go")
        transcript = chat.app.transcript
        await chat.until(lambda: transcript.max_scroll_y > 20)
        assert transcript.scroll_offset.y == transcript.max_scroll_y
        await chat.press("pageup")
        await chat.settle()
        at = transcript.scroll_offset.y
        assert not transcript.follows
        before = transcript.max_scroll_y
        await chat.until(lambda: transcript.max_scroll_y > before + 4)
        assert transcript.scroll_offset.y == at
        await chat.press("ctrl+end")
        await chat.settle()
        assert transcript.follows and transcript.scroll_offset.y == transcript.max_scroll_y

    drive(body, ScriptedModel([Script("line\n\n" * 20 + "a line \n\n" * 3000, seconds=0.004)]))


def test_resizing_while_it_streams() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.send("go")
        await chat.until(lambda: "word word" in chat.shown)
        for size in ((60, 20), (200, 50), (40, 12), (100, 30)):
            await chat.pilot.resize_terminal(*size)
            await chat.until(lambda n=size[1]: chat.screen_text.count("\n") == n - 1)
            await chat.until(lambda: "word word" in chat.screen_text)
        await chat.press("escape")

    drive(body, ScriptedModel([Script("word " * 3000, seconds=0.003)]))


def test_a_long_answer_keeps_the_screen_alive() -> None:
    text = "Some words of an answer, **bold**.\n\n```py\nx = 1\n```\n\n" * 700

    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("long")
        assert len(chat.app.transcript.blocks) > 1400
        drawn = [b for b in chat.app.transcript.blocks if b.rows is not None]
        assert chat.app.transcript.scroll_offset.y == chat.app.transcript.max_scroll_y
        assert len(drawn) < 1400
        await chat.press("ctrl+up", "home")
        await chat.settle()
        assert "long" in chat.screen_text

    drive(body, ScriptedModel([Script(text)]))


def test_probabilities_of_an_answer() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("q")
        await chat.press("ctrl+up", "p")
        await chat.settle()
        assert isinstance(chat.app.screen, ProbabilitiesScreen)
        assert "98%" in chat.screen_text and "t900" in chat.screen_text
        await chat.press("n", "escape")

    drive(body, ScriptedModel([Script(logprobs=True)]))


def test_without_logprobs_it_says_how_to_get_them() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("q")
        await chat.press("ctrl+up", "p")
        await chat.settle()
        assert len(chat.app.screen_stack) == 1

    drive(body)


def test_dropped_turns_are_told_once() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("a")
        assert "not read any more" not in chat.shown
        await chat.ask("b")
        await chat.ask("c")
        assert chat.shown.count("2 oldest turns are not read any more") == 1

    drive(body, ScriptedModel([Script(), Script(n_dropped=2)]))


def test_first_run_offers_models_and_downloads_one() -> None:
    fetched, hold = [], threading.Event()

    def fetch(name: str, note: Callable[[int, int], None]) -> str:
        note(50 << 20, 98 << 20)
        hold.wait(120)
        fetched.append(name)
        return "/models/tiny.gguf"

    async def body(chat: Chat) -> None:
        await chat.until(lambda: isinstance(chat.app.screen, ModelScreen))
        assert "Welcome" in chat.screen_text and "download" in chat.screen_text
        await chat.press("enter")
        await chat.until(lambda: "tiny is 98 MB to download" in chat.screen_text)
        assert fetched == []
        await chat.press("enter")
        await chat.until(lambda: "50 MB of 98 MB" in chat.screen_text)
        hold.set()
        await chat.idle()

    choices = [ModelChoice("tiny", None, 98 << 20)]
    drive(body, path=None, list_models=lambda: choices, fetch=fetch)
    assert fetched == ["tiny"]


@pytest.mark.parametrize(
    "error", [FileNotFoundError("no file x.gguf"), InvalidModelError("truncated", path="x.gguf")]
)
def test_a_model_that_does_not_load_leads_to_the_chooser(error: Exception) -> None:
    async def body(chat: Chat) -> None:
        await chat.until(lambda: isinstance(chat.app.screen, ModelScreen))
        await chat.until(lambda: "did not load" in chat.screen_text)
        assert str(error)[:9] in chat.screen_text
        await chat.press("escape")
        await chat.send("waits")
        assert isinstance(chat.app.screen, ModelScreen)

    drive(body, open_model=opener(ScriptedModel(), error=error))


def test_the_model_can_be_switched_with_a_preview(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    for name in ("a", "b"):
        (tmp_path / "models" / f"{name}.gguf").write_bytes(b"GGUF")

    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.press("ctrl+l")
        await chat.until(lambda: "fits: 476 MB of 8.0 GB" in chat.screen_text)
        text = " ".join(chat.screen_text.replace("│", " ").split())
        assert "of 8.0 GB free, 3.0 GB of 6.0 GB on cuda:0, context 8,192 tokens" in text
        await chat.press("down", "enter")
        await chat.until(lambda: loaded == [str(tmp_path / "models" / "b.gguf")])
        await chat.idle()

    model, loaded = ScriptedModel(), []
    gpu = Pool("cuda:0", {"weights Q4_K": 3 << 30}, 6 << 30)
    plan = model.plan._replace(pools=(model.plan.host, gpu))
    plain = opener(model)

    def open_model(path: str, progress: Any) -> ScriptedModel:
        if path != "scripted.gguf":
            loaded.append(path)
        result: ScriptedModel = plain(path, progress)
        return result

    drive(
        body,
        model,
        folder=tmp_path,
        open_model=open_model,
        plan_model=lambda path, n_ctx=0, freed=None: plan,
    )


def test_copying() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("q")
        await chat.press("ctrl+y")
        assert chat.app.clipboard == "Look:\n\n```py\nx = 1\n```\n"
        await chat.press("ctrl+b")
        assert chat.app.clipboard == "x = 1"
        transcript = chat.app.transcript
        index = next(i for i, b in enumerate(transcript.blocks) if b.kind == "code")
        chat.app.copy_to_clipboard("")
        y = transcript._list.top(index) - transcript.scroll_offset.y + 1
        await chat.pilot.click(transcript, offset=(10, y))
        await chat.settle()
        assert chat.app.clipboard == "x = 1"

    drive(body, ScriptedModel([Script("Look:\n\n```py\nx = 1\n```\n")]))


def test_a_click_marks_a_message_and_the_mouse_selects_text() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("question")
        transcript = chat.app.transcript
        await chat.pilot.click(transcript, offset=(8, 3))
        await chat.settle()
        assert transcript.selected is not None and "┃" in chat.screen_text
        await chat.press("escape")
        assert transcript.selected is None
        chat.app.screen.text_select_all()
        text = chat.app.screen.get_selected_text() or ""
        assert "question" in text and "Hello from the script." in text

    drive(body)


def test_ctrl_c_stops_then_leaves() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.send("go")
        await chat.press("ctrl+c")
        assert chat.app.session.running is None and chat.app.is_running
        await chat.press("ctrl+c", "ctrl+c")
        await chat.until(lambda: chat.app._exit)

    drive(body, ScriptedModel([SLOW]))


def test_help_lists_every_command() -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.press("f1")
        await chat.settle()
        assert isinstance(chat.app.screen, TextScreen)
        assert "ctrl+j" in chat.screen_text
        await chat.press("escape")
        await chat.press("ctrl+p")
        await chat.until(lambda: "Export" in chat.screen_text)

    drive(body, size=(100, 60))


@pytest.mark.parametrize("size", [(60, 16), (60, 24), (240, 70)])
def test_every_size_is_usable(size: tuple[int, int]) -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("question")
        text = chat.screen_text
        assert "question" in text and "Hello from the script." in text and "Ask anything" in text
        assert "context" in text

    drive(body, size=size)


def test_without_colour_everything_is_still_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("question")
        assert chat.app.no_color and "▌  question" in chat.screen_text
        svg = chat.app.export_screenshot()
        colours = set(re.findall(r"fill: #([0-9a-f]{6})", svg))
        colours.discard("c5c8c6")  # the exported window's own
        assert {c for c in colours if not c[:2] == c[2:4] == c[4:]} == set()

    drive(body)


def test_the_theme_is_remembered(tmp_path: Path) -> None:
    async def first(chat: Chat) -> None:
        await chat.send("/theme edge-light")
        await chat.settle()

    async def second(chat: Chat) -> None:
        assert chat.app.theme == "edge-light"

    drive(first, folder=tmp_path)
    drive(second, folder=tmp_path)
