"""The same measurements by llama-bench, in turns with ours: A B A B in one run.

Knows llama-bench by its flags and its JSON only.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path

from edgeinfer import platform
from edgeinfer.bench.speed import Tell, quiet, run_bench
from edgeinfer.errors import EdgeInferError, reason_of
from edgeinfer.runtime import Runtime

_EVERY_LAYER = 99  # and the head, which llama.cpp counts as one more


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second after a depth of context, decoding without sampling."""

    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Medians; `ratio` is the median of the ratios of neighbouring runs."""

    what: str
    edgeinfer: float
    llama_cpp: float
    ratio: float


def compare(
    runtime: Runtime,
    llama_bench: str,
    prompt_tokens: int,
    gen_tokens: int,
    depth: int,
    repeat: int,
    tell: Tell = quiet,
) -> list[Comparison]:
    """Measure prefill and decode after `depth` tokens with both, `repeat` times in turns."""
    # The same kernels on the processors ("shim") are no GPU of llama.cpp's.
    n_layers = runtime.n_gpu_layers if runtime.device.kind == "cuda" else 0
    command = llama_command(
        llama_bench, runtime.model.file.path, runtime.n_threads,
        _EVERY_LAYER if n_layers == runtime.model.hparams.n_layers else n_layers,
        prompt_tokens, gen_tokens, depth,
    )  # fmt: skip
    ours: list[Rates] = []
    theirs: list[Rates] = []
    for turn in range(repeat):
        tell("bench", turn, repeat)
        result = run_bench(runtime, prompt_tokens, gen_tokens, depth, 1, turn)
        tell("llama-bench", turn, repeat)
        ours.append(Rates(result.prefill_tok_s, result.decode_tok_s))
        theirs.append(parse_rates(_output(command)))
    return [
        _comparison("prefill", [r.prefill for r in ours], [r.prefill for r in theirs]),
        _comparison("decode", [r.decode for r in ours], [r.decode for r in theirs]),
    ]


def llama_command(
    llama_bench: str,
    model: Path,
    threads: int,
    n_gpu_layers: int,
    prompt_tokens: int,
    gen_tokens: int,
    depth: int,
) -> list[str]:
    """One run of llama-bench, after its own warm-up."""
    sizes = ["-t", str(threads), "-ngl", str(n_gpu_layers)]
    sizes += ["-p", str(prompt_tokens), "-n", str(gen_tokens)]
    if depth:  # of 2025 and later only
        sizes += ["-d", str(depth)]
    return [llama_bench, "-m", str(model), *sizes, "-r", "1", "-o", "json"]


def parse_rates(text: str) -> Rates:
    """The two rates in llama-bench's JSON: a test of prompts only and one of generation only."""
    try:
        tests = json.loads(text)
        prefill = [float(t["avg_ts"]) for t in tests if t["n_prompt"] and not t["n_gen"]]
        decode = [float(t["avg_ts"]) for t in tests if t["n_gen"] and not t["n_prompt"]]
        return Rates(prefill[0], decode[0])
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        raise EdgeInferError(
            f"llama-bench printed {text[:60]!r}, not JSON with a prompt and a generation test; "
            "compare with llama-bench of llama.cpp"
        ) from None


def check_llama_bench(llama_bench: str) -> None:
    """Raise where there is no such program; whether it is llama-bench shows when it runs."""
    if not Path(_program(llama_bench)).is_file():
        raise EdgeInferError(f"{llama_bench} is no file; give the path of llama-bench")


def _program(llama_bench: str) -> str:
    # Windows would take one in the current folder first; who wants that one gives its path.
    is_path = Path(llama_bench).name != llama_bench
    program = llama_bench if is_path else platform.find_program(llama_bench)
    if program is None:
        raise EdgeInferError(f"no {llama_bench} in PATH; give the path of llama-bench")
    return program


def _output(command: list[str]) -> str:
    program = _program(command[0])
    try:
        process = platform.start_program(
            [program, *command[1:]], errors=subprocess.PIPE, folder=Path()
        )
    except OSError as error:
        raise EdgeInferError(
            f"{command[0]} can't be run ({reason_of(error)}); give the path of llama-bench"
        ) from None
    with process:
        try:
            output, errors = process.communicate()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        last = (errors.strip().splitlines() or ["it said nothing"])[-1]
        if process.returncode == platform.NOT_RUN:
            raise EdgeInferError(f"{last}; give the path of llama-bench")
        raise EdgeInferError(f"{command[0]} failed with {process.returncode}: {last}")
    return str(output)


def _comparison(what: str, ours: list[float], theirs: list[float]) -> Comparison:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Comparison(
        what, statistics.median(ours), statistics.median(theirs), statistics.median(ratios)
    )
