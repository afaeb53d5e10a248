"""Runs of the headline's traffic on a server of a kind, each kept as it ends.

A run that the result file has, and that was asked for just so, is not measured again.
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
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from edgeinfer.load.generator import Generator, Settings, tokens_per_word
from edgeinfer.load.http_client import Client
from edgeinfer.load.summary import summary
from edgeinfer.load.traffic import Conversation, Texts, read_traffic, repeated
from edgeinfer.remote.address import read_address

TRAFFIC = Path(__file__).with_name("headline.jsonl")
HEAD_START = 45.0  # seconds: conversations of six turns that go on when a run begins
WARMUP = 0.25  # of a run's time, not counted
_START_SECONDS = 300.0  # kernels may have to be built
_LONGEST = 3600.0  # seconds of a run that ends with its conversations
_SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "seed": 1}
_SAME = ("model", "threads", "slots", "ctx")  # of all runs of a result


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass
class Bench:
    """One model's runs; `found` has each by its name, and what is the same for all."""

    args: argparse.Namespace
    found: dict[str, Any]
    url: Callable[[], str] = field(default=lambda: "", init=False)  # of the server; starts it

    @classmethod
    def opened(cls, args: argparse.Namespace) -> Bench:
        """Goes on with the runs of the result file; SystemExit where they are of something else."""
        found: dict[str, Any] = {}
        if args.result.exists():
            found = json.loads(args.result.read_text())
        same = dict(zip(_SAME, (args.model.name, args.threads, args.slots, args.ctx), strict=True))
        for name, value in same.items():
            if found.get(name, value) != value:
                raise SystemExit(
                    f"{args.result} is of {name} {found[name]}, not {value}: name another --result"
                )
        return cls(args, found | same)

    @property
    def traffic(self) -> list[Conversation]:
        return read_traffic(TRAFFIC)

    @property
    def n_turns(self) -> float:
        """Of a conversation: its requests."""
        return sum(len(each.turns) for each in self.traffic) / len(self.traffic)

    def of(self, name: str) -> dict[str, Any]:
        """A run of before."""
        of_run: dict[str, Any] = self.found.get(name, {})
        if "window_s" not in of_run:  # or it is from before windows were kept
            raise SystemExit(f"{name} is not in {self.args.result}: measure that piece first")
        return of_run

    def keep(self, name: str, run: dict[str, Any]) -> None:
        self.found[name] = run
        whole = self.args.result.with_name(f"{self.args.result.name}.new")
        whole.write_text(json.dumps(self.found, indent=1) + "\n")
        whole.replace(self.args.result)

    def run(
        self,
        name: str,
        seconds: float = _LONGEST,
        *,
        rate: float = 0.0,
        n_users: int = 0,
        n_conversations: int | None = None,
        shares: bool = True,
        warmup: float = WARMUP,
    ) -> dict[str, Any]:
        """One load, of `rate` requests a second; a share of its time warms up.

        With `n_conversations` it ends with them.
        """
        asked = {
            "window_s": seconds, "requests_per_s": rate, "asked_users": n_users,
            "conversations": n_conversations, "shares": shares, "warmup": warmup,
        }  # fmt: skip
        before: dict[str, Any] = self.found.get(name, {})
        if asked.items() <= before.items() and not self.args.again:
            tell(f"{name}: kept from before (--again measures it anew)")
            return before
        url = self.url()
        by = f"{n_users} users" if n_users else f"{rate:.3f} requests/s"
        length = f"{seconds:.0f} s"
        if n_conversations is not None:
            length = f"{n_conversations} conversations"
        tell(f"{name}: {by} for {length} ...")
        settings = Settings(
            model="m",
            rate=max(rate, 1e-9) / self.n_turns,
            n_users=n_users,
            seconds=seconds,
            head_start=0.0 if n_users else HEAD_START,
            warmup=seconds * warmup,
            drain=seconds / 2,
            n_retries=0,
            shares_prompts=shares,
            body=_SAMPLING,
            ignores_eos=True,
            seed=seed_of(name),
        )

        async def measure() -> dict[str, Any]:
            client = Client(read_address(url, None))
            if "tokens_per_word" not in self.found:
                self.found["tokens_per_word"] = await tokens_per_word(client, settings)
            texts = Texts(self.found["tokens_per_word"])
            talks = islice(repeated(self.traffic), n_conversations)
            generator = Generator(client, settings, talks, texts)
            await generator.run()
            return summary(generator.measured)

        found = asyncio.run(measure()) | asked
        if not (found["answered_per_s"] if n_users else found["end_to_end_s"]):
            raise SystemExit(f"{name}: nothing was answered in time; raise --minutes")
        self.keep(name, found)
        _tell_run(found)
        return found

    @contextmanager
    def serving(self, kind: str) -> Iterator[None]:
        """Runs of the block are on a server of a kind; the first one that is measured starts it."""
        with ExitStack() as stack:
            self.url = cache(lambda: stack.enter_context(self._served(kind)))
            yield

    @contextmanager
    def _served(self, kind: str) -> Iterator[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        tell(f"starting {kind} ...")
        log = Path(f"{self.args.result}.{kind}.log")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._command(kind, port), stdout=output, stderr=output, env=environment
            )
        try:
            _wait_until_ready(url, process, log)
            yield url
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


def seed_of(name: str) -> int:
    """Of what users say in a run: where that was said in one before, a server has it still."""
    return zlib.crc32(name.encode())


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if asyncio.run(_is_ready(url)):
            return
        time.sleep(0.3)
    raise SystemExit(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")


async def _is_ready(url: str) -> bool:
    client = Client(replace(read_address(url, None), prefix=""))
    try:
        reply = await client.request("GET", "/health", b"", lambda at, status, data: None)
        return reply.status == 200
    except OSError:
        return False
    finally:
        client.close()


def _tell_run(found: dict[str, Any]) -> None:
    p95 = (found["end_to_end_s"] or {}).get("p95", float("nan"))
    tell(
        f"  {found['answered_per_s']:.2f} answered/s, {found['answer_tok_s']:.0f} tok/s, "
        f"p95 {p95:.2f} s of {found['requests']}, {sum(found['failed'].values())} failed, "
        f"{found['still_running']} still running, client {found['client']['cpu_share']:.1%}"
    )
    for kind, said in found["messages"].items():
        tell(f"  {kind}: {said}")
