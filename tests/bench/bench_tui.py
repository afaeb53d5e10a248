"""What the chat costs: start-up, share of a core, stopping, decode beside it, a large history.

`python tests/bench/bench_tui.py [PART ...] [--model FILE] [--slow-model FILE]`. Every part runs the
app in a pseudo-terminal of its own, in a process of its own. What each child found goes to stderr
as it comes; one that takes longer than its limit ends the run with an error. Linux and macOS.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SMALL = ROOT.parent / "shared/data/models/SmolLM2-135M-Instruct.Q4_1.gguf"
SLOW = ROOT.parent / "bench_models/llama1b-q4_k_m.gguf"  # random weights, about 20 tok/s
SECONDS = 10.0
CHILD_SECONDS = 180.0  # the slowest one, with every kernel to build, takes about 100
PROSE = "Some words of an answer that is **not** very short, with `code` in it. " * 3
TEXT = f"{PROSE}\n\n```python\ndef f(x):\n    return x + 1  # next\n```\n\n- one\n- two\n\n" * 60


class Terminal:
    """A child on a pseudo-terminal of 100 x 40; everything it draws is read."""

    def __init__(self, command: list[str], home: str) -> None:
        from tests.bench.bench_start import users_environment

        share_cache(Path(home))
        environment = {**users_environment(home), "TERM": "xterm-256color"}
        environment.pop("NO_COLOR", None)
        self.started_at = time.perf_counter()
        self.pid, self.fd = pty.fork()
        if not self.pid:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
            os.chdir(ROOT)
            os.execve(command[0], command, environment)
        self.seen = b""
        self.has_ended = False

    def read(self, seconds: float) -> bool:
        """Take what was drawn; False when nothing came in time, or at the end."""
        if not select.select([self.fd], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self.fd, 1 << 16)
        except OSError:  # what Linux says at the end
            data = b""
        self.has_ended = not data
        self.seen += data
        return bool(data)

    def until(self, mark: bytes, seconds: float = 60.0) -> float:
        """Wait for text on the screen; when it came."""
        end = time.perf_counter() + seconds
        while mark not in self.seen:
            self.read(0.05)
            if self.has_ended or time.perf_counter() > end:
                self.close()
                raise SystemExit(f"no {mark!r} in {self.seen[-2000:]!r}")
        return time.perf_counter()

    def send(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def close(self) -> None:
        """Ask it to leave; after five seconds it has no choice."""
        with contextlib.suppress(OSError):  # it may have ended by itself
            self.send(b"\x11")
        end = time.perf_counter() + 5
        while os.waitpid(self.pid, os.WNOHANG)[0] == 0:
            if time.perf_counter() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                break
            if self.has_ended:
                time.sleep(0.05)
            else:
                self.read(0.05)
        os.close(self.fd)


def share_cache(home: Path) -> None:
    """Kernels that are built already serve here too: building takes a minute."""
    from edgeinfer import config

    config.cache_folder().mkdir(parents=True, exist_ok=True)
    if not (home / "cache").exists():
        (home / "cache").symlink_to(config.cache_folder())


def chat_command(model: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "edgeinfer", "chat", str(model), "--device", "cpu", *flags]


# -- parts ---------------------------------------------------------------------------------------


def start(arguments: argparse.Namespace) -> dict[str, Any]:
    """From the command to the prompt on the screen, and to the model being ready."""
    shown, ready = [], []
    with tempfile.TemporaryDirectory() as home:
        for i in range(6):
            terminal = Terminal(chat_command(arguments.model), home)
            at = terminal.until(b"sk anything") - terminal.started_at
            done = terminal.until(b"of 8,192") - terminal.started_at
            if i:  # the first run fills caches
                shown.append(at)
                ready.append(done)
            terminal.close()
    return {"screen_s": _median(shown), "model_ready_s": _median(ready)}


def history(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start-up beside 2,000 conversations, and the time of a search as a person sees it."""
    with tempfile.TemporaryDirectory() as home:
        fill(Path(home) / "data", 2000)
        shown = []
        for _ in range(5):
            terminal = Terminal(chat_command(arguments.model), home)
            shown.append(terminal.until(b"sk anything") - terminal.started_at)
            terminal.until(b"of 8,192")
            terminal.close()
        found = _child("search", home=home)
    return {"screen_s": _median(shown), **found}


def share(arguments: argparse.Namespace) -> dict[str, Any]:
    """Processor time of the interface while 30 tokens come each second."""
    return {
        f"history_{n}": _child("share", n_messages=n, seconds=SECONDS)["core_share"]
        for n in (0, 200, 2000)
    }


def stop(arguments: argparse.Namespace) -> dict[str, Any]:
    """From Escape in the terminal to the engine being still, while it writes and while it reads."""
    return {
        **_child("stop", model=str(arguments.model)),
        **_child("stop_prefill", model=str(arguments.model)),
    }


