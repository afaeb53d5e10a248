"""What goes wrong between here and a server, in one line each that says what to do.

What the server itself says is a part of them: cut short, cleaned, and without the key.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from edgeinfer import config
from edgeinfer.errors import EdgeInferError, ModelNotFoundError, reason_of
from edgeinfer.remote.address import Address
from edgeinfer.terminal import one_line

_MOST_SAID = 400  # characters of a server's words
_MOST_SHOWN = 6  # names of models in a line
_TOO_LONG = re.compile(
    "context_length_exceeded|exceed_context_size|maximum context length|available context size|"
    "context window|prompt is too long|input is too long|larger than the context",
    re.IGNORECASE,
)
_LIMIT = re.compile(r"maximum context length is (\d{1,9})|context size \((\d{1,9})")
_LENGTH = re.compile(r"resulted in (\d{1,9})|\((\d{1,9}) in the messages|request \((\d{1,9}) tok")


class ServerError(EdgeInferError):
    """A server could not be reached, refused, or broke off."""


class TooLongError(ServerError):
    """More than the server's model holds; tokens to read and to hold, 0 where it does not say."""

    def __init__(self, found: str = "", *, n_tokens: int = 0, n_ctx: int = 0) -> None:
        self.n_tokens, self.n_ctx = n_tokens, n_ctx
        super().__init__(found)


class Refusal(NamedTuple):
    """A reply that is no answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def names_of(known: Sequence[str]) -> str:
    """The first models of a server, in words."""
    shown = ", ".join(one_line(id, 100) for id in known[:_MOST_SHOWN])
    n_more = len(known) - _MOST_SHOWN
    return f"{shown} and {n_more} more" if n_more > 0 else shown


# -- connections ---------------------------------------------------------------------------------


def broken(error: Exception, address: Address, *, has_begun: bool) -> ServerError:
    """What a failed connection is called; `has_begun` once an answer was on its way."""
    place = address.place
    if isinstance(error, ServerError):
        return error
    reason = _reason(error, address)
    if has_begun:
        return ServerError(f"{place} broke off before the end of its answer ({reason})")
    if isinstance(error, socket.gaierror):
        return ServerError(f"no address is known for {place}; check the URL, and the network")
    if isinstance(error, ssl.SSLCertVerificationError):
        why = one_line(error.verify_message)
        return ServerError(
            f"the certificate of {place} is not trusted ({why}); SSL_CERT_FILE names a file of "
            "further authorities"
        )
    if isinstance(error, ssl.SSLError):
        return ServerError(
            f"{place} does not speak TLS as it should ({reason}); would http:// be right?"
        )
    if isinstance(error, ConnectionRefusedError):
        return ServerError(f"nothing listens at {place}; start the server, or check the URL")
    if isinstance(error, TimeoutError):
        return ServerError(f"{place} does not answer in time; try again later, or check the URL")
    if isinstance(error, ConnectionResetError):  # of http.client, too, where nothing came
        ask = "does it still run?" if address.is_secure else "does it run, and without TLS?"
        return ServerError(f"{place} closed the connection without an answer; {ask}")
    if isinstance(error, http.client.HTTPException):
        return ServerError(
            f"{place} does not answer in HTTP ({reason}); would "
            f"http{'' if address.is_secure else 's'}:// be right?"
        )
    if isinstance(error, UnicodeError):
        return ServerError(f"{place} can't be the name of a host; check the URL")
    return ServerError(f"no connection to {place} ({reason}); check the network")


def _reason(error: Exception, address: Address) -> str:
    if isinstance(error, http.client.IncompleteRead):
        return "the connection was closed"
    said = reason_of(error)
    return one_line(address.hidden(" ".join(said.split())), 160)


# -- replies -------------------------------------------------------------------------------------


def refused(refusal: Refusal, address: Address, model: str, known: Sequence[str]) -> EdgeInferError:
    """Why a server gives no answer; `known` are the models that it has told of."""
    status, place = refusal.status, address.place
    said, error = words_of(refusal.body, address), _error_of(refusal.body)
    found = f"HTTP {status}: {said}" if said else f"HTTP {status}"
    if is_too_long(error, said):
        return too_long(error, said, address)
    if 300 <= status < 400:
        where = one_line(address.hidden(refusal.headers.get("location") or "nowhere"))
        return ServerError(f"{place} sends on to {where}, which is not followed; give that URL")
    if status == 401 or (status == 403 and "key" in said.lower()):
        return ServerError(_about_key(address, found))
    if status == 404 and ("model" in said.lower() if said else model not in known):
        missing = f"{place} has no model {one_line(model)} ({found})"
        if not known:
            return ServerError(f"{missing}; check the name, and the URL")
        has = "lists it all the same" if model in known else f"has {names_of(known)}"
        return ModelNotFoundError(f"{missing}; it {has}", near=known[:1])
    if status in (404, 405):
        return ServerError(f"{place} has no {address.path('')} ({found}); check the URL's path")
    if status in (429, 503, 529):
        state = "is not ready" if status == 503 else "takes no more requests for now"
        return ServerError(
            f"{place} {state} ({found}); try again {_when(refusal.headers, address)}"
        )
    return ServerError(
        f"{place} refuses ({found})" if status < 500 else f"{place} failed ({found})"
    )


def _about_key(address: Address, found: str) -> str:
    to_do = "set EDGEINFER_API_KEY, or give --api-key"
    if address.key:
        return f"{address.place} does not take this API key ({found}); {to_do} another one"
    is_held_back = config.api_key(is_private=True) is not None
    why = ", and OPENAI_API_KEY is not sent over http" if is_held_back else ""
    return f"{address.place} asks for an API key ({found}){why}; {to_do}"


def said_in_answer(frame: Mapping[str, Any], address: Address) -> ServerError:
    """An error that comes in place of the rest of an answer."""
    said, error = one_line(address.hidden(text_of(frame)), _MOST_SAID), frame.get("error")
    if is_too_long(error, said):
        return too_long(error, said, address)
    return ServerError(f"{address.place} ended the answer with an error: {said or 'no reason'}")


def is_too_long(error: Any, said: str) -> bool:
    kinds = [error.get("code"), error.get("type")] if isinstance(error, Mapping) else []
    return any(isinstance(t, str) and _TOO_LONG.search(t) is not None for t in (said, *kinds))


def too_long(error: Any, said: str, address: Address) -> TooLongError:
    """In the chat's words, with the counts that the server gives."""
    facts = error if isinstance(error, Mapping) else {}
    n_ctx = _count(facts.get("n_ctx")) or _first(_LIMIT, said)
    n_tokens = _count(facts.get("n_prompt_tokens")) or _first(_LENGTH, said)
    if n_tokens and n_ctx:
        counts = f"{n_tokens:,} tokens to read, and the context at {address.place} holds {n_ctx:,}"
    else:
        counts = f"{address.place} says: {said}"
    return TooLongError(
        f"this is too long: {counts}; shorten it, or begin a new chat",
        n_tokens=n_tokens,
        n_ctx=n_ctx,
    )


