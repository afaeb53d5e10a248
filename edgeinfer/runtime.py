"""Loads a model file into a running engine: everything an open model consists of.

Knows nothing of requests or of text that is generated.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn, TypeVar

from edgeinfer import platform
from edgeinfer.backend import (
    Backend,
    CompileProgress,
    HeadReader,
    Program,
    RunsOnGpu,
    head_reader,
    open_backend,
)
from edgeinfer.batch import HOST
from edgeinfer.device import Device
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.memory_plan import USUAL_TYPES, MemoryPlan, PlanRequest, solve
from edgeinfer.engine.plan_rows import PYTHON_BYTES, HostBytes, base_bytes
from edgeinfer.errors import (
    DeviceError,
    EdgeInferError,
    InvalidRequestError,
    Keyword,
    ModelNotFoundError,
    PlanError,
    TemplateError,
    UnsupportedModelError,
    memory_ran_out,
)
from edgeinfer.gguf import GGUFFile
from edgeinfer.hub.discovery import find_model
from edgeinfer.later import Later
from edgeinfer.load_settings import LoadSettings
from edgeinfer.model import Model
from edgeinfer.options import LoadOptions, Progress
from edgeinfer.parameters import shown
from edgeinfer.segment import Segment
from edgeinfer.text.chat import ChatTemplate, read_template
from edgeinfer.text.footprint import text_bytes
from edgeinfer.text.template_engine import TemplateEngine
from edgeinfer.text.tokenizer import Tokenizer
from edgeinfer.text.vocabulary import pre_tokenizer

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Runtime:
    """An open model; `close` ends its engine and closes its file."""

    model: Model
    segment: Segment  # as it was loaded
    plan: MemoryPlan
    program: Program
    engine: Engine
    device: Device  # the first, where several are asked for
    device_note: str
    n_threads: int
    n_gpu_layers: int  # the last ones
    load_s: float
    pooling: str  # of embeddings, "" where that is not known
    _tokenizer: Later[Tokenizer]
    _template: Later[ChatTemplate]
    _fingerprint: Later[str]
    _head_reader: Later[HeadReader] | None

    @property
    def fingerprint(self) -> str:
        """That of the file as it was loaded, whatever has become of it since."""
        return self._fingerprint.result()

    @property
    def head_reader(self) -> HeadReader:
        """What makes rows of streams for embeddings; their pooling is known."""
        assert self._head_reader is not None, "nobody has said how embeddings are pooled"
        return self._head_reader.result()

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer.result()

    @property
    def template(self) -> ChatTemplate:
        return self._template.result()

    @property
    def found_template(self) -> ChatTemplate | None:
        """None for a model without one, as base models and those for embeddings are."""
        try:
            return self.template
        except TemplateError:
            return None

    @property
    def bytes_per_token(self) -> int:
        """Packed weights that a decode step reads."""
        return self.program.step_weight_bytes

    @property
    def devices(self) -> str:
        """What has layers: "cuda:0", "cpu + cuda:0 + cuda:1"."""
        return str(self.program.describe()["device"])

    @property
    def runs_on(self) -> str:
        """In words: "2 threads", "12 + 20 of 32 layers on RTX 3060 + RTX 4090, 2 threads"."""
        facts, n_layers = self.program.describe(), self.model.hparams.n_layers
        words = []
        if n_threads := facts.get("threads", 0):
            words.append("1 thread" if n_threads == 1 else f"{n_threads} threads")
        if "gpu" in facts:
            by_device = facts.get("layers", {})
            counts = " + ".join(str(n) for name, n in by_device.items() if name != "cpu")
            numerics = f", {facts['numerics']} numerics" if "numerics" in facts else ""
            where = counts and f"{counts} of {n_layers} layers on "
            words.insert(0, where + facts["gpu"] + numerics)
        return ", ".join(words) or str(self.device)

    def close(self, timeout: float = 5.0) -> None:
        """Give all back; steps that take longer than so many seconds end by themselves."""
        try:
            self.engine.close(timeout)
        finally:  # an interrupt ends the wait for a long step, and it ends by itself
            self._template.abandon(lambda template: template.close())
            self.model.file.close()

    def __del__(self) -> None:
        if not self.engine.has_ended:  # an interrupt came before anybody had it, or closed it
            self.close(timeout=0)

    def __reduce__(self) -> NoReturn:  # its end would close the model
        raise TypeError("an open model can't be copied or pickled")


def load(
    path: str | PathLike[str], options: LoadOptions, templates: TemplateEngine | None = None
) -> Runtime:
    """Open, plan, load; all in a thread, so that an interrupt never leaves native code half-way.

    Where `templates` are given they get ready, and the model's is looked into, beside loading;
    else that waits for the first chat.
    """
    try:
        settings = LoadSettings.resolve("LLM", options)
        found = find_file(path, download=settings.may_download)
        return _load_apart(found, settings, templates)
    except BaseException:
        if templates is not None:
            templates.close()
        raise


def _load_apart(found: Path, settings: LoadSettings, templates: TemplateEngine | None) -> Runtime:
    try:
        if (available := platform.available_memory()) < _LEAST_MEMORY:
            raise MemoryError(f"{available >> 10} KiB are available")
        if templates is not None:
            templates.start()
        later = Later(lambda: _or_on_cpu(lambda s: _load(found, s, templates), settings))
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
            f"memory ran out while the model was loaded ({error or 'nothing was left'})",
            advice=(
                "close other programs, raise this one's limits (ulimit -v, -d), or give a smaller ",
                Keyword("n_ctx"),
            ),
            available=platform.available_memory(),
        )
    # In an interpreter that ends, modules that have threads can't even be imported.
    if isinstance(error, RuntimeError) and re.search("new thread|shutdown", str(error)):
        return DeviceError(
            f"{error}: loading a model needs a few threads; load it before the interpreter exits, "
            "or raise this process's limits (ulimit -u, -v)"
        )
    return None


def _or_on_cpu(run: Callable[[LoadSettings], T], settings: LoadSettings) -> T:
    """Run, and again on the processors, with a note, where a GPU fails that nobody asked for."""
    try:
        return run(settings)
    except (DeviceError, UnsupportedModelError, PlanError) as error:  # what only GPUs lack too
        is_hosts = isinstance(error, PlanError) and error.memory == HOST
        if is_hosts or not settings.may_leave_gpu:
            raise
        return run(settings.on_cpu(f"no GPU is used: {error}"))


def _load(path: Path, settings: LoadSettings, templates: TemplateEngine | None) -> Runtime:
    start, file = time.perf_counter(), GGUFFile.open(path)
    try:
        model, packs = Model.load(file), threading.Event()
        chosen, templates = _read_chosen(file, settings, templates)
        backend, plan, n_gpu_layers, note = _planned(model, settings, _progress(settings, packs))
        # Text is got ready while weights are packed, which needs no Python: sooner it delays that.
        make = partial(Tokenizer.from_metadata, file.metadata, pre=settings.pre)
        tokenizer = Later(partial(_after, packs, make))
        # Read now, though an answer needs neither: the file may be changed once it is loaded.
        fingerprint = Later(partial(_after, packs, file.fingerprint))
        pooling = settings.pooling_of(model)
        try:
            template = Later(lambda: _make_template(file, settings, chosen, templates, tokenizer))
            segment = settings.segment(model, plan.n_ctx, plan.kv_types)
            reader = Later(lambda: head_reader(segment)) if pooling else None
            program = backend.compile(segment, plan.limits)
        finally:
            packs.set()
            tokenizer.wait()
        try:
            tokenizer.result()
            fingerprint.result()
            if reader is not None:
                reader.wait()
            n_vocab = model.hparams.vocab_size
            engine = Engine(
                program, plan.limits, plan.n_ctx, n_vocab, segment=segment, is_naive=settings.naive
            )
        except BaseException:
            program.close()
            raise
    except BaseException:
        file.close()
        raise
    return Runtime(
        model, segment, plan, program, engine, settings.device, note, settings.n_threads,
        n_gpu_layers, time.perf_counter() - start, pooling, tokenizer, template, fingerprint,
        reader,
    )  # fmt: skip


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


def plan_model(
    model: Model, settings: LoadSettings, freed: Mapping[str, int] = MappingProxyType({})
) -> MemoryPlan:
    """The memory that loading so takes, once `freed` bytes of each memory have come back."""
    return _or_on_cpu(lambda settings: _planned(model, settings, freed=freed)[1], settings)


def _planned(
    model: Model,
    settings: LoadSettings,
    progress: CompileProgress | None = None,
    freed: Mapping[str, int] = MappingProxyType({}),
) -> tuple[Backend, MemoryPlan, int, str]:
    """The machine that is to run it, the memory that takes, how many layers are on GPUs.

    Then a note where another device would be expected. PlanError where it does not fit.
    """
    request = _plan_request(model, settings, freed)
    memory = request.available + freed.get(HOST, 0) - base_bytes(request.host)

    notes = list[str]()

    def opened(device: Device) -> Backend:
        backend = open_backend(device, progress=progress, memory=memory, numerics=settings.numerics)
        if isinstance(backend, RunsOnGpu) and backend.numerics != settings.numerics:
            gpu = backend.device.facts.name
            notes.append(f"numerics on {device} are exact: {gpu} lacks the tensor cores for others")
        return backend

    segment = settings.segment(model, settings.n_ctx, settings.kv_types or USUAL_TYPES)
    if settings.device.has_number:
        from edgeinfer.placement import (  # what other devices don't need
            gpus_in_turn,
            place,
            without_layers,
        )

        open_cpu = cache(lambda: opened(Device("cpu")))
        gpus = gpus_in_turn(settings, opened, notes)
        leave = lambda: notes.append(without_layers(settings))  # noqa: E731
        placed = place(segment, gpus, open_cpu, settings.gpu_layers, request, leave)
        return *placed, "; ".join(notes)
    backend = opened(settings.device)
    return backend, solve(segment, backend, request), 0, settings.device_note


def _plan_request(model: Model, settings: LoadSettings, freed: Mapping[str, int]) -> PlanRequest:
    text = text_bytes(model.file.metadata)
    screen = _SCREEN_BYTES if "textual" in sys.modules else 0
    gpu = _GPU_BYTES if settings.device.kind == "cuda" else 0
    host = HostBytes(text.kept, text.building, screen, gpu)
    usual = platform.memory_budget(min(platform.rss(), PYTHON_BYTES))
    return PlanRequest(
        settings.n_ctx, settings.slots, settings.n_threads, settings.allowed_memory(usual), freed,
        settings.kv_types, host, usual, settings.kept_tokens,
    )  # fmt: skip


# Textual, and what the chat shows: VmRSS on x86-64 Linux grew by 36 MiB.
_SCREEN_BYTES = 40 << 20
_GPU_BYTES = 50 << 20  # CuPy and the driver; not measured on a machine that has them


def _read_chosen(
    file: GGUFFile, settings: LoadSettings, templates: TemplateEngine | None
) -> tuple[str | None, TemplateEngine | None]:
    """The text of a template that was asked for, and what renders it.

    That it can't be, or that there is no such pre-tokenizer, is told before the weights are read.
    """
    if settings.pre is not None:
        pre_tokenizer(file.metadata, settings.pre)
    if settings.chat_template is None:
        return None, templates
    templates = templates or TemplateEngine()
    return read_template(settings.chat_template, file.metadata, templates), templates


def _after(packs: threading.Event, make: Callable[[], T]) -> T:
    packs.wait()
    return make()


def _make_template(
    file: GGUFFile,
    settings: LoadSettings,
    chosen: str | None,
    templates: TemplateEngine | None,
    tokenizer: Later[Tokenizer],
) -> ChatTemplate:
    """After the tokenizer, which loading waits for; probed here while weights are packed."""
    known = tokenizer.result()
    template = ChatTemplate.from_metadata(
        file.metadata,
        settings.chat_template,
        source=chosen,
        texts=known.texts,
        bos_token=known.bos_text,
        eos_token=known.eos_text,
        engine=templates,
    )
    if templates is not None:
        template.look()
    return template


def _progress(settings: LoadSettings, packs: threading.Event) -> CompileProgress:
    """Tells whoever asked, and sets `packs` once weights are packed."""
    report = settings.progress

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "weights":
            packs.set()
        if report is not None:
            report(Progress(stage, done, total))

    return progress


_LEAST_MEMORY = 32 << 20  # with less, a thread may fail before Python can say that it did
