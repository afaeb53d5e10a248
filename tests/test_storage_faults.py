"""Disks that are full, read-only or broken, at every call that files go through in turn.

Whatever fails, a command works without keeping the file, or ends with an error that names it; no
file of ours is half written or left over, and the next run works.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import edgeinfer
from edgeinfer import EdgeInferError, config, platform
from edgeinfer.cli.main import commands
from edgeinfer.hub import recent
from edgeinfer.hub.client import _opener
from edgeinfer.kernels.cpu import kept_objects
from edgeinfer.kernels.cpu.library import Library
from edgeinfer.kernels.cpu.ready import Ready
from edgeinfer.kernels.cpu.targets import Target
from edgeinfer.tui.conversation import Conversation
from edgeinfer.tui.export import export
from edgeinfer.tui.store import FILE_NAME, Store

from .fake_hub import FakeHub
from .faults import failing, sweep
from .models_for_tests import tiny_model

REPO, FILE = "org/Tiny-GGUF", "Tiny-Q4_K_M.gguf"
DATA = b"GGUF" + bytes(range(256)) * 64
both_ways = pytest.mark.parametrize("lasts", [False, True], ids=["once", "from then on"])


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if ".part" in path.name]


def check_ended(error: BaseException | None, *paths: Path) -> None:
    """It worked, or says which file and what to do."""
    if error is not None:
        assert isinstance(error, EdgeInferError), repr(error)
        assert any(str(path) in str(error) for path in paths), error
        assert any(sign in str(error) for sign in (";", "run it again")), error


# -- files ---------------------------------------------------------------------------------------


@both_ways
def test_a_file_is_the_new_one_or_the_old_one(tmp_path: Path, lasts: bool) -> None:
    def make(folder: Path) -> Path:
        platform.write_whole(folder / "deep" / "file", b"old")
        return folder / "deep" / "file"

    def write(folder: Path, path: Path) -> None:
        platform.write_whole(path, b"new" * 5000)

    for n, folder, path, error in sweep(tmp_path, make, write, lasts=lasts):
        assert path.read_bytes() == (b"old" if error else b"new" * 5000), n
        assert error is None or isinstance(error, OSError)
        if not lasts:  # where nothing can be deleted, something is left
            assert leftovers(folder) == []
    assert n > 4


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_no_file_takes_the_place_of_a_pipe(tmp_path: Path) -> None:
    """Nor of a device: whoever may write to /dev would lose /dev/null."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (pipe, link):
        platform.write_whole(path, b"data")
        assert os.read(reader, 100) == b"data"
    os.close(reader)
    assert pipe.is_fifo() and link.is_symlink() and leftovers(tmp_path) == []
    with pytest.raises(IsADirectoryError):
        platform.write_whole(tmp_path, b"data")


@pytest.mark.skipif(not hasattr(os, "fchmod"), reason="links and modes of another kind")
def test_a_file_that_a_person_names_stays_where_it_is(tmp_path: Path) -> None:
    """What is behind a link is replaced, with the mode that it had; a cache's links are not."""

    def write(name: str) -> None:
        with platform.replaced_whole(tmp_path / name) as file:
            file.write(b"new")

    target, chain = tmp_path / "folder" / "target", tmp_path / "chain"
    target.parent.mkdir()
    target.write_text("old")
    target.chmod(0o640)
    (tmp_path / "link").symlink_to("folder/target")
    chain.symlink_to("link")
    write("chain")
    assert chain.is_symlink() and (tmp_path / "link").is_symlink()
    assert target.read_text() == "new" and stat.S_IMODE(target.stat().st_mode) == 0o640
    (tmp_path / "dangling").symlink_to("folder/made")
    write("dangling")
    assert (target.parent / "made").read_text() == "new"
    assert stat.S_IMODE((target.parent / "made").stat().st_mode) == 0o600
    (tmp_path / "ring").symlink_to("ring")
    with pytest.raises(OSError, match="symbolic links"):
        write("ring")
    assert (tmp_path / "ring").is_symlink()
    with pytest.raises(RuntimeError), platform.replaced_whole(chain) as file:
        file.write(b"newer")
        raise RuntimeError
    assert target.read_text() == "new"
    platform.write_whole(chain, b"ours")
    assert not chain.is_symlink() and target.read_text() == "new"
    assert leftovers(tmp_path) == leftovers(target.parent) == []


