"""How fast a loaded model runs here: prefill, decode, memory bandwidth, start-up.

Knows nothing of text; the figures are medians over repeats.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from edgeinfer import platform
from edgeinfer.backend import ReadsMemory
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.generation import Generation
from edgeinfer.engine.sequence import EngineEvent, Finished, Prefilled, Request, Token
from edgeinfer.errors import ContextLengthError, Keyword
from edgeinfer.runtime import Runtime
from edgeinfer.sampling.params import SamplingParams

_READS = 7
# How far a measurement is: its stage ("depth", "bench", "llama-bench", "steps"), done, total.
Tell: TypeAlias = Callable[[str, int, int], object]


def quiet(stage: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Rates are those after `depth` tokens of context.

    `decode_fraction` is the share of `read_gb_s` that decoding reads weights at.
    """

    n_ctx: int
    prompt_tokens: int
    gen_tokens: int
    depth: int
    repeat: int
    prefill_tok_s: float
    decode_tok_s: float
    decode_sampled_tok_s: float
    read_gb_s: float | None
    decode_fraction: float | None
    load_s: float
    first_token_s: float
    peak_rss_mib: float


def run_bench(
    runtime: Runtime,
    prompt_tokens: int,
    gen_tokens: int,
    depth: int,
    repeat: int,
    first_turn: int = 0,
    tell: Tell = quiet,
) -> BenchResult:
    """Measure; every figure is taken `repeat` times, in turns.

    Prompts differ from turn to turn: one read before would be in the cache. The context before
    them is the same: it is read once, and found in the cache from then on.
    """
    engine, program = runtime.engine, runtime.program
    check_room(depth, max(prompt_tokens, gen_tokens + 1) + 1, engine.n_ctx)
    if depth:
        for event in _run(engine, depth, (), 1, SamplingParams(temperature=0.0, seed=1)):
            _check(event)
            if isinstance(event, Prefilled):
                tell("depth", event.done, event.total)
    greedy, sampled = SamplingParams(temperature=0.0, seed=1), SamplingParams(seed=1)
    prefill: list[float] = []
    first: list[float] = []
    decode: list[float] = []
    with_sampling: list[float] = []
    read: list[float] = []
    for i in range(first_turn, first_turn + repeat):
        tell("bench", i - first_turn, repeat)
        start, rate = _prefill(engine, depth, prompt_tokens, i)
        prefill.append(rate)
        first.append(start)
        decode.append(_decode(engine, depth, gen_tokens, greedy, i))
        if isinstance(program, ReadsMemory):
            # A pass takes milliseconds: several, beside the decoding that they are compared with.
            read += [program.read_bandwidth() for _ in range(_READS)]
        with_sampling.append(_decode(engine, depth, gen_tokens, sampled, i))
    decode_tok_s = statistics.median(decode)
    read_s = statistics.median(read) if read else None
    return BenchResult(
        n_ctx=engine.n_ctx,
        prompt_tokens=prompt_tokens,
        gen_tokens=gen_tokens,
        depth=depth,
        repeat=repeat,
        prefill_tok_s=round(statistics.median(prefill), 2),
        decode_tok_s=round(decode_tok_s, 2),
        decode_sampled_tok_s=round(statistics.median(with_sampling), 2),
        read_gb_s=round(read_s / 1e9, 2) if read_s else None,
        decode_fraction=round(decode_tok_s * runtime.bytes_per_token / read_s, 3)
        if read_s
        else None,
        load_s=round(runtime.load_s, 3),
        first_token_s=round(statistics.median(first), 4),
        peak_rss_mib=round(platform.peak_rss() / 2**20, 1),
    )


def check_room(depth: int, n_more: int, n_ctx: int) -> None:
    """Raise where a context can't hold a depth and so many tokens more."""
    n_tokens = depth + n_more
    if n_tokens > n_ctx:
        raise ContextLengthError(
            f"a depth of {depth} and {n_more} more tokens need a context of {n_tokens}, this one "
            f"holds {n_ctx}",
            advice=("raise ", Keyword("n_ctx"), ", or measure fewer"),
            n_tokens=n_tokens,
            n_ctx=n_ctx,
        )


def _prefill(engine: Engine, depth: int, n_tokens: int, turn: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second, of a prompt seen never before."""
    begun = time.perf_counter()
    greedy = SamplingParams(temperature=0.0, seed=1)
    events = _checked(_run(engine, depth, _new_ids(engine, n_tokens, 2 * turn), 1, greedy))
    reads = [event for event in events if isinstance(event, Prefilled)]
    tokens = [event for event in events if isinstance(event, Token)]
    n_read = reads[-1].done - reads[0].done
    return tokens[0].at - begun, n_read / (reads[-1].at - reads[0].at)


def _decode(engine: Engine, depth: int, n_tokens: int, params: SamplingParams, turn: int) -> float:
    """Tokens per second from a depth on."""
    prompt = _new_ids(engine, 1, 2 * turn + 1)
    events = _checked(_run(engine, depth, prompt, n_tokens + 1, params))
    times = [event.at for event in events if isinstance(event, Token)]
    return (len(times) - 1) / (times[-1] - times[0])


def _checked(generation: Generation) -> list[EngineEvent]:
    """Its events; raises what ended it early."""
    events = list(generation)
    _check(events[-1])
    return events


def _check(event: EngineEvent) -> None:
    if isinstance(event, Finished) and event.error is not None:
        raise event.error


def _run(
    engine: Engine, depth: int, prompt: tuple[int, ...], n_new: int, params: SamplingParams
) -> Generation:
    """A generation that no stop token ends, of the context of a depth and a prompt after it."""
    context = tuple((17 + 29 * i) % engine.n_vocab for i in range(depth))
    return engine.submit(Request(ids=context + prompt, params=params, max_tokens=n_new))


def _new_ids(engine: Engine, n: int, salt: int) -> tuple[int, ...]:
    """Tokens of which the first is another for every salt."""
    first = salt * 7919 + 1
    return tuple((first + 31 * i) % engine.n_vocab for i in range(n))
