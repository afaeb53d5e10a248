"""Loads a model file into a running engine: everything an open model consists of.

Knows nothing of requests or of text that is generated.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar, cast

from edgeinfer import config, platform
from edgeinfer.backend import (
    Backend,
    CompileProgress,
    Program,
    device_kind,
    open_backend,
)
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.generation import WAKE_SECONDS
from edgeinfer.engine.memory_plan import PYTHON_BYTES, MemoryPlan, PlanRequest, solve
from edgeinfer.errors import (
    DeviceError,
    EdgeInferError,
    InvalidRequestError,
    ModelNotFoundError,
    PlanError,
    memory_ran_out,
)
from edgeinfer.gguf import GGUFFile
from edgeinfer.graph import Segment
from edgeinfer.hub.discovery import find_model
from edgeinfer.model import Model
from edgeinfer.options import LoadOptions, Progress
from edgeinfer.parameters import LOAD, checked, parse_memory, shown
from edgeinfer.text.chat import ChatTemplate
from edgeinfer.text.template_engine import TemplateEngine
from edgeinfer.text.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Runtime:
    """An open model; `close` ends its engine and closes its file."""

    model: Model
    plan: MemoryPlan
    program: Program
    engine: Engine
    device: str
    n_threads: int
    load_s: float
    _tokenizer: _Later[Tokenizer]
    _template: _Later[ChatTemplate]

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer.result()

    @property
    def template(self) -> ChatTemplate:
        return self._template.result()

    @property
    def bytes_per_token(self) -> int:
        """Packed weights that a decode step reads."""
        return self.program.step_weight_bytes

    def close(self) -> None:
        self.engine.close()
        self._template.abandon(lambda template: template.close())
        self.model.file.close()


def load(
    path: str | PathLike[str], options: LoadOptions, templates: TemplateEngine | None = None
) -> Runtime:
    """Open, plan, load; all in a thread, so that an interrupt never leaves native code half-way.

    Where `templates` are given they get ready, and the model's is looked into, beside loading;
    else that waits for the first chat.
    """
    try:
        options = checked_options("LLM", options)
        found = find_file(path, download=bool(options.get("download")))
        return _load_apart(found, options, templates)
    except BaseException:
        if templates is not None:
            templates.close()
        raise


def _load_apart(found: Path, options: LoadOptions, templates: TemplateEngine | None) -> Runtime:
    try:
        if (available := platform.available_memory()) < _LEAST_MEMORY:
            raise MemoryError(f"{available >> 10} KiB are available")
        if templates is not None:
            templates.start()
        later = _Later(lambda: _load(found, options, templates))
        try:
            return later.result()
        except BaseException:
            later.abandon(lambda runtime: runtime.close())
            raise
    except (MemoryError, OSError, RuntimeError, ImportError) as error:
        if (explained := _explained(error)) is None:
            raise
        raise explained from None


def _explained(error: Exception) -> EdgeInferError | None:
    """What to tell of an error of the system's: memory that ran out, a thread not to be had."""
    if isinstance(error, EdgeInferError):
        return None
    if memory_ran_out(error):
        return PlanError(
            f"memory ran out while the model was loaded ({error or 'nothing was left'}): close "
            "other programs, raise this one's limits (ulimit -v, -d), or give a smaller n_ctx",
            available=platform.available_memory(),
        )
    if isinstance(error, RuntimeError) and "new thread" in str(error):
        return DeviceError(
            f"{error}: loading a model needs a few; load it before the interpreter exits, or "
            "raise this process's limits (ulimit -u, -v)"
        )
    return None


def _load(path: Path, options: LoadOptions, templates: TemplateEngine | None) -> Runtime:
    start = time.perf_counter()
    file = GGUFFile.open(path)
    try:
        model, packs = Model.load(file), threading.Event()
        machine = _Machine.of(options)
        backend = machine.open_backend(_progress(options, packs))
        segment = model.graph.segment()
        plan = _plan(segment, options, machine, backend)
        # Text is got ready while weights are packed, which needs no Python: sooner it delays that.
        tokenizer = _Later(lambda: _make_tokenizer(file, options, packs))
        try:
            template = _Later(lambda: _make_template(file, options, templates, tokenizer))
            segment = model.graph.segment(n_ctx=plan.n_ctx)
            program = backend.compile(segment, plan.limits)
        finally:
            packs.set()
            tokenizer.wait()
        try:
            tokenizer.result()
            engine = Engine(program, plan.limits, plan.n_ctx, model.hparams.vocab_size)
        except BaseException:
            program.close()
            raise
    except BaseException:
        file.close()
        raise
    load_s = time.perf_counter() - start
    return Runtime(
        model, plan, program, engine, machine.device, machine.n_threads, load_s, tokenizer, template
    )


