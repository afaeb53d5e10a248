"""Every question to the operating system, each with an answer for systems that don't know it.

Knows nothing of models or kernels. A name's module is imported when the name is first used: the
process in which templates run needs one of them, a start few.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeinfer.platform.children import (
        MODULE_FLAG,
        NOT_RUN,
        STARTS_ITSELF,
        begin_anew,
        can_start_python,
        find_program,
        module_folders,
        python_command,
        run_editor,
        run_tool,
        set_for_us,
        start_isolated,
        start_program,
    )
    from edgeinfer.platform.devices import (
        CudaDriver,
        Gpu,
        NvrtcLibrary,
        board_name,
        cuda_driver,
        cuda_library,
        nvrtc_libraries,
    )
    from edgeinfer.platform.energy import EnergyMeter
    from edgeinfer.platform.files import (
        ReadableFile,
        append_private,
        bytes_below,
        delete_all,
        delete_parts,
        files_below,
        forget_file_pages,
        free_disk,
        is_at,
        is_writable,
        make_folder,
        open_appending,
        open_scratch,
        read_whole,
        replaced_whole,
        sync,
        try_lock,
        unlink_open,
        write_whole,
        written_whole,
    )
    from edgeinfer.platform.forks import ForkedProcess
    from edgeinfer.platform.limits import ProcessLimits, ended_for_time
    from edgeinfer.platform.locks import ProcessLock
    from edgeinfer.platform.memory import available_memory, memory_budget, peak_rss, rss
    from edgeinfer.platform.native import (
        Code,
        Memory,
        ThreadCalls,
        can_run_generated_code,
        keep,
        thread_calls,
    )
    from edgeinfer.platform.processors import (
        cpu_name,
        default_threads,
        processor_facts,
        usable_processors,
    )
    from edgeinfer.platform.signals import (
        SIGNAL_CODE,
        signals_call,
        signals_exit,
        signals_handled,
        stop_for_shell,
    )
    from edgeinfer.platform.sockets import end_reading, listen, tls_context
    from edgeinfer.platform.stacks import with_stack
    from edgeinfer.platform.terminals import input_waits
    from edgeinfer.platform.threads import mapped, start_some
    from edgeinfer.platform.trust import distrust, read_private
    from edgeinfer.platform.wakeups import Wakeup

_NAMES = {
    "children": (
        "MODULE_FLAG NOT_RUN STARTS_ITSELF begin_anew can_start_python find_program "
        "module_folders python_command run_editor run_tool set_for_us start_isolated start_program"
    ),
    "forks": "ForkedProcess",
    "devices": "CudaDriver Gpu NvrtcLibrary board_name cuda_driver cuda_library nvrtc_libraries",
    "energy": "EnergyMeter",
    "files": (
        "ReadableFile append_private bytes_below delete_all delete_parts files_below "
        "forget_file_pages free_disk is_at is_writable make_folder open_appending open_scratch "
        "read_whole replaced_whole sync try_lock unlink_open write_whole written_whole"
    ),
    "limits": "ProcessLimits ended_for_time",
    "locks": "ProcessLock",
    "memory": "available_memory memory_budget peak_rss rss",
    "native": "Code Memory ThreadCalls can_run_generated_code keep thread_calls",
    "processors": "cpu_name default_threads processor_facts usable_processors",
    "signals": "SIGNAL_CODE signals_call signals_exit signals_handled stop_for_shell",
    "sockets": "end_reading listen tls_context",
    "stacks": "with_stack",
    "terminals": "input_waits",
    "threads": "mapped start_some",
    "trust": "distrust read_private",
    "wakeups": "Wakeup",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "Code",
    "CudaDriver",
    "EnergyMeter",
    "ForkedProcess",
    "Gpu",
    "MODULE_FLAG",
    "Memory",
    "NOT_RUN",
    "NvrtcLibrary",
    "ProcessLimits",
    "ProcessLock",
    "ReadableFile",
    "SIGNAL_CODE",
    "STARTS_ITSELF",
    "ThreadCalls",
    "Wakeup",
    "append_private",
    "available_memory",
    "begin_anew",
    "board_name",
    "bytes_below",
    "can_run_generated_code",
    "can_start_python",
    "cpu_name",
    "cuda_driver",
    "cuda_library",
    "default_threads",
    "delete_all",
    "delete_parts",
    "distrust",
    "end_reading",
    "ended_for_time",
    "files_below",
    "find_program",
    "forget_file_pages",
    "free_disk",
    "input_waits",
    "is_at",
    "is_writable",
    "keep",
    "listen",
    "make_folder",
    "mapped",
    "memory_budget",
    "module_folders",
    "nvrtc_libraries",
    "open_appending",
    "open_scratch",
    "peak_rss",
    "processor_facts",
    "python_command",
    "read_private",
    "read_whole",
    "replaced_whole",
    "rss",
    "run_editor",
    "run_tool",
    "set_for_us",
    "signals_call",
    "signals_exit",
    "signals_handled",
    "start_isolated",
    "start_program",
    "start_some",
    "stop_for_shell",
    "sync",
    "thread_calls",
    "tls_context",
    "try_lock",
    "unlink_open",
    "usable_processors",
    "with_stack",
    "write_whole",
    "written_whole",
]


def __getattr__(name: str) -> Any:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module 'edgeinfer.platform' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"edgeinfer.platform.{module}"), name)
    globals()[name] = value
    return value
