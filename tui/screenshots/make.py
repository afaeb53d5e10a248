"""Draws the chat's main states, without terminal or model, as SVG files beside this one.

`python tui/screenshots/make.py [NAME ...]`. Knows nothing of real models.
"""

from __future__ import annotations

import asyncio
import re
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from textual.pilot import Pilot  # noqa: E402

from edgeinfer.tui.app import ChatApp  # noqa: E402
from edgeinfer.tui.settings import ChatSettings, ModelChoice  # noqa: E402
from tests.tui_engine import Script, ScriptedModel, opener  # noqa: E402

MODEL = "SmolLM2 1.7B Instruct"
ANSWER = """A *ring buffer* keeps the last **n** values in a fixed array: it never grows, and both
ends move in constant time.

```python
class Ring:
    \"\"\"The last `size` values.\"\"\"

    def __init__(self, size: int) -> None:
        self.values = [0.0] * size
        self.at = 0

    def push(self, value: float) -> None:
        self.values[self.at % len(self.values)] = value
        self.at += 1  # wraps by itself
```

| operation | cost | allocates |
|---|---:|---|
| `push` | O(1) | no |
| mean of all | O(n) | no |

Two things to keep in mind:

1. reading before the ring is full gives zeros
2. `at` grows without end, which Python does not mind
"""
THOUGHTS = "The user wants a short example. A class with push is enough; mention the edge cases."
SHORT = "Yes: keep a running sum, add the new value and take off the one it replaces. " * 2
Act = Callable[[Pilot[None], ChatApp], Awaitable[None]]


async def ask(pilot: Pilot[None], text: str) -> None:
    pilot.app.query_one("#prompt").load_text(text)  # type: ignore[attr-defined]
    await pilot.press("enter")


async def idle(pilot: Pilot[None], app: ChatApp) -> None:
    for _ in range(400):
        await pilot.pause(0.02)
        if app.session.running is None and app.session.loader is None:
            break
    await pilot.pause(0.2)


async def answered(pilot: Pilot[None], app: ChatApp) -> None:
    await idle(pilot, app)
    await ask(pilot, "Show me a ring buffer in Python, with its costs.")
    await idle(pilot, app)


async def streaming(pilot: Pilot[None], app: ChatApp) -> None:
    await idle(pilot, app)
    await ask(pilot, "Show me a ring buffer in Python, with its costs.")
    await pilot.pause(2.2)
    await ask(pilot, "Can the mean be had in constant time too?")
    await pilot.pause(0.3)


async def reading(pilot: Pilot[None], app: ChatApp) -> None:
    await idle(pilot, app)
    await ask(pilot, "Summarise this for someone who was not there.")
    await pilot.pause(0.9)


async def branched(pilot: Pilot[None], app: ChatApp) -> None:
    await answered(pilot, app)
    await pilot.press("ctrl+r")
    await idle(pilot, app)
    await pilot.press("ctrl+up")
    await pilot.pause(0.2)


async def commands(pilot: Pilot[None], app: ChatApp) -> None:
    await idle(pilot, app)
    await pilot.press("/")
    await pilot.pause(0.3)


async def history(pilot: Pilot[None], app: ChatApp) -> None:
    await idle(pilot, app)
    for text in ("Why is the sky blue?", "A plan for the vegetable garden", "Regex for dates"):
        await ask(pilot, text)
        await idle(pilot, app)
        await pilot.press("ctrl+n")
    await pilot.press("ctrl+o")
    await pilot.pause(0.3)
    await pilot.press(*"runn")
    await pilot.pause(0.3)


async def models(pilot: Pilot[None], app: ChatApp) -> None:
    await idle(pilot, app)
    await pilot.press("ctrl+l")
    await pilot.pause(0.6)


async def first_run(pilot: Pilot[None], app: ChatApp) -> None:
    await pilot.pause(0.6)


async def probabilities(pilot: Pilot[None], app: ChatApp) -> None:
    await idle(pilot, app)
    await ask(pilot, "Can the mean be had in constant time too?")
    await idle(pilot, app)
    await pilot.press("ctrl+up", "p")
    await pilot.pause(0.3)


