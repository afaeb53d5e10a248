"""Models in the folders of other programs, found and used in place, whatever lies around them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edgeinfer.errors import ModelNotFoundError
from edgeinfer.hub.discovery import find_model, find_name, list_models, models_folder

GGUF = b"GGUF" + bytes(60)


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EDGEINFER_HOME", str(tmp_path / "ours"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "llama"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return tmp_path


def put(path: Path, data: bytes = GGUF) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def names() -> list[tuple[str, str]]:
    return [(info.source, info.name) for info in list_models()]


def test_nothing_is_there() -> None:
    assert list_models() == []


def test_the_hugging_face_cache(home: Path) -> None:
    repo = home / "hf/hub/models--org--Tiny-GGUF"
    blob = put(repo / "blobs/abc")
    link = repo / "snapshots/rev1/sub/Tiny-Q8_0.gguf"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    put(repo / "snapshots/rev1/mmproj-Tiny-f16.gguf")
    put(repo / "blobs/def.incomplete")
    assert names() == [("huggingface", "org/Tiny-GGUF:Q8_0")]
    assert find_model("Org/tiny-gguf") == link  # the only one, in any case
    with pytest.raises(ModelNotFoundError, match="edgeinfer pull org/Tiny-GGUF:Q4_0"):
        find_model("org/Tiny-GGUF:Q4_0")


def test_an_alias_finds_the_file_that_another_program_fetched(home: Path) -> None:
    folder = home / "hf/hub/models--bartowski--Qwen_Qwen3-4B-GGUF/snapshots/x"
    path = put(folder / "Qwen_Qwen3-4B-Q4_K_M.gguf")
    assert names() == [("huggingface", "qwen3-4b")]
    assert find_model("qwen3-4b") == find_model("Qwen3-4B:latest") == path


def manifest(home: Path, name: str, layers: object) -> None:
    text = json.dumps({"layers": layers}).encode()
    put(home / "ollama/manifests" / name, text)


def test_ollama(home: Path) -> None:
    kind = "application/vnd.ollama.image.model"
    layer = {"mediaType": kind, "digest": "sha256:aa"}
    other = {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:bb"}
    blob = put(home / "ollama/blobs/sha256-aa")
    manifest(home, "registry.ollama.ai/library/llama3.2/1b", [other, layer])
    manifest(home, "registry.ollama.ai/someone/tiny/latest", [layer])
    manifest(home, "registry.ollama.ai/library/gone/1b", [{**layer, "digest": "sha256:cc"}])
    manifest(home, "registry.ollama.ai/library/evil/1b", [{**layer, "digest": "../../x"}])
    manifest(home, "registry.ollama.ai/library/odd/1b", "text")
    put(home / "ollama/manifests/registry.ollama.ai/library/broken/1b", b"{")
    # One blob under two names is listed under both.
    assert names() == [("ollama", "llama3.2:1b"), ("ollama", "someone/tiny:latest")]
    assert find_model("llama3.2:1b") == find_model("someone/tiny") == blob


def test_lm_studio_and_llama_cpp(home: Path) -> None:
    put(home / ".lmstudio/models/pub/Repo-GGUF/model-Q4_0.gguf")
    put(home / "llama/pub_Repo_file-Q8_0.gguf")
    put(home / "llama/notes.gguf", b"text")
    assert names() == [("lmstudio", "pub/Repo-GGUF:Q4_0"), ("llama.cpp", "pub_Repo_file-Q8_0")]
    assert find_model("pub_Repo_file-Q8_0").name == "pub_Repo_file-Q8_0.gguf"


def test_our_own_folder_hides_what_is_unfinished() -> None:
    folder = models_folder() / "org" / "Big"
    put(folder / "big-Q4_0-00001-of-00002.gguf")
    assert list_models() == []
    put(folder / "big-Q4_0-00002-of-00002.gguf")
    put(folder / "other-Q8_0.gguf.abc.part")
    put(models_folder() / "smollm2" / ".fetch-x" / "model.gguf.part")
    put(models_folder() / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    (info, default) = list_models()
    assert (info.name, info.n_bytes) == ("org/Big:Q4_0", 128)
    assert find_name("smollm2") == default


def test_paths_come_before_names(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    put(models_folder() / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert find_model("smollm2").parent == models_folder() / "smollm2"
    path = put(home / "smollm2" / "mine.gguf")
    assert find_model("smollm2") == Path("smollm2/mine.gguf")
    assert find_model(str(path)) == path
    put(home / "smollm2" / "second.gguf")
    with pytest.raises(ModelNotFoundError, match="mine.gguf, second.gguf; name it"):
        find_model("smollm2/")
    (home / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match="it has none"):
        find_model("empty")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2", "did you mean smollm2"),
        ("qwen3-4b", "edgeinfer pull qwen3-4b"),
        ("org/repo:Q4_0", "edgeinfer pull org/repo:Q4_0"),
        ("models/mistrel.gguf", "did you mean models.mistral.gguf"),
        ("/none/of/this.gguf", "no file or folder"),
        ("zzzz", "edgeinfer list --all"),
        ("", "name of the model is empty"),
        ("hf://org/repo", "edgeinfer pull hf://org/repo"),
        ("https://huggingface.co/org/repo", "edgeinfer pull https://huggingface.co/org/repo"),
        ("https://example.org/x.gguf", "is an address, not a file; download that file"),
        ("file:///x.gguf", "is an address, not a file"),
        (os.devnull, "is a device" if os.name != "nt" else ""),
    ],
)
def test_names_that_mean_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(home)
    put(home / "models" / "mistral.gguf")
    with pytest.raises(ModelNotFoundError, match=message):
        find_model(name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files there")
def test_what_is_there_but_no_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    os.mkfifo("pipe.gguf")
    Path("loop.gguf").symlink_to("loop.gguf")
    Path("old.gguf").symlink_to("moved.gguf")
    (home / "folder.gguf").mkdir()
    for name, message in (
        ("pipe.gguf", "pipe.gguf is a pipe"),
        ("loop.gguf", "a link to loop.gguf, where nothing is"),
        ("old.gguf", "a link to moved.gguf, where nothing is"),
        (".", "it has none"),
    ):
        with pytest.raises(ModelNotFoundError, match=message):
            find_model(name)
    for i in range(20):
        put(home / f"{i:02}.gguf")
    with pytest.raises(ModelNotFoundError, match="00.gguf, .*, 07.gguf and 12 more; name it"):
        find_model(".")
    Path("here.gguf").symlink_to("03.gguf")
    assert find_model("here.gguf") == Path("here.gguf")


def test_what_is_broken_in_a_folder_hides_nothing_else(home: Path) -> None:
    kind = "application/vnd.ollama.image.model"
    for i, digest in enumerate(["sha256:\0", "sha256:\ud800", "sha256:" + "x" * 5000]):
        manifest(
            home, f"registry.ollama.ai/library/odd{i}/1b", [{"mediaType": kind, "digest": digest}]
        )
    manifest(
        home, "registry.ollama.ai/library/good/1b", [{"mediaType": kind, "digest": "sha256:aa"}]
    )
    put(home / "ollama/blobs/sha256-aa")
    folder = home / "hf/hub/models--org--Tiny-GGUF/snapshots"
    put(folder / "rev1/Tiny-Q8_0.gguf")
    (folder / "rev2").symlink_to(folder / "nowhere")
    assert names() == [("huggingface", "org/Tiny-GGUF:Q8_0"), ("ollama", "good:1b")]
