"""Questions to the operating system, and the suite's core where every one is left unanswered."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from edgeinfer import platform
from edgeinfer.gguf import GGUFFile
from edgeinfer.platform import system_files

from .models_for_tests import tiny_model

ROOT = Path(__file__).resolve().parent.parent
CORE = ("test_engine.py", "test_kvcache.py", "test_team.py", "test_hub.py", "test_llm.py")


def test_the_answers_are_plausible(tmp_path: Path) -> None:
    assert 1 <= platform.default_threads() <= 4096
    assert platform.available_memory() > 1 << 20
    assert 0 < platform.free_disk(tmp_path / "not" / "there")
    assert platform.is_writable(tmp_path / "new") and (tmp_path / "new").is_dir()
    assert not platform.is_writable(Path(__file__))
    assert platform.cpu_name()
    assert platform.can_run_generated_code() in (True, None)


def test_a_locked_file_is_refused_to_a_second_claim(tmp_path: Path) -> None:
    with (tmp_path / "f").open("ab") as first, (tmp_path / "f").open("ab") as second:
        assert platform.try_lock(first)
        assert not platform.try_lock(second)


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs pagemap")
@pytest.mark.parametrize("n_bytes", [1, 2 << 20, (5 << 20) + 1, (4 << 20) - 1])
def test_no_page_is_held_but_those_of_the_data(n_bytes: int) -> None:
    """Huge pages may not reach over its ends: no plan has a row for that."""
    memory = platform.Memory(n_bytes, huge=True)
    try:
        ctypes.memset(memory.address, 1, n_bytes)
        with Path("/proc/self/pagemap").open("rb") as file:  # 8 bytes a page, the first bit: held
            file.seek(ctypes.addressof(memory._view) // mmap.PAGESIZE * 8)
            pages = np.frombuffer(file.read(len(memory._map) // mmap.PAGESIZE * 8), np.uint64)
    finally:
        memory.close()
    assert np.count_nonzero(pages >> np.uint64(63)) == -(-n_bytes // mmap.PAGESIZE)


def is_cached(file: BinaryIO, at: int) -> bool:
    """Whether the system keeps a page of a file in memory; skips where it doesn't tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        pytest.skip("this system does not tell what it keeps of a file")
    try:
        return os.preadv(file.fileno(), [bytearray(1)], at, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError as error:
        pytest.skip(f"this file system does not tell what is kept of a file: {error}")


def test_what_was_copied_of_a_weight_is_forgotten_and_can_be_read_again(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, quant="F16", vocab=60_000)  # 7 MiB of embedding
    with path.open("rb") as other, GGUFFile.open(path) as file:
        os.fsync(other.fileno())
        weight = file.tensors["token_embd.weight"]
        n, at = len(weight.data), file.n_bytes - len(weight.data) // 2
        assert is_cached(other, at)
        data = bytes(weight.data[:])
        assert weight.forget(0, n // 2) == weight.rows(3, 60_000).forget(0, n // 4)
        assert all(each.forget(0, len(each.data)) for each in file.tensors.values()), "no fadvise"
        assert not is_cached(other, at)
        assert bytes(weight.data[:]) == data and is_cached(other, at)


def test_nothing_is_forgotten_where_the_system_can_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(bytes(9000))
    with (tmp_path / "f").open("rb") as file:
        assert not platform.forget_file_pages(file.fileno(), 0, 0)
        reader, writer = os.pipe()
        assert not platform.forget_file_pages(reader, 0, 9000)
        os.close(reader), os.close(writer)
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
        assert not platform.forget_file_pages(file.fileno(), 0, 9000)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_what_a_sandbox_forbids_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def forbidden(*_: object) -> Any:
        raise OSError(code, os.strerror(code))

    for name in ("sched_getaffinity", "preadv", "posix_fadvise", "fsync", "statvfs"):
        monkeypatch.setattr(os, name, forbidden, raising=False)
    if (resource := pytest.importorskip("resource")) is not None:
        monkeypatch.setattr(resource, "getrlimit", forbidden)
        monkeypatch.setattr(resource, "setrlimit", forbidden)
    assert platform.default_threads() >= 1 and platform.available_memory() > 0
    assert platform.memory_budget() > 0
    path = tmp_path / "f"
    platform.write_whole(path, b"abcdef")
    with path.open("rb+") as written:
        platform.sync(written)
    read, buffer = platform.ReadableFile(path), bytearray(4)
    assert read.read_into(memoryview(buffer), 1) == 4 and buffer == b"bcde"
    assert not read.forget(0, 4) and platform.free_disk(tmp_path) > 0
    read.close()


@pytest.mark.parametrize("text", ["", "x", "1", "-1 -1", f"{'9' * 30} {'9' * 30}", None])
def test_what_the_system_says_of_memory_may_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    monkeypatch.setattr(system_files, "read", lambda path: text)
    assert platform.rss() == 0 and platform.peak_rss() >= 0


@pytest.mark.slow
def test_the_core_works_without_any_of_them() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "tests.bare_system"]
    files = [str(ROOT / "tests" / name) for name in CORE]
    done = subprocess.run(
        [*command, "-k", "not same_bits and not progress", "-p", "no:cacheprovider", *files],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_a_folder_that_others_delete_from_is_counted_and_listed(tmp_path: Path) -> None:
    """pip and other windows do, while a model is fetched or listed."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "kept.gguf").write_bytes(bytes(1000))
    inner, is_over = tmp_path / "a" / "b", threading.Event()

    def churn() -> None:
        while not is_over.is_set():
            inner.mkdir(parents=True, exist_ok=True)
            (inner / "f").write_bytes(b"x")
            (inner / "f").unlink()
            inner.rmdir()
            inner.parent.rmdir()

    other = threading.Thread(target=churn)
    other.start()
    try:
        for _ in range(500):
            assert platform.bytes_below(tmp_path) in (1000, 1001)
            assert platform.files_below(tmp_path, "**/*.gguf") == [tmp_path / "m" / "kept.gguf"]
    finally:
        is_over.set()
        other.join()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_the_peak_of_a_process_is_its_own() -> None:
    """Not that of the larger one which started it."""
    kept = bytearray(os.urandom(1 << 20) * 64)
    code = "from edgeinfer import platform; print(platform.peak_rss())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 32 << 20 < len(kept) <= platform.peak_rss()


def test_certificates_are_read_once_for_each_value_of_their_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = platform.tls_context()
    assert platform.tls_context() is first
    monkeypatch.setenv("SSL_CERT_FILE", os.devnull)
    other = platform.tls_context()
    assert other is not first and platform.tls_context() is other


# -- stacks ---------------------------------------------------------------------------------------


def test_work_with_a_stack_of_its_own_gives_or_raises_what_it_does() -> None:
    before = threading.stack_size()
    assert platform.with_stack(64 << 20, lambda: 5) == 5
    with pytest.raises(KeyError, match="x"):
        platform.with_stack(64 << 20, lambda: {}["x"])
    with pytest.raises(MemoryError, match="stack"):
        platform.with_stack(1 << 60, lambda: 5)
    assert threading.stack_size() == before
