"""Finds the models on this machine: our own, and those of other programs, used where they are.

Never touches the network, and never writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from edgeinfer import config, platform
from edgeinfer.errors import ModelNotFoundError, reason_of
from edgeinfer.hub.catalog import (
    ALIASES,
    choose_file,
    find_alias,
    is_model_file,
    nearest,
    parse_repo,
    parts_of,
    quant_of,
)

OURS = "edgeinfer"
_MAGIC = b"GGUF"
_NAMES_SHOWN = "`edgeinfer list --all` shows the names"
_MOST_NAMED = 8  # files of a folder
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


class ModelInfo(NamedTuple):
    """A model on this machine; `name` is what every command takes for it."""

    name: str
    path: Path  # the first file of a split model
    n_bytes: int  # of all its files
    source: str  # "edgeinfer", "huggingface", "ollama", "lmstudio" or "llama.cpp"
    quant: str | None
    repo: str  # "org/repo" on the hub, "" where that is not known


def models_folder() -> Path:
    """Where our own models are."""
    return config.data_folder() / "models"


def list_models() -> list[ModelInfo]:
    """Every model here, ours first; a file that several programs share is listed once."""
    found: list[ModelInfo] = list(_ours())
    seen = {info.path.resolve() for info in found}
    scans = {
        "huggingface": _hub_cache,
        "ollama": _ollama,
        "lmstudio": _lm_studio,
        "llama.cpp": _llama_cpp,
    }
    for source, folders in config.model_folders().items():
        for folder in folders:
            try:
                infos = sorted(scans[source](folder), key=lambda info: info.name.lower())
            except OSError:  # not ours to complain about
                continue
            found += [info for info in infos if info.path.resolve() not in seen]
            seen |= {info.path.resolve() for info in infos}
    return found


def find_model(name: str) -> Path:
    """The file that a path or a model's name means on this machine; ModelNotFoundError if none."""
    if not name.strip():  # a variable that a script did not set: no folder is meant
        raise ModelNotFoundError("the name of the model is empty", advice=(_NAMES_SHOWN,))
    try:
        path = _at_path(name)
        if path is None and (info := find_name(name)) is not None:
            path = info.path
        if path is None:
            raise _not_here(name)
    except ModelNotFoundError:
        raise
    except OSError as error:  # too long a name, a folder of another user
        raise ModelNotFoundError(f"{name} can't be opened: {reason_of(error)}") from error
    return path


def _at_path(name: str) -> Path | None:
    path = config.expand_user(name)
    if path.is_dir() and (any(path.glob("*.gguf")) or parse_repo(name) is None):
        return _only_model(path)
    if path.is_file() or path.is_dir():
        return path if path.is_file() else None
    if what := _kind_of(path):
        raise ModelNotFoundError(f"{name} is {what}", advice=("give the path of a .gguf file",))
    return None


def _kind_of(path: Path) -> str:
    """What is there that can't be a model, "" where nothing is."""
    if path.is_fifo() or path.is_socket():
        return "a pipe or a socket, which can't be read at any place"
    if path.is_char_device() or path.is_block_device():
        return "a device"
    return f"a link to {path.readlink()}, where nothing is" if path.is_symlink() else ""


def find_name(name: str) -> ModelInfo | None:
    """The model of this name on this machine; a path is no name."""
    here, alias = list_models(), find_alias(name)
    if alias is not None and alias.source.startswith("pypi:"):
        return next((info for info in here if info.name == alias.name), None)
    wanted = parse_repo(alias.source if alias else name)
    if wanted is not None:
        of_repo = [info for info in here if info.repo.lower() == wanted.repo.lower()]
        by_file = {info.path.name: info for info in reversed(of_repo)}
        try:
            return by_file[choose_file(wanted.repo, list(by_file), wanted.quant)]
        except ModelNotFoundError:
            pass
    keys = (name.lower(), f"{name.lower()}:latest")
    return next((info for info in here if info.name.lower() in keys), None)


