"""Where a server is and what it is told of who asks: its URL and the API key, both checked.

Nothing that this module raises or shows has the key in it.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

from edgeinfer import config
from edgeinfer.errors import InvalidRequestError
from edgeinfer.terminal import one_line

_ENDPOINT = "/chat/completions"  # what is copied from documentation often ends so
_LEAST_HIDDEN = 6  # characters of a key: a shorter one may be a part of any word


@dataclass(frozen=True, slots=True)
class Address:
    """A server's API: `prefix` is the path before `/models` and `/chat/completions`."""

    is_secure: bool
    host: str
    port: int
    prefix: str
    place: str  # as people are shown it: host, and port where one was given
    key: str | None = field(default=None, repr=False)

    @property
    def is_local(self) -> bool:
        """Whether it is this machine, which what is sent does not leave."""
        return _is_loopback(self.host)

    @property
    def url(self) -> str:
        return f"{'https' if self.is_secure else 'http'}://{self.place}"

    def path(self, endpoint: str) -> str:
        """Of an endpoint of the API."""
        return self.prefix + endpoint

    def root(self, endpoint: str) -> str:
        """Of an endpoint beside the API."""
        return self.prefix.removesuffix("/v1") + endpoint

    def hidden(self, text: str) -> str:
        """What a server says, less the key that it may have repeated."""
        key = self.key
        return text.replace(key, "[the key]") if key and len(key) >= _LEAST_HIDDEN else text


def read_address(url: str, key: str | None) -> Address:
    """The address that a person has given; InvalidRequestError says what is wrong with it."""
    written = url.strip()
    if "://" not in written and _is_loopback(_host_of("http://" + written)):
        written = "http://" + written
    try:
        parts = urlsplit(written)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _refused(url, str(error)) from None
    if "@" in parts.netloc:
        raise InvalidRequestError(
            "the URL holds a password; give it without, and the key in EDGEINFER_API_KEY",
            param="url",
        )
    if parts.scheme not in ("http", "https") or not host:
        raise _refused(url, "it begins with no http:// or https:// and a host")
    if parts.query or parts.fragment:
        raise _refused(url, "it has a ? or a # in it")
    if not written.isprintable() or " " in written:
        raise _refused(url, "it has characters that no URL has")
    is_secure = parts.scheme == "https"
    path = parts.path.rstrip("/").removesuffix(_ENDPOINT)
    return Address(
        is_secure=is_secure,
        host=host,
        port=port if port is not None else (443 if is_secure else 80),
        prefix=quote(path or "/v1", safe="/%:@!$&'()*+,;=~"),
        place=one_line(_shown(host, port)),
        key=read_key(key, may_leave=is_secure or _is_loopback(host)),
    )


def read_key(given: str | None, *, may_leave: bool) -> str | None:
    """The key of the flag, else the environment's."""
    key = given if given is not None else config.api_key(is_private=may_leave)
    key = key.strip() if key is not None else None
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise InvalidRequestError(
            "the API key has a space or a character that no header can hold; check it for what "
            "was copied with it",
            param="api_key",
        )
    return key or None


def _refused(url: str, why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{one_line(url)!r} is no URL of a server: {why}; http://127.0.0.1:8080/v1 would be one",
        param="url",
    )


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _shown(host: str, port: int | None) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port is None else f"{name}:{port}"
