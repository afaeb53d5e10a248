"""Many copies of a model behind one address, on one machine or on many, by Ray Serve.

python fleet.py MODEL [--most 4] [--slots 8] [--cores 2] [--port 8000]

Every API of `edgeinfer serve` works, streams included. A request goes to the copy that has read
the longest beginning of it, unless that one is much busier than another; copies come and go with
the number of requests. README.md, beside this file, says what to set.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from edgeinfer.options import LoadOptions
from edgeinfer.server.app import find_envelope, make_app
from edgeinfer.server.errors import ApiError
from edgeinfer.server.models import Models
from edgeinfer.server.service import Limits, Service
from edgeinfer.server.wire import decode, read_body, reply

BLOCK = 1024  # characters of a request that are remembered together
MOST_BLOCKS = 64  # of one request: the first 64 K characters tell conversations apart
MOST_REMEMBERED = 1 << 17  # blocks, some 20 MB
SLACK = 4  # requests by which the copy that knows a request may be busier than the idlest
BEGINNINGS = ("system", "instructions", "tools", "messages", "input", "prompt")


def beginning(body: bytes) -> list[bytes]:
    """Hashes of the first 1, 2, 3 ... blocks of what a request has a model read."""
    try:
        given = decode(body)
    except ApiError:  # the copy says what is wrong
        return []
    text = msgspec.json.encode([given[name] for name in BEGINNINGS if given.get(name)])
    hashes, so_far = [], hashlib.blake2b(digest_size=16)
    for start in range(0, min(len(text), BLOCK * MOST_BLOCKS), BLOCK):
        so_far.update(text[start : start + BLOCK])
        hashes.append(so_far.digest())
    return hashes


class KnowsBeginnings(RequestRouter):
    """Chooses the copy that has answered what begins alike, or else the idlest."""

    def initialize_state(self) -> None:
        self._copies: OrderedDict[bytes, ReplicaID] = OrderedDict()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Copies in the order in which they are asked whether they have room."""
        waiting = self.replica_queue_len_cache.get
        ranked = sorted(candidate_replicas, key=lambda copy: waiting(copy.replica_id) or 0)
        hashes = pending_request.args[0] if pending_request else []
        there = {copy.replica_id: copy for copy in ranked}
        for each in reversed(hashes):
            knowing = there.get(self._copies.get(each))
            if knowing is not None:
                ahead = (waiting(knowing.replica_id) or 0) - (waiting(ranked[0].replica_id) or 0)
                if ahead <= SLACK:
                    ranked.remove(knowing)
                    ranked.insert(0, knowing)
                break
        return [[copy] for copy in ranked]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        for each in pending_request.args[0]:
            self._copies[each] = replica_id
            self._copies.move_to_end(each)
        while len(self._copies) > MOST_REMEMBERED:
            self._copies.popitem(last=False)


class Copy:
    """One model with its engine; it answers a request as `edgeinfer serve` would."""

    async def __init__(  # type: ignore[misc]  # Ray waits for it
        self, name: str, model: Path, load: LoadOptions, limits: Limits
    ) -> None:
        models = Models([(name, model)], load)
        await models.start()
        self._app = make_app(Service(models, limits))

    async def answer(
        self, hashes: Sequence[bytes], scope: dict[str, Any], body: bytes
    ) -> AsyncGenerator[Message, None]:
        """The messages of ASGI that a reply consists of. Closing the generator ends the answer."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        unread, gone = [{"type": "http.request", "body": body}], asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not unread:
                await gone.wait()
            return unread.pop() if unread else {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(scope, receive, messages.put)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            gone.set()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


class Door:
    """Reads requests and passes on replies; it has no model and little to do."""

    def __init__(self, copies: DeploymentHandle, limits: Limits) -> None:
        self._answer = copies.options(method_name="answer", stream=True)
        self._limits = limits

    async def __call__(self, request: Request) -> Response:
        try:
            body = await read_body(request, self._limits.most_body)
        except ApiError as error:
            tell = find_envelope(request.url.path, request.headers)
            return reply(tell(error), error.status, error.headers)
        kept = ("type", "method", "path", "raw_path", "query_string", "headers", "http_version")
        scope = {name: request.scope[name] for name in kept if name in request.scope}
        messages = self._answer.remote(beginning(body), scope, body)
        head = await anext(messages)
        parts = _parts(messages)
        response = StreamingResponse(parts, head["status"])
        response.raw_headers = list(head["headers"])
        return response


async def _parts(messages: Any) -> AsyncGenerator[bytes, None]:
    try:
        async for message in messages:
            yield message.get("body", b"")
    finally:
        messages.cancel()


def fleet(
    model: Path,
    *,
    least: int = 1,
    most: int = 4,
    cores: float = 2,
    limits: Limits | None = None,
    **load: Any,
) -> serve.Application:
    """The application: `least` to `most` copies of a model, with `cores` and `slots` each."""
    limits = limits or Limits()
    slots = load.setdefault("slots", 8)
    load.setdefault("threads", max(1, int(cores)))
    copies = serve.deployment(
        request_router_config=RequestRouterConfig(request_router_class=KnowsBeginnings),
        ray_actor_options={"num_cpus": cores},
        max_ongoing_requests=2 * slots,  # as many wait as are being answered
        autoscaling_config={
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": slots,
            "upscale_delay_s": 10,
            "downscale_delay_s": 300,  # what has read much is worth keeping
        },
    )
    door = serve.deployment(max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0})
    return door(Door).bind(copies(Copy).bind(model.stem, model, load, limits), limits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", type=Path, help="a GGUF file that is at this place on all machines"
    )
    parser.add_argument("--most", type=int, default=4, help="copies")
    parser.add_argument("--slots", type=int, default=8, help="answers of a copy at a time")
    parser.add_argument("--cores", type=float, default=2, help="of a copy")
    parser.add_argument("--n-ctx", type=int, default=4096)
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    app = fleet(
        given.model.resolve(), most=given.most, cores=given.cores, slots=given.slots,
        n_ctx=given.n_ctx,
    )  # fmt: skip
    serve.run(app, blocking=True)


if __name__ == "__main__":
    main()
