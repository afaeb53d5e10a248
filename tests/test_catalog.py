"""Names of models: aliases, repositories, quantisations, near misses."""

from __future__ import annotations

import pytest

from edgeinfer.errors import ModelNotFoundError
from edgeinfer.hub.catalog import (
    ALIASES,
    choose_file,
    find_alias,
    is_model_file,
    largest_that_fits,
    memory_needed,
    nearest,
    parse_repo,
    parts_of,
    quant_of,
)

REPO = "org/Some-Model-GGUF"
FILES = [
    "Some-Model-Q4_K_M.gguf",
    "Some-Model-Q8_0.gguf",
    "Some-Model-f16.gguf",
    "mmproj-Some-Model-f16.gguf",
    "Some-Model.imatrix.gguf",
    "Some-Model-draft-Q4_0.gguf",
    "README.md",
]


@pytest.mark.parametrize(
    "name, repo, quant",
    [
        ("org/repo", "org/repo", None),
        ("org/repo:q4_k_m", "org/repo", "Q4_K_M"),
        ("hf.co/org/repo.v1:Q8_0", "org/repo.v1", "Q8_0"),
        ("hf://org/repo", "org/repo", None),
        ("https://huggingface.co/org/repo", "org/repo", None),
        ("org/repo:latest", "org/repo", None),
    ],
)
def test_repository_names(name: str, repo: str, quant: str | None) -> None:
    parsed = parse_repo(name)
    assert parsed is not None and (parsed.repo, parsed.quant) == (repo, quant)


@pytest.mark.parametrize(
    "name", ["smollm2", "/abs/path", "a/b/c", "../up", "dir/model.gguf", "", "a/.."]
)
def test_what_is_no_repository(name: str) -> None:
    assert parse_repo(name) is None


def test_the_usual_quantisation_is_the_default() -> None:
    assert choose_file(REPO, FILES, None) == "Some-Model-Q4_K_M.gguf"
    assert choose_file(REPO, FILES, "F16") == "Some-Model-f16.gguf"
    assert choose_file(REPO, ["only-one.gguf", "mmproj.gguf"], None) == "only-one.gguf"
    assert choose_file(REPO, ["a-UD-Q4_K_M.gguf", "a-Q8_0.gguf"], None) == "a-UD-Q4_K_M.gguf"


def test_a_quantisation_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(ModelNotFoundError, match=r"no Q5_K_M file; .*F16, Q4_K_M, Q8_0"):
        choose_file(REPO, FILES, "Q5_K_M")
    with pytest.raises(ModelNotFoundError, match="no Q4_K_M file"):
        choose_file(REPO, ["a-Q8_0.gguf", "a-Q6_K.gguf"], None)
    with pytest.raises(ModelNotFoundError, match="has no .gguf model"):
        choose_file(REPO, ["README.md", "mmproj-x.gguf"], None)


@pytest.mark.parametrize(
    "file, quant",
    [
        ("qwen2.5-7b-instruct-q4_k_m-00001-of-00002.gguf", "Q4_K_M"),
        ("Qwen3-4B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("x.IQ4_XS.gguf", "IQ4_XS"),
        ("Model-BF16.gguf", "BF16"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("plain.gguf", None),
    ],
)
def test_quantisation_in_a_file_name(file: str, quant: str | None) -> None:
    assert quant_of(file) == quant


def test_parts_of_a_split_model() -> None:
    first = "sub/x-q4_0-00001-of-00003.gguf"
    assert parts_of(first) == [f"sub/x-q4_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert is_model_file(first) and not is_model_file("x-q4_0-00002-of-00003.gguf")
    assert parts_of("x.gguf") == ["x.gguf"]


def test_aliases_are_found_in_any_case_and_name_what_exists() -> None:
    assert find_alias("Qwen3-4B") is ALIASES["qwen3-4b"]
    assert find_alias("smollm2:latest") is find_alias("SmolLM2-135M") is ALIASES["smollm2"]
    assert find_alias("nothing") is None
    for alias in ALIASES.values():
        assert alias.source.startswith("pypi:") or parse_repo(alias.source)
        assert alias.n_bytes > 0 and alias.licence


def test_the_largest_alias_that_fits() -> None:
    smallest = min(a.n_bytes for a in ALIASES.values())
    assert largest_that_fits(memory_needed(smallest)) is None
    best = largest_that_fits(4_000_000_000)
    assert best is not None and best.name == "qwen3-4b"
    best = largest_that_fits(1 << 40)
    assert best is not None and best.n_bytes == max(a.n_bytes for a in ALIASES.values())


def test_near_names() -> None:
    assert nearest("smolm2", ALIASES)[0] == "smollm2"
    assert nearest("Qwen3-4", ALIASES)[0] == "qwen3-4b"
    assert nearest("zzzz", ALIASES) == []
