"""Other programs: how they are found and started, Python above all."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

from edgeinfer.platform import forks

if TYPE_CHECKING:
    import subprocess

    from edgeinfer.platform.forks import ForkedProcess

_PACKAGE = Path(__file__).parent.parent


def can_start_python() -> bool:
    """Whether there is an interpreter to start: a frozen program would start itself."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


def python_command(module: str, *arguments: str, folders: Sequence[str] = ()) -> list[str]:
    """A command that runs a module as `python -m` does, for `start_program`.

    Modules are found in `folders`, then where this process finds them, but never in the folder it
    is started in: anything may lie there.
    """
    flags = ["-B"] if sys.dont_write_bytecode else []
    found = "\n".join([*folders, *module_folders()])
    return [sys.executable, _alone(), *flags, "-c", _RUN_MODULE, found, module, *arguments]


def begin_anew() -> None:
    """Have this process begin anew what it was started for, with the streams that it has.

    Nothing that was read may be left in a buffer. Where the system can't, the process goes on.
    """
    if os.name == "posix":
        with suppress(OSError):
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _alone() -> str:
    """Python's flag to look at nothing of the user's."""
    # -I doesn't look at PYTHONHOME either, without which a moved Python finds nothing.
    return "-s" if "PYTHONHOME" in os.environ else "-I"


_RUN_MODULE = """
import sys
found = sys.argv.pop(1).split("\\n")
sys.path = found + [folder for folder in sys.path if folder and folder not in found]
del sys.argv[0]
import runpy
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def start_isolated(
    module: str, folders: Sequence[str], *, may_fork: bool = False
) -> subprocess.Popen[bytes] | ForkedProcess:
    """Start `main()` of a module that lies in `folders`, as is all that Python lacks of itself.

    A copy of this process starts sooner, which `may_fork` allows: for one that holds nothing yet.
    No garbage is collected before it asks for that: imports would be a tenth slower.
    OSError where no such process can be started.
    """
    if may_fork and forks.can_fork():
        return forks.fork(module, [*folders, *module_folders()], str(_PACKAGE))
    if getattr(sys, STARTS_ITSELF, False):
        command = [sys.executable, MODULE_FLAG, module]
    elif can_start_python():
        # Without `site` it is ready 20 ms sooner.
        command = [sys.executable, _alone(), "-S", "-c", _RUN_MAIN, module, *folders]
    else:
        raise OSError("this program can't start a second Python, since it is frozen or embedded")
    # Any thread may start it; it ends when nobody has the other end of its pipe.
    return start_program(command, is_text=False, hears_keys=False, ends_with_us=False)


STARTS_ITSELF = "_edgeinfer_starts_itself"  # set in `sys` by a frozen program that knows the flag
MODULE_FLAG = "--edgeinfer-module"
_RUN_MAIN = """
import gc, sys
gc.disable()
sys.path = [folder for folder in sys.path if folder] + sys.argv[2:]
import importlib
importlib.import_module(sys.argv[1]).main()
"""


def module_folders() -> list[str]:
    """Where this process finds modules, but for the folder it was started in."""
    ours = str(_PACKAGE.parent)
    found = [folder for folder in sys.path if os.path.isabs(folder) and not _is_here(folder)]
    return found if ours in found else [ours, *found]


def _is_here(folder: str) -> bool:
    try:
        return os.path.samefile(folder, os.curdir)
    except OSError:
        return False


def find_program(name: str) -> str | None:
    """The path of a program in PATH; never one in the current folder, where Windows looks first."""
    endings = ["", *os.environ.get("PATHEXT", "").split(";")] if sys.platform == "win32" else [""]
    for folder in filter(os.path.isabs, os.get_exec_path()):
        for path in (os.path.join(folder, name + ending) for ending in endings):
            if os.path.isfile(path) and os.access(path, os.X_OK):
                return path
    return None


def run_tool(command: Sequence[str], text: bytes) -> bool:
    """Give a text to a program of PATH that takes it at once; False where that fails."""
    import subprocess

    program = find_program(command[0])
    if program is None:
        return False
    try:
        # Nobody reads what it says: xclip stays in the background, and would keep a pipe open.
        done = subprocess.run(
            [program, *command[1:]], input=text, timeout=_TOOL_SECONDS, cwd=_PACKAGE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


_TOOL_SECONDS = 2.0


def run_editor(command: Sequence[str], file: Path) -> int:
    """Run a program of PATH that has the terminal and writes a file; its exit code.

    It runs in the file's folder: nothing that lies in the current one changes what it does. Keys
    that interrupt are the program's; what ends us asks it to end too, which editors do with all
    that is written. OSError where it can't be started.
    """
    import signal
    import subprocess

    from edgeinfer.platform.signals import ending_signals, signals_handled

    program = find_program(command[0])
    if program is None:
        raise FileNotFoundError(errno.ENOENT, "no such program in PATH", command[0])
    keys = [getattr(signal, name) for name in ("SIGINT", "SIGQUIT") if hasattr(signal, name)]
    others = {n: signal.getsignal(n) for n in ending_signals() if n not in keys}
    running: list[subprocess.Popen[bytes]] = []
    came: list[int] = []  # while it was being started

    def pass_on(number: int, frame: Any) -> None:
        if running:
            running[0].send_signal(number)
        else:
            came.append(number)
        if callable(ours := others[number]):
            ours(number, frame)

    # A handler, unlike SIG_IGN, is not handed down to the program.
    with signals_handled(keys, lambda *_: None), signals_handled(list(others), pass_on):
        running.append(
            subprocess.Popen(
                [program, *command[1:], str(file)], cwd=file.parent, env=_environment()
            )
        )
        for number in came:
            running[0].send_signal(number)
        return running[0].wait()


def set_for_us(name: str, value: str) -> None:
    """Set an environment variable that nobody has set; programs that we start don't get it."""
    if name not in os.environ:
        os.environ[name] = value
        _FOR_US.add(name)


