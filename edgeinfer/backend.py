"""The machines a model can run on, behind one interface; the only importer of kernels.

Knows nothing of sequences, text or scheduling.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from edgeinfer import config
from edgeinfer.batch import (
    Batch,
    Demand,
    Numerics,
    OpTime,
    Outputs,
    Sampler,
    StepLimits,
    StepRequest,
)
from edgeinfer.device import Choice, Device, find
from edgeinfer.graph import Segment

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeinfer.kernels.cuda.device import Device as Gpu
    from edgeinfer.sampling.params import SampleTable

# stage ("kernels", "weights"), done, total
CompileProgress: TypeAlias = Callable[[str, int, int], None]
# The sampler for a vocabulary of a size, and so many threads.
MakeSampler: TypeAlias = Callable[[int, int], Sampler]


class Ticket(Protocol):
    """One step on its way."""

    def wait(self) -> Outputs:
        """Block, with the GIL released, until the step is done."""
        ...

    def abort(self) -> None:
        """Cut the step short, from any thread; its outputs then say so."""
        ...


class Program(Protocol):
    """A segment made runnable: owns packed weights, scratch and KV pages."""

    @property
    def step_weight_bytes(self) -> int:
        """Bytes of weights that a step of one row reads."""
        ...

    def submit(self, batch: Batch) -> Ticket:
        """Prepare one step, or begin it.

        The arrays of a batch, page tables among them, are copied as far as the step needs them:
        whoever made them may change them once this returns. `batch.samples` alone belongs to the
        step until it was waited for. A sequence has the same `PageTable` objects in all its steps.
        """
        ...

    def sample(self, logits: NDArray[np.float32], table: SampleTable) -> None:
        """Fill the outputs of a table's first R rows from logits (R, V) of a step, edited or not.

        Between steps; the tokens are those that a step picks from such logits itself.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Facts of what it runs on, for reports: its "device" first, then what only that has.

        Where there are any: the number of "threads", the name of the "gpu", "layers" by device, and
        the "numerics" where they are not exact.
        """
        ...

    # What it keeps between steps. All of this is asked for while no step is on its way, by one
    # thread, and takes no memory of the device. `group` is an index into the tables of a batch.

    @property
    def cache_layout(self) -> str:
        """What its bytes mean: only programs with an equal one can take them."""
        ...

    def copy_pages(self, group: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Make pages of all layers of a group equal others; no target is a source."""
        ...

    def read_pages(self, group: int, pages: Sequence[int]) -> NDArray[np.uint8]:
        """A copy of pages, (n, bytes of a page); of that width without any, too."""
        ...

    def write_pages(self, group: int, pages: Sequence[int], data: NDArray[np.uint8]) -> None:
        """Put what was read into pages; ValueError where it has another shape."""
        ...

    def page_positions(self, group: int) -> NDArray[np.uint8]:
        """Which of the 32 positions of a page each of its bytes belongs to, (bytes of a page,)."""
        ...

    def read_states(self, slots: Sequence[int]) -> NDArray[np.uint8]:
        """A copy of slots of state, (n, bytes of a slot): none where the segment has no state."""
        ...

    def write_states(self, slots: Sequence[int], data: NDArray[np.uint8]) -> None:
        """Put what was read into slots; ValueError where it has another shape."""
        ...

    def close(self) -> None: ...


class Backend(Protocol):
    """A machine that segments can be compiled for."""

    def memories(self, host: int) -> Mapping[str, int]:
        """Bytes that may be taken of each memory, where `host` may be of the host's.

        "host" is among them, and may be less where a GPU shares it. Of a GPU's own ("cuda:0") it is
        what is free, less what its driver takes later.
        """
        ...

    def demand(self, segment: Segment, request: StepRequest) -> Demand:
        """Memory that a program for such steps takes; nothing is allocated.

        UnsupportedModelError names what this machine can't run.
        """
        ...

    def compile(self, segment: Segment, limits: StepLimits) -> Program: ...


# -- what only some programs can do -------------------------------------------------------------


@runtime_checkable
class BuildsExactly(Protocol):
    """Its kernels may have been made for a family of machines: see `build_exactly`."""

    def build_exactly(self, progress: Callable[[int, int], None]) -> int: ...


