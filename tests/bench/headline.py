"""What batching and reuse are worth under a load of conversations, beside naive and llama.cpp's.

    python -m tests.bench.headline MODEL.gguf [--llama LLAMA_SERVER] [--result FILE.json]
        [--only naive,ours,llama,unshared,curve] [--plot FILE.svg] [--minutes 45] [--again]

The traffic is `headline.jsonl`, written before anything was measured: four system prompts of 500
tokens, 1 to 6 turns, users' texts of 20 to 200 tokens, answers of 30 to 300, 5 s of thought. Naive
is the same program with `--naive`: one request at a time, nothing reused. All answers are as long
as the traffic says, and users say something else in each run: what a server has kept of one serves
no other, but for the system prompts. The rules below say which loads are compared, and for how
long; what they come to was not looked at before. `headline_load.py` says why they are these.

- Naive's capacity: one user has CAPACITY conversations, without pauses. They tell what a token of a
  prompt and one of an answer cost naive serving, and so what the whole traffic does.
- The load at which naive serving is about to run away: what comes in the window costs LOADED of it.
- Equal p95: the highest load tried at which ours keeps up, with no more than naive's p95 at that.
- Saturation: `--waiting` clients without pauses. llama-server's best load: LOADED of that.
- Windows are as long as there is time for: naive, ours and llama shall together take `--minutes`,
  as long as naive takes for RUNS times the requests of a window, and FIXED more. The first quarter
  warms up. At saturation a window is as long as naive takes for half as many; half of it warms up.
  In 45 minutes 38 requests come in a window where naive takes 8.7 s for one (1.1 B on two cores of
  a Zen 3), 319 where it takes 1.2 s (SmolLM2). No window is longer than naive's.

Each run is kept in the result file as it ends and, asked for just so, not measured again: a bench
that was stopped, or measured piece by piece (`--only naive`, later `--only ours`), goes on.
"""

from __future__ import annotations

import argparse
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgeinfer.load.traffic import repeated
from tests.bench.headline_load import Cost, long_run_p95, p95_of, queue, rate_of_share
from tests.bench.headline_runs import HEAD_START, WARMUP, Bench, tell
from tests.bench.headline_table import draw, table

