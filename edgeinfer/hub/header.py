"""A model on the hub, opened without being fetched: its header comes, its tensors stay there."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from edgeinfer.errors import ModelNotFoundError
from edgeinfer.gguf import GGUFFile
from edgeinfer.hub import client as hub
from edgeinfer.hub.catalog import choose_file, find_alias, parse_repo
from edgeinfer.hub.repository import RemoteFile, Repository

_STEP = 64 << 10  # of what is asked for at least, so that small tensors beside each other come once


def is_on_hub(name: str) -> bool:
    """Whether a name is one of the hub's; it may have no such model."""
    alias = find_alias(name)
    return parse_repo(alias.source if alias else name) is not None


def open_header(name: str) -> GGUFFile:
    """What the file says of itself; the data of a tensor is fetched where it is asked for.

    DownloadError or ModelNotFoundError where the hub does not give it.
    """
    alias = find_alias(name)
    wanted = parse_repo(alias.source if alias else name)
    if wanted is None:
        raise ModelNotFoundError(f"no model {name!r} on the hub; give org/repo[:QUANT]")
    repository = hub.look_up(wanted.repo)
    first = choose_file(repository.name, list(repository.files), wanted.quant)

    def opened(path: Path) -> _RemoteBytes:
        file = repository.files.get(path.relative_to(repository.name).as_posix())
        if file is None:
            raise ModelNotFoundError(f"{repository.name} has no {path.name}")
        return _RemoteBytes(repository, file)

    return GGUFFile.open(Path(PurePosixPath(repository.name, first)), opened)


class _RemoteBytes:
    """A file of a repository, as `edgeinfer.gguf` reads files; what has come last is kept."""

    def __init__(self, repository: Repository, file: RemoteFile) -> None:
        self._repository, self._file = repository, file
        self.n_bytes, self.is_closed = file.n_bytes, False
        self._start, self._kept = 0, b""

    def read_into(self, buffer: memoryview, at: int) -> int:
        """Fill a buffer from byte `at` on; fewer bytes than it has where the file ends."""
        end = min(at + len(buffer), self.n_bytes)
        if not self._start <= at <= end <= self._start + len(self._kept):
            n_bytes = min(max(end - at, _STEP), self.n_bytes - at)
            self._start = at
            self._kept = hub.read_range(self._repository, self._file, at, n_bytes)
        part = self._kept[at - self._start : end - self._start]
        buffer[: len(part)] = part
        return len(part)

    def is_unchanged(self) -> bool:
        return True  # it is of one revision

    def is_in_place(self) -> bool:
        return True

    def forget(self, at: int, n_bytes: int) -> bool:
        return False

    def close(self) -> None:
        self.is_closed, self._kept = True, b""