@runtime_checkable
class KeepsKernels(Protocol):
    """What it builds and measures is kept for the next process: see `unkept_kernels`."""

    @property
    def unkept(self) -> str: ...


@runtime_checkable
class Tunes(Protocol):
    """It runs in one of several ways, with the same results: see `tune`."""

    def tune(self, progress: Callable[[int, int], None]) -> str: ...


@runtime_checkable
class ReadsMemory(Protocol):
    """It can tell how fast its weights can be read, in bytes a second."""

    def read_bandwidth(self) -> float: ...


@runtime_checkable
class TimesOps(Protocol):
    """It can run a step op by op."""

    def op_seconds(self, batch: Batch) -> list[OpTime]: ...


@runtime_checkable
class Drafts(Protocol):
    """It may have its segment's `draft` beside it: a program that is closed with it.

    Steps of that take token ids and `hidden`, and yield logits and hidden rows.
    """

    @property
    def draft(self) -> Program | None: ...


@runtime_checkable
class GuessesOn(Protocol):
    """A draft that goes on from its own tokens: of its steps no logits come to the host."""

    def guess(self, batch: Batch, n: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The likeliest token behind each wanted row, one a sequence, and n - 1 more: (n, R).

        At most 4, of the batch's `n_logits` first tokens where it names so many. All places but the
        last token's have their pages. With the last step's hidden rows (R, D), where the batch asks
        for them.
        """
        ...


@runtime_checkable
class RunsOnGpu(Backend, Protocol):
    """A backend that compiles for a GPU, or for what stands in its place."""

    @property
    def device(self) -> Gpu: ...

    @property
    def numerics(self) -> Numerics:
        """Those of its programs: "exact" also on a GPU that has no "fast" ones."""
        ...

    def with_numerics(self, numerics: Numerics) -> RunsOnGpu:
        """Another one of the same device; it may have to stay with exact ones."""
        ...

    @property
    def joins(self) -> bool:
        """Whether steps of one row are few launches: never on a GPU that can't have that."""
        ...

    def with_joined_kernels(self, joins: bool) -> RunsOnGpu:
        """Another one of the same device, with few launches for steps of one row if it can."""
        ...

    def prepare(self, segments: Iterable[tuple[Segment, StepLimits]]) -> int:
        """Compile the kernels of programs to come, all at once; how many there are."""
        ...


# -- opening one --------------------------------------------------------------------------------


def find_device(name: str) -> Choice:
    """The device, or devices, that a caller names; DeviceError for what can't be had."""
    return find(name)


def open_backend(
    device: Device,
    *,
    progress: CompileProgress | None = None,
    memory: int | None = None,
    make_sampler: MakeSampler | None = None,
    numerics: Numerics = "exact",
) -> Backend:
    """The backend of a device; its kernels are imported here and nowhere else.

    `numerics` are what GPUs are asked for: see `RunsOnGpu`.

    `memory` is how many bytes of the host's memory there are for all that it does. A GPU leaves
    what it can't sample to what `make_sampler` gives, by default to `host_sampler`.
    """
    if device.kind in ("reference", "law"):
        from edgeinfer.kernels.reference import ReferenceBackend
        from edgeinfer.sampling.sampler import ReferenceSampler

        is_law = device.kind == "law"
        return ReferenceBackend(ReferenceSampler(), "quantised" if is_law else "exact")
    if device.kind == "cpu":
        from edgeinfer.kernels.cpu.backend import CpuBackend

        return CpuBackend(config.cache_folder(), progress, config.isa(), memory)
    from edgeinfer.kernels.cuda.backend import CudaBackend, open_device

    def make_host_sampler(n_vocab: int, n_threads: int) -> Sampler:
        return host_sampler(n_vocab, n_threads, progress=progress)

    opened = open_device(device.kind, device.index)
    make_sampler = make_sampler or make_host_sampler
    joins = config.joins_kernels()
    return CudaBackend(opened, str(device), make_sampler, progress, numerics, joins=joins)


def compile_law(segment: Segment, limits: StepLimits, sampler: Sampler) -> Program:
    """A program whose results all others must have, bit for bit, at NumPy's pace."""
    from edgeinfer.kernels.reference import ReferenceBackend

    return ReferenceBackend(sampler, "quantised").compile(segment, limits)


def attention_weights(
    segment: Segment, layer: int, x: NDArray[np.float32], rows: Collection[int]
) -> NDArray[np.float32]:
    """What the queries at `rows` give to each position in a layer, (rows, H, T), by the law.

    x (T, D) is the stream that enters the layer, among the segment's residuals.
    InvalidRequestError where the layer has no attention, or one that can't be looked at alone.
    """
    from edgeinfer.kernels.reference.attention_rows import attention_weights

    return attention_weights(segment, layer, x, rows)


HeadReader: TypeAlias = "Callable[[NDArray[np.float32]], NDArray[np.float32]]"


def head_reader(segment: Segment) -> HeadReader:
    """What makes of rows (n, D) of the stream that leaves the last layer what the head reads.

    By the law; UnsupportedModelError where the head reads more than that stream.
    """
    from edgeinfer.kernels.reference.head_rows import head_reader

    return head_reader(segment)


def host_sampler(
    n_vocab: int, n_threads: int, *, progress: CompileProgress | None = None
) -> Sampler:
    """What samples in host memory for a device that leaves that to the host, still to be opened.

    Where LLVM is not installed it runs in NumPy: slow, with the same tokens.
    """
    if find_spec("llvmlite") is None:
        from edgeinfer.sampling.sampler import ReferenceSampler

        return ReferenceSampler()
    from edgeinfer.kernels.cpu.host_sampler import HostSampler
    from edgeinfer.kernels.cpu.library import Library

    def tell(done: int, total: int, name: str) -> None:
        if progress is not None:
            progress("kernels", done, total)

    # One process builds its three kernels: others may hold what there is by then.
    library = Library.host(config.cache_folder(), config.isa(), memory=0)
    return HostSampler(library, n_vocab, n_threads, tell)


def cpu_target() -> dict[str, Any]:
    """The instruction-set family that kernels are chosen by, and what LLVM finds here."""
    from edgeinfer.kernels.cpu.targets import Target

    target = Target.host(config.isa())
    features = [each[1:] for each in target.features.split(",") if each.startswith("+")]
    return {"family": target.family, "llvm_name": target.cpu, "features": features}


def build_exactly(program: Program, progress: Callable[[int, int], None]) -> int:
    """Build a program's kernels for this machine alone where they were made for its family.

    Returns how many; the next process takes them. `progress(done, total)` follows.
    """
    return program.build_exactly(progress) if isinstance(program, BuildsExactly) else 0


def unkept_kernels(program: Program) -> str:
    """Why what was built or measured can't be kept for the next process; "" where it is."""
    return program.unkept if isinstance(program, KeepsKernels) else ""


def tune(program: Program, progress: Callable[[int, int], None]) -> str:
    """Find out how a program decodes fastest here, if it doesn't know yet: "on 2 threads".

    `progress(done, total)` follows. "" where there is nothing to find out.
    """
    return program.tune(progress) if isinstance(program, Tunes) else ""


def kernel_origins() -> dict[str, int]:
    """How many CPU kernels are cached for this machine, came ready with the package, or neither."""
    from edgeinfer.kernels.cpu.kept_objects import cache_folder
    from edgeinfer.kernels.cpu.library import kernels_here
    from edgeinfer.kernels.cpu.ready import NAMES
    from edgeinfer.kernels.cpu.targets import Target

    target = Target.host(config.isa())
    here = kernels_here(target, cache_folder(config.cache_folder(), target))
    counts = {origin: list(here.values()).count(origin) for origin in ("cached", "ready")}
    return {**counts, "to_build": len(set(NAMES) - here.keys())}


def can_build_kernels() -> bool:
    """Whether kernels that are not here can be built: not in a frozen program."""
    from edgeinfer.kernels.cpu.builders import can_build

    return can_build()


def ready_kernel_files() -> list[Path]:
    """Files of ready kernels that were made of the sources here, for a program to be frozen."""
    from edgeinfer.kernels.cpu.library import current_files

    return current_files()
