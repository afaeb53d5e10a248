"""Text that files and servers bring, where it is shown: one line, no more than fits, harmless."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any
from unicodedata import category

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeinfer import errors, one_line
from edgeinfer.cli import main as cli
from edgeinfer.errors import EdgeInferError, InvalidModelError, UnsupportedModelError
from edgeinfer.gguf import GGUFFile
from edgeinfer.inspect_file import describe
from edgeinfer.model import Model

from .models_for_tests import tiny_model
from .test_models import write_with_tensors

# A line of ours faked, a clipboard written, a direction turned, nothing to see, no UTF-8.
EVIL = (
    "good\nedgeinfer: all is well\r\x1b[2J\x1b]52;c;aGk=\x07\x9b31m\u2028fake\x85fake\u202egpj"
    "\u2066\u200b\ufeff\u00ad\U000e0041\x00\x08"
)
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def is_clean(text: str, limit: int = 2200) -> bool:
    return len(text) < limit and not any(category(c) in UNSEEN for c in text)


@given(st.text() | st.text("\x1b[]0;m\x9b\x07\n a\u202e\ud800", max_size=40), st.integers(8, 99))
def test_one_line_is_clean_short_and_stable(text: str, limit: int) -> None:
    shown = one_line(text, limit)
    assert is_clean(shown, limit + 40)
    assert one_line(shown, len(shown)) == shown
    shown.encode()


def test_one_line_keeps_what_is_harmless() -> None:
    for text in ("Qwen3 4B  Instruct", "日本語 grüße 🦙 e\u0301", "/a/b  c/\ue000.gguf", ""):
        assert one_line(text) == text
    assert one_line("a\nb\tc\u2029d") == "a b c d"
    cut = one_line("x" * 10**6 + "end")
    assert cut.endswith("end") and "[1000003 characters]" in cut and len(cut) < 250


ERRORS = [
    each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, Exception)
]


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("text", [EVIL, "x\n" * 10**6], ids=["evil", "long"])
def test_every_error_is_one_clean_line(kind: type[EdgeInferError], text: str) -> None:
    needed: dict[str, Any] = {}
    if kind is errors.ContextLengthError:
        needed = {"n_tokens": 1, "n_ctx": 1}
    error = kind(text, **needed)
    assert is_clean(str(error)) and is_clean("".join(map(str, error.args)))
    assert is_clean(error.found)
    if not needed:
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_what_an_error_carries_is_clean() -> None:
    invalid = InvalidModelError("found this", path=Path(EVIL), field=EVIL * 1000, offset=7)
    assert is_clean(str(invalid)) and is_clean(str(invalid.field)) and "offset 7" in str(invalid)
    lacking = UnsupportedModelError("needs", architecture=EVIL, missing=[EVIL, EVIL * 1000])
    assert is_clean(str(lacking.architecture)) and all(map(is_clean, lacking.missing))


# -- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [EVIL, "n\n" * 100_000], ids=["evil", "long"])
def test_a_models_name_is_one_line_everywhere(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("general.name", "general.license", "tokenizer.ggml.pre", "tokenizer.ggml.model")
    path = tiny_model(tmp_path, metadata=dict.fromkeys(keys, name))
    with GGUFFile.open(path) as file:
        assert is_clean(Model.load(file).name, 300)
    assert all(is_clean(str(value)) for value in describe(str(path)).values())
    with pytest.raises(SystemExit):
        cli.main(["info", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(describe(str(path)))
    assert all(map(is_clean, lines))


@pytest.mark.parametrize(
    "key",
    [
        "general.architecture",
        "general.name",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.model",
        "tokenizer.ggml.eos_token_id",
        "llama.rope.scaling.type",
        "llama.block_count",
        "llama.hidden_activation",
    ],
)
@pytest.mark.parametrize("value", [EVIL, "x\x1b[31m" * (1 << 18)], ids=["evil", "long"])
def test_found_values_are_shown_clean(
    key: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_model(tmp_path, metadata={key: value})
    for arguments in (["info", str(path)], ["tokenize", str(path), "-p", "a"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        for line in "".join(capsys.readouterr()).splitlines():
            assert is_clean(line.replace("\t", " "))


@pytest.mark.parametrize("name", [f"blk.0.{EVIL}.weight", EVIL, f"{EVIL}_exps", "t" * 60_000])
def test_tensor_names_are_shown_clean(name: str, tmp_path: Path) -> None:
    path = write_with_tensors(tmp_path, {name: np.ones(32, np.float64)})
    with GGUFFile.open(path) as file, pytest.raises(UnsupportedModelError) as caught:
        Model.load(file)
    assert is_clean(str(caught.value), 1000)


def test_damaged_names_are_shown_clean(tmp_path: Path) -> None:
    path = tmp_path / "twice.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32(EVIL, 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    raw = path.read_bytes()
    (tmp_path / f"cut\n{path.name}").write_bytes(raw[:-2])
    with pytest.raises(InvalidModelError) as caught:
        GGUFFile.open(tmp_path / f"cut\n{path.name}")
    assert is_clean(str(caught.value))


def test_file_names_are_listed_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEINFER_HOME", str(tmp_path))
    folder = tmp_path / "data" / "models" / "a\nb  fake  \x1b[31m"
    folder.mkdir(parents=True)
    tiny_model(folder)
    with pytest.raises(SystemExit):
        cli.main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and is_clean(lines[0])