def decode(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of the same answer with and without the interface.

    The best of the runs is the one that other programs disturbed least.
    """
    result: dict[str, Any] = {}
    for threads in (None, 1):
        runs: dict[str, list[float]] = {"with": [], "without": []}
        for _ in range(arguments.runs):
            for way, rates in runs.items():
                found = _child("decode", model=str(arguments.slow_model), way=way, threads=threads)
                rates.append(found["tok_s"])
        name = f"threads_{threads or 'all'}"
        result[name] = {
            **{way: [round(rate, 1) for rate in rates] for way, rates in runs.items()},
            "share_of_medians": round(_median(runs["with"]) / _median(runs["without"]), 3),
            "share_of_best": round(max(runs["with"]) / max(runs["without"]), 3),
        }
    return result


# -- children ------------------------------------------------------------------------------------


def _child(name: str, **values: Any) -> dict[str, Any]:
    """Run a function of this file on a pseudo-terminal; what it wrote into its result file."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        given = json.dumps({"home": folder, "out": str(out), **values})
        command = [sys.executable, str(Path(__file__).resolve()), "--child", name, given]
        terminal = Terminal(command, values.get("home", folder))
        end = time.perf_counter() + CHILD_SECONDS
        while not out.exists() and not terminal.has_ended and time.perf_counter() < end:
            terminal.read(0.02)
            if b"PRESS-ESC" in terminal.seen:
                terminal.seen = b""
                terminal.send(b"\x1b")
        terminal.close()
        result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
        if not result or "error" in result:
            drawn = terminal.seen[-3000:].decode(errors="replace")
            raise SystemExit(f"{name} {given} found {result}; it wrote {drawn}")
        print(f"  {name} {json.dumps(values)} {result}", file=sys.stderr, flush=True)
        return result


def _app(open_model: Callable[..., Any], given: dict[str, Any], **settings: Any) -> Any:
    from edgeinfer.tui.app import ChatApp
    from edgeinfer.tui.launch import driver
    from edgeinfer.tui.settings import ChatSettings

    data = Path(given["home"]) / "data"
    return ChatApp(
        ChatSettings(data_folder=data, open_model=open_model, model="x", **settings), driver()
    )


def _run(app: Any, act: Callable[[], dict[str, Any]], out: str) -> None:
    """Run the app; `act` runs in a thread beside it and gives the result."""

    def beside() -> None:
        while not app.is_running or app.session.model is None:
            time.sleep(0.02)
        time.sleep(0.5)
        try:
            result = act()
        except BaseException as error:
            result = {"error": repr(error)}
        _write(result, out)

    threading.Thread(target=beside, daemon=True).start()
    app.run()


def _write(result: dict[str, Any], out: str) -> None:
    """All of it at once: the parent waits for the file."""
    Path(out + ".part").write_text(json.dumps(result))
    Path(out + ".part").rename(out)


def _ask(app: Any, text: str) -> None:
    def send() -> None:
        app.composer.prompt.set_text(text)
        app.simulate_key("enter")

    app.call_from_thread(send)


def child_share(given: dict[str, Any]) -> None:
    from tests.tui_engine import Script, ScriptedModel, opener

    model = ScriptedModel([Script(TEXT, seconds=1 / 30)])
    app = _app(opener(model), given, keeps_history=True)
    if given["n_messages"]:
        fill(Path(given["home"]) / "data", 1, given["n_messages"])

    def act() -> dict[str, Any]:
        from edgeinfer.tui import actions

        if given["n_messages"]:
            last = app.session.store
            app.call_from_thread(lambda: actions.open_conversation(app, last.recent(1)[0].id))
        time.sleep(0.5)
        _ask(app, "go")
        time.sleep(2.0)
        start, cpu = time.perf_counter(), time.process_time()
        time.sleep(given["seconds"])
        used, took = time.process_time() - cpu, time.perf_counter() - start
        return {"core_share": round(used / took, 3)}

    _run(app, act, given["out"])


def _open_real(given: dict[str, Any], **load: Any) -> Callable[..., Any]:
    def open_model(path: str, progress: Any) -> Any:
        from edgeinfer import LLM

        return LLM(given["model"], device="cpu", progress=progress, **load)

    return open_model


def _stopped_after(app: Any, is_time: Callable[[], bool]) -> float:
    while app.session.running is None or not is_time():
        time.sleep(0.005)
    turn = app.session.running.turn
    # Its time starts before the key is pressed: reading the mark counts against the chat.
    pressed = time.perf_counter()
    # The parent reads this mark and presses the key; a terminal ignores it.
    os.write(2, b"\x1b]PRESS-ESC\x07")
    assert turn.wait(20), "it did not stop"
    took = time.perf_counter() - pressed
    while app.session.running is not None:
        time.sleep(0.001)
    time.sleep(0.3)
    return round(took * 1e3, 1)


def child_stop(given: dict[str, Any]) -> None:
    app = _app(_open_real(given), given, keeps_history=True)

    def act() -> dict[str, Any]:
        took = []
        for _ in range(7):
            _ask(app, "Write a very long story about the sea.")
            took.append(_stopped_after(app, lambda: app.session.readings.n_answer > 20))
        return {"stop_ms": _median(took), "stop_worst_ms": max(took)}

    _run(app, act, given["out"])


def child_stop_prefill(given: dict[str, Any]) -> None:
    app = _app(_open_real(given), given, keeps_history=True)

    def act() -> dict[str, Any]:
        from edgeinfer.tui import actions

        took, sizes, readings = [], [], app.session.readings
        for i in range(4):
            words = f"Read this, number {i}. " + "The sea was calm and the boat went on. " * 440
            app.call_from_thread(actions.begin_anew, app)
            _ask(app, words)
            took.append(_stopped_after(app, lambda: 500 < readings.n_read < readings.n_prompt))
            sizes.append(readings.n_prompt)
        return {
            "prefill_tokens": sizes[0],
            "stop_prefill_ms": _median(took),
            "stop_prefill_worst_ms": max(took),
        }

    _run(app, act, given["out"])


def child_decode(given: dict[str, Any]) -> None:
    load = {"n_ctx": 2048, "chat_template": "chatml", "threads": given["threads"]}
    sampling: Any = {"max_tokens": 160, "seed": 1, "temperature": 0.0, "speculation": False}
    if given["way"] == "without":
        with _open_real(given, **load)("x", None) as llm:
            llm.chat("Tell me of the sea.", max_tokens=4)
            answer = llm.chat("Tell me of the sea.", **sampling)
        n_tokens = answer.usage.completion_tokens
        _write({"tok_s": round(answer.timings.decode_tok_s, 1), "n_tokens": n_tokens}, given["out"])
        return
    app = _app(_open_real(given, **load), given, sampling=sampling, keeps_history=True)

    def act() -> dict[str, Any]:
        app.session.model.chat("Tell me of the sea.", max_tokens=4)
        _ask(app, "Tell me of the sea.")
        while (node := app.session.conversation.last("assistant")) is None or not node.details:
            time.sleep(0.1)
        return {"tok_s": node.details["tok_s"], "n_tokens": node.details["n_tokens"]}

    _run(app, act, given["out"])


def child_search(given: dict[str, Any]) -> None:
    from tests.tui_engine import ScriptedModel, opener

    app = _app(opener(ScriptedModel()), given)

    def act() -> dict[str, Any]:
        from edgeinfer.tui import actions

        took: dict[str, list[float]] = {"open_ms": [], "search_ms": []}
        for _ in range(5):
            start = time.perf_counter()
            app.call_from_thread(actions.load, app, "")
            _drawn(app, lambda: len(app.screen_stack) == 2)
            took["open_ms"].append(1e3 * (time.perf_counter() - start))
            for i, letter in enumerate("boat", 1):
                start = time.perf_counter()
                app.call_from_thread(app.simulate_key, letter)
                _drawn(app, lambda n=i: len(app.screen.query_one("Input").value) == n)
                took["search_ms"].append(1e3 * (time.perf_counter() - start))
            app.call_from_thread(app.simulate_key, "escape")
            _drawn(app, lambda: len(app.screen_stack) == 1)
            time.sleep(0.3)  # what closing it has left to do is no part of opening it
        return {name: _median(values) for name, values in took.items()}

    _run(app, act, given["out"])


def _drawn(app: Any, is_so: Callable[[], bool]) -> None:
    """Wait until something is so and the screen has been refreshed after it."""
    while not app.call_from_thread(is_so):
        time.sleep(0.002)
    done = threading.Event()
    app.call_from_thread(lambda: app.call_after_refresh(done.set))
    done.wait(5)


def fill(folder: Path, n_conversations: int, n_messages: int = 6) -> None:
    """A history as months of use leave it."""
    from edgeinfer.tui.conversation import Conversation
    from edgeinfer.tui.store import FILE_NAME, Store

    store = Store(folder / FILE_NAME)
    store._file._db.execute("PRAGMA synchronous=OFF")
    words = "the sea boat wind harbour sail night star island map rope captain".split()
    for i in range(n_conversations):
        conversation = Conversation(store, "a model")
        parent = None
        for j in range(n_messages // 2):
            about = f"{words[(i + j) % 12]} and {words[(i * 7 + j) % 12]} number {i}"
            parent = conversation.ask(f"Tell me about the {about}", (), parent).id
            answer = conversation.answer(parent)
            answer.content, answer.state = f"About the {about}.\n\n{TEXT[:900]}", "done"
            conversation.save(answer)
            parent = answer.id
    store.close()


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 3)


def main() -> None:
    parts = {each.__name__: each for each in (start, history, share, stop, decode)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; all by default")
    parser.add_argument("--model", type=Path, default=SMALL)
    parser.add_argument("--slow-model", type=Path, default=SLOW)
    parser.add_argument("--runs", type=int, default=3, help="of decode, each way")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, given = arguments.child
        globals()[f"child_{name}"](json.loads(given))
        return
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    print(f"commit {commit}, {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    for name in arguments.parts or parts:
        print(name, json.dumps(parts[name](arguments)), flush=True)


if __name__ == "__main__":
    main()
