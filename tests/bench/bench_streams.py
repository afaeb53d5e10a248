"""What many streams at once cost: their sum, the host's time between steps, a long prompt beside.

    python -m tests.bench.bench_streams MODEL.gguf [-n 16] [-r 3] [-k total,host,beside]

Clients are threads that read their streams. `host` is the time from the end of a step to the
start of the next one, and the processor's time of the engine's thread in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from typing import Any

from edgeinfer import LLM

PLAIN: dict[str, Any] = {"speculation": False, "temperature": 0.0, "overflow": "error"}


class Watched:
    """A program that notes when its steps begin and end, and how many rows and sequences each had.

    Times are those of the clock, and of the engine's thread alone.
    """

    def __init__(self, program: Any) -> None:
        self._program = program
        self.steps: list[tuple[int, int, float, float, float, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def submit(self, batch: Any) -> Any:
        return _WatchedTicket(self, self._program.submit(batch), batch)


class _WatchedTicket:
    def __init__(self, owner: Watched, ticket: Any, batch: Any) -> None:
        self._owner, self._ticket = owner, ticket
        self._shape = batch.n_rows, len(batch.tables)
        self.abort = ticket.abort

    def wait(self) -> Any:
        begun, at = time.perf_counter(), time.thread_time()
        outputs = self._ticket.wait()
        end = time.perf_counter(), time.thread_time()
        self._owner.steps.append((*self._shape, begun, end[0], at, end[1]))
        return outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("-n", type=int, default=16, help="streams")
    parser.add_argument("-r", type=int, default=3, help="repeats")
    parser.add_argument("-k", default="total,host", help="what to measure")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--slots", type=int)
    parser.add_argument("--ctx", type=int, default=2560)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with LLM(args.model, n_ctx=args.ctx, slots=args.slots or args.n, device="cpu") as llm:
        watched = Watched(llm.runtime.engine._runner.program)
        llm.runtime.engine._runner.program = watched
        _read(llm, args.n, 8)
        for kind in args.k.split(","):
            runs = [_MEASURES[kind](llm, watched, args) for _ in range(args.r)]
            for name in runs[0]:
                found[name] = round(statistics.median(run[name] for run in runs), 4)
    print(json.dumps(found))


def _read(llm: LLM, n: int, n_tokens: int, prompt: int = 16) -> list[list[float]]:
    """The times at which each of `n` clients has read its tokens."""
    times: list[list[float]] = [[] for _ in range(n)]

    def client(i: int) -> None:
        ids = [10 + i, *range(20, 19 + prompt)]
        with llm.stream(ids, max_tokens=n_tokens, logit_bias={2: -1e9}, **PLAIN) as stream:
            for _ in stream:
                times[i].append(time.perf_counter())

    threads = [threading.Thread(target=client, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def _total(llm: LLM, watched: Watched, args: argparse.Namespace) -> dict[str, float]:
    """Decode tokens a second of `n` streams, of one, and their ratio; steps of decode rows only."""
    rates = []
    for n in (1, args.n):
        watched.steps.clear()
        _read(llm, n, args.tokens)
        steps = [step for step in watched.steps if step[0] == step[1] == n]
        seconds = steps[-1][3] - steps[0][2]
        rates.append(n * len(steps) / seconds)
    return {"one_tok_s": rates[0], "total_tok_s": rates[1], "times": rates[1] / rates[0]}


def _host(llm: LLM, watched: Watched, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds between steps of `n` decoding streams, and of one."""
    found = {}
    for n in (1, args.n):
        watched.steps.clear()
        _read(llm, n, args.tokens)
        pairs = list(zip(watched.steps, watched.steps[1:], strict=False))
        pairs = [(a, b) for a, b in pairs if a[:2] == b[:2] == (n, n)]
        walls = sorted(1e3 * (b[2] - a[3]) for a, b in pairs)
        cpus = sorted(1e3 * (b[4] - a[5]) for a, b in pairs)
        found[f"host_ms_{n}"] = statistics.median(walls)
        found[f"host_p90_ms_{n}"] = walls[9 * len(walls) // 10]
        found[f"host_cpu_ms_{n}"] = statistics.median(cpus)
        found[f"host_cpu_p25_ms_{n}"] = cpus[len(cpus) // 4]
        found[f"step_ms_{n}"] = statistics.median(1e3 * (s[3] - s[2]) for s in watched.steps)
    return found


def _beside(llm: LLM, watched: Watched, args: argparse.Namespace) -> dict[str, float]:
    """A prompt beside 8 streams: the gaps between their tokens, and how fast it is read."""
    first = 8 + 2 * len(_FIRST)  # what was read before is not read again
    _FIRST.append(first)
    prompt = [3 + i * 7 % 250 for i in range(args.prompt)]
    times: list[list[float]] = [[] for _ in range(8)]
    is_over = threading.Event()

    def client(i: int) -> None:
        options = PLAIN | {"logit_bias": {2: -1e9}}
        with llm.stream([30 + i, *range(20, 35)], max_tokens=2000, **options) as stream:
            for _ in stream:
                times[i].append(time.perf_counter())
                if is_over.is_set():
                    return

    alone = _seconds(llm, [first, *prompt])
    threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    while min(map(len, times)) < args.tokens:
        time.sleep(0.05)
    begun = time.perf_counter()
    beside = _seconds(llm, [first + 1, *prompt])
    is_over.set()
    for thread in threads:
        thread.join()
    pairs = [pair for each in times for pair in zip(each[4:], each[5:], strict=False)]
    quiet = sorted(b - a for a, b in pairs if b < begun)
    loud = sorted(b - a for a, b in pairs if begun < a and b < begun + beside)
    median, p95 = statistics.median(quiet), loud[95 * len(loud) // 100]
    return {
        "quiet_ms": 1e3 * median, "quiet_p95_ms": 1e3 * quiet[95 * len(quiet) // 100],
        "beside_p95_ms": 1e3 * p95, "gap_times": p95 / median,
        "alone_s": alone, "beside_s": beside, "speed_kept": alone / beside,
    }  # fmt: skip


def _seconds(llm: LLM, prompt: list[int]) -> float:
    begun = time.perf_counter()
    llm.generate(prompt, max_tokens=1, **PLAIN)
    return time.perf_counter() - begun


_FIRST: list[int] = []  # tokens of prompts
_MEASURES = {"total": _total, "host": _host, "beside": _beside}

if __name__ == "__main__":
    main()
