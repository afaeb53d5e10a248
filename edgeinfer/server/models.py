"""The models that are served: loaded when asked for, swapped where memory holds not all at once.

Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from edgeinfer import platform
from edgeinfer.aio import AsyncLLM
from edgeinfer.batch import HOST
from edgeinfer.engine.memory_plan import MemoryPlan
from edgeinfer.engine.plan_error import would_fit
from edgeinfer.engine.plan_rows import size_text
from edgeinfer.errors import Advice, EdgeInferError, Keyword, ModelNotFoundError, PlanError
from edgeinfer.inspect_file import plan
from edgeinfer.llm import LLM
from edgeinfer.options import LoadOptions
from edgeinfer.parameters import parse_memory
from edgeinfer.server.errors import ApiError
from edgeinfer.server.metrics import ModelMetrics
from edgeinfer.server.pull import is_on_hub, pull

T = TypeVar("T")
_USUAL_SLOTS = (4, 2, 1)  # contexts at full length, as many as need no shorter ones
_KEPT_SHARE = 4  # of what a plan leaves free: a quarter is for earlier prompts
_IDLE_SECONDS = 60.0  # that a request waits for another model's answers to end
_LOOK_SECONDS = 0.05
_LONGEST_NAME = 256  # characters
_SERVER_BYTES = 24 << 20  # beside models: many connections, and what reads grammars
_MiB = 1 << 20
_MOST_UNLOADS = 64  # tries to make room for one model


class ServedModel:
    """A model by its name. `llm` is there while it is loaded.

    `keep_seconds` are those that it stays loaded without requests; None: until its memory is
    needed.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.llm: LLM | None = None
        self.face: AsyncLLM | None = None
        self.metrics = ModelMetrics()
        self.last_used = 0.0
        self.n_users = 0
        self.keep_seconds: float | None = None
        self.alarm: asyncio.TimerHandle | None = None  # until it is unloaded for being idle
        self.is_loading = False
        self.changing = asyncio.Lock()  # held while it is loaded

    @property
    def state(self) -> Literal["loaded", "loading", "unloaded"]:
        if self.llm is not None:
            return "loaded"
        return "loading" if self.is_loading else "unloaded"

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
        may_pull: bool = False,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.served = [ServedModel(name, path) for name, path in served]
        self._load, self._is_strict, self._tell = load, has_strict_names, tell
        self._may_pull = may_pull
        self._pulling = asyncio.Lock()
        self._making_room = asyncio.Lock()  # whoever holds it alone changes what memory is taken
        self._tasks: set[asyncio.Task[Any]] = set()
        self.is_ready = False
        budget = load.get("memory")
        self._budget = None
        if budget is not None:
            self._budget = parse_memory(budget, platform.available_memory()) - _SERVER_BYTES

    def find(self, name: str) -> ServedModel:
        """The one that a request names; where one is served, any name means it."""
        model = self._named(name)
        is_any = len(self.served) == 1 and not (self._is_strict and name)
        if model is None and is_any and len(name) <= _LONGEST_NAME:  # replies repeat it
            model = self.served[0]
        if model is not None:
            return model
        there = ", ".join(repr(model.name) for model in self.served)
        raise ApiError(
            404,
            f"model {name[:200]!r} not found: this server has {there}",
            code="model_not_found",
            param="model",
        )

    def _named(self, name: str) -> ServedModel | None:
        wanted = name.lower().removesuffix(":latest")
        for model in self.served:
            names = [model.name, model.path.stem, model.path.name]
            names += [model.llm.name] if model.llm is not None else []
            if wanted in (each.lower().removesuffix(":latest") for each in names):
                return model
        return None

    async def find_or_pull(self, name: str) -> ServedModel:
        """`find`; a name of the hub is fetched where the server may do that."""
        if self._may_pull and self._named(name) is None and is_on_hub(name):
            return await self._finish(self._pull(name))  # also where nobody waits any more
        return self.find(name)

    async def fetch(self, name: str) -> ServedModel:
        """The model of that very name, fetched where it is not here and the server may do that."""
        model = self._named(name)
        if model is not None:
            return model
        if not self._may_pull:
            raise ApiError(
                403,
                "this server fetches no models: it must be started with --allow-pull, or with the "
                f"model: edgeinfer serve {name[:200]}",
                param="model",
            )
        if not is_on_hub(name):
            raise ApiError(
                404, f"{name[:200]!r} is no model's name: an alias or org/repo[:QUANT]",
                code="model_not_found", param="model",
            )  # fmt: skip
        return await self._finish(self._pull(name))

    async def _pull(self, name: str) -> ServedModel:
        async with self._pulling:
            model = self._named(name)
            if model is None:  # others may have asked for it meanwhile
                path = await asyncio.to_thread(pull, name, self._tell)
                model = next((each for each in self.served if each.path == path), None)
            if model is None:
                model = ServedModel(name, path)
                self.served.append(model)
            return model

    async def start(self) -> None:
        """Load the first; the others are loaded when they are asked for."""
        await self._open(self.served[0])
        self.is_ready = True

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[ServedModel]:
        """A loaded model, which stays loaded inside."""
        if not self.is_ready:
            raise ApiError(503, "the model is loading; try again in a moment")
        model = await self.find_or_pull(name)
        model.n_users += 1  # first, so that nobody unloads it meanwhile
        _silence(model)
        try:
            await self._finish(self._open_or_tell(model))
            model.last_used = time.time()
            yield model
        finally:
            model.n_users -= 1
            model.last_used = time.time()
            self._expect_idle(model)

    def keep(self, model: ServedModel, seconds: float | None) -> None:
        """Have it unloaded once it has been idle so long; None: when its memory is needed."""
        model.keep_seconds = seconds
        _silence(model)
        self._expect_idle(model)

    def _expect_idle(self, model: ServedModel) -> None:
        seconds = model.keep_seconds
        if model.llm is None or model.n_users or seconds is None:
            return
        loop = asyncio.get_running_loop()
        model.alarm = loop.call_later(seconds, lambda: self._begin(self.unload(model)))

    async def unload(self, model: ServedModel) -> bool:
        """Give its memory back; False where it is in use."""
        return await self._finish(self._unload(model))

    async def _unload(self, model: ServedModel) -> bool:
        # NOTE: whoever waits here must not hold `changing`, which who uses the model waits for.
        async with self._making_room:
            if model.n_users == 0:
                await self._close(model)
            return model.llm is None

    async def close(self) -> None:
        for model in self.served:
            await self._close(model)

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # or nobody holds it
        task.add_done_callback(self._tasks.discard)
        return task

    async def _finish(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives; it goes on where who waits for it is cancelled."""
        task = self._begin(work)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # it is told once
        return await asyncio.shield(task)

    async def _open_or_tell(self, model: ServedModel) -> None:
        """`_open` for a request, which is not told where files lie."""
        try:
            await self._open(model)
        except PlanError:
            raise
        except (EdgeInferError, OSError) as error:
            self._tell(f"{model.name} can't be loaded: {error}")
            raise ApiError(
                404 if isinstance(error, ModelNotFoundError) else 500,
                f"model {model.name!r} can't be loaded: whoever has started the server sees why",
                param="model",
            ) from error

    async def _open(self, model: ServedModel) -> None:
        async with model.changing:
            if model.llm is not None:
                return
            model.is_loading = True
            try:
                async with self._making_room:
                    await self._load_somehow(model)
            finally:
                model.is_loading = False

    async def _load_somehow(self, model: ServedModel) -> None:
        """Load it; while memory is short, unload those that were used longest ago."""
        for _ in range(_MOST_UNLOADS):
            options = await self._options(model)
            usual = await asyncio.to_thread(
                _usual, model.path, options, is_alone=len(self.served) == 1
            )
            # What a server adds is nobody's wish: less memory than there was a moment ago may do.
            asked: LoadOptions = {**options, "slots": options.get("slots") or 1}
            for tried in [usual, asked] if usual != asked else [asked]:
                face = AsyncLLM(model.path, **tried)
                try:
                    model.llm = await face.open()
                    model.face = face
                    return
                except PlanError as error:
                    failed = error
                    if self._budget is not None and error.memory == HOST:
                        failed = self._beside_others(error)
            if not await self._unload_oldest(model):
                raise failed
        raise failed

    def _beside_others(self, error: PlanError) -> PlanError:
        """What is short of the memory that was given: the model has but a part of that."""
        others = _SERVER_BYTES + self._taken
        advice = _with_others(error, others, platform.memory_budget(platform.rss()))
        found = f"{error.found}, beside {size_text(others)} of the server"
        found += " and other models" if self._taken else ""
        return PlanError(
            found, advice=advice, needed=error.needed, available=error.available,
            n_ctx=error.n_ctx, memory=error.memory,
        )  # fmt: skip

    async def _options(self, model: ServedModel) -> LoadOptions:
        """Those that were given, in the memory that the other models leave."""
        options: LoadOptions = {**self._load}
        if self._budget is not None:
            options["memory"] = max(1, self._budget - self._taken)
        return options

    @property
    def _taken(self) -> int:
        """Bytes that models have now."""
        return sum(each.llm.plan.host.total_bytes for each in self.served if each.llm is not None)

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
        _silence(model)
        llm, model.llm, model.face, model.keep_seconds = model.llm, None, None, None
        if llm is not None:
            await asyncio.to_thread(llm.close)


def _silence(model: ServedModel) -> None:
    if model.alarm is not None:
        model.alarm.cancel()
        model.alarm = None


def _with_others(error: PlanError, others: int, most: int) -> Advice:
    """What an error advises, with the memory for all: none where that is above `most` bytes."""
    settings = [each for each in error.advice if isinstance(each, Keyword)]
    names = [setting.name for setting in settings]
    if "memory" not in names or error.needed is None:
        return error.advice
    at, n_mib = names.index("memory"), -(-(others + error.needed) // _MiB)
    settings[at : at + 1] = [Keyword("memory", f"{n_mib}M")] if n_mib * _MiB <= most else []
    if not settings:
        return ("serve fewer models at a time, or take a smaller file",)
    return would_fit(settings, " or ")


def _usual(path: Path, options: LoadOptions, *, is_alone: bool) -> LoadOptions:
    """The options, with what they leave open as a server wants it.

    Slots: as many contexts as memory holds without making them shorter. Tokens of earlier prompts,
    where the model `is_alone`: as many as all contexts have, in a quarter of what is left.
    """
    is_naive, slots = options.get("naive"), options.get("slots")
    if is_naive and slots is None:
        slots = 1
    for tried in _USUAL_SLOTS if slots is None else (slots,):
        usual: LoadOptions = {**options, "slots": tried}
        try:
            found = plan(path, **usual)
        except PlanError:
            continue
        if slots is None and found.note and tried > 1:
            continue
        if is_alone and not is_naive and options.get("kept_tokens") is None:
            usual["kept_tokens"] = _usual_kept(path, usual, found)
        return usual
    return {**options, "slots": slots or 1}


def _usual_kept(path: Path, options: LoadOptions, least: MemoryPlan) -> int | None:
    """None leaves it to the plan: where a GPU has the cache, or memory is short."""
    kept = least.slots * least.n_ctx
    asked: LoadOptions = {**options, "kept_tokens": kept}
    try:
        most = plan(path, **asked)
    except PlanError:
        return None
    room, taken = (least.available - least.total_bytes) // _KEPT_SHARE, most.kept_bytes
    if len(least.pools) > 1 or taken <= least.kept_bytes or room <= least.kept_bytes:
        return None
    return min(kept, kept * room // taken)
