"""The models that are served: loaded when asked for, swapped where memory holds not all at once.

Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from edgeinfer import platform
from edgeinfer.aio import AsyncLLM, Worker
from edgeinfer.batch import HOST
from edgeinfer.engine.plan_rows import size_text
from edgeinfer.errors import EdgeInferError, ModelNotFoundError, PlanError
from edgeinfer.inspect_file import plan
from edgeinfer.llm import LLM
from edgeinfer.options import LoadOptions
from edgeinfer.parameters import parse_memory
from edgeinfer.server.errors import ApiError
from edgeinfer.server.load_choices import advice_beside, usual_options
from edgeinfer.server.metrics import ModelMetrics
from edgeinfer.server.pull import is_on_hub, pull
from edgeinfer.terminal import one_line

T = TypeVar("T")
_IDLE_SECONDS = 60.0  # that a request waits for another model's answers to end
_LOOK_SECONDS = 0.05
_LONGEST_NAME = 256  # characters
_SERVER_BYTES = 24 << 20  # beside models: many connections, and what reads grammars
_MOST_UNLOADS = 64  # tries to make room for one model


class ServedModel:
    """A model by its name. `llm` is there while it is loaded.

    `keep_seconds` are those that it stays loaded without requests; None: until its memory is
    needed.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = one_line(name), path  # that of a file may be no text
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
    def names(self) -> list[str]:
        """What requests may call it: as it is served, as its file is called, as that calls itself.

        One counts less than another model's that stands before it.
        """
        own = [self.llm.name] if self.llm is not None else []
        return [self.name, self.path.stem, self.path.name, *own]

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
        self._is_one = len(served) == 1  # also when others were fetched beside it
        self._load, self._is_strict, self._tell = load, has_strict_names, tell
        self._may_pull = may_pull
        self._pulling = asyncio.Lock()
        self._is_ending = False
        self._making_room = asyncio.Lock()  # whoever holds it alone changes what memory is taken
        self._tasks: set[asyncio.Task[Any]] = set()
        self.is_ready = False
        budget = load.get("memory")
        self._budget = None
        if budget is not None:
            self._budget = parse_memory(budget, platform.available_memory()) - _SERVER_BYTES

    def find(self, name: str) -> ServedModel:
        """The one that a request names; of a server started with one, any name means it."""
        model = self._named(name)
        is_any = self._is_one and not (self._is_strict and name)
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
        wanted = _bare(name)
        found: list[tuple[int, int]] = []
        for i, model in enumerate(self.served):
            names = [*map(_bare, model.names)]
            if wanted in names:
                found.append((names.index(wanted), i))
        return self.served[min(found)[1]] if found else None

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
                # In a thread that nobody waits for at the end, should nothing come any more.
                path = await Worker().do(lambda: pull(name, self._tell, self._check_going_on))
                model = next((each for each in self.served if each.path == path), None)
            if model is None:
                model = ServedModel(name, path)
                self.served.append(model)
            return model

    def end_pulls(self) -> None:
        """End what is being fetched; what has come of it is kept."""
        self._is_ending = True

    def _check_going_on(self) -> None:
        if self._is_ending:
            raise ApiError(503, "the server is stopping; what has come of the model is kept")

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

    async def looked_into(self, name: str, tell: Callable[[ServedModel, LoadOptions], T]) -> T:
        """What `tell` says in a thread of a model, and how it is loaded, whether or not it is."""
        model = self.find(name)
        model.n_users += 1  # so that nobody unloads it meanwhile
        _silence(model)
        try:
            with self._told_of(model):
                return await asyncio.to_thread(tell, model, self._load)
        finally:
            model.n_users -= 1
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
        """`_open` for a request."""
        with self._told_of(model):
            await self._open(model)

    @contextmanager
    def _told_of(self, model: ServedModel) -> Iterator[None]:
        """Whoever asked is not told where files lie."""
        try:
            yield
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
        """Load it; while memory is short, unload those that were used longest ago.

        None is unloaded for one that does not fit without them either.
        """
        is_known_to_fit = False
        for _ in range(_MOST_UNLOADS):
            options = await self._options(model)
            usual = await asyncio.to_thread(
                usual_options, model.path, options, is_alone=len(self.served) == 1
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
                    failed = self._of_all_memory(error, self._taken)
            if not self._taken:
                raise failed
            if not is_known_to_fit:
                await asyncio.to_thread(self._check_alone, model)
                is_known_to_fit = True
            if not await self._unload_oldest(model):
                raise failed
        raise failed

    def _check_alone(self, model: ServedModel) -> None:
        """PlanError where a model would not fit if all others were unloaded."""
        options: LoadOptions = {**self._load, "slots": self._load.get("slots") or 1}
        held = Counter[str]()  # by memory
        for each in self.served:
            for pool in each.llm.plan.pools if each.llm is not None else ():
                held[pool.name] += pool.total_bytes
        if self._budget is not None:
            options["memory"] = max(1, self._budget)
            del held[HOST]
        try:
            plan(model.path, freed=held, **options)
        except PlanError as error:
            raise self._of_all_memory(error, 0) from None

    def _of_all_memory(self, error: PlanError, taken: int) -> PlanError:
        """What is short of the memory that was given, of which other models have `taken` bytes."""
        if self._budget is None or error.memory != HOST:
            return error
        others = _SERVER_BYTES + taken
        most = platform.memory_budget(platform.rss())
        advice = advice_beside(error, others, most)
        found = f"{error.found}, beside {size_text(others)} of the server"
        found += " and other models" if taken else ""
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


def _bare(name: str) -> str:
    return name.lower().removesuffix(":latest")


def _silence(model: ServedModel) -> None:
    if model.alarm is not None:
        model.alarm.cancel()
        model.alarm = None
