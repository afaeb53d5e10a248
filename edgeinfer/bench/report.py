"""What `edgeinfer bench` measures, as one JSON object and as lines to print."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, TypeAlias

from edgeinfer import platform
from edgeinfer.bench.compare import compare as compare_with
from edgeinfer.bench.speed import Tell, run_bench
from edgeinfer.bench.steps import sweep, sweep_threads, time_ops
from edgeinfer.bench.tables import compare_lines, op_lines, sweep_lines
from edgeinfer.llm import LLM
from edgeinfer.runtime import Runtime

Report: TypeAlias = "tuple[dict[str, Any], list[str]]"


def measure(
    runtime: Runtime,
    prompt_tokens: int,
    gen_tokens: int,
    depth: int,
    repeat: int,
    compare: str | None,
    ops: bool,
    tell: Tell,
) -> Report:
    """The usual figures, or those of a comparison, or of the ops of a step."""
    about = {"model": runtime.model.name, **_machine(runtime)}
    if compare is not None:
        rows = compare_with(runtime, compare, prompt_tokens, gen_tokens, depth, repeat, tell)
        sizes = {"prompt_tokens": prompt_tokens, "gen_tokens": gen_tokens, "depth": depth}
        result = {**about, **sizes, "repeat": repeat, "comparison": [asdict(row) for row in rows]}
        return result, compare_lines(rows, depth)
    if ops:
        decode = time_ops(runtime, 1, depth, repeat, tell)
        prefill = time_ops(runtime, prompt_tokens, depth, repeat, tell)
        result = {
            **about,
            "depth": depth,
            "decode": [asdict(row) for row in decode],
            "prefill": [asdict(row) for row in prefill],
        }
        after = f" at depth {depth}" if depth else ""
        titles = (
            f"one decode step{after}",
            f"prefill of up to {prompt_tokens} tokens in one step{after}",
        )
        return result, [titles[0], *op_lines(decode), "", titles[1], *op_lines(prefill)]
    result = asdict(run_bench(runtime, prompt_tokens, gen_tokens, depth, repeat, tell=tell))
    figures = {**about, **result}
    return figures, [f"{name:22} {value}" for name, value in figures.items() if value is not None]


def sweep_all(
    open_with: Callable[[int], AbstractContextManager[LLM]],
    most_threads: int | None,
    repeat: int,
    tell: Tell,
) -> Report:
    """Steps at thread counts up to the most (the default), the model loaded anew for each.

    A device without threads is measured once.
    """
    rows = []
    about: dict[str, Any] = {}
    for n_threads in sweep_threads(most_threads or platform.default_threads()):
        with open_with(n_threads) as llm:
            rows += sweep(llm.runtime, repeat, tell)
            about = {"model": llm.name, **_machine(llm.runtime)}
        if about.pop("threads", None) is None:
            break
    return {**about, "sweep": [asdict(row) for row in rows]}, sweep_lines(rows)


def _machine(runtime: Runtime) -> dict[str, Any]:
    """What a measurement was made on."""
    return {"cpu": platform.cpu_name(), **runtime.program.describe()}
