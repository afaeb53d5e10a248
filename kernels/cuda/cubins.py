"""Machine code of kernels for one GPU: what came with the package, what is cached, or compiled now.

Knows neither CuPy nor a GPU but by the number of its architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from edgeinfer import platform
from edgeinfer.errors import DeviceError
from edgeinfer.kernels.cuda.cache import Cache, key_of
from edgeinfer.kernels.cuda.device import Progress
from edgeinfer.kernels.cuda.early import waiting_first
from edgeinfer.kernels.cuda.kernel import Kernel, Sources
from edgeinfer.kernels.cuda.nvrtc import FLAGS, Job, Nvrtc, compile_all

PACKAGED = Path(__file__).parent / "ready"
_FIRST_CUDA = 12
_FIRST_ARCH_OF_CUDA_13 = 75


class Cubins:
    """Of one architecture (89), for a driver that runs CUDA up to this major version (12).

    `begins_early`: of kernels that may begin before those ahead of them have ended, see `early.py`.
    """

    def __init__(
        self, folder: Path, sources: Sources, arch: int, cuda: int, *, begins_early: bool = False
    ) -> None:
        self._sources, self._arch, self._cuda = sources, arch, cuda
        self._begins_early = begins_early
        self.unkept = ""  # why the next process will have to compile what this one has
        self._cache = Cache(folder)
        self._packaged = Cache(PACKAGED, is_ours=True)

    def load(
        self, kernels: Sequence[Kernel], progress: Progress | None = None
    ) -> dict[Kernel, bytes]:
        """The cubin of each kernel; DeviceError where one can't be compiled, and what to do."""
        jobs = {kernel: self.job(kernel) for kernel in kernels}
        found = {kernel: self._find(job) for kernel, job in jobs.items()}
        cubins = {kernel: data for kernel, data in found.items() if data is not None}
        missing = [kernel for kernel in kernels if kernel not in cubins]
        if missing:
            library = self._library()
            compiled = compile_all(library.path, [jobs[k] for k in missing], progress)
            for kernel, cubin in zip(missing, compiled, strict=True):
                job = jobs[kernel]
                self._keep(job, self._ending(library.cuda), cubin.data)
                cubins[kernel] = cubin.data
        return cubins

    def job(self, kernel: Kernel) -> Job:
        """What NVRTC is told."""
        self._sources.signature(kernel)
        text = self._sources.kernel_text(kernel)
        if self._begins_early:
            text = waiting_first(text, self._sources)
        return Job(kernel.label, text, tuple(kernel.flags), self._arch)

    def key(self, kernel: Kernel) -> str:
        """Changes with whatever its machine code is made of, but for the architecture."""
        return self._key(self.job(kernel))

    def _key(self, job: Job) -> str:
        return key_of(_seen(job.text), *FLAGS, *job.flags)

    def _ending(self, cuda: int) -> str:
        # A driver refuses what a CUDA of a later major version has made.
        return f".cuda{cuda}.{self._arch}.cubin"

    def _find(self, job: Job) -> bytes | None:
        for cache in (self._packaged, self._cache):
            for cuda in range(self._cuda, _FIRST_CUDA - 1, -1):
                path = cache.find(job.name, self._key(job), self._ending(cuda))
                if path is not None:
                    with suppress(OSError):  # somebody has cleared the cache meanwhile
                        return path.read_bytes()
        return None

    def _keep(self, job: Job, ending: str, data: bytes) -> None:
        try:
            self._cache.add(job.name, self._key(job), ending, data)
        except DeviceError as error:  # it is here all the same
            self.unkept = getattr(error.__cause__, "strerror", None) or str(error)

    def _library(self) -> platform.NvrtcLibrary:
        """The newest NVRTC that the driver can follow and that knows the architecture."""
        known = ""
        for library in platform.nvrtc_libraries():
            if _FIRST_CUDA <= library.cuda <= self._cuda:
                try:
                    architectures = Nvrtc(library.path).architectures
                except DeviceError as error:
                    known = known or str(error)
                    continue
                if self._arch in architectures:
                    return library
                known = known or f"that of CUDA {library.cuda} knows sm_" + ", ".join(
                    map(str, architectures)
                )
        is_old = self._cuda == 12 or self._arch < _FIRST_ARCH_OF_CUDA_13
        package = "nvidia-cuda-nvrtc" + ("-cu12" if is_old else "")
        raise DeviceError(
            f"kernels for sm_{self._arch} must be compiled, and there is no NVRTC of CUDA "
            f"{self._cuda} for that here{known and f' ({known})'}: pip install --upgrade {package}"
        )


def _seen(text: str) -> str:
    """What of a text reaches the machine code: not comments (no string of ours has a //)."""
    lines = (line.partition("//")[0].strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("#line"))
