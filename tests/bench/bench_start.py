"""Time from the command to the first token of `edgeinfer run`: caches cold, warm, and offline.

    python -m tests.bench.bench_start MODEL [--repeat 3] [--python VENV/bin/python]

Cold means no built kernels; where --python has a released wheel there are ready ones. Offline means
no network at all (`unshare -n`, where that may be run). Knows nothing of what takes the time.
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
    parser.add_argument("--python", type=Path, help="of an environment that has edgeinfer")
    args = parser.parse_args()
    # Not resolved: the link in an environment is what makes Python belong to it.
    python = str(args.python.absolute()) if args.python else sys.executable
    model = str(Path(args.model).absolute()) if Path(args.model).exists() else args.model
    command = [python, "-m", "edgeinfer", "run", model, "-p", "Hello", "-n", "8", "--seed", "1"]
    with tempfile.TemporaryDirectory() as home:
        environment = users_environment(home)
        folder = home if args.python else None  # not the checkout, which would be run instead
        print("caches  seconds to the first byte of the answer, median; all")
        for name in ("cold", "warm", "offline"):
            times = []
            for _ in range(args.repeat):
                if name == "cold":
                    shutil.rmtree(Path(home) / "cache", ignore_errors=True)
                times.append(first_byte(command, environment, folder, offline=name == "offline"))
            listed = " ".join(f"{each:.2f}" for each in times)
            print(f"{name:7} {statistics.median(times):6.2f}  ({listed})", flush=True)


def users_environment(home: str) -> dict[str, str]:
    """The environment of a command of a user whose home that is, where Python keeps bytecode."""
    environment = {**os.environ, "EDGEINFER_HOME": home}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling our modules takes 0.1 s
    return environment


def first_byte(
    command: list[str], environment: dict[str, str], folder: str | None, *, offline: bool
) -> float:
    if offline:
        command = ["unshare", "-rn", *command]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
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
