"""Time from the command to the first token of `edgeinfer run`: caches cold, warm, and offline.

    python -m tests.bench.bench_start MODEL [--repeat 3]

Cold means no built kernels; offline means no network at all (`unshare -n`, where that may be run).
Knows nothing of what takes the time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "EDGEINFER_HOME": folder}
        print("caches  seconds to the first byte of the answer, median; all")
        for name in ("cold", "warm", "offline"):
            times = []
            for _ in range(args.repeat):
                if name == "cold":
                    shutil.rmtree(Path(folder) / "cache", ignore_errors=True)
                times.append(first_byte(args.model, environment, offline=name == "offline"))
            listed = " ".join(f"{each:.2f}" for each in times)
            print(f"{name:7} {statistics.median(times):6.2f}  ({listed})", flush=True)


def first_byte(model: str, environment: dict[str, str], *, offline: bool) -> float:
    command = [
        sys.executable,
        "-m",
        "edgeinfer",
        "run",
        model,
        "-p",
        "Hello",
        "-n",
        "8",
        "--seed",
        "1",
    ]
    if offline:
        command = ["unshare", "-rn", *command]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    first = process.stdout.read(1)
    seconds = time.perf_counter() - start
    process.stdout.read()
    if process.wait() or not first:
        raise SystemExit(process.stderr.read().decode())
    return seconds


if __name__ == "__main__":
    main()
