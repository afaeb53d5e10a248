"""Two versions of edgeinfer in turns: how much slower or faster the second one is.

    python -m tests.bench.in_turns BEFORE/bin/python AFTER/bin/python MODEL
        [--pairs 11] [--flags "-p 512"] [--no-starts]

Measures the first byte of `run -p hi`, of the same with `--raw`, and what `bench --json` prints
with the flags. Which comes first changes from pair to pair, each version has a cache of its own,
and what one has found out about this processor counts for both: only their code differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.bench.bench_start import first_byte, users_environment

Measure = Callable[[str, dict[str, str]], dict[str, float]]
_BENCH = ("prefill_tok_s", "decode_tok_s", "load_s", "first_token_s", "peak_rss_mib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("model", type=Path)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--flags", type=shlex.split, default=[], help="of `bench`")
    parser.add_argument("--no-starts", action="store_true", help="measure `bench` alone")
    args = parser.parse_args()
    pythons = (os.path.abspath(args.before), os.path.abspath(args.after))
    model = str(args.model.absolute())
    starts: tuple[Measure, ...] = (
        lambda python, home: {"chat_start_s": _start(python, home, model)},
        lambda python, home: {"raw_start_s": _start(python, home, model, "--raw")},
    )
    measures: tuple[Measure, ...] = (
        *(() if args.no_starts else starts),
        lambda python, home: _bench(python, home, model, *args.flags),
    )
    with tempfile.TemporaryDirectory() as folder:
        homes = tuple(users_environment(f"{folder}/{name}") for name in "ab")
        for python, home in zip(pythons, homes, strict=True):
            _bench(python, home, model, *args.flags)  # builds and tunes
            _start(python, home, model, "--raw")
        _share_tuning(Path(folder, "a"), Path(folder, "b"))
        print(f"{'':14} {'before':>9} {'after':>9}  ratio  of pairs")
        for measure in measures:
            _compare(measure, pythons, homes, args.pairs)


def _compare(
    measure: Measure, pythons: tuple[str, ...], homes: tuple[dict[str, str], ...], n_pairs: int
) -> None:
    found: tuple[list[dict[str, float]], ...] = ([], [])
    for n in range(n_pairs):
        for i in (0, 1) if n % 2 == 0 else (1, 0):
            found[i].append(measure(pythons[i], homes[i]))
    for name in found[0][0]:
        before, after = ([each[name] for each in runs] for runs in found)
        medians = statistics.median(before), statistics.median(after)
        of_pairs = statistics.median(b / a for a, b in zip(before, after, strict=True))
        print(
            f"{name:14} {medians[0]:9.3f} {medians[1]:9.3f}  {medians[1] / medians[0]:.3f}"
            f"  {of_pairs:.3f}",
            flush=True,
        )


def _start(python: str, home: dict[str, str], model: str, *flags: str) -> float:
    command = [python, "-m", "edgeinfer", "run", model, "-p", "hi", "-n", "4", *flags]
    return first_byte(command, home, "/", offline=False)


def _bench(python: str, home: dict[str, str], model: str, *flags: str) -> dict[str, float]:
    command = [python, "-m", "edgeinfer", "bench", model, "--json", *flags]
    done = subprocess.run(command, cwd="/", env=home, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    facts = json.loads(done.stdout)
    return {name: facts[name] for name in _BENCH}


def _share_tuning(before: Path, after: Path) -> None:
    for path in after.rglob("decode-*.json"):
        for twin in before.rglob(path.name):
            shutil.copyfile(twin, path)


if __name__ == "__main__":
    main()
