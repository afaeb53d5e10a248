"""What a program frozen by PyInstaller needs of edgeinfer that its imports don't show.

Models, commands and the chat are imported by name when they are first used, and kernels come
ready: a frozen program can't build them, so Numba stays out.
"""

from __future__ import annotations

from PyInstaller.utils.hooks import (
    collect_data_files,
    collect_submodules,
    copy_metadata,
    logger,
)

from edgeinfer.backend import ready_kernel_files

_BUILD_ONLY = (
    "edgeinfer.kernels.cpu.native",
    "edgeinfer.kernels.cpu.build",
    "edgeinfer.pyinstaller",
)
_SHOWN_BY_DOCTOR = ("edgeinfer", "llvmlite", "numpy", "sentencepiece", "textual", "tokenizers")

excludedimports = ["numba", "cupy"]
hiddenimports = [
    *collect_submodules("edgeinfer", filter=lambda name: not name.startswith(_BUILD_ONLY)),
    *collect_submodules("textual.widgets"),
]
kernels = ready_kernel_files()
datas = [
    *collect_data_files("edgeinfer.tui"),
    *((str(path), "edgeinfer/kernels/cpu/ready") for path in kernels),
    *(file for name in _SHOWN_BY_DOCTOR for file in copy_metadata(name)),
]
if not kernels:
    logger.warning(
        "edgeinfer: no ready kernels here, the frozen program will only run with "
        "device='reference'; install edgeinfer from a wheel made by its .ci/wheel.py"
    )
