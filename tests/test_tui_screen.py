"""What the chat shows on terminals of few rows and few colours, and what it says of copies."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.color import Color, ColorSystem
from textual.widgets import OptionList

from edgeinfer import InvalidModelError, platform
from edgeinfer.tui.app import ChatApp
from edgeinfer.tui.clipboard import copy_with_tools, osc52
from edgeinfer.tui.model_screen import ModelScreen
from edgeinfer.tui.palette import OURS, Palette
from edgeinfer.tui.records import Attachment
from edgeinfer.tui.settings import ModelChoice
from edgeinfer.tui.terminal_colors import Answers, TerminalBackground, is_light_by
from tests.test_tui_chat import Chat, drive
from tests.tui_engine import Script, ScriptedModel, opener

ROOT = Path(__file__).resolve().parent.parent
posix = pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")


# -- colours -------------------------------------------------------------------------------------


def quantised(color: str, system: ColorSystem) -> int | None:
    """The number that rich, which draws for Textual, gives a colour."""
    return Color.parse(color[:7]).downgrade(system).number


@pytest.mark.parametrize("theme", OURS)
def test_grounds_and_texts_stay_apart_in_256_colours(theme: object) -> None:
    palette = Palette.of(theme)  # type: ignore[arg-type]
    colors = theme.to_color_system().generate()  # type: ignore[attr-defined]
    row = colors.get("row-background", "")
    grounds = [colors[name] for name in ("background", "surface", "panel")]
    if row.startswith("#") and "%" not in row:
        grounds.append(row)
    numbers = [quantised(each, ColorSystem.EIGHT_BIT) for each in grounds]
    assert len(set(numbers)) == len(numbers), list(zip(grounds, numbers, strict=True))
    texts = [palette.text, palette.muted, palette.faint, palette.accent]
    shown = {quantised(each, ColorSystem.EIGHT_BIT) for each in texts}
    assert len(shown) == len(texts) and not shown & set(numbers)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("answer", "is_light"),
    [
        ("\x1b]11;rgb:ffff/ffff/fafa\x1b\\", True), ("\x1b]11;rgb:1e/1e/1e\x07", False),
        ("\x1b]11;rgba:ffff/ffff/ffff/0000\x1b\\", True), ("\x1b]11;rgb:0/0/0\x07", False),
    ],
)  # fmt: skip
def test_the_terminals_answer_is_taken_out_of_what_is_typed(
    answer: str, is_light: bool, size: int
) -> None:
    answers, typed, said = Answers(), "", []
    text = f"ab\x1b[A{answer}c\x1b]d\x1b[B"
    for start in range(0, len(text), size):
        rest, found = answers.push(text[start : start + size])
        typed += rest
        said += [found] if found is not None else []
    assert typed + answers.flush() == "ab\x1b[Ac\x1b]d\x1b[B" and said == [is_light]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(["\x1b", "]", "1", "11;", "rgb:", "/", "f", "x", "\x07", "\\"])))
def test_nothing_typed_is_lost_beside_answers(parts: list[str]) -> None:
    answers, text = Answers(), "".join(parts)
    found = [answers.push(part) for part in parts]
    typed = "".join(rest for rest, _ in found) + answers.flush()
    if all(light is None for _, light in found):
        assert typed == text


def test_a_light_terminal_gets_the_light_theme_unless_one_was_chosen(tmp_path: Path) -> None:
    async def told(chat: Chat) -> None:
        assert chat.app.theme == "edge-dark"
        chat.app.post_message(TerminalBackground(is_light=True))
        await chat.until(lambda: chat.app.theme == "edge-light")
        assert chat.app.session.store.preference("theme") is None

    async def chosen(chat: Chat) -> None:
        await chat.idle()
        await chat.send("/theme edge-dark")
        chat.app.post_message(TerminalBackground(is_light=True))
        await chat.settle()
        assert chat.app.theme == "edge-dark"

    async def by_environment(chat: Chat) -> None:
        assert chat.app.theme == "edge-light"
        chat.app.post_message(TerminalBackground(is_light=False))  # knows better
        await chat.until(lambda: chat.app.theme == "edge-dark")

    drive(told, folder=tmp_path)
    drive(by_environment, environment={"COLORFGBG": "0;15"})
    drive(chosen, folder=tmp_path)
    assert not is_light_by({"COLORFGBG": "15;default;0"}) and not is_light_by({})


# -- few rows ------------------------------------------------------------------------------------

CHOICES = [ModelChoice(f"model number {i}", f"/models/{i}.gguf", i << 20) for i in range(30)]
TABLE = "- a\n\n| a | b |\n|--|--|\n| 漢 | d |\n\n```\nx\n```"


@pytest.mark.parametrize("size", [(80, 24), (40, 12)])
def test_the_model_screen_shows_all_its_parts(size: tuple[int, int]) -> None:
    model = ScriptedModel()
    error = InvalidModelError("the file ends in the middle of a tensor", path="x.gguf")

    async def body(chat: Chat) -> None:
        await chat.until(lambda: isinstance(chat.app.screen, ModelScreen))
        await chat.until(lambda: "fits:" in chat.screen_text)
        text = chat.screen_text
        assert "did not load" in text and "path/to/model.gguf" in text and "esc back" in text
        chat.app.screen.query_one(OptionList).highlighted = 28
        await chat.press("down")
        await chat.until(lambda: "model number 29" in chat.screen_text)
        assert "fits:" in chat.screen_text
        assert chat.app.screen.query_one(OptionList).size.height >= 1

    drive(
        body, model, size, open_model=opener(model, error=error), list_models=lambda: CHOICES,
        plan_model=lambda path, n_ctx=0, freed=0: model.plan,
    )  # fmt: skip


@pytest.mark.parametrize("size", [(100, 32), (60, 14)])
def test_a_page_that_is_cut_says_how_much_is_below(size: tuple[int, int]) -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.press("f1")
        await chat.until(lambda: "more lines" in chat.screen_text)
        assert "esc back" in chat.screen_text
        await chat.press("end")
        await chat.until(lambda: "more line" not in chat.screen_text)
        assert "/quit" in chat.screen_text and "esc back" in chat.screen_text

    drive(body, size=size)


@pytest.mark.parametrize("size", [(1, 1), (20, 2)])
def test_a_screen_too_small_for_anything_comes_back(size: tuple[int, int]) -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("question [x] 漢字 | a |")
        for key in ("f1", "escape", "ctrl+l", "escape", "ctrl+o", "escape", "f4", "escape"):
            await chat.press(key)
            await chat.settle()
        await chat.pilot.resize_terminal(80, 24)
        await chat.until(lambda: "question [x]" in chat.screen_text)
        assert "Ask anything" in chat.screen_text
        for width in (20, 90):
            await chat.pilot.resize_terminal(width, 24)
        await chat.until(lambda: "漢字 | a |" in chat.screen_text.split("\n")[1])
        assert "130 of 8,192" in chat.screen_text.split("\n")[-2]

    drive(body, ScriptedModel([Script(TABLE)]), size)


# -- notices and what is not ours ----------------------------------------------------------------


@pytest.mark.parametrize("size", [(60, 16)])
def test_a_notice_covers_neither_prompt_nor_status(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.press(*"my draft")
        chat.app.say("a [bold]notice[/] that is quite long " * 3, "warning")
        await chat.until(lambda: "a [bold]notice[/] that" in chat.screen_text)
        text = chat.screen_text
        assert "my draft" in text and "● ready" in text and "context" in text
        monkeypatch.setattr(ChatApp, "NOTIFICATION_TIMEOUT", 0.2)
        chat.app.say("a last notice", "warning")
        await chat.until(lambda: "notice" not in chat.screen_text)

    monkeypatch.setattr(ChatApp, "NOTIFICATION_TIMEOUT", 600)
    drive(body, size=size)


def test_text_of_others_is_no_markup_anywhere() -> None:
    evil = "[red]x[/red] [link=http://e.x]y [/nope] [@click=app.quit]q"

    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.press("ctrl+p")
        await chat.until(lambda: "Model [path]" in chat.screen_text)
        await chat.press(*"mod")
        await chat.until(lambda: "Model [path]" in chat.screen_text)
        await chat.press("escape")
        await chat.ask(evil)
        assert chat.screen_text.count(evil) == 3  # title, message, answer
        await chat.send(f"/system {evil}")
        await chat.send("/system")
        assert f"system: {evil}" in chat.screen_text
        await chat.send(f"/save {evil}")
        await chat.press("f4")
        await chat.settle()
        await chat.press("backspace", *"[/x]", "enter")
        await chat.settle()
        assert "[/x]" in chat.screen_text
        await chat.press("escape")

    drive(body, ScriptedModel([Script(evil)], name="m"), size=(140, 40))


# -- the clipboard -------------------------------------------------------------------------------


def fake_tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@posix
def test_copied_is_said_when_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("PATH", str(tmp_path))

    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("q")
        fake_tool(tmp_path, "xclip", f"/bin/cat > {out}")
        await chat.press("ctrl+y")
        await chat.until(lambda: "copied, 2 lines" in chat.screen_text)
        assert out.read_text() == "täxt\nline"
        fake_tool(tmp_path, "xclip", "exit 1")
        await chat.press("ctrl+y")
        await chat.until(lambda: "sent to the terminal" in chat.screen_text)
        chat.app.copy_to_clipboard("x" * 80_000)
        await chat.until(lambda: "not copied: 78 kB" in chat.screen_text)

    drive(
        body, ScriptedModel([Script("täxt\nline")]), environment={"DISPLAY": ":0"},
        run_tool=platform.run_tool,
    )  # fmt: skip


def test_text_that_terminals_would_cut_is_not_sent_to_them() -> None:
    assert osc52("ä" * 37_000, in_tmux=False) and osc52("ä" * 37_001, in_tmux=False) is None
    assert osc52("\ud800", in_tmux=False) is not None


@posix
def test_programs_are_never_taken_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mark = tmp_path / "ran"
    for name in ("tmux", "xclip", "wl-copy"):
        fake_tool(tmp_path, name, f"/bin/touch {mark}")
    for path in ("", ".", ":.:", "::"):
        monkeypatch.setenv("PATH", path)
        found = {"TMUX": "x", "DISPLAY": ":0", "WAYLAND_DISPLAY": "w"}
        assert copy_with_tools("secret", found, platform.run_tool) == []
    assert not mark.exists()


# -- a real terminal -----------------------------------------------------------------------------

CHAT = """
import os, sys
from pathlib import Path
from edgeinfer import platform
from edgeinfer.tui.app import ChatApp
from edgeinfer.tui.launch import driver
from edgeinfer.tui.settings import ChatSettings
from tests.tui_engine import Script, ScriptedModel, opener
text = Path(sys.argv[1]).read_text("utf-8")
ChatApp(ChatSettings(
    data_folder=Path("/nowhere"), keeps_history=False, model="x", environment=os.environ,
    open_model=opener(ScriptedModel([Script(text)])), run_tool=platform.run_tool,
    run_editor=platform.run_editor,
), driver()).run()
"""


class Tmux:
    """A server of its own, in which a chat with a scripted model runs."""

    def __init__(self, folder: Path) -> None:
        self._base = ["tmux", "-S", str(folder / "socket"), "-f", os.devnull]
        self._folder = folder

    def start(self, text: str, term: str = "screen-256color", **environment: str) -> None:
        (self._folder / "text").write_text(text, "utf-8")
        (self._folder / "chat.py").write_text(CHAT)
        exports = " ".join(f"{name}={value}" for name, value in environment.items())
        shell = (
            f"cd {ROOT}; env -u COLORTERM -u NO_COLOR PYTHONPATH=. TERM={term} {exports} "
            f"{sys.executable} {self._folder}/chat.py {self._folder}/text; echo LEFT $?; sleep 99"
        )
        size = ["-x", "80", "-y", "24"]
        subprocess.run([*self._base, "new-session", "-d", *size, shell], check=True)

    def run(self, *arguments: str) -> str:
        done = subprocess.run([*self._base, *arguments], capture_output=True, check=False)
        return done.stdout.decode("utf-8", "replace")

    def until(self, text: str, *flags: str) -> str:
        end = time.monotonic() + 120
        while text not in (screen := self.run("capture-pane", "-p", *flags)):
            assert time.monotonic() < end, f"waited for {text!r}:\n{screen}"
            time.sleep(0.05)
        return screen

    def ask(self) -> None:
        self.until("ready")
        self.run("send-keys", "-l", "go")
        self.run("send-keys", "Enter")
        self.until("tok/s")


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[Tmux]:
    if shutil.which("tmux") is None:
        pytest.skip("no tmux to be a terminal")
    opened = Tmux(tmp_path)
    yield opened
    opened.run("kill-server")


def test_what_is_copied_in_tmux_is_in_its_buffer(tmux: Tmux) -> None:
    long = "".join(f"línea {i} 漢字 \\[x\\]\n" for i in range(4000))  # 85 kB
    tmux.start(long)
    tmux.ask()
    tmux.run("send-keys", "C-y")
    tmux.until("copied to tmux, 4,001 lines")
    assert tmux.run("show-buffer") == long


def test_a_mouse_in_tmux_selects_what_is_copied(tmux: Tmux) -> None:
    """Over wide characters and a line that is wrapped; the terminal has 256 colours."""
    url = "https://example.org/" + "path/" * 30
    tmux.start(f"你好，世界。\n\nSee {url} there.\n\n```py\nx = 1\n```")  # noqa: RUF001
    tmux.ask()
    rows = tmux.until("x = 1").split("\n")
    first, last = (next(i for i, row in enumerate(rows) if part in row) for part in ("世", "x ="))

    def mouse(button: int, column: int, row: int, end: str) -> None:
        tmux.run("send-keys", "-l", f"\x1b[<{button};{column};{row}{end}")

    left = len(rows[first]) - len(rows[first].lstrip()) + 1
    mouse(0, left + 4, first + 1, "M")
    mouse(32, left + 6, last + 1, "M")
    mouse(32, 70, last + 1, "M")
    screen = tmux.until("48;5;59m", "-e")  # the ground of a selection
    mouse(0, 70, last + 1, "m")
    tmux.run("send-keys", "C-c")
    tmux.until("copied to tmux")
    assert tmux.run("show-buffer") == f"，世界。\n\nSee {url} there.\n\nx = 1"  # noqa: RUF001
    assert screen.count("48;5;59m") >= 6 and "48;5;234m" in screen


def test_an_editor_has_the_terminal_and_its_interrupts(tmux: Tmux, tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text(
        "#!/bin/sh\ntest -t 0 && test -t 1 || exit 9\nkill -INT $PPID\n"
        "echo IN THE EDITOR\nread line\necho $line >> $1\n"
    )
    editor.chmod(0o700)
    tmux.start("the answer", VISUAL=str(editor))
    tmux.until("ready")
    # All in one write, as a slow connection brings it; Alt+Enter as the oldest terminals write it.
    tmux.run("send-keys", "one", "Enter", "two", "M-Enter", "lines", "C-g")
    tmux.until("IN THE EDITOR")
    tmux.run("send-keys", "and more", "Enter")
    tmux.until("│ and more")  # not what the editor saw of it
    screen = tmux.until("the answer")
    lines = [line.strip(" │") for line in screen.splitlines()]
    assert lines[lines.index("two", 10) :][:3] == ["two", "lines", "and more"]
    assert "the answer" in screen and "EDITOR" not in screen


def test_sixteen_colours_are_the_terminals_own(tmux: Tmux) -> None:
    tmux.start("Text\n\n```py\nx = 1\n```", term="xterm")
    tmux.ask()
    tmux.run("send-keys", "-l", "/")
    tmux.until("/load")
    screen = tmux.until("\x1b[30m\x1b[46m", "-e")
    assert "/retry" in screen and "48;5" not in screen and "48;2" not in screen


def test_the_chat_asks_the_terminal_for_its_colour(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "chat.py").write_text(CHAT)
    pid, fd = pty.fork()
    if not pid:
        os.chdir(ROOT)
        environment = {**os.environ, "PYTHONPATH": ".", "TERM": "xterm-256color"}
        environment |= {"COLORTERM": "truecolor", "COLUMNS": "80", "LINES": "24"}
        environment.pop("NO_COLOR", None)
        command = [sys.executable, str(tmp_path / "chat.py"), str(tmp_path / "text")]
        os.execve(command[0], command, environment)
    seen = read_until(fd, lambda seen: b"\x1b]11;?" in seen)
    os.write(fd, b"\x1b]11;rgb:ffff/ffff/f0f0\x1b\\")
    # The light theme's background, and nothing typed.
    seen = read_until(fd, lambda seen: b"48;2;251;251;249" in seen and b"ready" in seen)
    assert b"rgb" not in seen
    os.write(fd, b"\x11")
    os.waitpid(pid, 0)
    os.close(fd)


def read_until(fd: int, is_so: Callable[[bytes], bool], seconds: float = 120.0) -> bytes:
    seen, end = b"", time.monotonic() + seconds
    while not is_so(seen):
        assert time.monotonic() < end, seen[-2000:]
        try:
            seen += os.read(fd, 1 << 16)
        except OSError:
            raise AssertionError(seen) from None
    return seen


@posix
@pytest.mark.parametrize(
    ("term", "charset", "draws"),
    [
        ("dumb", "utf-8", False), ("", "utf-8", False), (None, "utf-8", False),
        ("xterm", "utf-8", True), ("xterm", "ascii", False), ("xterm", "iso-8859-1", False),
    ],
)  # fmt: skip
def test_a_terminal_that_draws_nothing_gets_the_plain_chat(
    term: str | None, charset: str, draws: bool
) -> None:
    pty = pytest.importorskip("pty")
    code = "import os, edgeinfer.cli.console as c; print('is', c.draws_screens(os.environ))"
    pid, fd = pty.fork()
    if not pid:
        environment = {name: value for name, value in os.environ.items() if name != "TERM"}
        environment |= {"TERM": term} if term is not None else {}
        environment["PYTHONIOENCODING"] = charset
        os.execve(sys.executable, [sys.executable, "-c", code], environment)
    seen = read_until(fd, lambda seen: b"is " in seen and seen.endswith(b"\n"))
    assert f"is {draws}".encode() in seen
    assert (b"line by line: the locale" in seen) == (charset != "utf-8")
    os.waitpid(pid, 0)
    os.close(fd)


@pytest.mark.parametrize("size", [(24, 6), (30, 8), (40, 10), (80, 12), (80, 24)])
def test_what_is_written_and_the_status_stay_on_the_screen(size: tuple[int, int]) -> None:
    lines = "\n".join(map(str, range(30)))

    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("hi")
        screen, composer = chat.app.screen, chat.app.composer

        async def check() -> None:
            await chat.settle()
            status = screen.query_one("#status").region
            assert composer.prompt.cursor_screen_offset.y < status.y < size[1]
            assert screen.max_scroll_y == 0, chat.screen_text

        composer.prompt.set_text(lines)
        await check()
        composer.prompt.set_text("/")
        await check()
        await chat.press("escape")
        composer.prompt.set_text(lines)
        for i in range(5):
            composer.attach(Attachment(f"file {i}", "x"))
        await check()
        chat.app.say("a notice of many words " * 20, "warning")
        await check()

    drive(body, size=size)
