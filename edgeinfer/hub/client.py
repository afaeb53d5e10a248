"""A client of the Hugging Face hub: what a repository holds, and files that arrive whole.

Knows nothing of models. Uses the standard library only, so that every byte is hashed while it
arrives and a cut connection goes on where it stopped, whatever huggingface_hub is installed.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from edgeinfer import config, platform
from edgeinfer.errors import DownloadError, ModelNotFoundError, reason_of
from edgeinfer.hub.repository import SHA256, RemoteFile, Repository, read_repository

# bytes done, bytes in all
BytesProgress = Callable[[int, int], None]

_CHUNK = 1 << 20
_TIMEOUT = 30.0
_ATTEMPTS = 5  # in a row without a new byte
_SPARE = 64 << 20  # disk space that is left free
_MOST_FACTS = 64 << 20  # bytes of what a hub says about a repository
_NO_FACTS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
_RETRIED = (408, 425, 429, 500, 502, 503, 504)


def look_up(repo: str) -> Repository:
    """What the hub's main revision of `org/repo` holds."""
    try:
        with _open(f"/api/models/{repo}?blobs=true", repo) as response:
            return read_repository(repo, json.loads(response.read(_MOST_FACTS)))
    except (DownloadError, ModelNotFoundError):
        raise
    except OSError as error:
        raise DownloadError(
            f"{config.hub_endpoint()} does not answer ({reason_of(error)}); try again later"
        ) from error
    except (*_NO_FACTS, http.client.HTTPException) as error:
        raise DownloadError(
            f"{config.hub_endpoint()} does not answer like a model hub; check HF_ENDPOINT"
        ) from error


def download(
    repository: Repository, file: RemoteFile, target: Path, progress: BytesProgress
) -> None:
    """Fetch a file to `target`, which appears only once all of it is there and correct."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(repository, file, target)
    with claim(part) as out:
        if is_current(file, target):  # another process has just finished
            platform.unlink_open(part)
            return
        found = _fetch(repository, file, out, progress)
        if file.sha256 not in (None, found):
            out.truncate(0)
            raise DownloadError(
                f"{file.name} arrived damaged: its SHA-256 is {found}, the hub says "
                f"{file.sha256}; run the command again"
            )
        platform.sync(out)
    try:
        part.replace(target)
    except FileNotFoundError:  # another process found it complete and was faster
        if not target.exists():
            raise
    _note_digest(target, found)


def read_range(repository: Repository, file: RemoteFile, start: int, n_bytes: int) -> bytes:
    """Some bytes of a file, without the rest of it; DownloadError where the hub won't say them."""
    data = b""
    for attempt in range(_ATTEMPTS):
        first = start + len(data)
        with _tried_again():
            address = _address(repository, file)
            with _open(address, repository.name, first, start + n_bytes) as response:
                if response.status != 206:
                    raise DownloadError(
                        f"{config.hub_endpoint()} can't send a part of {file.name}; fetch all of "
                        f"it with `edgeinfer pull {repository.name}`"
                    )
                _check_part(response.headers.get("Content-Range"), first, file)
                for chunk in _chunks(response):
                    data += chunk
                    if len(data) >= n_bytes:
                        return data[:n_bytes]
        time.sleep(min(0.2 * 2**attempt, 5))
    raise DownloadError(
        f"the connection broke at byte {start + len(data)} of {file.name}; try again later"
    )