def _only_model(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    files = [file for file in found if is_model_file(file.name) and file.is_file()]
    if len(files) == 1:
        return files[0]
    names = ", ".join(file.name for file in files[:_MOST_NAMED]) or "none"
    if len(files) > _MOST_NAMED:
        names += f" and {len(files) - _MOST_NAMED} more"
    raise ModelNotFoundError(f"folder {folder} needs one .gguf model, it has {names}; name it")


def _not_here(name: str) -> ModelNotFoundError:
    """What to do about a name that means nothing here: near names, or the command to fetch it."""
    is_address = name.startswith(("hf://", "hf.co/")) or _ADDRESS.match(name) is not None
    is_repo = parse_repo(name) and (is_address or ("\\" not in name and name.count("/") == 1))
    if find_alias(name) or is_repo:
        fetch = f"fetch it with `edgeinfer pull {name}` (or add -y)"
        return ModelNotFoundError(f"{name} is not on this machine", advice=(fetch,))
    if is_address:
        how = "download that file and give its path, or name a model of the hub: org/repo[:QUANT]"
        return ModelNotFoundError(f"{name} is an address, not a file", advice=(how,))
    path = config.expand_user(name)
    beside: list[str] = []
    if path.parent.is_dir():
        beside = [p.name for p in path.parent.iterdir() if p.is_dir() or p.suffix == ".gguf"]
    near = [str(path.parent / each) for each in nearest(path.name, beside)]
    if path.name == name and not name.lower().endswith(".gguf"):
        near = nearest(name, [*ALIASES, *(info.name for info in list_models())]) or near
    if near:
        meant = f"did you mean {' or '.join(near)}?"
        return ModelNotFoundError(f"no model {name!r}", advice=(meant,), near=near)
    if "/" in name or "\\" in name or name.lower().endswith(".gguf"):
        give = "give the path of a .gguf file (`edgeinfer list`)"
        return ModelNotFoundError(f"no file or folder {name!r}", advice=(give,))
    return ModelNotFoundError(f"no model {name!r}", advice=(_NAMES_SHOWN,))


# -- folders -------------------------------------------------------------------------------------


def _ours() -> Iterator[ModelInfo]:
    root = models_folder()
    for info in _files(root, OURS):
        parts = info.path.relative_to(root).parts
        repo = "/".join(parts[:2]) if len(parts) > 2 else ""
        yield _named(info, _repo_name(repo, info.quant) if repo else parts[0], repo)


def _hub_cache(root: Path) -> Iterator[ModelInfo]:
    """The cache that huggingface_hub and llama.cpp share: only complete files are in snapshots."""
    for folder in sorted(root.glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        seen: set[str] = set()
        newest_first = sorted(folder.glob("snapshots/*"), key=_changed_at, reverse=True)
        for snapshot in newest_first:
            for info in _files(snapshot, "huggingface"):
                if info.path.name not in seen:
                    seen.add(info.path.name)
                    yield _named(info, _repo_name(repo, info.quant), repo)


def _changed_at(path: Path) -> float:
    """When it was changed; of what leads nowhere, long ago."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _lm_studio(root: Path) -> Iterator[ModelInfo]:
    for info in _files(root, "lmstudio", "*/*/*.gguf"):
        repo = "/".join(info.path.relative_to(root).parts[:2])
        yield _named(info, _repo_name(repo, info.quant), repo)


def _llama_cpp(root: Path) -> Iterator[ModelInfo]:
    yield from _files(root, "llama.cpp", "*.gguf")


def _ollama(root: Path) -> Iterator[ModelInfo]:
    """Ollama names models in manifests; its files are named by their digests."""
    for manifest in sorted((root / "manifests").glob("*/*/*/*")):
        registry, space, model, tag = manifest.relative_to(root / "manifests").parts
        try:
            layers = json.loads(manifest.read_text("utf-8"))["layers"]
            digest = next(
                str(layer["digest"])
                for layer in layers
                if layer["mediaType"] == "application/vnd.ollama.image.model"
            )
        except (OSError, ValueError, KeyError, TypeError, StopIteration, RecursionError):
            continue
        path = root / "blobs" / digest.replace(":", "-")
        if "/" in digest or "\\" in digest or not _is_gguf(path):
            continue
        owner = {"library": ""}.get(space, f"{space}/")
        if registry != "registry.ollama.ai":
            owner = f"{registry}/{space}/"
        name = f"{owner}{model}:{tag}"
        yield ModelInfo(name, path, path.stat().st_size, "ollama", quant_of(f"{tag}.gguf"), "")


def _files(root: Path, source: str, pattern: str = "**/*.gguf") -> Iterator[ModelInfo]:
    """Whole models below a folder, named by their files."""
    for path in platform.files_below(root, pattern):
        parts = [path.with_name(name) for name in parts_of(path.name)]
        if is_model_file(path.name) and all(_is_gguf(part) for part in parts):
            try:
                n_bytes = sum(part.stat().st_size for part in parts)
            except OSError:  # deleted meanwhile
                continue
            yield ModelInfo(path.stem, path, n_bytes, source, quant_of(path.name), "")


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == _MAGIC
    except (OSError, ValueError):  # of a name that none can have
        return False


def _repo_name(repo: str, quant: str | None) -> str:
    """The alias of a repository's file, else `org/repo:QUANT`."""
    name = f"{repo}:{quant}" if quant else repo
    return next((a.name for a in ALIASES.values() if a.source.lower() == name.lower()), name)


def _named(info: ModelInfo, name: str, repo: str) -> ModelInfo:
    return ModelInfo(name, info.path, info.n_bytes, info.source, info.quant, repo)
