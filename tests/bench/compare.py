"""edgeinfer against llama-bench, side by side: A B A B in one run, medians and their ratio.

    python -m tests.bench.compare LLAMA_BENCH MODEL.gguf [MODEL.gguf ...] [-t 2] [-p 256] [-n 32]

Prints a table and, last, one JSON line. Both measure prefill of p tokens and decode of n tokens
from depth 0, without sampling.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from edgeinfer import platform


def llama_bench(binary: str, model: str, args: argparse.Namespace) -> dict[str, float]:
    command = [binary, "-m", model, "-t", str(args.threads), "-p", str(args.prompt_tokens)]
    command += ["-n", str(args.gen_tokens), "-r", "1", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    prefill = next(row["avg_ts"] for row in rows if row["n_prompt"])
    decode = next(row["avg_ts"] for row in rows if row["n_gen"])
    return {"prefill_tok_s": prefill, "decode_tok_s": decode}


def edgeinfer_bench(model: str, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "edgeinfer", "bench", model, "-t", str(args.threads)]
    command += ["-p", str(args.prompt_tokens), "-n", str(args.gen_tokens), "-r", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llama_bench")
    parser.add_argument("models", nargs="+")
    parser.add_argument("-t", "--threads", type=int, default=platform.default_threads())
    parser.add_argument("-p", "--prompt-tokens", type=int, default=256)
    parser.add_argument("-n", "--gen-tokens", type=int, default=32)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{platform.cpu_name()}, {args.threads} threads, load {os.getloadavg()[0]:.2f}")
    print(f"{'model':34} {'':8} {'edgeinfer':>10} {'llama.cpp':>10} {'ratio':>7}")
    results = []
    for model in args.models:
        ours, theirs = [], []
        for _ in range(args.rounds):
            ours.append(edgeinfer_bench(model, args))
            theirs.append(llama_bench(args.llama_bench, model, args))
        for what in ("prefill_tok_s", "decode_tok_s"):
            a = statistics.median(r[what] for r in ours)
            b = statistics.median(r[what] for r in theirs)
            ratio = statistics.median(x[what] / y[what] for x, y in zip(ours, theirs, strict=True))
            name = Path(model).name
            print(f"{name:34} {what.split('_')[0]:8} {a:10.1f} {b:10.1f} {ratio:6.2f}x")
            results.append(
                {"model": name, "what": what, "edgeinfer": a, "llama_cpp": b, "ratio": ratio}
            )
    print(json.dumps({"threads": args.threads, "rounds": args.rounds, "results": results}))


if __name__ == "__main__":
    main()
