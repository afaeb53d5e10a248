"""One request to a server and its reply, over the standard library's HTTP.

Follows no redirect, so the key goes nowhere else. Knows nothing of models.
"""

from __future__ import annotations

import base64
import http.client
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from edgeinfer import __version__, platform
from edgeinfer.remote.address import Address
from edgeinfer.remote.packing import unpacked
from edgeinfer.remote.refusals import Refusal, ServerError, broken
from edgeinfer.terminal import one_line

_CONNECT_SECONDS = 15.0
_READ_BYTES = 1 << 16
_MOST_SAID = 1 << 16  # bytes of a refusal


class Connection:
    """A request under way, for one thread; `end`, from any other, ends it at once."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._socket: socket.socket | None = None
        self._http: http.client.HTTPConnection | None = None
        self._response: http.client.HTTPResponse | None = None
        self.is_ended = self._is_late = False

    def ask(self, path: str, body: Mapping[str, Any] | None = None, *, seconds: float) -> None:
        """Send a request, a GET without a `body`, and wait for the reply to begin.

        Neither that, however slowly its head comes, nor any later wait for a byte takes longer than
        `seconds`. ServerError where there is no connection.
        """
        data = None if body is None else json.dumps(body).encode()
        try:
            proxy = _proxy_for(self._address)
            self._http = _opened(self._address, proxy)
            self._socket = self._http.sock
            if self.is_ended:  # while it was connecting
                raise ConnectionAbortedError
            self.wait_at_most(seconds)
            headers = self._headers(is_asking=data is not None)
            if proxy is not None and not self._address.is_secure:
                path = self._address.url + path
                headers |= proxy.headers
            with self._ended_after(seconds):
                self._http.request("GET" if data is None else "POST", path, data, headers)
                self._response = self._http.getresponse()
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            raise broken(error, self._address, has_begun=False) from None

    @contextmanager
    def _ended_after(self, seconds: float) -> Iterator[None]:
        """TimeoutError where the block takes longer: each byte alone has that time, too."""
        timer = threading.Timer(seconds, self._end_late)
        timer.daemon = True
        with suppress(RuntimeError):  # no thread is to be had: each byte has its time
            timer.start()
        try:
            yield
        except (OSError, http.client.HTTPException, ValueError):
            if not self._is_late:
                raise
        finally:
            timer.cancel()
        if self._is_late:  # or what is cut off was taken for a whole head
            raise TimeoutError

    def _end_late(self) -> None:
        self._is_late = True
        if self._socket is not None:
            platform.end_reading(self._socket)

    def wait_at_most(self, seconds: float) -> None:
        """For the next bytes."""
        if self._socket is not None:
            self._socket.settimeout(seconds)

    @property
    def refusal(self) -> Refusal | None:
        """What came in place of an answer."""
        response = self._response
        assert response is not None
        if response.status == 200:
            return None
        headers = {name.lower(): value for name, value in response.getheaders()}
        try:
            said = self.body(_MOST_SAID)
        except ServerError:
            said = b""
        return Refusal(response.status, headers, said)

    @property
    def content_type(self) -> str:
        assert self._response is not None
        return (self._response.getheader("content-type") or "").partition(";")[0].strip().lower()

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the reply as they come; ServerError where they break off."""
        response = self._response
        assert response is not None
        try:
            yield from unpacked(self._read(response), response.getheader("content-encoding"))
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise broken(error, self._address, has_begun=True) from None

    def _read(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        while chunk := response.read1(_READ_BYTES):
            yield chunk

    def body(self, most: int) -> bytes:
        """The whole reply, its first `most` bytes where it is longer."""
        data, end = b"", time.monotonic() + _CONNECT_SECONDS
        for chunk in self.chunks():
            data += chunk
            if len(data) >= most or time.monotonic() > end:
                break
        return data[:most]

    def end(self) -> None:
        """Whoever reads gets no more; the server sees the connection closed."""
        self.is_ended = True
        if self._socket is not None:
            platform.end_reading(self._socket)

    def close(self) -> None:
        """Give all of it back; only for the thread that reads."""
        self.end()
        for each in (self._response, self._http):
            if each is not None:
                each.close()

    def _headers(self, *, is_asking: bool) -> dict[str, str]:
        headers = {
            "User-Agent": f"edgeinfer/{__version__}",
            "Accept": "text/event-stream, application/json" if is_asking else "application/json",
            "Connection": "close",
        }
        if is_asking:
            headers["Content-Type"] = "application/json"
        if self._address.key:
            headers["Authorization"] = f"Bearer {self._address.key}"
        return headers


# -- the way there -------------------------------------------------------------------------------


class _Proxy(NamedTuple):
    host: str
    port: int
    headers: dict[str, str]


def _opened(address: Address, proxy: _Proxy | None) -> http.client.HTTPConnection:
    host, port = (proxy.host, proxy.port) if proxy else (address.host, address.port)
    opened: http.client.HTTPConnection
    if address.is_secure:
        context = platform.tls_context()
        opened = http.client.HTTPSConnection(host, port, timeout=_CONNECT_SECONDS, context=context)
        if proxy:
            opened.set_tunnel(address.host, address.port, proxy.headers)
    else:
        opened = http.client.HTTPConnection(host, port, timeout=_CONNECT_SECONDS)
    opened.connect()
    return opened


def _proxy_for(address: Address) -> _Proxy | None:
    """The one that the environment, or the system, names for this host; never for this machine."""
    if address.is_local or urllib.request.proxy_bypass(address.host):
        return None
    named = urllib.request.getproxies()
    url = named.get("https" if address.is_secure else "http") or named.get("all")
    if not url:
        return None
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        raise ServerError(
            f"the proxy for {address.place} is of kind {one_line(parts.scheme)}, http is supported;"
            " NO_PROXY names hosts that are asked without one"
        )
    headers = {}
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    return _Proxy(parts.hostname, parts.port or 80, headers)
