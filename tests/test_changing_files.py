"""Model files that are cut, written to or replaced while they are read: errors, never a signal."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeinfer import LLM, Recording, platform
from edgeinfer.dequantize import dequantize
from edgeinfer.errors import InvalidModelError
from edgeinfer.gguf import GGUFFile

from .models_for_tests import tiny_model

Change = Callable[[Path], None]


def cut(path: Path) -> None:
    os.truncate(path, 0)


def cut_in_the_middle(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def write_over(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"new.")
    later = path.stat().st_mtime_ns + 10**7  # a clock tick may be longer than this test
    os.utime(path, ns=(later, later))


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def replace(path: Path) -> None:
    other = path.with_suffix(".part")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


def delete(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [cut, cut_in_the_middle, write_over, append])
def test_a_file_that_changes_after_it_was_opened_is_an_error(
    tmp_path: Path, change: Change
) -> None:
    path = tiny_model(tmp_path)
    with GGUFFile.open(path) as file:
        tokens = file.metadata.get_array("tokenizer.ggml.tokens")
        before = tokens.strings()
        change(path)
        with pytest.raises(InvalidModelError, match="cut short or written to while it was read"):
            for weight in file.tensors.values():
                dequantize(weight)
        assert tokens.strings() == before  # the header is ours


@pytest.mark.skipif(os.name != "posix", reason="Windows keeps what is open")
@pytest.mark.parametrize("change", [replace, delete])
def test_a_file_that_another_takes_the_place_of_stays_what_it_was(
    tmp_path: Path, change: Change
) -> None:
    path = tiny_model(tmp_path)
    with GGUFFile.open(path) as file, GGUFFile.open(path) as again:
        values = [dequantize(weight) for weight in file.tensors.values()]
        change(path)
        for weight, value in zip(again.tensors.values(), values, strict=True):
            np.testing.assert_array_equal(dequantize(weight), value)


@pytest.mark.skipif(os.name != "posix", reason="Windows keeps what is open")
def test_parts_that_are_replaced_while_they_are_opened_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_model(tmp_path)
    first, second = (tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2))
    subprocess.run(
        [sys.executable, "-c", _SPLIT, str(whole), str(first), str(second)], check=True, timeout=300
    )
    GGUFFile.open(first).close()
    opened = platform.ReadableFile.__init__

    def replace_the_first(self: platform.ReadableFile, path: Path) -> None:
        if path == second:
            copy = first.with_suffix(".copy")
            copy.write_bytes(first.read_bytes())
            copy.replace(first)
        opened(self, path)

    monkeypatch.setattr(platform.ReadableFile, "__init__", replace_the_first)
    with pytest.raises(InvalidModelError, match="replaced while the parts"):
        GGUFFile.open(first)


_SPLIT = """
import sys, gguf
source = gguf.GGUFReader(sys.argv[1])
for no, path in enumerate(sys.argv[2:]):
    out = gguf.GGUFWriter(path, "llama")
    out.add_uint16("split.no", no); out.add_uint16("split.count", 2)
    out.add_int32("split.tensors.count", 2)
    out.add_tensor(source.tensors[no].name, source.tensors[no].data.copy(),
                   raw_dtype=source.tensors[no].tensor_type)
    out.write_header_to_file(); out.write_kv_data_to_file()
    out.write_tensors_to_file(); out.close()
