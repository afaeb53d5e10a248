"""Files attached with @: found by any name, read without a wait, gone with their names."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgeinfer import EdgeInferError
from edgeinfer.text.plain_text import decode
from edgeinfer.tui import attachments
from edgeinfer.tui.attachments import Attachments
from edgeinfer.tui.completions import Candidate, Sources, complete, mention, mentioned
from edgeinfer.tui.files import (
    FileSearch,
    FoundFile,
    from_shown,
    list_files,
    read_attachment,
    shown_name,
)
from edgeinfer.tui.records import Attachment
from edgeinfer.tui.settings import ModelChoice
from tests.test_tui_chat import Chat, drive
from tests.tui_engine import ScriptedModel

LATIN = os.fsdecode(b"caf\xe9.txt")
has_any_names = pytest.mark.skipif(sys.platform != "linux", reason="names are any bytes on Linux")


def find(root: Path, query: str) -> list[str]:
    return [file.name for file in _search(root, query)]


def _search(root: Path, query: str) -> list[FoundFile]:
    search = FileSearch(root)
    found, end = search.find(query), time.monotonic() + 120
    while search.was_early() and time.monotonic() < end:
        time.sleep(0.01)
        found = search.find(query)
    return found


def filled(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")
    return folder


# -- finding -------------------------------------------------------------------------------------


def test_files_are_found_by_letters_and_hidden_or_generated_ones_left_out(tmp_path: Path) -> None:
    filled(tmp_path, "a.py", "sub/b.py", ".git/c.py", "node_modules/d.py", "raw.bin")
    assert [file.name for file in list_files(tmp_path)] == ["a.py", "raw.bin", "sub/b.py"]
    assert find(tmp_path, "by") == ["sub/b.py"]
    assert find(tmp_path, "nothing") == []


def test_hidden_files_and_paths_are_found_by_naming_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = filled(tmp_path / "home", "notes.md", ".profile", "my docs/a b.txt")
    work = filled(tmp_path / "work", ".env", ".github/ci.yml", "sub/.hidden", "sub/x.py", "y.py")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    assert find(work, ".") == [".env", ".github/", "y.py", "sub/x.py"]
    assert find(work, "s") == ["sub/", "sub/x.py"]
    assert find(work, ".github/") == [".github/ci.yml"]
    assert find(work, "sub/") == ["sub/x.py"] and find(work, "sub/.") == ["sub/.hidden", "sub/x.py"]
    assert find(work, "~") == ["~/"]
    assert find(work, "~/") == ["~/my docs/", "~/notes.md"]
    assert find(work, "~/.p") == ["~/.profile"]
    assert find(work, "~/MY docs/A") in ([], ["~/MY docs/a b.txt"])  # as the system has it
    assert find(work, "~/my docs/A") == ["~/my docs/a b.txt"]
    assert find(work, f"{home}/no") == [f"{home}/notes.md"]
    assert find(work, "../home/no") == ["../home/notes.md"]
    assert find(work, "~nosuchuser/") == find(work, "/no/such/") == find(work, "a\0b/") == []
    for file in _search(work, "~/my docs/a"):
        assert read_attachment(file.path, file.name, decode)[0].text == "text"


def test_an_unreadable_folder_has_no_completions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path, "shut/a.txt", "open.txt")
    scan = os.scandir

    def refuse(path: str) -> object:
        if path.rstrip("/").endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert find(tmp_path, "shut/") == [] and find(tmp_path, "o") == ["open.txt"]


def test_a_disk_that_does_not_answer_freezes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = threading.Event()
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (hold.wait(120), scan(path))[1])
    filled(tmp_path, "slow.txt")
    search, start, n_before = FileSearch(tmp_path), time.monotonic(), threading.active_count()
    assert [search.find(f"s{i}/") for i in range(99)] == [[]] * 99
    assert time.monotonic() - start < 60, "it has waited for the disk"
    assert threading.active_count() < n_before + 10
    hold.set()
    assert find(tmp_path, "slo") == ["slow.txt"]


def test_who_looked_too_early_looks_again_though_the_search_has_ended_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may end at any moment, also between a look and the question whether another is needed."""
    hold, scan = threading.Event(), os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (hold.wait(120), scan(path))[1])
    search = FileSearch(filled(tmp_path, "slow.txt"))
    assert search.find("slo") == []
    hold.set()
    assert search._searches[-1].wait(120)
    assert search.was_early()
    assert [each.name for each in search.find("slo")] == ["slow.txt"] and not search.was_early()