def checked_options(function: str, given: LoadOptions) -> LoadOptions:
    """The options in the types that are used; raises what names the one that can't be."""
    options = cast(LoadOptions, checked(function, given, LOAD))
    kv_type = options.get("kv_type", "f16")
    if any(each != "f16" for each in ((kv_type,) if isinstance(kv_type, str) else kv_type or ())):
        raise InvalidRequestError(
            f"kv_type is {shown(kv_type)}; this version stores K and V as f16", param="kv_type"
        )
    if options.get("gpu_layers"):
        raise DeviceError("gpu_layers needs a GPU, which this version does not run on")
    return options


def find_file(name: str | PathLike[str], *, download: bool = False) -> Path:
    """The GGUF file that a path or a model's name means; fetched only where that is allowed."""
    if not isinstance(name, (str, PathLike)) or not isinstance(os.fspath(name), str):
        raise InvalidRequestError(
            f"model is {shown(name)}; it must be a path or a name", param="model"
        )
    try:
        return find_model(os.fspath(name))
    except ModelNotFoundError:
        if not download or not isinstance(name, str):
            raise
    from edgeinfer.hub.fetch import pull

    return pull(name)


def plan_model(model: Model, options: LoadOptions) -> MemoryPlan:
    """The memory that loading with these options takes."""
    machine = _Machine.of(options)
    return _plan(model.graph.segment(), options, machine, machine.open_backend())


def _plan(
    segment: Segment, options: LoadOptions, machine: _Machine, backend: Backend
) -> MemoryPlan:
    n_ctx, slots = options.get("n_ctx"), options.get("slots") or 1
    request = PlanRequest(n_ctx, slots, machine.n_threads, machine.available)
    return solve(segment, backend, request)


class _Machine(NamedTuple):
    """Where a model runs and what it may take there: asked of the system once, a millisecond."""

    device: str
    n_threads: int
    available: int  # bytes that the user allows, or else that there are

    @classmethod
    def of(cls, options: LoadOptions) -> _Machine:
        threads = options.get("threads") or config.threads()
        checked_threads = int(LOAD["threads"].check(threads)) if threads else None
        available, memory = platform.available_memory(), options.get("memory")
        return cls(
            device_kind(options.get("device") or "auto"),
            checked_threads or platform.default_threads(),
            available if memory is None else parse_memory(memory, available),
        )

    def open_backend(self, progress: CompileProgress | None = None) -> Backend:
        return open_backend(self.device, progress=progress, memory=self.available - PYTHON_BYTES)


def _make_tokenizer(file: GGUFFile, options: LoadOptions, packs: threading.Event) -> Tokenizer:
    packs.wait()
    return Tokenizer.from_metadata(file.metadata, pre=options.get("pre"))


def _make_template(
    file: GGUFFile,
    options: LoadOptions,
    templates: TemplateEngine | None,
    tokenizer: _Later[Tokenizer],
) -> ChatTemplate:
    """After the tokenizer, which loading waits for; probed here while weights are packed."""
    known = tokenizer.result()
    template = ChatTemplate.from_metadata(
        file.metadata,
        options.get("chat_template"),
        texts=known.texts,
        bos_token=known.bos_text,
        eos_token=known.eos_text,
        engine=templates,
    )
    if templates is not None:
        template.capabilities  # noqa: B018
    return template


def _progress(options: LoadOptions, packs: threading.Event) -> CompileProgress:
    """Tells whoever asked, and sets `packs` once weights are packed."""
    report = options.get("progress")

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "weights":
            packs.set()
        if report is not None:
            report(Progress(stage, done, total))

    return progress


class _Later(Generic[T]):
    """A value that another thread is making; an error waits for whoever asks for the value."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._values: list[T] = []
        self._error: BaseException | None = None
        self._discard: Callable[[T], None] | None = None
        self._thread = threading.Thread(target=self._run, name="edgeinfer-load", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        while self._thread.is_alive():
            self._thread.join(WAKE_SECONDS)

    def result(self) -> T:
        self.wait()
        if self._error is not None:
            raise self._error
        return self._values[0]

    def abandon(self, discard: Callable[[T], None]) -> None:
        """Nobody wants the value any more: `discard` it, as soon as it is there."""
        with self._lock:
            self._discard = discard
            values = list(self._values)
        for value in values:
            discard(value)

    def _run(self) -> None:
        try:
            value = self._make()
        except BaseException as error:
            self._error = error
            return
        with self._lock:
            self._values.append(value)
            discard = self._discard
        if discard is not None:
            discard(value)


_LEAST_MEMORY = 32 << 20  # with less, a thread may fail before Python can say that it did