"""


@pytest.mark.parametrize("change", [cut, cut_in_the_middle, write_over])
@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_file_that_changes_while_it_loads_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, device: str
) -> None:
    """At every read that a load makes of tensors, the first, one within and the last."""
    path = tiny_model(tmp_path)
    data, reads = path.read_bytes(), count_reads(monkeypatch, path, device)
    for n in {1, reads // 2, reads}:
        path.write_bytes(data)
        change_at(monkeypatch, n, lambda: change(path))
        with pytest.raises(InvalidModelError, match="cut short or written to while it was read"):
            LLM(path, device=device)
        monkeypatch.undo()


def count_reads(monkeypatch: pytest.MonkeyPatch, path: Path, device: str) -> int:
    reads: list[int] = []
    change_at(monkeypatch, 0, lambda: None, reads)
    LLM(path, device=device).close()
    monkeypatch.undo()
    return len(reads)


def change_at(
    monkeypatch: pytest.MonkeyPatch,
    n: int,
    change: Callable[[], None],
    reads: list[int] | None = None,
) -> None:
    """Have the file changed before the n-th read of it, in whatever thread."""
    seen, lock = [] if reads is None else reads, threading.Lock()
    read = platform.ReadableFile.read_into

    def read_into(self: platform.ReadableFile, buffer: memoryview, at: int) -> int:
        with lock:
            seen.append(at)
            if len(seen) == n:
                change()
        return read(self, buffer, at)

    monkeypatch.setattr(platform.ReadableFile, "read_into", read_into)


def test_nothing_is_read_of_the_file_once_it_is_loaded(tmp_path: Path) -> None:
    path, session = tiny_model(tmp_path), tmp_path / "one.session"
    with LLM(path, device="cpu", pooling="mean") as llm:
        cut(path)
        with llm.stream("a b c", max_tokens=8, temperature=0) as stream:
            before = stream.run().token_ids
        assert Recording.of(llm, stream).replay(llm).is_equal
        assert llm.save_session(session, stream) == len(llm.load_session(session))
        assert llm.embed("hello").shape == (1, 64)
        assert llm.generate("a b c", max_tokens=8, temperature=0).token_ids == before
        assert llm.detokenize(llm.tokenize("hello")) == "hello"
        assert llm.logits([1, 2, 3]).shape[0] == 3


@pytest.mark.slow
def test_a_file_cut_at_any_moment_of_a_load_ends_no_process(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, dim=512, n_heads=8, ffn_dim=2048, n_layers=16, vocab=2000)
    data = path.read_bytes()
    outcomes = set()
    for i in range(150):
        path.write_bytes(data)
        code = "import sys; from edgeinfer import LLM; print('go', flush=True); LLM(sys.argv[1])"
        with subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as job:  # fmt: skip
            assert job.stdout is not None
            job.stdout.readline()
            threading.Event().wait(0.25 * i / 150)
            (cut, cut_in_the_middle, write_over)[i % 3](path)
            _, errors = job.communicate(timeout=300)
        last = errors.strip().splitlines()[-1] if job.returncode else "whole"
        outcomes.add((job.returncode, last.partition(":")[0]))
    assert outcomes <= {(0, "whole"), (1, "edgeinfer.errors.InvalidModelError")}
    assert len(outcomes) == 2


def test_what_a_load_reads_fits_its_portion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces are read into memory of their own, aligned, one behind the other."""
    monkeypatch.setattr("edgeinfer.kernels.cpu.weights._PORTION", 4096)
    path = tiny_model(tmp_path)
    with LLM(path) as llm:
        found = llm.logits([1, 2, 3])
    monkeypatch.undo()
    with LLM(path) as llm:
        np.testing.assert_array_equal(llm.logits([1, 2, 3]), found)


# -- the interpreter's end -----------------------------------------------------------------------

_AT_EXIT = """
import atexit, sys
def late():
    from edgeinfer import LLM
    from edgeinfer.errors import DeviceError
    try:
        print(len(LLM(sys.argv[1]).generate("hi", max_tokens=3, temperature=0).token_ids))
    except DeviceError as error:
        print(error)
atexit.register(late)
"""


def test_a_model_that_is_loaded_while_the_interpreter_ends(tmp_path: Path) -> None:
    path = tiny_model(tmp_path)
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", _AT_EXIT, str(path)], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().isdigit() or "before the interpreter exits" in done.stdout


def test_a_thread_that_can_not_be_started_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeinfer.errors import DeviceError

    path, start = tiny_model(tmp_path), threading.Thread.start
    for name in ("edgeinfer-load", "edgeinfer-engine"):

        def refuse(self: threading.Thread, name: str = name) -> None:
            if self.name == name:
                raise RuntimeError("can't start new thread")
            start(self)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(DeviceError, match="can't start new thread: .*ulimit -u"):
            LLM(path)
