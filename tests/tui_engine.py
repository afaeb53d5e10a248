"""A scripted model for the tests and pictures of the TUI. No model file is read."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeinfer import (
    Completion,
    Delta,
    Done,
    Event,
    MemoryPlan,
    Progress,
    PromptProgress,
    Timings,
    TokenLogprob,
    Usage,
)
from edgeinfer.engine.plan_rows import Pool


@dataclass
class Script:
    """One answer: its words, what happens before them, and how fast they come."""

    text: str = "Hello from the script."
    reasoning: str = ""
    seconds: float = 0.0  # between words
    prompt_seconds: float = 0.0  # between reports of the prompt
    n_prompt: int = 120
    n_cached: int = 40
    n_dropped: int = 0
    n_guessed: int = 0
    n_guessed_right: int = 0
    error: Exception | None = None
    logprobs: bool = False
    hold: threading.Event | None = None  # wait for it before the last word


class ScriptedStream:
    """Yields a script's events; `close` from another thread ends it."""

    def __init__(self, script: Script, model: ScriptedModel) -> None:
        self.dropped_turns = script.n_dropped
        self.is_closed = threading.Event()
        self._script, self._model = script, model

    def close(self) -> None:
        self.is_closed.set()

    def __iter__(self) -> Iterator[Event]:
        script, n_words = self._script, 0
        for done in range(script.n_cached, script.n_prompt + 1, max(1, script.n_prompt // 4)):
            yield PromptProgress(done=done, total=script.n_prompt)
            if script.prompt_seconds and self.is_closed.wait(script.prompt_seconds):
                return
        if script.error is not None:
            raise script.error
        for word in _words(script.reasoning):
            if self.is_closed.wait(script.seconds):
                return
            yield Delta(reasoning=word)
        words = _words(script.text)
        for i, word in enumerate(words):
            if script.hold is not None and i == len(words) - 1:
                while not script.hold.wait(0.01):
                    if self.is_closed.is_set():
                        return
            if script.seconds and self.is_closed.wait(script.seconds):
                return
            if self.is_closed.is_set():
                return
            n_words += 1
            yield Delta(text=word)
        yield Done(completion=self._completion(n_words))

    def _completion(self, n_words: int) -> Completion:
        script = self._script
        logprobs = None
        if script.logprobs:
            logprobs = tuple(
                TokenLogprob(
                    id=i, text=word, logprob=-0.02 - (i * 7 % 5) * 0.45,
                    top=((i, -0.02 - (i * 7 % 5) * 0.45), (900 + i, -1.4), (800 + i, -3.0)),
                )
                for i, word in enumerate(_words(script.text))
            )  # fmt: skip
        return Completion(
            text=script.text, reasoning=script.reasoning, token_ids=(), finish_reason="stop",
            stop=None, logprobs=logprobs, seed=7, model=self._model.name,
            usage=Usage(
                prompt_tokens=script.n_prompt, completion_tokens=n_words,
                cached_tokens=script.n_cached,
            ),
            timings=Timings(
                load_s=0.1, first_token_s=0.2, prefill_tok_s=900.0, decode_tok_s=42.0, total_s=1.0,
                proposed_tokens=script.n_guessed, accepted_tokens=script.n_guessed_right,
            ),
        )  # fmt: skip


@dataclass
class ScriptedModel:
    """Answers with its scripts in turn, the last one again and again."""

    scripts: list[Script] = field(default_factory=lambda: [Script()])
    name: str = "Scripted 1B"
    n_ctx: int = 8192
    n_ctx_train: int = 32768
    recommended: dict[str, Any] = field(default_factory=dict)
    asked: list[list[Any]] = field(default_factory=list)
    sampling: list[dict[str, Any]] = field(default_factory=list)
    streams: list[ScriptedStream] = field(default_factory=list)
    is_closed: bool = False

    @property
    def plan(self) -> Any:
        rows = {"weights Q4_K": 380 << 20, "KV cache": 96 << 20}
        limits: Any = None
        return MemoryPlan((Pool("host", rows, 8 << 30),), self.n_ctx, 1, limits, "")

    def stream_chat(
        self,
        messages: str | Sequence[Any],
        *,
        template_args: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> ScriptedStream:
        script = self.scripts[min(len(self.asked), len(self.scripts) - 1)]
        self.asked.append(list(messages))
        self.sampling.append(sampling)
        self.streams.append(ScriptedStream(script, self))
        return self.streams[-1]

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        return list(range(len(text.split())))

    def detokenize(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        return " ".join(f"t{id}" for id in token_ids)

    def close(self) -> None:
        self.is_closed = True


def opener(model: ScriptedModel, hold: threading.Event | None = None, error: Any = None) -> Any:
    """`open_model` of the settings: reports progress, waits for `hold`, then gives the model."""

    def open_model(path: str, progress: Any, n_ctx: int | None = None) -> ScriptedModel:
        model.n_ctx = n_ctx or model.n_ctx
        progress(Progress("weights", 45, 100))
        if hold is not None:
            hold.wait(120)
        if error is not None:
            raise error
        return model

    return open_model


def _words(text: str) -> list[str]:
    parts = text.split(" ")
    return (
        [part + (" " if i < len(parts) - 1 else "") for i, part in enumerate(parts)] if text else []
    )