async def keys(pilot: Pilot[None], app: ChatApp) -> None:
    await idle(pilot, app)
    await pilot.press("f1")
    await pilot.pause(0.3)


async def params(pilot: Pilot[None], app: ChatApp) -> None:
    await idle(pilot, app)
    await pilot.press("f4")
    await pilot.pause(0.3)


async def light(pilot: Pilot[None], app: ChatApp) -> None:
    app.theme = "edge-light"
    await answered(pilot, app)


async def loading(pilot: Pilot[None], app: ChatApp) -> None:
    await pilot.pause(0.3)
    await ask(pilot, "Good morning! What can you do?")
    await pilot.pause(0.3)


SLOW = Script(ANSWER, reasoning=THOUGHTS, seconds=0.02, n_prompt=812, n_cached=640)
STATES: dict[str, tuple[Act, tuple[int, int], list[Script]]] = {
    "answer": (answered, (100, 38), [Script(ANSWER, THOUGHTS, n_prompt=812, n_cached=640)]),
    "light": (light, (100, 38), [Script(ANSWER, THOUGHTS, n_prompt=812, n_cached=640)]),
    "streaming": (streaming, (100, 32), [SLOW]),
    "reading": (
        reading,
        (100, 24),
        [Script(SHORT, prompt_seconds=0.4, n_prompt=3900, n_cached=256)],
    ),
    "branches": (branched, (100, 32), [Script(SHORT), Script(SHORT + "\n\nThat is all of it.")]),
    "commands": (commands, (100, 28), [Script(SHORT)]),
    "history": (history, (100, 28), [Script(SHORT)]),
    "models": (models, (100, 28), [Script(SHORT)]),
    "first-run": (first_run, (100, 24), [Script(SHORT)]),
    "probabilities": (probabilities, (100, 28), [Script(SHORT, logprobs=True)]),
    "keys": (keys, (100, 40), [Script(SHORT)]),
    "params": (params, (100, 24), [Script(SHORT)]),
    "loading": (loading, (100, 20), [Script(SHORT)]),
    "narrow": (answered, (60, 34), [Script(ANSWER, THOUGHTS, n_prompt=812, n_cached=640)]),
}


def settings_for(name: str, scripts: list[Script], folder: Path) -> ChatSettings:
    model = ScriptedModel(scripts, name=MODEL)
    hold = threading.Event() if name == "loading" else None
    choices = [
        ModelChoice("SmolLM2-135M-Instruct Q4_1", "/models/smollm2-135m.gguf", 98 << 20),
        ModelChoice("SmolLM2-1.7B-Instruct Q4_K_M", "/models/smollm2-1.7b.gguf", 1007 << 20),
        ModelChoice("Qwen3-4B Q4_K_M", "/models/qwen3-4b.gguf", 2382 << 20),
    ]
    if name == "first-run":
        choices = [ModelChoice("smollm2 (135M, for a first try)", None, 98 << 20), choices[1]]
    plan: Any = model.plan
    return ChatSettings(
        data_folder=folder, open_model=opener(model, hold), folder=folder,
        model=None if name == "first-run" else "/models/smollm2-1.7b.gguf",
        list_models=lambda: choices, plan_model=lambda path, n_ctx=0, freed=0: plan,
        fetch=lambda name, progress: "", memory_now=lambda: 441 << 20,
    )  # fmt: skip


async def draw(name: str) -> None:
    act, size, scripts = STATES[name]
    with tempfile.TemporaryDirectory() as folder:
        app = ChatApp(settings_for(name, scripts, Path(folder)))
        async with app.run_test(size=size) as pilot:
            app.query_one("#prompt").cursor_blink = False  # type: ignore[attr-defined]
            await act(pilot, app)
            svg = app.export_screenshot(title="edgeinfer chat")
    # Ids that differ from run to run would make every picture a change.
    svg = re.sub(r"terminal-\d+-", "t-", svg)
    (HERE / f"{name}.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    for each in sys.argv[1:] or STATES:
        asyncio.run(draw(each))
