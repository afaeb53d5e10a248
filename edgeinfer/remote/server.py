"""A server as a chat begins with it: the models that it offers, and one of them opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

from edgeinfer.errors import ModelNotFoundError
from edgeinfer.parameters import SAMPLING
from edgeinfer.remote.address import Address
from edgeinfer.remote.connection import Connection
from edgeinfer.remote.frames import as_object, no_api
from edgeinfer.remote.model import RemoteModel
from edgeinfer.remote.refusals import ServerError, names_of, refused
from edgeinfer.remote.told import context_of, number

_SECONDS = 20.0
_PROPS_SECONDS = 5.0
_MOST_BYTES = 8 << 20  # of a list
_MOST_MODELS = 2000
_LONGEST = 500  # characters of a name
_NO_LIST = (404, 405, 501)
_SHOWN = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")


class Offered(NamedTuple):
    """A model of a server; its context length and that of its training, 0 where not told."""

    id: str
    n_ctx: int
    n_ctx_train: int


class Server:
    """What is at an address. `offered` is what it told when a model was last opened."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.offered: tuple[Offered, ...] = ()

    @property
    def place(self) -> str:
        """Its host as people are shown it."""
        return self.address.place

    @property
    def is_here(self) -> bool:
        """Whether it runs on this machine."""
        return self.address.is_local

    def open(self, id: str = "") -> RemoteModel:
        """The model of that name, else the only one that there is.

        A name that is not listed is tried all the same: some servers list a part of their models.
        """
        self.offered = self._list()
        if not id:
            id = self._only()
        known = {each.id: each for each in self.offered}
        found = known.get(id, Offered(id, 0, 0))
        # Servers of llama.cpp's kind tell both lengths, and have more to say elsewhere.
        told = self._props(id) if found.n_ctx_train or not found.n_ctx else {}
        return RemoteModel(
            self.address,
            id,
            n_ctx=found.n_ctx or context_of({"meta": told})[0],
            n_ctx_train=found.n_ctx_train,
            recommended=_sampling(told.get("params")),
            known=tuple(known),
            tells_progress=bool(told),
        )

    def _list(self) -> tuple[Offered, ...]:
        """What GET /models tells; nothing where there is no such thing."""
        address = self.address
        connection = Connection(address)
        try:
            connection.ask(address.path("/models"), seconds=_SECONDS)
            refusal = connection.refusal
            if refusal is not None:
                if refusal.status in _NO_LIST:
                    return ()
                raise refused(refusal, address, "", ())
            text = connection.body(_MOST_BYTES).decode("utf-8", "replace")
        finally:
            connection.close()
        if text.lstrip()[:1] == "[":
            text = f'{{"data": {text}}}'
        found = as_object(text, self.address)
        rows = found.get("data", found.get("models"))
        if not isinstance(rows, list):
            raise no_api(text, self.address)
        offered = (_offered(row) for row in rows[:_MOST_MODELS])
        return tuple({each.id: each for each in offered if each is not None}.values())

    def _only(self) -> str:
        ids = [each.id for each in self.offered]
        if len(ids) == 1:
            return ids[0]
        if not ids:
            raise ServerError(
                f"{self.place} lists no models at {self.address.path('/models')}; check the URL's "
                "path, or give the name of a model"
            )
        raise ModelNotFoundError(
            f"{self.place} has {len(ids)} models and none was named: choose one of {names_of(ids)}",
            near=ids[:1],
        )

    def _props(self, id: str) -> Mapping[str, Any]:
        """The settings that llama-server and its like tell of a model; empty elsewhere."""
        connection = Connection(self.address)
        try:
            path = self.address.root(f"/props?model={quote(id, safe='')}")
            connection.ask(path, seconds=_PROPS_SECONDS)
            if connection.refusal is not None:
                return {}
            text = connection.body(_MOST_BYTES).decode("utf-8", "replace")
            settings = as_object(text, self.address).get("default_generation_settings")
        except ServerError:
            return {}
        finally:
            connection.close()
        return settings if isinstance(settings, Mapping) else {}


def _offered(row: Any) -> Offered | None:
    if isinstance(row, str):
        row = {"id": row}
    if not isinstance(row, Mapping):
        return None
    id = row.get("id") or row.get("name")
    if not isinstance(id, str) or len(id) > _LONGEST:
        return None
    return Offered(id, *context_of(row))


def _sampling(params: Any) -> dict[str, Any]:
    """What a server uses where a request says nothing, as far as a chat shows it."""
    told = params if isinstance(params, Mapping) else {}
    # Of 32 bits, they are written with more digits than they have.
    found = {name: round(number(told.get(name)), 6) for name in _SHOWN if number(told.get(name))}
    return {
        name: int(value) if SAMPLING[name].kind is int else value for name, value in found.items()
    }
