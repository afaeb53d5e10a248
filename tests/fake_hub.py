"""A model hub on this machine, with the ways of failing that a real one has.

    python -m tests.fake_hub gated|refused|cut|lies edgeinfer pull org/model

runs a command against such a hub, which has org/model. Knows nothing of the tests that use it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeHub:
    """Repositories by name, each a dictionary of files; every request is noted."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)  # the token's owner has not accepted a licence
    token: str = "hf_right"
    cut_after: int | None = None  # bytes of the next answers after which the line is cut
    n_cuts: int = 0  # how often still
    ignores_ranges: bool = False
    lies: bool = False  # announces another checksum than the file has
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    held_after: int = 0  # bytes of the next answers after which the rest waits for `hold`
    hold: threading.Event | None = None
    n_busy: int = 0  # answers of 503 before the first good one
    redirects: bool = False  # to another path, for every file
    bytes_sent: int = 0  # of files
    address: str = ""

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.requests.append((self.path, dict(self.headers)))
                _answer(hub, self)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def bytes_asked(self) -> list[str | None]:
        """The range of every request for a file."""
        return [h.get("Range") for path, h in self.requests if "/resolve/" in path]


def _answer(hub: FakeHub, request: BaseHTTPRequestHandler) -> None:
    path = request.path.partition("?")[0]
    if hub.n_busy:
        hub.n_busy -= 1
        return _send(request, 503, b"busy")
    if path.startswith("/api/models/"):
        return _describe(hub, request, path.removeprefix("/api/models/"))
    if hub.redirects and not path.startswith("/moved/"):
        return _send(request, 302, b"", {"Location": f"/moved{path}"})
    path = path.removeprefix("/moved")
    repo, _, rest = path.lstrip("/").partition("/resolve/")
    _, _, name = rest.partition("/")
    if _is_refused(hub, request, repo):
        return None
    data = hub.repos[repo].get(name)
    if data is None:
        return _send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
    return _send_file(hub, request, data)


def _describe(hub: FakeHub, request: BaseHTTPRequestHandler, repo: str) -> None:
    if _is_refused(hub, request, repo):
        return
    siblings = [
        {
            "rfilename": name,
            "size": len(data),
            "lfs": {"size": len(data), "sha256": _sha(hub, data)},
        }
        for name, data in hub.repos[repo].items()
    ]
    facts = {"id": repo, "sha": "c0ffee", "siblings": siblings, "cardData": {"license": "mit"}}
    _send(request, 200, json.dumps(facts).encode())


def _is_refused(hub: FakeHub, request: BaseHTTPRequestHandler, repo: str) -> bool:
    given = request.headers.get("Authorization")
    if repo not in hub.repos:
        _send(request, 401 if given is None else 404, b"", {"X-Error-Code": "RepoNotFound"})
    elif given not in (None, f"Bearer {hub.token}"):
        _send(request, 401, b"")
    elif repo in hub.gated and given is None:
        _send(request, 401, b"", {"X-Error-Code": "GatedRepo"})
    elif repo in hub.refused:
        _send(request, 403, b"", {"X-Error-Code": "GatedRepo"})
    else:
        return False
    return True


def _send_file(hub: FakeHub, request: BaseHTTPRequestHandler, data: bytes) -> None:
    asked = None if hub.ignores_ranges else request.headers.get("Range")
    first, _, last = (asked or "").removeprefix("bytes=").partition("-")
    start, end = int(first or 0), int(last) + 1 if last else len(data)
    body = data[start:end]
    cut = hub.cut_after if hub.n_cuts else None
    request.send_response(206 if asked else 200)
    if asked:
        total = len(data) + hub.lies
        request.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{total}")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if hub.hold is not None:
        request.wfile.write(body[: hub.held_after])
        body = body[hub.held_after :]
        hub.hold.wait(120)
    hub.bytes_sent += len(body if cut is None else body[:cut])
    with contextlib.suppress(ConnectionError):  # whoever asked has left
        request.wfile.write(body if cut is None else body[:cut])
    if cut is not None:
        hub.n_cuts -= 1
        request.wfile.flush()
        request.connection.close()


def _send(
    request: BaseHTTPRequestHandler, code: int, body: bytes, headers: dict[str, str] | None = None
) -> None:
    request.send_response(code)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def _sha(hub: FakeHub, data: bytes) -> str:
    return hashlib.sha256(data + b"!" * hub.lies).hexdigest()


def main() -> int:
    way, *command = sys.argv[1:]
    repo, data = "org/model", b"GGUF" + bytes(1 << 20)
    with FakeHub({repo: {"model-Q4_K_M.gguf": data}}) as hub:
        if way in ("gated", "refused"):
            getattr(hub, way).add(repo)
        elif way == "cut":
            hub.cut_after, hub.n_cuts = 0, 100
        else:
            hub.lies = way == "lies"
        return subprocess.call(command, env={**os.environ, "HF_ENDPOINT": hub.address})


if __name__ == "__main__":
    sys.exit(main())
