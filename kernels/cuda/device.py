"""What the CUDA backend asks of a device: memory, launches in order, graphs, events.

One stream: everything but `write_now` happens in the order in which it was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgeinfer.errors import Keyword, PlanError
from edgeinfer.kernels.cuda.kernel import Kernel

Progress: TypeAlias = Callable[[int, int, str], None]  # done, total, kernel
Grid: TypeAlias = tuple[int, int, int]
Args: TypeAlias = Mapping[str, Any]


class DeviceFacts(NamedTuple):
    """What a device is."""

    name: str
    arch: int  # 89: compute capability 8.9
    n_multiprocessors: int
    shared_bytes: int  # the most that a block may have, static and dynamic
    has_own_memory: bool  # False where it shares the host's, as on a Jetson
    is_cooperative: bool  # it can promise that all blocks of a launch run at once


class Bound(NamedTuple):
    """Arguments of a kernel that have been checked, in order and as C takes them."""

    kernel: Kernel
    values: tuple[np.generic, ...]

    def slots(self) -> NDArray[np.uint64]:
        """The same with 8 bytes each."""
        slots = np.zeros(len(self.values), np.uint64)
        for i, value in enumerate(self.values):
            slots[i : i + 1].view(value.dtype)[0] = value
        return slots


class Event(Protocol):
    """A point in the order of what a device does."""

    def wait(self) -> None:
        """Block, with the GIL released, until everything before it is done."""
        ...

    def seconds_since(self, earlier: Event) -> float:
        """Device time between two events that are over."""
        ...


class Graph(Protocol):
    """Launches, fills and copies that were recorded."""

    def replay(self) -> None: ...


class Device(Protocol):
    """A machine that runs the kernels of this folder. DeviceError for whatever it can't do."""

    @property
    def facts(self) -> DeviceFacts: ...

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and in all."""
        ...

    def reserve(self, n_bytes: int) -> int:
        """The address of new memory, 256-byte aligned, of any content; PlanError."""
        ...

    def free(self, address: int) -> None:
        """Return what `reserve` gave, once everything that was asked for is done."""
        ...

    def write(self, address: int, data: NDArray[Any]) -> None:
        """Copy an array there; it may change as soon as this returns."""
        ...

    def write_now(self, address: int, word: int) -> None:
        """Set an int32 without waiting for what was asked for before."""
        ...

    def read(self, address: int, into: NDArray[Any]) -> None:
        """Fill an array, and wait for that."""
        ...

    def host(self, n_bytes: int) -> NDArray[np.uint8]:
        """Memory of the host that `fetch` can fill while the device goes on; PlanError."""
        ...

    def fetch(self, address: int, into: NDArray[Any]) -> None:
        """Start to fill a part of `host` memory: it is there once a later `mark` is over."""
        ...

    def fill(self, address: int, n_bytes: int, byte: int = 0) -> None: ...

    def copy(self, to: int, address: int, n_bytes: int) -> None:
        """Copy inside the device's memory, between parts that don't overlap."""
        ...

    def load(self, kernels: Iterable[Kernel], progress: Progress | None = None) -> None:
        """Make kernels ready for `bind` and `launch`: from a cache, or compiled now."""
        ...

    @property
    def unkept(self) -> str:
        """Why what was compiled can't be kept for the next process; "" where it is."""
        ...

    def bind(self, kernel: Kernel, args: Args) -> Bound:
        """Check the arguments of a loaded kernel once for many launches.

        TypeError where one is missing, unknown or of another kind, ValueError out of range.
        """
        ...

    def launch(
        self,
        kernel: Kernel,
        grid: Grid,
        threads: int,
        shared: int,
        args: Args | Bound,
        *,
        at_once: bool = False,
    ) -> None:
        """Run a loaded kernel with `shared` bytes of dynamic shared memory a block.

        `at_once`: its blocks, at most `blocks_at_once`, may wait for each other.
        """
        ...

    def blocks_at_once(self, kernel: Kernel, threads: int, shared: int) -> int:
        """How many blocks of a loaded kernel can run at once, 0 where that can't be promised."""
        ...

    def record(self, body: Callable[[], None]) -> Graph:
        """What `body` launches, fills, copies and fetches; none of it happens now."""
        ...

    def mark(self) -> Event: ...

    def close(self) -> None:
        """Return all memory."""
        ...


def out_of_memory(memory: str, what: str) -> PlanError:
    """That something has no room on a device, though the plan had found some for it."""
    return PlanError(
        f"{memory}: {what}",
        advice=(
            "close what else uses it, or give fewer ", Keyword("gpu_layers"), " or a smaller ",
            Keyword("n_ctx"),
        ),
        memory=memory,
    )  # fmt: skip


def check_launch(
    kernel: Kernel, grid: Grid, threads: int, most_threads: int, shared: int, most_shared: int
) -> None:
    """ValueError for a launch that CUDA, or this kernel, can't have."""
    limits = (0x7FFFFFFF, 0xFFFF, 0xFFFF)
    if len(grid) != 3 or not all(0 < n <= most for n, most in zip(grid, limits, strict=True)):
        raise ValueError(f"kernel {kernel}: a grid of {grid}; each of three is 1 to {limits}")
    if threads % 32 or not 0 < threads <= 1024:
        raise ValueError(f"kernel {kernel}: {threads} threads; it must be 32, 64, ... 1024")
    if threads > most_threads:
        raise ValueError(
            f"kernel {kernel}: {threads} threads, and it is declared for {most_threads}"
        )
    if not 0 <= shared <= most_shared:
        raise ValueError(f"kernel {kernel}: {shared} bytes of shared memory, 0 to {most_shared}")


def check_args(kernel: Kernel, args: Args | Bound) -> None:
    if isinstance(args, Bound) and args.kernel != kernel:
        raise ValueError(f"arguments of kernel {args.kernel} are given to kernel {kernel}")
