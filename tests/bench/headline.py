"""What batching and reuse are worth under a load of conversations, beside naive and llama.cpp's.

    python -m tests.bench.headline MODEL.gguf [--llama LLAMA_SERVER] [--result FILE.json]
        [--only naive,ours,llama,unshared,curve] [--plot FILE.svg] [--scale 1.0]

The traffic is `headline.jsonl`, written before anything was measured: four system prompts of 500
tokens, 1 to 6 turns, users' texts of 20 to 200 tokens, answers of 30 to 300, 5 s of thought. Naive
is the same program with `--naive`: one request at a time, nothing reused. All answers are as long
as the traffic says. Pieces add to the result file, so that they can be measured one by one; the
rules below say which loads are compared, and what they are was not looked at before.

- The load at which naive serving is about to run away: LOADED of what it can do.
- Equal p95: the highest load tried at which ours keeps up, with no more than naive's p95 at that.
- Saturation: `--waiting` clients without pauses. llama-server's best load: LOADED of that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeinfer.load.generator import Generator, Settings, tokens_per_word
from edgeinfer.load.http_client import Client
from edgeinfer.load.summary import summary
from edgeinfer.load.traffic import Texts, read_traffic, repeated
from edgeinfer.remote.address import read_address

LOADED = 0.85
TRAFFIC = Path(__file__).with_suffix(".jsonl")
_HEAD_START = 45.0  # seconds: conversations of six turns that go on when a run begins
_KEEPS_UP = 0.9  # of the requests that come are answered meanwhile
_START_SECONDS = 300.0  # kernels may have to be built
_SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "seed": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama", help="the program llama-server")
    parser.add_argument(
        "--only", default="naive,ours,llama,unshared", help="pieces; curve: more points"
    )
    parser.add_argument("--result", type=Path, help="what was measured; pieces add to it")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="of all times")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--ctx", type=int, default=4096)
    parser.add_argument("--waiting", type=int, default=32)
    args = parser.parse_args()
    args.result = args.result or Path(f"headline-{args.model.stem}.json")
    found: dict[str, Any] = {}
    if args.result.exists():
        found = json.loads(args.result.read_text())
    found |= {"model": args.model.name, "threads": args.threads, "slots": args.slots}
    for name in filter(None, args.only.split(",")):
        if name == "llama" and not args.llama:
            continue
        begun = time.monotonic()
        _PIECES[name](Bench(args, found))
        _tell(f"{name}: {time.monotonic() - begun:.0f} s in all, kept in {args.result}")
    print("\n".join(table(found)))
    if args.plot:
        draw(args.plot, found)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- pieces ---------------------------------------------------------------------------------------


def _naive(bench: Bench) -> None:
    with bench.serving("naive"):
        one = bench.run("naive capacity", seconds=35, n_users=1)
        bench.run("naive loaded", seconds=65, rate=LOADED * one["answered_per_s"])


def _ours(bench: Bench) -> None:
    with bench.serving("ours"):
        full = bench.saturate("ours saturated", seconds=50)
        bench.run("ours at naive's load", seconds=65, rate=bench.rate_of("naive loaded"))
        _equal(bench, "naive loaded", "ours at equal p95", full["answered_per_s"], 3)


def _unshared(bench: Bench) -> None:
    """Every conversation has a system prompt of its own."""
    capacity, loaded = "naive capacity, nothing shared", "naive loaded, nothing shared"
    with bench.serving("naive"):
        one = bench.run(capacity, seconds=25, n_users=1, shares=False)
        rate = LOADED * one["answered_per_s"]
        bench.run(loaded, seconds=35, rate=rate, shares=False)
    with bench.serving("ours"):
        at = "ours at naive's load, nothing shared"
        bench.run(at, seconds=35, rate=rate, shares=False)
        full = bench.saturate("ours saturated, nothing shared", seconds=30, shares=False)
        name = "ours at equal p95, nothing shared"
        _equal(bench, loaded, name, full["answered_per_s"], 2, shares=False)


def _curve(bench: Bench) -> None:
    """More points for the plot."""
    for kind, name, shares in (
        ("naive", "naive loaded", (0.5, 0.75, 1.0, 1.25)),
        ("ours", "ours at equal p95", (0.5, 0.75, 1.25)),
    ):
        if name not in bench.found:
            continue
        with bench.serving(kind):
            for share in shares:
                rate = bench.rate_of(name)
                bench.run(f"{kind} at {share} (curve)", seconds=50, rate=share * rate)


def _equal(
    bench: Bench, naive: str, name: str, capacity: float, n_tries: int, *, shares: bool = True
) -> None:
    """Loads around the highest one at which p95 is what naive's is."""
    target, rate, step = bench.p95_of(naive), LOADED * capacity, 1.25
    best: dict[str, Any] | None = None
    was_below: bool | None = None
    for i in range(n_tries):
        tried = bench.run(
            f"{name} ({i + 1})", seconds=40 if shares else 30, rate=rate, shares=shares
        )
        keeps_up = tried["answered_per_s"] >= _KEEPS_UP * tried["due_per_s"]
        is_below = keeps_up and tried["end_to_end_s"]["p95"] <= target
        if is_below and (best is None or tried["answered_per_s"] > best["answered_per_s"]):
            best = tried
        if was_below not in (None, is_below):
            step = step**0.5  # it lies between the two
        rate, was_below = rate * (step if is_below else 1 / step), is_below
    if best is not None:
        bench.keep(name, best)
    else:
        _tell(f"{name}: no load that was tried stays below {target:.1f} s")


