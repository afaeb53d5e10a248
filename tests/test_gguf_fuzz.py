"""Damaged GGUF files: each is read or refused, fast, without large allocations, by our errors.

What the damage is, and what reads the files: damage_gguf.py. What a message says: test_gguf.py.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeinfer.errors import InvalidModelError
from edgeinfer.gguf import GGUFFile

from . import damage_gguf

DataFile = Callable[[str], Path]


def run_damaged(folder: Path, *arguments: str, seconds: float) -> dict[str, Any]:
    """In a process of their own, so that its death is seen; the summary."""
    command = [sys.executable, "-m", "tests.damage_gguf", str(folder), *arguments]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=seconds, env=os.environ
    )
    number = (folder / "number").read_text()
    assert done.returncode == 0, f"file {number}: {done.returncode} {done.stderr[-2000:]}"
    *bad, summary = map(json.loads, done.stdout.splitlines())
    assert bad == []
    print(f"\n{summary}")
    # Both outcomes must be common, or the damage tests only one of them.
    assert summary["files"] // 50 < summary["refused"] < summary["files"] * 49 // 50
    return dict(summary)


def test_damaged_files(tmp_path: Path) -> None:
    assert run_damaged(tmp_path, "--count", "1000", seconds=300)["files"] == 1000


@pytest.mark.slow
@pytest.mark.parametrize("first", [10**7, 2 * 10**7])
def test_many_damaged_files_some_of_which_run(first: int, tmp_path: Path) -> None:
    numbers = ("--first", str(first), "--count", "20000")
    run_damaged(tmp_path, *numbers, "--generate", "200", "--limit-mib", "8192", seconds=3600)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-spm", "gpt-2", "phi-3"])
def test_damaged_files_with_real_vocabularies(
    name: str, tmp_path: Path, data_file: DataFile
) -> None:
    vocabulary = str(data_file(f"vocab/ggml-vocab-{name}.gguf"))
    numbers = ("--first", str(3 * 10**7), "--count", "1000")
    run_damaged(tmp_path, *numbers, "--vocabulary", vocabulary, seconds=3600)


def test_the_sound_files_are_read(tmp_path: Path) -> None:
    for i, sound in enumerate(damage_gguf.sound_files(tmp_path, None)):
        path = tmp_path / f"sound{i}.gguf"
        path.write_bytes(sound.written())
        n_getters = len(damage_gguf._GETTERS)
        n_refused = damage_gguf.read_all(path, renders=True, generates=False)
        # Each key is refused by the getters of other types, and by nothing else.
        assert n_refused < len(sound.keys) * n_getters
        assert damage_gguf.read_all(path, renders=False, generates=False) == 0


def test_every_kind_of_damage_is_done(tmp_path: Path) -> None:
    sounds = damage_gguf.sound_files(tmp_path, None)[:1]
    whole = sounds[0].written()
    seen = Counter(damage_gguf.damaged(sounds, seed) != whole for seed in range(300))
    assert seen[True] > 200
    for damage in damage_gguf._STRUCTURAL:
        outcomes = set()
        for seed in range(60):
            file, counts = sounds[0].copy(), {}
            damage(random.Random(seed), file, counts)
            outcomes.add(file.written(**counts))
        assert len(outcomes) > 10, damage.__name__


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    sound = damage_gguf.sound_files(tmp_path, None)[0]
    raw, path = sound.written(), tmp_path / "short.gguf"
    header = len(raw) - len(sound.data)
    lengths = [*range(0, header, 7), *range(header, len(raw) - 256, 1999)]
    for n_bytes in lengths:
        path.unlink(missing_ok=True)
        path.write_bytes(raw[:n_bytes])
        with pytest.raises(InvalidModelError):
            GGUFFile.open(path)
