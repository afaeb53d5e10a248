"""Questions to the operating system, and the suite's core where every one is left unanswered."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edgeinfer import platform

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
