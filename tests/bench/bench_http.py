"""What HTTP costs: decode through it and without, the way of a first byte, microseconds a token.

    python -m tests.bench.bench_http MODEL.gguf [-r 5] [--tokens 128] [-k decode,path]

`decode` streams answers over HTTP and from the engine alone, in turns, and compares the rates. The
client is a process of its own that reads first and understands later: what it does takes from the
processors that decode. `path` has a program that computes nothing, so that what is left is the way
from a token to the socket: processor time of the event loop's thread, of all threads, and of the
client that `edgeinfer load` has.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import h11

from edgeinfer.engine.generation import Generation
from edgeinfer.engine.sequence import Finished, Prefilled, Request, Token
from edgeinfer.load.answer_stream import AnswerStream
from edgeinfer.load.http_client import Client
from edgeinfer.remote.address import read_address
from edgeinfer.stream import Stream

from ..server_for_tests import Running, running

_STEP_SECONDS = 0.004  # of a program that computes nothing
_PROMPT = "Once upon a time there was a"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("-r", type=int, default=5, help="repeats")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("-k", default="decode,path", help="what to measure")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--streams", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        if args.streams:
            found = asyncio.run(_ask(args.client, args.streams, args.tokens))
        else:
            found = _read(args.client, args.tokens)
        print(json.dumps(found))
        return
    found = {}
    with running([("m", args.model)], load={"device": "cpu", "slots": 4, "n_ctx": 1024}) as server:
        for kind in args.k.split(","):
            found |= _MEASURES[kind](server, args)
    print(json.dumps(found))


# -- the client -----------------------------------------------------------------------------------


def _read(url: str, n_tokens: int) -> dict[str, Any]:
    """When one client has its pieces of text; it looks at them once all have come."""
    target = read_address(url, None)
    body = _body(0, n_tokens)
    head = f"POST {target.path('/chat/completions')} HTTP/1.1\r\nhost: {target.place}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    came: list[tuple[float, bytes]] = []
    with socket.create_connection((target.host, target.port)) as connection:
        connection.sendall(head.encode() + body)
        while not (came and came[-1][1].endswith(b"0\r\n\r\n")):
            data = connection.recv(1 << 16)
            came.append((time.perf_counter(), data))
            assert data, "the server has closed the connection"
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="POST", target="/", headers=[("host", "h")]))
    parser.send(h11.EndOfMessage())
    stream = AnswerStream()
    for at, data in came:
        parser.receive_data(data)
        while (event := parser.next_event()) is not h11.NEED_DATA:
            if isinstance(event, h11.EndOfMessage):
                break
            if isinstance(event, h11.Data):
                stream.take(at, 200, bytes(event.data))
    stream.finish()
    return {"times": [list(stream.times)]}


async def _ask(url: str, n: int, n_tokens: int) -> dict[str, Any]:
    """The times at which each of `n` clients has its pieces of text, and processor time a token."""
    client = Client(read_address(url, None))
    begun = list[float]()

    async def one(i: int) -> list[float]:
        stream = AnswerStream()

        def take(at: float, status: int, data: bytes) -> None:
            if not begun:
                begun.append(time.process_time())
            stream.take(at, status, data)

        await client.request("POST", "/chat/completions", _body(i, n_tokens), take)
        stream.finish()
        return list(stream.times)

    try:
        times = await asyncio.gather(*(one(i) for i in range(n)))
        seconds = time.process_time() - begun[0]
        return {"times": times, "us": 1e6 * seconds / (n * n_tokens)}
    finally:
        client.close()


def _body(i: int, n_tokens: int) -> bytes:
    message = {"role": "user", "content": f"{_PROMPT} {i}"}
    return json.dumps(
        {"messages": [message], "max_tokens": n_tokens, "temperature": 0, "stream": True,
         "ignore_eos": True}
    ).encode()  # fmt: skip


def _client(server: Running, n: int, n_tokens: int) -> dict[str, Any]:
    """What a client in another process finds; with no streams one that only reads."""
    command = [sys.executable, "-m", "tests.bench.bench_http", "-", "--client", server.url]
    command += ["--streams", str(n), "--tokens", str(n_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# -- what is measured -----------------------------------------------------------------------------


def _decode(server: Running, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of one client and of a reader in the process; a first byte's way."""
    llm, opened = server.llm, list[Stream]()
    ends = dict.fromkeys(llm.runtime.tokenizer.eog_ids, -1e9)
    of_chat = llm.stream_chat

    def noted(*given: Any, **more: Any) -> Stream:
        opened.append(of_chat(*given, **more))
        return opened[-1]

    llm.stream_chat = noted  # type: ignore[method-assign]
    ratios, rates, ways = [], [], []
    message: Any = [{"role": "user", "content": f"{_PROMPT} 0"}]
    for turn in range(args.r + 1):
        stream = of_chat(message, max_tokens=args.tokens, temperature=0.0, logit_bias=ends)
        alone = stream.run().timings.decode_tok_s
        (times,) = _client(server, 0, args.tokens)["times"]
        over_http = (args.tokens - 1) / (times[-1] - times[0])
        if turn:  # the first one warms up
            ratios.append(over_http / alone)
            rates.append((alone, over_http))
            ways.append(1e3 * (times[0] - opened[-1]._first_at))
    return {
        "engine_tok_s": statistics.median(rate[0] for rate in rates),
        "http_tok_s": statistics.median(rate[1] for rate in rates),
        "http_of_engine": statistics.median(ratios),
        "first_byte_ms": statistics.median(ways),
        "first_byte_worst_ms": max(ways),
    }


