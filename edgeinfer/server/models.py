"""The models that are served: loaded when asked for, swapped where memory holds not all at once.

Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from edgeinfer import platform
from edgeinfer.aio import AsyncLLM
from edgeinfer.errors import PlanError
from edgeinfer.inspect_file import plan
from edgeinfer.llm import LLM
from edgeinfer.options import LoadOptions
from edgeinfer.parameters import parse_memory
from edgeinfer.server.errors import ApiError
from edgeinfer.server.metrics import ModelMetrics

_USUAL_SLOTS = (4, 2, 1)  # contexts at full length, as many as need no shorter ones
_IDLE_SECONDS = 60.0  # that a request waits for another model's answers to end
_LOOK_SECONDS = 0.05
_MOST_UNLOADS = 64  # tries to make room for one model


class ServedModel:
    """A model by its name. `llm` is there while it is loaded."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.llm: LLM | None = None
        self.face: AsyncLLM | None = None
        self.metrics = ModelMetrics()
        self.last_used = 0.0
        self.n_users = 0
        self.changing = asyncio.Lock()  # held while it is loaded or unloaded

    @property
    def opened(self) -> LLM:
        assert self.llm is not None
        return self.llm

    @property
    def created(self) -> int:
        """When the file was written."""
        try:
            return int(self.path.stat().st_mtime)
        except OSError:
            return 0

    @property
    def n_bytes(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError:
            return 0


class Models:
    """All of them, under one limit of memory."""

    def __init__(
        self,
        served: Sequence[tuple[str, Path]],
        load: LoadOptions,
        *,
        has_strict_names: bool = False,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.served = [ServedModel(name, path) for name, path in served]
        self._load, self._is_strict, self._tell = load, has_strict_names, tell
        self._making_room = asyncio.Lock()
        self.is_ready = False
        budget = load.get("memory")
        self._budget = None
        if budget is not None:
            self._budget = parse_memory(budget, platform.available_memory())

    def find(self, name: str) -> ServedModel:
        """The one that a request names; where one is served, any name means it."""
        wanted = name.lower().removesuffix(":latest")
        for model in self.served:
            names = [model.name, model.path.stem, model.path.name]
            names += [model.llm.name] if model.llm is not None else []
            if wanted in (each.lower().removesuffix(":latest") for each in names):
                return model
        if len(self.served) == 1 and not (self._is_strict and wanted):
            return self.served[0]
        there = ", ".join(repr(model.name) for model in self.served)
        raise ApiError(
            404,
            f"model {name[:200]!r} not found: this server has {there}",
            code="model_not_found",
            param="model",
        )

    async def start(self) -> None:
        """Load the first; the others are loaded when they are asked for."""
        await self._open(self.served[0])
        self.is_ready = True

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[ServedModel]:
        """A loaded model, which stays loaded inside."""
        model = self.find(name)
        if not self.is_ready:
            raise ApiError(503, "the model is loading; try again in a moment")
        model.n_users += 1  # first, so that nobody unloads it meanwhile
        try:
            await self._open(model)
            model.last_used = time.time()
            yield model
        finally:
            model.n_users -= 1
            model.last_used = time.time()

    async def unload(self, model: ServedModel) -> None:
        """Give its memory back, once nobody uses it."""
        async with model.changing:
            if model.n_users == 0:
                await self._close(model)

    async def close(self) -> None:
        for model in self.served:
            await self._close(model)

    async def _open(self, model: ServedModel) -> None:
        async with model.changing:
            if model.llm is not None:
                return
            async with self._making_room:
                await self._load_somehow(model)

    async def _load_somehow(self, model: ServedModel) -> None:
        """Load it; while memory is short, unload those that were used longest ago."""
        for _ in range(_MOST_UNLOADS):
            face = AsyncLLM(model.path, **await self._options(model))
            try:
                model.llm = await face.open()
                model.face = face
                return
            except PlanError:
                if not await self._unload_oldest(model):
                    raise

    async def _options(self, model: ServedModel) -> LoadOptions:
        options: LoadOptions = {**self._load}
        if self._budget is not None:
            taken = sum(
                each.llm.plan.host.total_bytes for each in self.served if each.llm is not None
            )
            options["memory"] = max(1, self._budget - taken)
        if options.get("slots") is None:
            options["slots"] = await asyncio.to_thread(_usual_slots, model.path, options)
        return options

    async def _unload_oldest(self, wanted: ServedModel) -> bool:
        """The one used longest ago, once one is idle; False if there is none to unload."""
        end = time.monotonic() + _IDLE_SECONDS
        while others := [m for m in self.served if m.llm is not None and m is not wanted]:
            idle = [model for model in others if not model.n_users]
            if idle:
                oldest = min(idle, key=lambda model: model.last_used)
                self._tell(f"unloading {oldest.name}: {wanted.name} needs its memory")
                await self._close(oldest)
                return True
            if time.monotonic() > end:
                raise ApiError(503, "all models are busy and there is no memory for another")
            await asyncio.sleep(_LOOK_SECONDS)
        return False

    async def _close(self, model: ServedModel) -> None:
        llm, model.llm, model.face = model.llm, None, None
        if llm is not None:
            await asyncio.to_thread(llm.close)


def _usual_slots(path: Path, options: Any) -> int:
    """As many contexts as memory holds without making them shorter."""
    for slots in _USUAL_SLOTS:
        try:
            if not plan(path, **{**options, "slots": slots}).note:
                return slots
        except PlanError:
            continue
    return 1