def test_a_full_disk_takes_empty_files_and_is_not_writable(tmp_path: Path) -> None:
    def write(folder: Path, made: Any) -> None:
        made.append(platform.is_writable(folder))

    found = [made for *_, made, _ in sweep(tmp_path, lambda folder: [], write, lasts=True)]
    assert found == [[False]] * (len(found) - 1) + [[True]] and len(found) > 3


@both_ways
def test_an_export_replaces_a_file_whole_or_leaves_it(tmp_path: Path, lasts: bool) -> None:
    conversation = Conversation(Store(None))
    conversation.ask("word " * 5000, (), None)

    def make(folder: Path) -> Path:
        (folder / "chat.md").write_text("before")
        return folder / "chat.md"

    for n, folder, path, error in sweep(
        tmp_path,
        make,
        lambda folder, path: export(conversation, "chat.md", folder, replaces=True),
        lasts=lasts,
    ):
        check_ended(error, path)
        assert (path.read_text() == "before") == (error is not None), n
        if not lasts:
            assert leftovers(folder) == []
    link, target = tmp_path / "link.md", tmp_path / "target.md"
    target.write_text("before")
    target.chmod(0o640)
    link.symlink_to(target)
    export(conversation, "link.md", tmp_path, replaces=True)
    assert link.is_symlink() and "word" in target.read_text()
    assert target.stat().st_mode & 0o777 == 0o640


def test_the_last_model_is_noted_or_said_not_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(folder: Path) -> list[str]:
        monkeypatch.setenv("EDGEINFER_HOME", str(folder / "home"))
        recent.remember("before")
        return []

    def note(folder: Path, said: list[str]) -> None:
        said.append(recent.remember(__file__))

    for n, folder, (said,), error in sweep(tmp_path, make, note, lasts=False):
        assert error is None and leftovers(folder) == []
        noted = (folder / "home" / "data" / "last-model").read_text()
        assert (noted == "before", bool(said)) == ((True, True) if said else (False, False)), n
        assert not said or str(config.data_folder()) in said


# -- models --------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(
        "edgeinfer.hub.client._opener", cache(_opener)
    )  # certificates take their time
    with FakeHub() as server:
        server.repos[REPO] = {FILE: DATA}
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    def set_home(folder: Path) -> Path:
        monkeypatch.setenv("EDGEINFER_HOME", str(folder / "home"))
        return folder / "home" / "data" / "models" / REPO / FILE

    return set_home


@both_ways
def test_a_pull_ends_whole_or_says_why_and_goes_on_the_next_time(
    tmp_path: Path, hub: FakeHub, home: Callable[[Path], Path], lasts: bool
) -> None:
    for n, folder, path, error in sweep(
        tmp_path, home, lambda folder, path: edgeinfer.pull(REPO), lasts=lasts
    ):
        check_ended(error, path.parent, folder / "home")
        assert error is not None or path.read_bytes() == DATA
        assert not path.exists() or path.read_bytes() == DATA
        # Of a download that failed its own part alone is left: it goes on from there.
        if not lasts:
            assert not [name for name in leftovers(folder) if not name.startswith(FILE)], n
            assert edgeinfer.pull(REPO).read_bytes() == DATA
            assert leftovers(folder) == []
    assert n > 8


@both_ways
def test_a_model_is_deleted_or_can_be_still(
    tmp_path: Path, home: Callable[[Path], Path], lasts: bool
) -> None:
    def make(folder: Path) -> Path:
        path = home(folder)
        platform.write_whole(path, DATA)
        platform.write_whole(path.with_name(f"{FILE}.sha256"), b"0" * 64)
        return path

    def delete(folder: Path, path: Path) -> None:
        result = CliRunner().invoke(commands, ["rm", f"{REPO}:Q4_K_M"])
        if result.exception is not None:
            raise result.exception

    for n, _, path, error in sweep(tmp_path, make, delete, lasts=lasts):
        if not isinstance(error, edgeinfer.ModelNotFoundError):  # its folder could not be read
            check_ended(error, path.parent)
            assert path.exists() == (error is not None), n
        if path.exists():
            delete(tmp_path, path)
        assert not list(path.parent.glob("*"))