_FOR_US: set[str] = set()


def _environment() -> dict[str, str]:
    """Ours, but for what would change what a child that is written in Python imports."""
    return {
        k: v
        for k, v in os.environ.items()
        if (k == "PYTHONHOME" or k[:6] != "PYTHON") and k not in _FOR_US
    }


def start_program(
    command: Sequence[str],
    *,
    errors: IO[Any] | int | None = None,
    talks: bool = True,
    is_text: bool = True,
    folder: Path | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
    in_background: bool = False,
    hears_keys: bool = True,
    ends_with_us: bool = True,
) -> subprocess.Popen[Any]:
    """A child whose standard streams are pipes, of text or bytes, where it `talks`, else closed.

    It runs in `folder`, by default our own: what lies where this process was started can't change
    what it does. `in_background` it gets only what processors have left over; then, and where it
    does not hear keys, an interrupt from the terminal doesn't reach it. On Linux it `ends_with_us`
    whatever ends us: with the thread that starts it, to be precise, which has to wait for it.
    OSError where it can't be run, or the exit code NOT_RUN with a line that says why.
    """
    import subprocess  # 20 ms that most starts don't need

    stream = subprocess.PIPE if talks else subprocess.DEVNULL
    is_apart = in_background or not hears_keys
    names = _BACKGROUND_FLAGS[not in_background :] if is_apart else ()
    process = subprocess.Popen(
        _ending_with_us(command) if ends_with_us else command,
        stdin=stream,
        stdout=stream,
        stderr=subprocess.DEVNULL if errors is None else errors,
        text=is_text,
        cwd=folder or _PACKAGE,
        env={**_environment(), **variables},
        start_new_session=is_apart,
        creationflags=sum(getattr(subprocess, name, 0) for name in names),
    )
    if in_background:
        try:
            os.setpriority(os.PRIO_PROCESS, process.pid, 19)
            os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))
        except (AttributeError, OSError):  # not this system's way, or it forbids that
            pass
    return process


def _ending_with_us(command: Sequence[str]) -> Sequence[str]:
    """A command whose process the system kills when this one is gone, where it can do that."""
    if sys.platform != "linux" or not can_start_python():
        return command
    return [sys.executable, _alone(), "-S", "-c", _END_WITH_PARENT, str(os.getpid()), *command]


# PR_SET_PDEATHSIG is 1, SIGKILL 9. Python ignores two signals, and a program it becomes would too.
_END_WITH_PARENT = """
import sys
sys.path = [folder for folder in sys.path if folder]
import _signal, os
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)
except (ImportError, OSError, AttributeError):
    pass
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
    _signal.signal(number, _signal.SIG_DFL)
try:
    os.execv(sys.argv[2], sys.argv[2:])
except OSError as error:
    print(f"{sys.argv[2]} can't be run ({error.strerror})", file=sys.stderr)
    sys.exit(126)
"""
NOT_RUN = 126  # what a shell says too of a program that it can't run
_BACKGROUND_FLAGS = ("IDLE_PRIORITY_CLASS", "CREATE_NEW_PROCESS_GROUP", "CREATE_NO_WINDOW")