@contextmanager
def _tried_again() -> Iterator[None]:
    """What a broken connection raises ends the block alone."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, (DownloadError, ModelNotFoundError)):
            raise


def _check_part(content_range: str | None, start: int, file: RemoteFile) -> None:
    """Raise DownloadError unless it is what was asked for, of the file that the hub told of."""
    match = re.fullmatch(r"bytes (\d{1,20})-\d{1,20}/(\d{1,20}|\*)", content_range or "")
    if match is None or int(match[1]) != start or match[2] not in ("*", str(file.n_bytes)):
        raise DownloadError(
            f"{config.hub_endpoint()} sent another part of {file.name} than was asked for"
        )


def n_fetched(repository: Repository, file: RemoteFile, target: Path) -> int:
    """Bytes of a file that an earlier try has left to go on from."""
    try:
        return min(_part_of(repository, file, target).stat().st_size, file.n_bytes)
    except OSError:
        return 0


def _part_of(repository: Repository, file: RemoteFile, target: Path) -> Path:
    mark = (file.sha256 or repository.revision)[:12]
    return target.with_name(f"{target.name}.{mark}.part")


@contextmanager
def claim(part: Path) -> Iterator[BinaryIO]:
    """The file of an unfinished download; DownloadError while another process fills it."""
    with platform.open_appending(part) as out:
        # One that was deleted since it was opened may be somebody's again, under the same name.
        if not (platform.try_lock(out) and platform.is_at(out, part)):
            raise DownloadError(
                f"{part.stem} is being downloaded by another process; wait until that is done"
            )
        yield out


def is_current(file: RemoteFile, target: Path) -> bool:
    """Whether `target` is this file; it is read through only where no digest was noted."""
    if not target.exists() or target.stat().st_size != file.n_bytes:
        return False
    if file.sha256 is None:
        return True
    try:
        noted = _digest_file(target).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        noted = ""
    if not SHA256.fullmatch(noted):
        with target.open("rb") as stored:
            noted = _digest_of(stored, file.n_bytes).hexdigest()
        _note_digest(target, noted)
    return noted == file.sha256


def delete(target: Path) -> None:
    """Take away a downloaded file and what was noted of it."""
    _digest_file(target).unlink(missing_ok=True)
    target.unlink(missing_ok=True)


def _note_digest(target: Path, digest: str) -> None:
    """Spare the next look at a file the reading of it; where that fails, it is read."""
    with suppress(OSError):
        platform.write_whole(_digest_file(target), digest.encode())


def _digest_file(target: Path) -> Path:
    return target.with_name(target.name + ".sha256")


def _fetch(repo: Repository, file: RemoteFile, out: BinaryIO, progress: BytesProgress) -> str:
    """Append what is missing of a file; the SHA-256 of all of it."""
    digest = _digest_of(out, file.n_bytes)
    address, n_failed = _address(repo, file), 0
    while (n_done := out.tell()) < file.n_bytes:
        _check_space(Path(out.name).parent, file.n_bytes - n_done)
        with _tried_again(), _open(address, repo.name, start=n_done) as response:
            if n_done and response.status == 206:
                _check_part(response.headers.get("Content-Range"), n_done, file)
            elif n_done:  # a server that sends all of it again
                out.truncate(0)
                out.seek(0)
                digest = hashlib.sha256()
            for chunk in _chunks(response):
                _write(out, chunk, file)
                digest.update(chunk)
                progress(out.tell(), file.n_bytes)
                if out.tell() > file.n_bytes:
                    break
        n_failed = 0 if out.tell() > n_done else n_failed + 1
        if n_failed == _ATTEMPTS:
            raise DownloadError(
                f"the connection broke at {n_done >> 20} of {file.n_bytes >> 20} MiB of "
                f"{file.name}; run the same command again, it goes on from there"
            )
        if out.tell() < file.n_bytes:
            time.sleep(min(0.2 * 2**n_failed, 5))
    if out.tell() > file.n_bytes:
        out.truncate(0)
        raise DownloadError(f"{file.name} is longer than the hub says; run the command again")
    return str(digest.hexdigest())


def _address(repo: Repository, file: RemoteFile) -> str:
    return f"/{repo.name}/resolve/{repo.revision}/{urllib.parse.quote(file.name)}"


def _chunks(response: IO[bytes]) -> Iterator[bytes]:
    while True:
        try:
            chunk = response.read(_CHUNK)
        except ValueError as error:  # of a length that is none
            raise http.client.HTTPException(str(error)) from None
        if not chunk:
            return
        yield chunk


def _digest_of(out: BinaryIO, n_bytes: int) -> Any:
    """A digest fed with what an earlier try left; `out` then stands at its end."""
    digest = hashlib.sha256()
    out.seek(0)
    while chunk := out.read(_CHUNK):
        digest.update(chunk)
    if out.tell() > n_bytes:
        out.truncate(0)
        out.seek(0)
        return hashlib.sha256()
    return digest


def _write(out: BinaryIO, chunk: bytes, file: RemoteFile) -> None:
    try:
        out.write(chunk)
        out.flush()
    except OSError as error:
        raise DownloadError(
            f"{file.name} could not be written to {Path(out.name).parent}: {reason_of(error)}; "
            "make room or set EDGEINFER_HOME to another disk, then run the same command again"
        ) from error


def check_space(folder: Path, n_bytes: int, what: str) -> None:
    """Refuse a download that the disk can't hold."""
    free = platform.free_disk(folder)
    if free < n_bytes + _SPARE:
        raise DownloadError(
            f"{what} needs {(n_bytes + _SPARE) / 1e9:.2f} GB in {folder}, {free / 1e9:.2f} GB are "
            "free; make room or set EDGEINFER_HOME to another disk"
        )


