"""What every request passes first: who may ask, from where, and what a refusal looks like.

Knows nothing of what APIs do.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgeinfer.server.errors import ApiError, Json
from edgeinfer.server.service import Limits
from edgeinfer.server.wire import reply

# The envelope of the API that a path belongs to.
FindEnvelope = Callable[[str, Mapping[str, str]], Callable[[ApiError], Json]]
_OPEN_PATHS = ("/", "/health", "/v2/health/live", "/v2/health/ready")  # without a key
_LOCAL_NAMES = ("localhost", "ip6-localhost")


class Gate:
    """ASGI in front of the application: paths with and without /v1 or a last slash are one."""

    def __init__(self, app: ASGIApp, limits: Limits, find_envelope: FindEnvelope) -> None:
        self._app, self._limits, self._find_envelope = app, limits, find_envelope
        self._hosts = None if limits.hosts is None else set(map(_host_name, limits.hosts))
        self._origins = set(map(_as_sent, limits.origins))
        self._n_held = 0  # bytes of the bodies of all requests that are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        origin = request.headers.get("origin", "")
        named, path = _target(scope["path"])
        scope["path"] = _bare(path)
        scope["app"] = self  # or the router would reply to what it does not know
        has_begun = is_trusted = False
        n_body = 0

        async def take() -> Message:
            nonlocal n_body
            message = await receive()
            n_more = len(message.get("body", b""))
            n_body, self._n_held = n_body + n_more, self._n_held + n_more
            if self._n_held > self._limits.most_held and n_more:
                raise ApiError(503, "the server holds too many large requests; try again later")
            return message

        async def pass_on(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                if origin and is_trusted:
                    message["headers"] = [*message["headers"], *_cors(request)]
            await send(message)

        try:
            _check_framing(request.headers)
            self._check_host(request.headers.get("host", ""))
            self._check_host(named)
            self._check_origin(origin)
            is_trusted = True
            self._check_key(request)
            if request.method == "OPTIONS":
                await Response(status_code=204, headers=_PREFLIGHT)(scope, receive, pass_on)
            else:
                await self._app(scope, take, pass_on)
        except Exception as error:
            if isinstance(error, HTTPException):
                refused = _of_router(error, scope)
            else:
                refused = ApiError.of(error)
            if not has_begun:
                tell = self._find_envelope(scope["path"], request.headers)
                response = reply(tell(refused), refused.status, refused.headers)
                await response(scope, receive, pass_on)
        finally:
            self._n_held -= n_body

    def _check_host(self, given: str) -> None:
        """ApiError for a name that is not this server's: one pointed here, or a proxy's."""
        host = _host_name(given)
        if self._hosts is not None and host and not self._answers_to(host):
            raise ApiError(
                403, f"this server is not {host[:200]!r}; --allow-host NAME lets it answer to that"
            )

    def _check_origin(self, origin: str) -> None:
        """ApiError where a page that a browser shows has no business here."""
        if origin and not self._is_trusted(origin):
            raise ApiError(
                403,
                f"pages of {origin[:200]} may not ask this server; --cors-origin ORIGIN lets them",
            )

    def _check_key(self, request: Request) -> None:
        is_open = request.method == "OPTIONS" or request.scope["path"] in _OPEN_PATHS
        if self._limits.api_keys and not is_open and not self._has_key(request.headers):
            raise ApiError(
                401,
                "the API key is missing or wrong",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _answers_to(self, host: str) -> bool:
        return _is_local(host) or host in (self._hosts or ())

    def _is_trusted(self, origin: str) -> bool:
        """Local pages and local programs, which have schemes of their own; "*" means all."""
        if "*" in self._origins or _as_sent(origin) in self._origins:
            return True
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        if parts.scheme in ("http", "https"):
            return _is_local(parts.hostname or "")
        return bool(parts.scheme)

    def _has_key(self, headers: Mapping[str, str]) -> bool:
        bearer = headers.get("authorization", "")
        given = [headers.get("x-api-key", ""), headers.get("api-key", "")]
        given += [bearer[7:]] if bearer[:7].lower() == "bearer " else []
        # All are compared, and each in constant time, as the bytes that came: other kinds of space
        # than a header may have around it are parts of letters.
        matches = [
            hmac.compare_digest(key.encode(), each.strip(" \t").encode("latin-1"))
            for key in self._limits.api_keys
            for each in filter(None, given)
        ]
        return any(matches)


def _of_router(error: HTTPException, scope: Scope) -> ApiError:
    method, path = scope["method"], scope["path"][:200]
    told = f"there is no {path} here"
    if error.status_code == 405:
        told = f"{method} does not work on {path}"
    return ApiError(error.status_code, told, headers=error.headers)


_PREFLIGHT = {
    "allow": "GET, HEAD, POST, DELETE, OPTIONS",
    "access-control-allow-methods": "GET, HEAD, POST, DELETE, OPTIONS",
    "access-control-max-age": "600",
}


def _cors(request: Request) -> list[tuple[bytes, bytes]]:
    """What lets the page of a trusted origin read the reply."""
    headers = dict(request.scope["headers"])
    return [
        (b"access-control-allow-origin", headers[b"origin"]),
        # A star does not stand for `authorization`.
        (b"access-control-allow-headers", headers.get(b"access-control-request-headers", b"*")),
        (b"access-control-expose-headers", b"*"),
        (b"vary", b"origin"),
    ]


_URL = re.compile(r"https?://([^/]*)(.*)", re.IGNORECASE | re.DOTALL)


def _target(target: str) -> tuple[str, str]:
    """The host, if it names one, and the path: as proxies get it, it is a URL (RFC 9112, 3.2.2)."""
    match = _URL.fullmatch(target)
    return (match[1], match[2] or "/") if match else ("", target)


def _bare(path: str) -> str:
    """/v1/models/ and /models are one; so is what clients make of base URLs with these."""
    while "//" in path:
        path = path.replace("//", "/")
    while path.startswith("/v1/") or path == "/v1":
        path = path[3:] or "/"
    return path.rstrip("/") or "/"


_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:/@\[\]]*))(?::\d*)?", re.IGNORECASE)


def _host_name(host: str) -> str:
    """Without the port; what is no name with one stays as it is, and is nobody's."""
    match = _HOST.fullmatch(host)
    return (match[1] or match[2]).lower().rstrip(".") if match else host


def _as_sent(origin: str) -> str:
    """An origin as browsers spell it: without a path, in lower case."""
    return origin.rstrip("/").lower()


def _check_framing(headers: Mapping[str, str]) -> None:
    """ApiError where a proxy in front may see the body end elsewhere than we do."""
    if "content-length" in headers and "transfer-encoding" in headers:
        raise ApiError(
            400,
            "both content-length and transfer-encoding are given; send one",
            headers={"connection": "close"},
        )


def _is_local(host: str) -> bool:
    """Names that no stranger's name server can point here: this machine's, and addresses."""
    if host in _LOCAL_NAMES or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
