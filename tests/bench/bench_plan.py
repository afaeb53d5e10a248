"""What a plan promises beside what processes hold: a model loaded, its context filled, then reused.

    python -m tests.bench.bench_plan MODEL [--n-ctx 512] [--slots 1] [--kv-type f16] [--more 10000]

Runs in a fresh process for every line. Linux alone tells how much a process has held at most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from edgeinfer import LLM
from edgeinfer.engine.plan_rows import BUILDING

ROOT = Path(__file__).resolve().parents[2]
MiB = 1 << 20
SHARE, SPARE = 0.05, 16 * MiB  # of a plan, that may be left once its context was filled
_ANSWER, _LOGITS = 24, 256  # tokens


class Held(NamedTuple):
    """Bytes, of this process and of those that it has started."""

    planned: int
    loaded: int  # at most, once the model was loaded
    filled: int  # at most, once every slot was full, with other prompts each time
    after: int  # at most, after `more` tokens
    grown: int  # by which the process holds more after them
    n_tokens: int

    @property
    def is_kept(self) -> bool:
        return max(self.filled, self.after) <= self.planned

    @property
    def is_close(self) -> bool:
        return self.planned - self.filled <= SHARE * self.planned + SPARE


def measure(model: str | Path, more: int = 0, **options: Any) -> Held:
    """In a process of its own: load a model so, fill it, then generate `more` tokens."""
    code = "from tests.bench.bench_plan import fill; fill()"
    given = json.dumps([str(model), more, options])
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, input=given, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return Held(*json.loads(done.stdout.splitlines()[-1]))


def fill() -> None:
    """What `measure` has a process do."""
    model, more, options = json.load(sys.stdin)
    with LLM(model, **options) as llm:
        loaded, n_slots = _peak(), llm.plan.slots
        n_vocab, n = llm.runtime.model.hparams.vocab_size, llm.n_ctx - _ANSWER
        for turn in range(2):  # the second one takes the pages that are spare
            prompts = [
                [3 + (7919 * turn + 131 * slot + 17 * i) % (n_vocab - 8) for i in range(n)]
                for slot in range(n_slots)
            ]
            llm.generate_batch(prompts, max_tokens=_ANSWER, temperature=0.8, seed=1)
        # Whoever asks for logits has as many rows of them as there are at a time.
        llm.runtime.engine.each_logits(prompts[0], lambda row, logits: None, max(0, n - _LOGITS))
        filled, before, n_tokens = _peak(), _field("VmRSS:"), 0
        while n_tokens < more:  # side by side, as many answers as there are slots
            answers = llm.generate_batch(
                [[3 + slot] for slot in range(n_slots)],
                max_tokens=-(-(more - n_tokens) // n_slots),
                overflow="slide", seed=n_tokens,
            )  # fmt: skip
            n_tokens += sum(max(1, len(answer.token_ids)) for answer in answers)
        grown = _field("VmRSS:") - before
        # What builders of kernels took is not ours any more.
        planned = llm.plan.total_bytes - llm.plan.rows.get(BUILDING, 0)
        print(json.dumps([planned, loaded, filled, _peak(), grown, n_tokens]))


def _peak() -> int:
    """Of this process and its children: pages of files that they share count for each."""
    stat = [entry for entry in os.listdir("/proc") if entry.isdigit()]
    children = [pid for pid in stat if _parent(pid) == os.getpid()]
    return sum(_field("VmHWM:", pid) for pid in ("self", *children))


def _parent(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return 0


def _field(name: str, pid: str = "self") -> int:
    words = Path(f"/proc/{pid}/status").read_text().split()
    return int(words[words.index(name) + 1]) << 10


def line(name: str, held: Held) -> str:
    """A row of the table, in MiB."""
    planned, loaded, filled, after = (round(n / MiB) for n in held[:4])
    verdict = "kept" if held.is_kept else "BROKEN"
    close = "close" if held.is_close else "FAR"
    return (
        f"{name:44} {planned:7} {loaded:7} {filled:7} {after:7} {held.grown / MiB:7.1f} "
        f"{held.n_tokens:7} {verdict} {close}"
    )


HEADER = (
    f"{'':44} {'planned':>7} {'loaded':>7} {'filled':>7} {'after':>7} {'grown':>7} {'tokens':>7}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--kv-type", default="f16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--more", type=int, default=0, help="tokens to generate after that")
    given = vars(parser.parse_args())
    model, more = given.pop("model"), given.pop("more")
    print(HEADER)
    print(line(Path(model).stem, measure(model, more, **given)))


if __name__ == "__main__":
    main()