def _check_space(folder: Path, n_bytes: int) -> None:
    check_space(folder, n_bytes, "the rest of the download")


# -- requests ------------------------------------------------------------------------------------


class _Again(OSError):
    """It may go better the next time."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; the user's token stays with the host that it was meant for."""

    def redirect_request(
        self, request: Any, fp: Any, code: int, msg: str, headers: Any, url: str
    ) -> Any:
        scheme, before = (urllib.parse.urlsplit(each).scheme for each in (url, request.full_url))
        if scheme != "https" and scheme != before:
            where = _origin(url)
            raise DownloadError(f"{_origin(request.full_url)} redirects to {where}: not followed")
        known = 307 if code == 308 else code  # Python 3.10 refuses 308
        again = super().redirect_request(request, fp, known, msg, headers, url)
        token = request.unredirected_hdrs.get("Authorization")
        if again is not None and token and _origin(url) == _origin(request.full_url):
            again.add_unredirected_header("Authorization", token)
        return again

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302


def _origin(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc


@contextmanager
def _open(path: str, repo: str, start: int = 0, end: int | None = None) -> Iterator[Any]:
    """A response of the hub, from byte `start` on, up to `end` where one is given."""
    if config.is_offline():
        raise DownloadError(f"HF_HUB_OFFLINE is set: {repo} can't be fetched")
    request = urllib.request.Request(config.hub_endpoint() + path)
    request.add_header("User-Agent", "edgeinfer")
    if start or end is not None:
        last = "" if end is None else end - 1
        request.add_header("Range", f"bytes={start}-{last}")
    token = config.hub_token()
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        response = _opener().open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:  # it holds the connection
            raise _refusal(error, repo, has_token=bool(token)) from None
    except urllib.error.URLError as error:
        if start:  # a download under way tries again
            raise _Again(str(error.reason)) from None
        raise DownloadError(
            f"no connection to {config.hub_endpoint()} ({reason_of(error)}); check the network, or "
            "copy a .gguf file here and give its path"
        ) from None
    except ValueError:
        raise DownloadError(
            f"{config.hub_endpoint()} is no address, or redirects to what is none; check "
            "HF_ENDPOINT"
        ) from None
    with response:
        yield response


def _opener() -> urllib.request.OpenerDirector:
    context = platform.tls_context()
    return urllib.request.build_opener(_Redirects, urllib.request.HTTPSHandler(context=context))


def _refusal(error: urllib.error.HTTPError, repo: str, *, has_token: bool) -> Exception:
    page = f"{config.hub_endpoint()}/{repo}"
    code = error.headers.get("X-Error-Code") or ""
    tokens = f"{config.hub_endpoint()}/settings/tokens"
    if code == "GatedRepo" or error.code == 403:
        then = "" if has_token else f", make a token at {tokens} and set HF_TOKEN to it"
        return DownloadError(
            f"{repo} asks you to accept its licence (HTTP {error.code}): open {page}, log in and "
            f"accept it{then}"
        )
    if error.code == 401 and has_token and code != "RepoNotFound":
        return DownloadError(f"the hub refuses your token (HTTP 401); make another at {tokens}")
    if error.code in (401, 404):  # the hub says 401 for what does not exist, too
        private = "it may be private" if has_token else "if it is private, set HF_TOKEN"
        return ModelNotFoundError(f"the hub has no {repo} (HTTP {error.code}); {private}")
    if error.code in _RETRIED:
        return _Again(f"HTTP {error.code}")
    return DownloadError(f"{page} answered HTTP {error.code} {error.reason}")
