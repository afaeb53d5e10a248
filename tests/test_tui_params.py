"""Sampling and context length: what is in force, whose it is, and what another length needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from textual.widgets import Input

from edgeinfer import LLM, InvalidModelError, PlanError, plan, platform
from edgeinfer.options import LoadOptions
from edgeinfer.sampling.params import SamplingParams
from edgeinfer.sampling.recommended import recommended
from edgeinfer.tui import launch
from edgeinfer.tui.params import (
    CONTEXT,
    PARAMS,
    SAMPLING,
    context_in_force,
    in_force,
    parse_param,
)
from edgeinfer.tui.params_screen import ParamsScreen

from .models_for_tests import tiny_model
from .test_tui_chat import Chat, drive
from .tui_engine import ScriptedModel, opener


def test_a_files_values_are_those_that_an_answer_takes() -> None:
    file = {"general.sampling.temp": 0.6, "top_k": 20, "sequence": "x", "penalty_repeat": 1.1}
    found = recommended(file)
    assert found == {"temperature": 0.6, "top_k": 20, "repeat_penalty": 1.1}
    params = SamplingParams.resolve({"top_k": 3}, file)
    assert (params.temperature, params.top_k, params.repeat_penalty) == (0.6, 3, 1.1)
    with pytest.raises(InvalidModelError, match="top_p"):
        recommended({"top_p": 7})
    assert SamplingParams.resolve({"top_p": 0.5}, {"top_p": 7}).top_p == 0.5


def test_a_model_says_what_it_recommends_and_was_trained_for(tmp_path: Path) -> None:
    with LLM(tiny_model(tmp_path, n_ctx=96), device="reference") as llm:
        assert llm.n_ctx_train == 96 and llm.recommended == {}


def test_every_parameter_has_a_value_in_force() -> None:
    class Damaged(ScriptedModel):
        @property
        def recommended(self) -> Any:
            raise InvalidModelError("top_k is x")

        @recommended.setter
        def recommended(self, value: object) -> None:
            pass

    own = ScriptedModel(recommended={"temperature": 0.6, "top_k": 20})
    for model in (None, own, Damaged()):
        for param in SAMPLING:
            value, source = in_force(param.name, {}, model)
            advises = model is own and param.name in own.recommended
            assert value not in ("", "None") and source == (
                "the model’s own" if advises else "usual"
            )
    assert in_force("temperature", {"temperature": 0.0}, own) == ("0.0", "yours")
    assert in_force("overflow", {}, None).value == "drop-turns"
    assert parse_param("context", "16,384") == 16384 and parse_param("context", "") is None
    assert len({param.name for param in PARAMS}) == len(PARAMS)
    for text in ("0", "-1", "1e3", "many", "9" * 30):
        with pytest.raises(ValueError, match="context is"):
            parse_param("context", text)
    assert "n_ctx" not in CONTEXT.help
    assert context_in_force(None, own) == ("8192", "usual; trained for 32,768")
    assert context_in_force(40_000, own).source == "yours; only trained for 32,768"


def words(chat: Chat) -> str:
    """What the screen says, however it wraps."""
    return " ".join(chat.screen_text.replace("│", " ").split())


def test_the_form_shows_what_is_in_force_and_another_context_opens_the_model_anew() -> None:
    asked: list[int] = []
    model = ScriptedModel(recommended={"temperature": 0.6})

    def plan_model(
        path: str, n_ctx: int = 0, freed: Mapping[str, int] = MappingProxyType({})
    ) -> Any:
        asked.append(n_ctx)
        # The open model gives back 476 MB, which are enough for 16,384 only.
        needed = {16384: 500 << 20}.get(n_ctx, 9 << 30)
        available = (100 << 20) + freed.get("host", 0)
        if needed > available:
            raise PlanError("n_ctx", needed=needed, available=available, n_ctx=2048)

    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("remember this")
        await chat.send("/params temperature 0.3")
        assert "temperature = 0.3 (yours)" in chat.screen_text
        await chat.send("/params temperature")
        assert "temperature = 0.6 (the model’s own)" in chat.screen_text
        await chat.send("/params top_p 0.5")
        await chat.send("/params")
        screen, rows = chat.app.screen, chat.screen_text.splitlines()
        assert isinstance(screen, ParamsScreen) and len(rows) == 24
        for parts in (
            ("temperature", "0.6", "the model’s own"), ("top p", "0.5", "yours"),
            ("top k", "40", "usual"), ("overflow", "drop-turns", "usual"),
            ("context", "8192", "trained for 32,768"), ("max tokens", "no limit", "usual"),
        ):  # fmt: skip
            assert any(all(part in row for part in parts) for row in rows), parts
        assert "0 always takes the likeliest" in chat.screen_text
        screen.query_one("#context", Input).value = "many"
        await chat.press("enter")
        await chat.until(lambda: "context is 'many'" in chat.screen_text)
        screen.query_one("#context", Input).value = "900000"
        await chat.press("enter")
        await chat.until(lambda: "A context of 2,048 tokens would fit" in words(chat))
        assert model.n_ctx == 8192 and not model.is_closed
        await chat.press("escape")
        await chat.send("/params context 16384")
        await chat.until(lambda: model.n_ctx == 16384)
        await chat.idle()
        await chat.until(lambda: "of 16,384" in chat.screen_text)
        await chat.ask("what was it?")

    drive(body, model, size=(80, 24), open_model=opener(model), plan_model=plan_model)
    assert asked == [900_000, 16_384, 16_384]  # the form looks, then the loader
    assert [message["content"] for message in model.asked[1]][::2] == [
        "remember this", "what was it?",
    ]  # fmt: skip
    assert model.sampling[1] == {"overflow": "drop-turns", "top_p": 0.5}


def test_the_memory_of_the_open_model_counts_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tiny_model(tmp_path, n_ctx=8192))
    # A device that never builds kernels first.
    given: LoadOptions = {"device": "reference", "kv_type": "f16"}
    whole = plan(path, **given)
    needed = whole.total_bytes - whole.rows["prefix pages"]

    def allow(n_bytes: int) -> None:
        monkeypatch.setattr(platform, "memory_budget", lambda held: n_bytes)

    allow(needed - 1)
    assert launch._plan(path, given, {}).n_ctx < 8192
    found = launch._plan(path, given, {"host": 1})
    assert found.n_ctx == 8192 and found.note == "once the open model is closed"
    assert launch._plan(path, {**given, "memory": needed}, {"host": 1}).note == ""
    allow(needed - (1 << 20))
    short = launch._plan(path, given, {"host": 1})  # too little comes back to help
    without = launch._plan(path, given, {})
    assert short.n_ctx < 8192 and short.available == without.available + 1
    assert short == without._replace(pools=(without.host._replace(available=short.available),))
    allow(40 << 20)
    assert launch._plan(path, given, {"host": needed}).n_ctx == 8192
    for freed in (0, 1 << 20):
        with pytest.raises(PlanError):
            launch._plan(path, given, {"host": freed})


def test_a_length_is_asked_for_before_there_is_a_model(tmp_path: Path) -> None:
    with pytest.raises(PlanError):
        plan(tiny_model(tmp_path, n_ctx=64), n_ctx=2**30, memory="2G")
    opened: list[int | None] = []
    model = ScriptedModel()

    def open_model(path: str, progress: Any, n_ctx: int | None = None) -> ScriptedModel:
        opened.append(n_ctx)
        if n_ctx is None:
            raise PlanError("n_ctx", needed=2, available=1, n_ctx=512)
        return model

    async def body(chat: Chat) -> None:
        await chat.until(lambda: "/params context 512" in words(chat))
        await chat.press("escape")
        await chat.send("/params context 512")
        await chat.until(lambda: len(chat.app.screen_stack) == 1)  # the form has looked
        await chat.send("/model scripted.gguf")
        await chat.idle()

    drive(body, model, open_model=open_model)
    assert opened == [None, 512]
