"""A child that is a copy of this process: it is ready in half the time that a new Python takes."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NoReturn


class ForkedProcess:
    """The copy as its parent sees it: what `subprocess.Popen` calls by these names."""

    def __init__(self, pid: int, stdin: int, stdout: int) -> None:
        self.pid = pid
        self.stdin, self.stdout = open(stdin, "wb"), open(stdout, "rb")
        self._status: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        with self._lock:
            if self._status is None:
                try:
                    pid, status = os.waitpid(self.pid, os.WNOHANG)
                except ChildProcessError:  # somebody else asked first, and knows it alone
                    pid, status = self.pid, 0
                if pid:
                    self._status = os.waitstatus_to_exitcode(status)
            return self._status

    def wait(self) -> int:
        """The exit status, once there is one."""
        while (status := self.poll()) is None:
            # It stays a zombie, so that nobody else gets its number before `kill` has looked.
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        return status

    def kill(self) -> None:
        with self._lock:
            if self._status is None:
                os.kill(self.pid, signal.SIGKILL)


def can_fork() -> bool:
    """Whether a copy would be whole: of several threads it has one, and the locks of all."""
    try:
        return sys.platform == "linux" and len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def fork(module: str, folders: Sequence[str], home: str) -> ForkedProcess:
    """Run `main()` of a module in a copy that imports from `folders` only and runs in `home`.

    Its standard streams are pipes and nothing else is open; signals and keys for this process
    don't reach it. Garbage is not collected until it asks. OSError where there is no room for it.
    """
    pipes: list[int] = []
    # A signal for the child must not meet the parent's handlers in it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        for _ in range(2):
            pipes += os.pipe()
        pid = os.fork()
        if pid == 0:
            _be_child(module, folders, home, (pipes[0], pipes[3]), mask)
    except OSError:
        for end in pipes:
            os.close(end)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.close(pipes[0])
    os.close(pipes[3])
    return ForkedProcess(pid, stdin=pipes[1], stdout=pipes[2])


def _be_child(
    module: str,
    folders: Sequence[str],
    home: str,
    streams: tuple[int, int],
    mask: Iterable[int],
) -> NoReturn:
    try:
        import fcntl  # not on Windows, where nothing forks

        gc.disable()
        os.setsid()
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):  # a handler of the parent's
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        # Where this process was started without standard streams, a pipe may have their numbers.
        for stream, end in enumerate([fcntl.fcntl(end, fcntl.F_DUPFD, 3) for end in streams]):
            os.dup2(end, stream)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        _close_others()
        os.chdir(home)
        sys.path = list(folders)
        importlib.import_module(module).main()
    except BaseException:  # the parent's handlers and destructors are still below on the stack
        os._exit(1)
    os._exit(0)


def _close_others() -> None:
    """All but the standard streams: what is open, since there may be a billion that could be."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with suppress(OSError):  # the one by which they were listed
                os.close(int(name))
