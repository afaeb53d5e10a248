"""Compiled kernels on the disk, by what they were made of; the name of a file has its digest.

Knows neither compilers nor devices.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path

from edgeinfer import platform
from edgeinfer.errors import DeviceError, reason_of

_MAX_VERSIONS = 12
_HEX_DIGITS = 24  # of a key, and of a digest
_DIGEST = re.compile(rf"-[0-9a-f]{{{_HEX_DIGITS}}}(?=\.)")


def key_of(*parts: str) -> str:
    """A key that changes with any of the texts that a kernel is made of."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:_HEX_DIGITS]


class Cache:
    """The files of one folder; DeviceError where others could have put them there.

    A folder that `is_ours` came with the package, and is trusted as its modules are.
    """

    def __init__(self, folder: Path, *, is_ours: bool = False) -> None:
        self.folder = folder
        self._paths: dict[str, list[Path]] | None = None  # by name without digest, once asked for
        self._read = Path.read_bytes if is_ours else platform.read_private
        reason = None if is_ours else platform.distrust(folder)
        if reason is not None:
            raise DeviceError(
                f"compiled kernels in {folder} are not used: {reason}; set EDGEINFER_HOME to a "
                "folder of your own"
            )

    def find(self, label: str, key: str, ending: str) -> Path | None:
        """The file of a kernel; None where it is absent, damaged, or another user's."""
        if self._paths is None:
            self._paths = {}
            for path in platform.files_below(self.folder, "*"):
                self._paths.setdefault(_DIGEST.sub("", path.name), []).append(path)
        for path in self._paths.get(f"{label}-{key}{ending}", []):
            with suppress(OSError):
                if self._name(label, key, ending, self._read(path)) == path.name:
                    return path
        return None

    def add(self, label: str, key: str, ending: str, data: bytes) -> Path:
        """Write a file, complete or not at all; the latest few of other sources stay.

        DeviceError where the folder takes it not.
        """
        path = self.folder / self._name(label, key, ending, data)
        try:
            platform.write_whole(path, data)
        except OSError as error:
            raise DeviceError(
                f"kernels can't be kept in {self.folder} ({reason_of(error)}); make room, "
                "or set EDGEINFER_HOME to another folder"
            ) from error
        self._paths = None
        with suppress(OSError):  # too many do no harm
            versions = sorted(
                self.folder.glob(f"{label}-*{ending}"), key=lambda path: path.stat().st_mtime
            )
            for old in versions[:-_MAX_VERSIONS]:
                old.unlink(missing_ok=True)
        return path

    def _name(self, label: str, key: str, ending: str, data: bytes) -> str:
        return f"{label}-{key}-{hashlib.sha256(data).hexdigest()[:_HEX_DIGITS]}{ending}"