def _llama(bench: Bench) -> None:
    with bench.serving("llama"):
        full = bench.saturate("llama-server saturated", seconds=50)
        rate = LOADED * full["answered_per_s"]
        bench.run("llama-server at its best load", seconds=45, rate=rate)
    with bench.serving("ours"):
        bench.run("ours at llama-server's best load", seconds=45, rate=rate)


_PIECES = {
    "naive": _naive, "ours": _ours, "llama": _llama, "unshared": _unshared, "curve": _curve,
}  # fmt: skip


# -- runs -----------------------------------------------------------------------------------------


@dataclass
class Bench:
    """One model's runs; `found` has each by its name."""

    args: argparse.Namespace
    found: dict[str, Any]
    url: str = ""

    def rate_of(self, name: str) -> float:
        return float(self._of(name)["requests_per_s"])

    def p95_of(self, name: str) -> float:
        return float(self._of(name)["end_to_end_s"]["p95"])

    def _of(self, name: str) -> dict[str, Any]:
        if name not in self.found:
            raise SystemExit(f"{name} is not in {self.args.result}: measure that piece first")
        of_run: dict[str, Any] = self.found[name]
        return of_run

    def keep(self, name: str, run: dict[str, Any]) -> None:
        self.found[name] = run
        self.args.result.write_text(json.dumps(self.found, indent=1) + "\n")

    def run(
        self,
        name: str,
        seconds: float,
        *,
        rate: float = 0.0,
        n_users: int = 0,
        shares: bool = True,
        warmup: float = 0.25,
    ) -> dict[str, Any]:
        """One load, of `rate` requests a second; a share of its time warms up."""
        seconds *= self.args.scale
        asked = f"{n_users} users" if n_users else f"{rate:.2f} requests/s"
        _tell(f"{name}: {asked} for {seconds:.0f} s ...")
        traffic = read_traffic(TRAFFIC)
        n_turns = sum(len(each.turns) for each in traffic) / len(traffic)
        settings = Settings(
            model="m",
            rate=max(rate, 1e-9) / n_turns,
            n_users=n_users,
            seconds=seconds,
            head_start=0.0 if n_users else _HEAD_START,
            warmup=seconds * warmup,
            drain=seconds / 2,
            n_retries=0,
            shares_prompts=shares,
            body=_SAMPLING,
            ignores_eos=True,
        )

        async def measure() -> dict[str, Any]:
            client = Client(read_address(self.url, None))
            if "tokens_per_word" not in self.found:
                self.found["tokens_per_word"] = await tokens_per_word(client, settings)
            texts = Texts(self.found["tokens_per_word"])
            generator = Generator(client, settings, repeated(traffic), texts)
            await generator.run()
            return summary(generator.measured)

        found = asyncio.run(measure()) | {"requests_per_s": rate}
        self.keep(name, found)
        _tell_run(found)
        return found

    def saturate(self, name: str, seconds: float, *, shares: bool = True) -> dict[str, Any]:
        """Clients without pauses. All come at once: it takes a while until they do no more."""
        n_users = self.args.waiting
        found = self.run(name, seconds, n_users=n_users, shares=shares, warmup=0.5)
        if not found["answered_per_s"]:
            raise SystemExit(f"{name}: nothing was answered in time; raise --scale")
        return found

    @contextmanager
    def serving(self, kind: str) -> Iterator[None]:
        """A server of a kind, while the block runs."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        _tell(f"starting {kind} ...")
        log = Path(f"{self.args.result}.{kind}.log")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._command(kind, port), stdout=output, stderr=output, env=environment
            )
        try:
            self._wait_until_ready(process, log)
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _command(self, kind: str, port: int) -> list[str]:
        args, model = self.args, str(self.args.model)
        common = ["-t", str(args.threads), "--port", str(port)]
        if kind == "llama":
            n_ctx = str(args.ctx * args.slots)
            return [args.llama, "-m", model, "-np", str(args.slots), "-c", n_ctx, *common]
        command = [sys.executable, "-m", "edgeinfer", "serve", model, "-c", str(args.ctx)]
        command += ["--slots", str(args.slots), *common]
        return [*command, "--naive"] if kind == "naive" else command

    def _wait_until_ready(self, process: subprocess.Popen[bytes], log: Path) -> None:
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and process.poll() is None:
            if asyncio.run(_is_ready(self.url)):
                return
            time.sleep(0.3)
        raise SystemExit(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")


def _tell_run(found: dict[str, Any]) -> None:
    p95 = (found["end_to_end_s"] or {}).get("p95", float("nan"))
    _tell(
        f"  {found['answered_per_s']:.2f} answered/s, {found['answer_tok_s']:.0f} tok/s, "
        f"p95 {p95:.2f} s, {sum(found['failed'].values())} failed, "
        f"{found['still_running']} still running, client {found['client']['cpu_share']:.1%}"
    )
    for kind, said in found["messages"].items():
        _tell(f"  {kind}: {said}")


async def _is_ready(url: str) -> bool:
    client = Client(replace(read_address(url, None), prefix=""))
    try:
        reply = await client.request("GET", "/health", b"", lambda at, status, data: None)
        return reply.status == 200
    except OSError:
        return False
    finally:
        client.close()


# -- what it comes to -----------------------------------------------------------------------------


def table(found: dict[str, Any]) -> list[str]:
    """Markdown: a line per run, then the ratios that are asked for."""
    lines = [
        f"{found['model']}, {found['threads']} threads, {found['slots']} slots",
        "",
        "| load | requests/s asked | answered | per core-hour | tokens/s | p50 | p95 | cached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in found.items():
        if not isinstance(run, dict) or "(" in name:
            continue
        seconds = run["end_to_end_s"] or {"p50": float("nan"), "p95": float("nan")}
        asked = f"{run['users']} users" if run["users"] else f"{run['requests_per_s']:.2f}"
        cached = "" if run["cached_share"] is None else f"{run['cached_share']:.0%}"
        lines.append(
            f"| {name} | {asked} | {run['answered_per_s']:.2f} | {_per_core_hour(found, run):,.0f} "
            f"| {run['answer_tok_s']:.0f} | {seconds['p50']:.2f} s | {seconds['p95']:.2f} s "
            f"| {cached} |"
        )
    ratios = [*_ratios(found)]
    return [*lines, "", "| ratio | measured | asked |", "|---|---|---|", *ratios]


def _per_core_hour(found: dict[str, Any], run: dict[str, Any]) -> float:
    return float(3600 * run["answered_per_s"] / found["threads"])


def _ratios(found: dict[str, Any]) -> Iterator[str]:
    def p95(run: dict[str, Any]) -> float:
        return float(run["end_to_end_s"]["p95"])

    def tokens(run: dict[str, Any]) -> float:
        return float(run["answer_tok_s"])

    def cost(run: dict[str, Any]) -> float:
        return _per_core_hour(found, run)

    for what, of, over, value, asked in (
        ("p95 of naive, at its load", "naive loaded", "ours at naive's load", p95, ">= 4"),
        ("requests per core-hour, at equal p95", "ours at equal p95", "naive loaded", cost,
         ">= 5.6"),
        ("p95 of naive, nothing shared", "naive loaded, nothing shared",
         "ours at naive's load, nothing shared", p95, ""),
        ("requests per core-hour, nothing shared", "ours at equal p95, nothing shared",
         "naive loaded, nothing shared", cost, ""),
        ("throughput saturated, of llama-server's", "ours saturated", "llama-server saturated",
         tokens, ">= 2.4"),
        ("p95 of llama-server's, at its best load", "ours at llama-server's best load",
         "llama-server at its best load", p95, "<= 0.4"),
    ):  # fmt: skip
        if all(name in found and found[name]["end_to_end_s"] for name in (of, over)):
            yield f"| {what} | {value(found[of]) / value(found[over]):.2f}x | {asked} |"


def draw(path: Path, found: dict[str, Any]) -> None:
    """p95 by requests answered a second, of all loads that are no saturation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for kind in ("naive", "ours", "llama-server"):
        for suffix, style in (("", "o-"), (", nothing shared", "x:")):
            runs = [
                run for name, run in found.items()
                if isinstance(run, dict) and name.startswith(kind) and not run["users"]
                and ("nothing shared" in name) == bool(suffix) and run["end_to_end_s"]
            ]  # fmt: skip
            points = sorted((run["answered_per_s"], run["end_to_end_s"]["p95"]) for run in runs)
            if points:
                axes.plot(*zip(*points, strict=True), style, label=kind + suffix)
    axes.set(
        xlabel="requests answered a second", ylabel="p95 of whole answers, s", yscale="log",
        title=f"{found['model']}, {found['threads']} threads",
    )  # fmt: skip
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    main()
