"""The benchmark of streams beside llama-server: what it counts, and what it says of both."""

from __future__ import annotations

import json
import random
import re
import stat
import sys
import textwrap
import threading
from itertools import count
from pathlib import Path

import pytest

from tests.bench import bench_llama_streams as bench
from tests.models_for_tests import tiny_model

SERVER = """\
    #!{python}
    # What of llama-server's API is asked for: a start that takes its time, and events of tokens.
    import json, sys, time
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    begun = time.monotonic()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if time.monotonic() > begun + 0.3 else 503)
            self.end_headers()

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert asked["ignore_eos"] and not asked["cache_prompt"], asked
            assert len(asked["prompt"]) == 16 and asked["stream"], asked
            self.send_response(200)
            self.end_headers()
            for i in range(asked["n_predict"] + 1):
                event = json.dumps({{"content": "x", "stop": i == asked["n_predict"]}})
                self.wfile.write(f"data: {{event}}\\n\\n".encode())
                self.wfile.flush()
                time.sleep(0.002)

        def log_message(self, *_):
            pass

    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def measured(
    model: Path, llama: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[dict[str, float], str]:
    command = ["bench", str(model), "--llama", llama, "-n", "1", "-r", "1", "-t", "1"]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    told = capsys.readouterr()
    return json.loads(told.out.splitlines()[-1]), told.err


@pytest.mark.skipif(sys.platform == "win32", reason="starts a script")
def test_both_are_measured_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, server = tiny_model(tmp_path, n_ctx=512), tmp_path / "server"
    server.write_text(textwrap.dedent(SERVER).format(python=sys.executable))
    server.chmod(server.stat().st_mode | stat.S_IXUSR)
    found, told = measured(model, str(server), monkeypatch, capsys)
    # One stream: of more, those of a tiny model may end before others begin.
    assert set(found) == {"ours_1_tok_s", "llama_1_tok_s", "ratio_1"}
    assert 0 < found["llama_1_tok_s"] < 500  # an event every 2 ms
    assert found["ratio_1"] == pytest.approx(
        found["ours_1_tok_s"] / found["llama_1_tok_s"], rel=0.02
    )
    assert "not measured" not in told
    # Warm-up is not told; one turn is its own median.
    turn = re.fullmatch(
        r"turn 1, streams 1, tokens a second: ours (.+), llama (.+), ratio (.+)\n", told
    )
    assert turn is not None, told
    assert list(map(float, turn.groups())) == list(found.values())


def test_without_llama_server_it_says_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, told = measured(tiny_model(tmp_path, n_ctx=512), "no-such-program", monkeypatch, capsys)
    assert set(found) == {"ours_1_tok_s"}
    assert "not measured: llama_1_tok_s, ratio_1: no program" in told


def rate(*rounds: tuple[list[float], ...]) -> float:
    """Of streams whose tokens come at these times, in the first round, the next one and so on."""
    n = len(rounds[0])
    asked, lock = count(), threading.Lock()

    def client(ids: list[int], seed: int) -> list[float]:
        with lock:
            i = next(asked)
            return rounds[i // n][i % n]

    return bench._rate(client, n, 5000, 0)


def test_a_rate_counts_what_comes_while_all_run() -> None:
    assert rate(([0.0, 1.0, 2.0, 3.0],)) == 1.0
    # From 1 s, when the last one begins, to 3 s, when the first one ends: 2 and 3, 1.5 and 2.5.
    assert rate(([0.0, 1.0, 2.0, 3.0], [1.0, 1.5, 2.5, 9.0])) == 2.0


APART = ([0.0, 1.0], [2.0, 3.5])


def test_streams_that_never_meet_are_asked_anew_a_few_times() -> None:
    together = ([0.0, 1.0, 2.0, 3.0], [1.0, 1.5, 2.5, 9.0])
    assert rate(APART, together) == 2.0
    assert rate(*[APART] * (bench._TRIES - 1), together) == 2.0
    with pytest.raises(
        SystemExit, match=r"2 streams never .* in 5 tries: .* ended 1\.00 s .*[(]-n[)]"
    ):
        rate(*[APART] * bench._TRIES, together)


def test_a_stream_that_ends_early_is_no_figure() -> None:
    with pytest.raises(SystemExit, match="ended after 1 tokens of 48"):
        rate(([0.0, 1.0], [0.5]))


def test_what_a_stream_fails_with_is_told() -> None:
    def client(ids: list[int], seed: int) -> list[float]:
        raise SystemExit("llama-server answers 503")

    with pytest.raises(SystemExit, match="answers 503"):
        bench._rate(client, 2, 5000, 0)


def test_prompts_differ_and_come_again_with_their_seed() -> None:
    asked: dict[int, list[int]] = {}
    for _ in range(2):
        before = dict(asked)

        def client(ids: list[int], seed: int) -> list[float]:
            asked[seed] = ids
            return [0.0, 1.0 + random.random()]

        bench._rate(client, 3, 640, 1)
        assert not before or asked == before
    assert len(set(map(tuple, asked.values()))) == 3
    assert all(10 <= id < 640 for ids in asked.values() for id in ids)


def test_streams_asked_anew_have_prompts_of_their_own() -> None:
    """Else ours would find them in its cache."""
    prompts: list[tuple[int, ...]] = []

    def client(ids: list[int], seed: int) -> list[float]:
        prompts.append(tuple(ids))
        return APART[len(prompts) % 2]

    for turn in range(2):
        with pytest.raises(SystemExit):
            bench._rate(client, 2, 5000, turn)
    assert len(set(prompts)) == len(prompts) == 2 * 2 * bench._TRIES
