"""What a chat's second turn costs before its first token, of what the first one did.

    python -m tests.bench.bench_prefix MODEL.gguf|windows ... [-n 4000] [-r 3] [--device cpu]

`whole` keeps the first answer as it was; `dropped` leaves out its first half, as templates do that
drop earlier thinking. Then 16 conversations with one beginning: rows computed, pages held.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

from edgeinfer import LLM
from edgeinfer.batch import StepLimits, StepRequest
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.sequence import Prefilled, Request, Token
from edgeinfer.sampling.params import SamplingParams

from ..backends import backend
from ..test_windows import segment
from .bench_streams import Watched

PARAMS = SamplingParams(temperature=0.0, seed=1)
N_ANSWER, N_NEW = 60, 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("-n", type=int, default=4000, help="tokens of the history")
    parser.add_argument("-r", type=int, default=3, help="repeats")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    for path in given.models:
        with opened(path, given.n + 256, given.device) as engine:
            print(path)
            turns(engine, given.n, given.r)
            share(engine, given.n // 8)


@contextmanager
def opened(path: str, n_ctx: int, device: str) -> Iterator[Engine]:
    """Of a file, or of random layers of which most see a window of 512, as Gemma's do."""
    if path != "windows":
        with LLM(path, n_ctx=n_ctx, slots=2, device=device) as llm:
            yield llm.runtime.engine
        return
    model = segment(512, 512, 512, 512, 512, 0)
    limits = StepLimits.of(StepRequest(n_ctx, 2, 2), 40, model.groups, 512)
    engine = Engine(backend(device).compile(model, limits), limits, n_ctx, 40)
    try:
        yield engine
    finally:
        engine.close()


def turns(engine: Engine, n: int, repeats: int) -> None:
    found = []
    first_token(engine, tokens(engine, 99, 600), 2)  # what only the first steps do
    for i in range(repeats):
        user, asked = tokens(engine, i, n - 6), [1, 2, 3, 4, 5, 6]
        first, _, answer = first_token(engine, user + asked, N_ANSWER, (len(user),))
        new = tokens(engine, 1000 + i, N_NEW)
        whole = first_token(engine, user + asked + answer[:-1] + new, 2, (n + N_ANSWER,))
        dropped = first_token(engine, user + asked[:2] + answer[N_ANSWER // 2 :] + new, 2)
        found.append((first, whole[0] / first, whole[1], dropped[0] / first, dropped[1]))
    first_s, whole_share, cached, dropped_share, n_dropped = map(
        statistics.median, zip(*found, strict=True)
    )
    print(
        f"  first turn {first_s:.2f} s; second {whole_share:.2%} of it ({cached:.0f} cached), "
        f"dropped {dropped_share:.2%} ({n_dropped:.0f} cached)"
    )


def share(engine: Engine, n: int) -> None:
    system = tokens(engine, 7, n)
    program = engine._runner.program = Watched(engine._runner.program)
    asked = [
        Request(
            ids=(*system, *tokens(engine, 2000 + i, 20)), params=PARAMS, max_tokens=8, borders=(n,)
        )
        for i in range(16)
    ]
    running = [engine.submit(each) for each in asked]
    cached = [[e.cached for e in each if isinstance(e, Prefilled)][-1] for each in running]
    n_rows = sum(step[0] for step in program.steps)
    least = n + 16 * (20 + 7)
    print(f"  16 with {n} tokens alike: {n_rows} rows, {least} at least; cached {sorted(cached)}")


def tokens(engine: Engine, seed: int, n: int) -> list[int]:
    return random.Random(seed).choices(range(min(250, engine.n_vocab)), k=n)


def first_token(
    engine: Engine, ids: list[int], n: int, borders: tuple[int, ...] = ()
) -> tuple[float, int, list[int]]:
    """Seconds until the first token, how much was cached, and the answer."""
    begun, at, cached, answer = time.perf_counter(), 0.0, 0, []
    for event in engine.submit(
        Request(ids=tuple(ids), params=PARAMS, max_tokens=n, borders=borders)
    ):
        if isinstance(event, Prefilled):
            cached = event.cached
        elif isinstance(event, Token):
            at = at or event.at
            answer.append(event.id)
    return at - begun, cached, answer


if __name__ == "__main__":
    main()