def test_a_folder_of_very_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system lists them; making them would take longer than the test may."""

    class Entry:
        def __init__(self, i: int) -> None:
            self.name, self.path = f"file-{i:06}", f"/many/file-{i:06}"

        def is_dir(self) -> bool:
            return False

    class Entries(list[Entry]):
        def __enter__(self) -> Entries:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    many = Entries(map(Entry, range(100_000)))
    monkeypatch.setattr(os, "scandir", lambda path: many)
    search, longest, found = FileSearch(tmp_path), 0.0, []
    end = time.monotonic() + 120
    while not found and time.monotonic() < end:
        start = time.thread_time()
        found = search.find("/many/099")
        longest = max(longest, time.thread_time() - start)
        time.sleep(0.05)
    assert longest < 0.25
    assert len(found) == 8 and all("099" in file.name for file in found)


# -- names in a message --------------------------------------------------------------------------

names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12)


@given(st.binary(min_size=1, max_size=8).filter(lambda b: b"/" not in b and b"\0" not in b))
@example(b"caf\xe9.txt")
@example(b"nb\xc2\xa0sp\n\x7f")
def test_any_name_can_be_shown_and_is_found_again(raw: bytes) -> None:
    name = os.fsdecode(raw)
    shown = shown_name(name)
    assert shown.isprintable() and shown.encode() is not None
    if "\\" not in name:
        assert from_shown(shown) == name


@settings(max_examples=25, deadline=None)
@given(st.lists(names.map(shown_name), min_size=1, max_size=5, unique=True), names.map(shown_name))
@example(["a b", 'q"x', "it's", "b\\"], "a")
@example(["a.t", "a.txt"], "x")
def test_what_completes_is_what_the_message_mentions(chosen: list[str], other: str) -> None:
    files = [FoundFile(name, f"/w/{name}") for name in chosen]
    sources = Sources((), lambda name: [], lambda query: [f for f in files if f.name == query])
    text = ""
    for file in files:
        typed = mention(file.name).removesuffix('"')
        found: list[Candidate] = complete(f"{text}{typed}", True, sources)
        assert [each.file for each in found] == [file]
        text = text[: found[0].start] + found[0].text
    assert mentioned(text, chosen) == set(chosen)
    assert mentioned("none at all", [*chosen, other]) == set()


# -- reading -------------------------------------------------------------------------------------


def failure(path: Path) -> str:
    start = time.perf_counter()
    with pytest.raises(EdgeInferError) as caught:
        read_attachment(str(path), path.name, decode)
    assert time.perf_counter() - start < 60
    return str(caught.value)


def test_only_files_are_read_and_only_up_to_a_size(tmp_path: Path) -> None:
    (tmp_path / "raw.bin").write_bytes(bytes(range(256)))
    (tmp_path / "sub").mkdir()
    with (tmp_path / "huge.txt").open("wb") as huge:
        huge.truncate(5 << 40)
    assert "is not text" in failure(tmp_path / "raw.bin")
    assert "a folder" in failure(tmp_path / "sub")
    assert "5,497,558 MB" in failure(tmp_path / "huge.txt")
    assert "No such file" in failure(tmp_path / "no.txt")
    assert "null byte" in failure(tmp_path / "a\0b")
    assert failure(tmp_path / ("x" * 999))
    os.symlink("loop", tmp_path / "loop")
    assert failure(tmp_path / "loop")


def test_other_encodings_are_read_and_what_is_lost_is_said(tmp_path: Path) -> None:
    for name, data in (("u16", "Grüße".encode("utf-16")), ("latin", b"a long caf\xe9 text")):
        (tmp_path / name).write_bytes(data)
    assert read_attachment(str(tmp_path / "u16"), "u16", decode) == (Attachment("u16", "Grüße"), "")
    assert "1 characters" in read_attachment(str(tmp_path / "latin"), "latin", decode)[1]


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices have no names there")
def test_pipes_sockets_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # which nobody writes to
    os.symlink(tmp_path / "pipe", tmp_path / "link")
    os.symlink(os.devnull, tmp_path / "device")
    assert "a pipe" in failure(tmp_path / "pipe") and "a pipe" in failure(tmp_path / "link")
    assert "a device" in failure(tmp_path / "device") and "a device" in failure(Path("/dev/tty"))
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(tmp_path)
        try:
            listening.bind("socket")
        finally:
            os.chdir(here)
        assert "a socket" in failure(tmp_path / "socket")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_files_of_the_system_that_name_no_size_are_read_up_to_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "Name:" in read_attachment("/proc/self/status", "status", decode)[0].text
    assert failure(Path("/proc/self/mem"))
    monkeypatch.setattr("edgeinfer.tui.files._MOST_BYTES", 100)
    assert "more than" in failure(Path("/proc/self/status"))


@pytest.mark.skipif(os.name != "posix", reason="needs pipes")
def test_a_file_that_becomes_a_pipe_or_vanishes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, look = tmp_path / "a.txt", os.stat
    for become in (lambda: os.mkfifo(path), lambda: None):
        path.write_text("text")

        def stat(*arguments: object, become=become, **keywords: object) -> os.stat_result:  # type: ignore[no-untyped-def]
            found = look(*arguments, **keywords)  # type: ignore[call-overload]
            monkeypatch.setattr(os, "stat", look)
            path.unlink()
            become()
            return found

        monkeypatch.setattr(os, "stat", stat)
        assert failure(path)
        path.unlink(missing_ok=True)


def test_a_slow_file_is_read_while_the_draft_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    hold = threading.Event()

    def read(path: str, name: str, decode: object) -> tuple[Attachment, str]:
        hold.wait(120)
        return Attachment(name, "text"), "told of it"

    monkeypatch.setattr(attachments, "read_attachment", read)
    held, notes = Attachments(decode), []
    held.set_text("see @a.txt and @b.txt ")
    for name in ("a.txt", "b.txt"):
        held.read(FoundFile(name, name))
    assert held.reading == ["a.txt", "b.txt"] and held.shown == []
    held.set_text("see @b.txt ")
    assert held.reading == ["b.txt"]
    hold.set()
    end = time.monotonic() + 120
    while held.reading and time.monotonic() < end:
        notes += held.take()[1]
    assert [each.name for each in held.shown] == ["b.txt"]
    assert "told of it" in notes
    held.set_text("see @a.txt again")  # as undo does
    while held.reading and time.monotonic() < end:
        held.take()
    assert [each.name for each in held.shown] == ["a.txt"]


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("what does @notes.txt say?", ["notes.txt"]),
        ("compare @notes.txt, @sub/more.txt.", ["notes.txt", "sub/more.txt"]),
        ('look at @"my notes.txt" and (@notes.txt)', ["my notes.txt"]),
        ("ask @someone, me@notes.txt or @notes.txt/x", []),
        ("@sub is a folder, @red.png no text", []),
    ],
)
def test_names_that_are_written_attach_as_those_that_are_chosen(
    tmp_path: Path, text: str, sent: list[str]
) -> None:
    filled(tmp_path, "notes.txt", "my notes.txt", "sub/more.txt")
    (tmp_path / "red.png").write_bytes(bytes(range(256)))
    held, notes = Attachments(decode), []
    held.set_text(text)
    held.read_written(FileSearch(tmp_path).file)
    end = time.monotonic() + 120
    while True:
        notes += held.take()[1]
        if not held.reading or time.monotonic() > end:
            break
    assert sorted(each.name for each in held.shown) == sorted(sent)
    assert len(notes) == (2 if "folder" in text else 0)


# -- in the chat ---------------------------------------------------------------------------------


@has_any_names
def test_names_of_any_bytes_and_pipes_in_the_chat(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"f\xe9")
    filled(folder, LATIN, "my notes.txt")
    os.mkfifo(folder / "pipe")

    async def body(chat: Chat) -> None:
        await chat.idle()
        composer = chat.app.composer
        composer.prompt.insert("@caf")
        await chat.press("tab")
        await chat.until(lambda: composer.attachments)
        chat.screen_text.encode()
        assert composer.prompt.text == r"@caf\xe9.txt "
        for letters in ("@my", "@pip"):
            composer.prompt.insert(letters)
            await chat.press("tab")
        await chat.until(lambda: "it is a pipe" in chat.screen_text)
        assert composer.prompt.text.endswith('@"my notes.txt" @pipe ')
        assert len(composer.attachments) == 2
        await chat.press("ctrl+u")
        await chat.until(lambda: not composer.attachments)
        composer.prompt.undo()
        await chat.until(lambda: len(composer.attachments) == 2)
        await chat.press("enter")
        await chat.idle()
        chat.screen_text.encode()
        assert r"caf\xe9.txt · 1 tokens" in chat.shown and composer.attachments == []
        await chat.press(*"/model caf")
        await chat.press("tab", "enter")
        await chat.until(lambda: loaded[1:] == [str(folder / f"{LATIN}.gguf")])
        await chat.idle()
        chat.screen_text.encode()
        await chat.send('what does @"my notes.txt" say')
        await chat.idle()
        said = [node for node in chat.app.session.conversation.branch() if node.role == "user"]
        assert [each.name for each in said[-1].attachments] == ["my notes.txt"]
        await chat.send("/export json out.json")
        assert r"caf\\xe9.txt" in (folder / "out.json").read_text("utf-8")
        await chat.send("/export md ~nosuchuser/x.md")
        await chat.until(lambda: "can'tbewritten" in "".join(chat.screen_text.split()))
        chat.screen_text.encode()
        await chat.press("ctrl+o", "ctrl+e")
        await chat.until(lambda: "1 conversations written" in chat.screen_text)
        chat.screen_text.encode()

    loaded: list[str] = []
    model, choice = ScriptedModel(), ModelChoice(LATIN, str(folder / f"{LATIN}.gguf"), 1)

    def open_model(path: str, progress: object) -> ScriptedModel:
        loaded.append(path)
        return model

    drive(body, folder=folder, open_model=open_model, list_models=lambda: [choice])
    assert r'<file name="caf\xe9.txt">' in model.asked[0][-1]["content"]
