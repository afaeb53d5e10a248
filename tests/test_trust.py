"""Whose files are taken: kernels that others may have put there are not run, history not opened."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgeinfer import EdgeInferError, platform
from edgeinfer.kernels.cpu import kept_objects, library, tune
from edgeinfer.kernels.cpu.library import Library
from edgeinfer.kernels.cpu.ready import Ready
from edgeinfer.kernels.cpu.targets import Target
from edgeinfer.kernels.cpu.tune import Schedule
from edgeinfer.platform import trust
from edgeinfer.tui import schema

from . import native
from .models_for_tests import tiny_model

pytestmark = pytest.mark.skipif(os.name != "posix", reason="about owners and modes")
STRANGER = 54321
as_root = pytest.mark.skipif(
    getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can give files away"
)


@pytest.fixture(scope="module")
def probe() -> bytes:
    """The object of a kernel."""
    data = native.library().folder
    native.library().load(["norm"])
    found = kept_objects.read_object(data, "norm")
    assert found is not None
    return found


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def cache(tmp_path: Path, probe: bytes) -> Path:
    """A cache that holds one kernel, three folders below one of ours."""
    folder = tmp_path / "home" / "cache" / "kernels"
    kept_objects.write_object(folder, "norm", probe)
    return folder


def takes(folder: Path) -> bool:
    """Whether a kernel of this cache would run."""
    found, _ = Library(Target.host(), folder, Ready())._find(["norm"])
    return "norm" in found


def test_what_we_make_is_ours_alone_whatever_the_umask(tmp_path: Path, probe: bytes) -> None:
    with umask(0):
        kept_objects.write_object(tmp_path / "a" / "b", "norm", probe)
    file = kept_objects.object_path(tmp_path / "a" / "b", "norm")
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "a", file.parent, file)]
    assert modes == [0o700, 0o700, 0o600]
    assert takes(file.parent)


@pytest.mark.parametrize("mode", [0o777, 0o722, 0o702, 0o770])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_kernel_below_a_folder_that_others_can_write_is_not_run(
    cache: Path, mode: int, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert takes(cache)
    monkeypatch.setattr(trust, "_is_only_member", lambda gid: False)
    [cache, *cache.parents][level].chmod(mode)
    assert not takes(cache)


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_a_kernel_that_others_can_write_is_not_run(
    cache: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "_is_only_member", lambda gid: False)
    kept_objects.object_path(cache, "norm").chmod(mode)
    assert not takes(cache)


def test_the_group_of_this_user_alone_may_write(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "_is_only_member", lambda gid: True)
    cache.chmod(0o770)
    assert takes(cache)
    cache.chmod(0o772)
    assert not takes(cache)


def test_folders_that_others_add_to_but_not_change_are_no_reason(cache: Path) -> None:
    cache.parent.chmod(0o1777)  # as /tmp is
    assert takes(cache)


@as_root
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_a_kernel_of_another_user_is_not_run(cache: Path, level: int) -> None:
    path = [kept_objects.object_path(cache, "norm"), cache, *cache.parents][level]
    os.chown(path, STRANGER, STRANGER)
    assert not takes(cache)


@as_root
def test_a_user_takes_what_root_put_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    assert takes(cache)


def test_links_are_as_good_as_the_folders_on_both_ends(cache: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(cache)
    assert takes(link)
    (tmp_path / "home").chmod(0o777)
    assert not takes(link)
    (tmp_path / "home").chmod(0o755)
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    (open_to_all / "link").symlink_to(Path("..") / "home" / "cache" / "kernels")
    (tmp_path / "chain").symlink_to(open_to_all / "link")
    assert not takes(tmp_path / "chain")
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    assert not takes(tmp_path / "ring")
    assert not takes(tmp_path / "home" / ".." / "open" / "link")


@as_root
def test_a_link_of_another_user_in_a_sticky_folder_is_not_followed(
    cache: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(cache)
    os.lchown(link, STRANGER, STRANGER)
    assert not takes(link)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("other", path)])
def test_only_plain_files_are_read(cache: Path, make: Callable[[Path], None]) -> None:
    """A pipe would be waited for, a link may be anybody's."""
    path = kept_objects.object_path(cache, "norm")
    path.rename(cache / "other")
    make(path)
    assert not takes(cache)


def test_a_file_larger_than_any_kernel_is_not_read(cache: Path) -> None:
    os.truncate(kept_objects.object_path(cache, "norm"), 1 << 40)  # sparse: it takes no room
    assert not takes(cache)