@both_ways
def test_the_cache_is_cleared_or_what_stays_is_named(
    tmp_path: Path, home: Callable[[Path], Path], lasts: bool
) -> None:
    def make(folder: Path) -> list[Path]:
        path = home(folder)
        files = [folder / "home" / "cache" / "kernels" / "a" / "norm.o", path.parent / "x.part"]
        for file in [*files, path.parent / ".fetch-1" / "x.whl"]:
            platform.write_whole(file, b"data")
        return [files[0], files[1], path.parent / ".fetch-1"]

    def clear(folder: Path, files: list[Path]) -> None:
        result = CliRunner().invoke(commands, ["cache", "--clear"])
        if result.exception is not None:
            raise result.exception

    for _, folder, files, error in sweep(tmp_path, make, clear, lasts=lasts):
        check_ended(error, folder)
        clear(folder, files)
        assert not any(file.exists() for file in files)


# -- kernels -------------------------------------------------------------------------------------


@both_ways
def test_a_kernel_is_stored_whole_or_not_at_all(tmp_path: Path, lasts: bool) -> None:
    code = b"machine code" * 2000

    def write(folder: Path, made: None) -> None:
        kept_objects.write_object(folder / "kernels", "probe", code)

    for n, folder, _, error in sweep(tmp_path, lambda folder: None, write, lasts=lasts):
        found = kept_objects.read_object(folder / "kernels", "probe")
        assert found == (None if error else code), n
        if not lasts:
            assert leftovers(folder) == []
        write(folder, None)
        assert kept_objects.read_object(folder / "kernels", "probe") == code


def test_a_kernel_that_cannot_be_kept_runs_all_the_same(tmp_path: Path) -> None:
    with failing(tmp_path, 3, errno.ENOSPC, lasts=True):
        lib = Library(Target.host(), tmp_path / "kernels", Ready())
        lib.load(["probe"])
    assert lib.address("probe") and not lib.is_cached
    assert lib.unkept == os.strerror(errno.ENOSPC)
    assert kept_objects.read_object(tmp_path / "kernels", "probe") is None


# -- a real disk that is full --------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where one can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(folder: Path) -> Path:
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    return filler


@pytest.mark.parametrize("is_full_at_the_start", [True, False])
def test_a_chat_on_a_full_disk_is_kept_once_there_is_room(
    small_disk: Path, is_full_at_the_start: bool
) -> None:
    path = small_disk / FILE_NAME
    filler = fill(small_disk) if is_full_at_the_start else None
    store = Store(path)
    conversation = Conversation(store)
    conversation.ask("one", (), None)
    filler = filler or fill(small_disk)
    conversation.ask("word " * 5000, (), conversation.leaf)
    conversation.ask("three", (), conversation.leaf)
    assert str(path) in store.notice(conversation.id)
    assert not platform.is_writable(small_disk)
    filler.unlink()
    store._file.try_now()
    store.tend()
    assert store.notice(conversation.id) == ""
    store.close()
    again = Store(path)
    assert conversation.id is not None
    assert [node.content[:5] for node in again.messages(conversation.id)] == [
        "one", "word ", "three",
    ]  # fmt: skip
    again.close()


def test_a_chat_on_a_disk_that_is_read_only_is_kept_once_it_is_not(small_disk: Path) -> None:
    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(small_disk)], check=True)

    path = small_disk / FILE_NAME
    Store(path).close()
    remount("ro")
    store = Store(path)
    conversation = Conversation(store)
    conversation.ask("one", (), None)
    assert f"{path} can't be written" in store.notice(conversation.id)
    remount("rw")
    store._file.try_now()
    store.tend()
    assert store.notice(conversation.id) == ""
    assert conversation.id is not None and len(store.messages(conversation.id)) == 1
    store.close()


@pytest.mark.slow
def test_a_first_start_on_a_full_disk_answers(small_disk: Path, tmp_path: Path) -> None:
    fill(small_disk)
    model = tiny_model(tmp_path)
    environment = {**os.environ, "EDGEINFER_HOME": str(small_disk), "TMPDIR": str(small_disk)}
    done = subprocess.run(
        [sys.executable, "-m", "edgeinfer", "run", str(model), "-p", "hi", "--raw", "-n", "3"],
        env=environment, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "can't be kept" in done.stderr and os.strerror(errno.ENOSPC) in done.stderr
    assert leftovers(small_disk) == []