LOADED = 0.85
CAPACITY = 3  # conversations
FEWEST = 20  # requests of a window: of fewer p95 is but the longest
RUNS, FIXED = 7, 45  # what the three pieces take: windows of naive's requests, and beside these
_KEEPS_UP = 0.9  # of the requests that come are answered meanwhile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama", help="the program llama-server")
    parser.add_argument(
        "--only", default="naive,ours,llama,unshared", help="pieces; curve: more points"
    )
    parser.add_argument("--result", type=Path, help="what was measured; pieces add to it")
    parser.add_argument("--again", action="store_true", help="measure what it has, too")
    parser.add_argument("--plot", type=Path)
    parser.add_argument(
        "--minutes", type=float, default=45.0, help="that naive, ours and llama take, about"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--ctx", type=int, default=4096)
    parser.add_argument("--waiting", type=int, default=32)
    args = parser.parse_args()
    names = [name for name in args.only.split(",") if name]
    for name in names:
        if name not in _PIECES:
            parser.error(f"--only {name}: pieces are {', '.join(_PIECES)}")
    if args.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: .venv/bin/python -m pip install '.[plot]'")
    args.result = args.result or Path(f"headline-{args.model.stem}.json")
    bench = Bench.opened(args)
    for name in names:
        if name == "llama" and not args.llama:
            continue
        begun = time.monotonic()
        _PIECES[name](bench)
        tell(f"{name}: {time.monotonic() - begun:.0f} s in all, kept in {args.result}")
    print("\n".join(table(bench.found)))
    if args.plot:
        draw(args.plot, bench.found)


# -- pieces ---------------------------------------------------------------------------------------


def _naive(bench: Bench) -> None:
    with bench.serving("naive"):
        _load_naive(bench, "")


def _ours(bench: Bench) -> None:
    with bench.serving("ours"):
        full = _saturate(bench, "ours saturated")
        _repeat(bench, "naive loaded", "ours at naive's load")
        _equal(bench, "naive loaded", "ours at equal p95", full["answered_per_s"], 5)


def _unshared(bench: Bench) -> None:
    """Every conversation has a system prompt of its own."""
    suffix = ", nothing shared"
    with bench.serving("naive"):
        _load_naive(bench, suffix, shares=False)
    with bench.serving("ours"):
        loaded, name = f"naive loaded{suffix}", f"ours at equal p95{suffix}"
        _repeat(bench, loaded, f"ours at naive's load{suffix}", shares=False)
        full = _saturate(bench, f"ours saturated{suffix}", shares=False)
        _equal(bench, loaded, name, full["answered_per_s"], 2, shares=False)


def _llama(bench: Bench) -> None:
    name = "llama-server at its best load"
    with bench.serving("llama"):
        full = _saturate(bench, "llama-server saturated")
        _at_rate(bench, name, LOADED * full["answered_per_s"])
    with bench.serving("ours"):
        _repeat(bench, name, "ours at llama-server's best load")


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
                rate = share * bench.of(name)["requests_per_s"]
                _at_rate(bench, f"{kind} at {share} (curve)", rate)


_PIECES = {
    "naive": _naive, "ours": _ours, "llama": _llama, "unshared": _unshared, "curve": _curve,
}  # fmt: skip


# -- loads ----------------------------------------------------------------------------------------


def n_requests(bench: Bench) -> int:
    """That come in a window."""
    n_services = 60 * bench.args.minutes / _service(bench)
    return max(FEWEST, int((n_services - FIXED) / RUNS))


def _service(bench: Bench) -> float:
    """Seconds that naive serving takes for a request of the traffic, in the mean."""
    names = ("naive capacity", "naive capacity, nothing shared")
    name = next((name for name in names if name in bench.found), names[0])
    return Cost.of(bench.of(name)).mean_seconds(bench.traffic)


def _load_naive(bench: Bench, suffix: str, *, shares: bool = True) -> None:
    """What naive serving can do, and LOADED of that."""
    one = bench.run(
        f"naive capacity{suffix}", n_users=1, n_conversations=CAPACITY, shares=shares, warmup=0.0
    )
    cost, traffic = Cost.of(one), bench.traffic
    seconds = n_requests(bench) * cost.mean_seconds(traffic) / LOADED
    talks_per_s = rate_of_share(traffic, cost, LOADED, seconds, HEAD_START)
    awaited = queue(repeated(traffic), cost, talks_per_s, seconds, HEAD_START)
    tell(
        f"naive serving takes {cost.mean_seconds(traffic):.2f} s for a request: p95 should be "
        f"{p95_of(awaited, WARMUP * seconds):.1f} s in {seconds:.0f} s, "
        f"{long_run_p95(traffic, cost, LOADED):.0f} s in the long run"
    )
    rate = talks_per_s * bench.n_turns
    bench.run(f"naive loaded{suffix}", seconds, rate=rate, shares=shares)


def _saturate(bench: Bench, name: str, *, shares: bool = True) -> dict[str, Any]:
    """Clients without pauses. All come at once: it takes a while until they do no more."""
    seconds = n_requests(bench) / 2 * _service(bench)
    return bench.run(name, seconds, n_users=bench.args.waiting, shares=shares, warmup=0.5)


def _repeat(bench: Bench, load: str, name: str, *, shares: bool = True) -> None:
    """The load of another run."""
    other = bench.of(load)
    bench.run(name, other["window_s"], rate=other["requests_per_s"], shares=shares)


def _at_rate(bench: Bench, name: str, rate: float, *, shares: bool = True) -> dict[str, Any]:
    n = n_requests(bench)
    seconds = min(n / rate, n * _service(bench) / LOADED)  # naive's window is the longest
    return bench.run(name, seconds, rate=rate, shares=shares)


def _equal(
    bench: Bench, naive: str, name: str, capacity: float, n_tries: int, *, shares: bool = True
) -> None:
    """Loads around the highest one at which p95 is what naive's is."""
    target, rate, step = bench.of(naive)["end_to_end_s"]["p95"], LOADED * capacity, 1.25
    best: dict[str, Any] | None = None
    was_below: bool | None = None
    for i in range(n_tries):
        tried = _at_rate(bench, f"{name} ({i + 1})", rate, shares=shares)
        keeps_up = tried["answered_per_s"] >= _KEEPS_UP * tried["due_per_s"]
        is_below = keeps_up and tried["end_to_end_s"]["p95"] <= target
        if is_below and (best is None or tried["answered_per_s"] > best["answered_per_s"]):
            best = tried
        if was_below not in (None, is_below):
            step = step**0.5  # it lies between the two
        rate, was_below = rate * (step if is_below else 1 / step), is_below
    bench.found.pop(name, None)  # of other loads
    if best is not None:
        bench.keep(name, best)
    else:
        tell(f"{name}: no load that was tried stays below {target:.1f} s")


if __name__ == "__main__":
    main()