def test_distrusted_kernels_are_built_in_memory_and_said_in_one_line(
    cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.chmod(0o777)
    before = sorted(cache.iterdir())
    lib = Library(Target.host(), cache, Ready())
    lib.load(["probe"])
    assert lib.address("probe") and not lib.is_cached and lib.inexact() == []
    assert sorted(cache.iterdir()) == before
    (line,) = caplog.messages
    assert re.search(
        r"are not used: others can write to .* \(mode 0777\); set EDGEINFER_HOME", line
    )
    assert library.kernels_here(Target.host(), cache) == {} or "cached" not in (
        library.kernels_here(Target.host(), cache).values()
    )


def test_a_name_with_escapes_reaches_no_terminal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "a\x1b]52;c;x\ab\n"
    folder.mkdir()
    folder.chmod(0o777)
    Library(Target.host(), folder, Ready())
    assert "\x1b" not in caplog.text and "\a" not in caplog.text


def test_the_processor_is_not_what_others_say(tmp_path: Path) -> None:
    facts = Target.host(memory=tmp_path)
    (note,) = tmp_path.glob("processor-*")
    assert note.stat().st_mode & 0o777 == 0o600
    note.chmod(0o666)
    note.write_text(note.read_text().replace(facts.cpu, "evil"))
    assert Target.host(memory=tmp_path) == facts


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "", "{}", "[1]", "[null, []]", "\xff", "3", "[1e999, 2]"]
)
def test_a_measurement_is_checked_when_it_is_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "decode.json"
    path.write_bytes(text.encode("latin-1"))
    assert tune.read(path, [Schedule(2, 1.5)]) is None


def test_looking_costs_a_start_nothing(cache: Path) -> None:
    import time

    begun = time.thread_time()
    for _ in range(200):
        platform.distrust(cache)
    assert (time.thread_time() - begun) / 200 < 1e-3


# -- history -------------------------------------------------------------------------------------


def test_the_history_is_never_a_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("x")
    target.chmod(0o644)
    path = tmp_path / "data" / "history.db"
    path.parent.mkdir()
    for make in (path.symlink_to, path.hardlink_to):
        make(target)
        with pytest.raises(EdgeInferError, match="is a link|second name"):
            schema.connect(path)
        assert target.stat().st_mode & 0o777 == 0o644 and target.read_text() == "x"
        path.unlink()
    path.symlink_to(tmp_path / "nothing")
    with pytest.raises(EdgeInferError, match="is a link"):
        schema.connect(path)
    assert not (tmp_path / "nothing").exists()
    path.unlink()
    with contextlib.closing(schema.connect(path)):
        assert path.stat().st_mode & 0o777 == 0o600


@as_root
def test_the_history_of_another_user_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    sqlite3.connect(path).close()
    path.touch(0o666)
    path.chmod(0o666)
    os.chown(path, STRANGER, STRANGER)
    with pytest.raises(EdgeInferError, match="belongs to another user"):
        schema.connect(path)
    assert path.stat().st_mode & 0o777 == 0o666


# -- no home -------------------------------------------------------------------------------------

_NO_USER = """
import os, pwd, sys
def unknown(uid): raise KeyError(uid)
pwd.getpwuid = unknown
os.environ.pop("EDGEINFER_HOME", None)
for name in [n for n in os.environ if n.startswith("XDG_")]: del os.environ[name]
home = sys.argv.pop(1)
os.environ["HOME"] = home
if home == "unset": del os.environ["HOME"]
import edgeinfer.cli.main
edgeinfer.cli.main.main(sys.argv[1:])
"""


@pytest.mark.parametrize("home", ["unset", "", "/dev/null"])
def test_commands_need_no_home(home: str, tmp_path: Path) -> None:
    for arguments in (["cache", "--json"], ["rm", "nothing"]):
        done = subprocess.run(
            [sys.executable, "-c", _NO_USER, home, *arguments],
            cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == (1 if arguments[0] == "rm" else 0), done.stderr
        assert len(done.stderr.splitlines()) <= 1 and "unexpected" not in done.stderr
        if "--json" in arguments:
            assert all(os.path.isabs(folder) for folder in json.loads(done.stdout)["folders"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("home", ["unset", "", "/dev/null"])
def test_a_model_runs_without_a_home(home: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    for arguments, text in (
        (["run", "--raw", "-p", "x", "-n", "2"], ""),
        (["chat", "--plain", "--chat-template", "chatml"], "x\n"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", _NO_USER, home, *arguments, str(model)],
            input=text, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
        said = [line for line in done.stderr.splitlines() if "EDGEINFER_HOME" in line]
        assert sum("kernels can't be kept in" in line for line in said) == 1
        assert len(said) <= 2, said  # and the latest model isn't remembered
