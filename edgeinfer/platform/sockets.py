"""Listening for connections, and whom to trust over TLS."""

from __future__ import annotations

import functools
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. OSError says why none can be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere it would let two programs have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except BaseException:
        listener.close()
        raise
    return listener


def end_reading(connection: socket.socket) -> None:
    """Wake whatever waits for bytes of a connection, in any thread: none come any more."""
    try:
        # NOTE: SSLSocket's own would take the state away that the reader is using.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
    except OSError:  # it is closed, or was never open
        pass


def tls_context() -> ssl.SSLContext:
    """Certificates of the system, or of SSL_CERT_FILE and SSL_CERT_DIR, and certifi's.

    They are read once, not for each connection, as long as these variables stay the same.
    """
    return _context_of(*map(os.environ.get, ("SSL_CERT_FILE", "SSL_CERT_DIR")))


@functools.lru_cache(maxsize=1)
def _context_of(file: str | None, folder: str | None) -> ssl.SSLContext:
    """What OpenSSL makes of these values of its variables, which it reads itself."""
    import ssl  # 10 ms that most commands do without

    context = ssl.create_default_context()
    try:
        # Some Pythons on macOS come without certificates; more of them do no harm elsewhere.
        import certifi

        context.load_verify_locations(certifi.where())
    except (ImportError, OSError):
        pass
    return context