def words_of(body: bytes, address: Address) -> str:
    """A server's reason; of a page for browsers nothing."""
    text = body.decode("utf-8", "replace")
    found = _json(text)
    if isinstance(found, Mapping):
        text = text_of(found)
    elif text.lstrip()[:1] == "<":
        text = ""
    return one_line(address.hidden(" ".join(text.split())), _MOST_SAID)


def text_of(found: Mapping[str, Any]) -> str:
    """An error's text, by the names that it has."""
    for name in ("error", "message", "detail", "msg"):
        value = found.get(name)
        if isinstance(value, str):
            return value
        if isinstance(value, Mapping):
            return text_of(value)
        if value:
            return json.dumps(value)
    return ""


def _error_of(body: bytes) -> Any:
    found = _json(body.decode("utf-8", "replace"))
    return found.get("error") if isinstance(found, Mapping) else None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _when(headers: Mapping[str, str], address: Address) -> str:
    """What Retry-After says: seconds, or a date."""
    value = (headers.get("retry-after") or "").strip()
    if value.isdecimal() and len(value) < 7:
        return f"in {int(value):,} s"
    return f"after {one_line(address.hidden(value), 40)}" if value else "later"


def _count(value: Any) -> int:
    return value if type(value) is int and 0 < value < 1 << 40 else 0


def _first(pattern: re.Pattern[str], text: str) -> int:
    match = pattern.search(text)
    return int(next(filter(None, match.groups()))) if match else 0