def _path(server: Running, args: argparse.Namespace) -> dict[str, Any]:
    """Processor time a token of the event loop's thread, and of the whole process."""
    found = {}
    loop_thread = next(t for t in threading.enumerate() if t.name.startswith("Thread-"))
    clock = time.pthread_getcpuclockid(loop_thread.ident or 0)
    for n in (1, 16):
        costs, costs_all, loads = [], [], []
        for turn in range(args.r + 1):
            with _paced(server, n, args.tokens):
                begun = time.clock_gettime(clock), time.process_time()
                load = _client(server, n, args.tokens)["us"]
                ended = time.clock_gettime(clock), time.process_time()
            if turn:
                costs.append(1e6 * (ended[0] - begun[0]) / (n * args.tokens))
                costs_all.append(1e6 * (ended[1] - begun[1]) / (n * args.tokens))
                loads.append(load)
        found[f"loop_us_{n}"] = statistics.median(costs)
        found[f"process_us_{n}"] = statistics.median(costs_all)
        found[f"load_us_{n}"] = statistics.median(loads)
    return found


class _paced:
    """Inside, answers come from a thread that yields a token for each every few milliseconds."""

    def __init__(self, server: Running, n: int, n_tokens: int) -> None:
        self._engine = server.llm.runtime.engine
        self._id = server.llm.tokenize(" house")[0]
        self._n, self._n_tokens = n, n_tokens
        self._begun: list[Generation] = []
        self._thread = threading.Thread(target=self._step)

    def __enter__(self) -> None:
        self._engine.generation = self._made  # type: ignore[method-assign]
        self._engine.begin = lambda work: None  # type: ignore[method-assign]
        self._thread.start()

    def _made(self, request: Request) -> Generation:
        generation = Generation(self._engine, request, self._engine.layout("error"))
        self._begun.append(generation)
        return generation

    def _step(self) -> None:
        while len(self._begun) < self._n:
            time.sleep(_STEP_SECONDS)
        for i in range(-1, self._n_tokens + 1):
            now = time.perf_counter()
            for each in self._begun:
                if i < 0:
                    each.events.put(Prefilled(9, 9, 0, now))
                elif i < self._n_tokens:
                    each.events.put(Token(self._id, now, None, ()))
                else:
                    each.events.put(Finished("length", now))
            time.sleep(_STEP_SECONDS)

    def __exit__(self, *error: object) -> None:
        self._thread.join()
        del self._engine.generation, self._engine.begin


_MEASURES = {"decode": _decode, "path": _path}

if __name__ == "__main__":
    main()
