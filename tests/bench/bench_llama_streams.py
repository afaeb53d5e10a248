"""Streams at once, here and on llama-server, in turns: tokens a second while all of them run.

    python -m tests.bench.bench_llama_streams MODEL.gguf --llama LLAMA_SERVER [-n 16] [-r 3]

Prompts are 16 random tokens, answers 48, sampled at temperature 0.8; one stream, then `n`. A rate
counts what comes between the last stream's first token and the first stream's last one. Streams
between which there is no such time, on a busy machine, are asked anew, up to 5 times in all. Ours
are read in this process, theirs over HTTP, each by a thread. stderr has both rates of each turn and
their ratio, the last line, JSON, the medians. Without llama-server only ours is measured, and
stderr says which lines are left out.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from edgeinfer import LLM
from edgeinfer.results import Delta

PROMPT, ANSWER = 16, 48  # tokens
_TEMPERATURE = 0.8
_START_SECONDS = 120.0
_HIGHEST_ID = 20000  # of prompts, if the vocabulary has so many
_TRIES = 5  # of streams that must run at the same time

Client = Callable[[list[int], int], list[float]]  # a prompt and a seed to the times of its tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--llama", default="llama-server", help="the program llama-server")
    parser.add_argument("-n", type=int, default=16, help="streams")
    parser.add_argument("-r", type=int, default=3, help="repeats")
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--ctx", type=int, default=512)
    args = parser.parse_args()
    counts = sorted({1, args.n})
    names = [f"{who}_{n}_tok_s" for n in counts for who in ("ours", "llama")]
    found: dict[str, list[float]] = {name: [] for name in names}
    llama = shutil.which(args.llama)
    with (
        LLM(args.model, n_ctx=args.ctx, slots=args.n, threads=args.threads, device="cpu") as llm,
        _server(llama, args) as port,
    ):
        clients: dict[str, Client] = {"ours": lambda ids, seed: _ours(llm, ids, seed)}
        if port:
            clients["llama"] = lambda ids, seed: _theirs(port, ids, seed)
        n_ids = min(_HIGHEST_ID, llm.n_vocab)
        for turn in range(args.r + 1):  # the first one warms up
            for n in counts:
                rates = {who: _rate(client, n, n_ids, turn) for who, client in clients.items()}
                if turn:
                    _tell(turn, n, rates)
                    for who, rate in rates.items():
                        found[f"{who}_{n}_tok_s"].append(rate)
    result = {name: round(statistics.median(rates), 2) for name, rates in found.items() if rates}
    if llama:
        for n in counts:
            pairs = zip(found[f"ours_{n}_tok_s"], found[f"llama_{n}_tok_s"], strict=True)
            result[f"ratio_{n}"] = round(statistics.median(a / b for a, b in pairs), 3)
    else:
        left_out = ", ".join(f"llama_{n}_tok_s, ratio_{n}" for n in counts)
        print(f"not measured: {left_out}: no program {args.llama} (--llama)", file=sys.stderr)
    print(json.dumps(result))


def _tell(turn: int, n: int, rates: dict[str, float]) -> None:
    said = ", ".join(f"{who} {rate:.2f}" for who, rate in rates.items())
    if "llama" in rates:
        said += f", ratio {rates['ours'] / rates['llama']:.3f}"
    print(f"turn {turn}, streams {n}, tokens a second: {said}", file=sys.stderr, flush=True)


def _rate(client: Client, n: int, n_ids: int, turn: int) -> float:
    """Tokens a second of n streams while all of them run.

    SystemExit where a stream has ended early, or the streams of no try ran at the same time.
    """
    for n_try in range(_TRIES):
        times = _streams(client, n, n_ids, _TRIES * turn + n_try)
        if min(map(len, times)) < 2:
            raise SystemExit(f"a stream ended after {min(map(len, times))} tokens of {ANSWER}")
        first, last = max(each[0] for each in times), min(each[-1] for each in times)
        if last > first:
            return sum(first < at <= last for each in times for at in each) / (last - first)
    raise SystemExit(
        f"{n} streams never ran at the same time in {_TRIES} tries: in the last one a stream had "
        f"ended {first - last:.2f} s before another began; end what else this machine does, or "
        "measure fewer streams (-n)"
    )


def _streams(client: Client, n: int, n_ids: int, n_round: int) -> list[list[float]]:
    """The times of the tokens of n streams at once; each round has prompts of its own."""

    def read(i: int) -> list[float]:
        seed = 1000 * n_round + i + 1
        draw = random.Random(seed)
        return client([draw.randrange(n_ids // 64, n_ids) for _ in range(PROMPT)], seed)

    with ThreadPoolExecutor(n) as threads:
        return list(threads.map(read, range(n)))


def _ours(llm: LLM, ids: list[int], seed: int) -> list[float]:
    times: list[float] = []
    ends = llm.runtime.tokenizer.eog_ids
    with llm.stream(
        ids, max_tokens=ANSWER, temperature=_TEMPERATURE, seed=seed, speculation=False,
        logit_bias=dict.fromkeys(ends, -1e9),
    ) as stream:  # fmt: skip
        for event in stream:
            if isinstance(event, Delta):
                times += [time.perf_counter()] * len(event.token_ids)
    return times


def _theirs(port: int, ids: list[int], seed: int) -> list[float]:
    body = {
        "prompt": ids, "n_predict": ANSWER, "stream": True, "ignore_eos": True,
        "temperature": _TEMPERATURE, "seed": seed, "cache_prompt": False,
    }  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    times = []
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/completion", json.dumps(body), headers)
        reply = connection.getresponse()
        if reply.status != 200:
            raise SystemExit(f"llama-server answers {reply.status}: {reply.read()[:500]!r}")
        for line in reply:
            if line.startswith(b"data: ") and not json.loads(line[6:])["stop"]:
                times.append(time.perf_counter())
    finally:
        connection.close()
    return times


@contextmanager
def _server(program: str | None, args: argparse.Namespace) -> Iterator[int]:
    """The port of a llama-server while the block runs; 0 where there is no such program."""
    if program is None:
        yield 0
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "-m", args.model, "-np", str(args.n), "-c", str(args.ctx * args.n)]
    command += ["-t", str(args.threads), "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            end = time.monotonic() + _START_SECONDS
            while not _is_ready(port):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    said = log.read()[-2000:].decode(errors="replace")
                    raise SystemExit(f"llama-server did not start:\n{said}")
                time.sleep(0.2)
            yield port
        finally:
            process.kill()
            process.wait()


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    main()
