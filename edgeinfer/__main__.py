"""The `edgeinfer` command, also as `python -m edgeinfer`: what must stand before any import.

Knows nothing of commands.
"""

from __future__ import annotations

# Nothing that takes a millisecond to import: an interrupt would print a traceback until `main`.
import os
import signal
import sys

INTERRUPTED = 130


def main() -> None:
    """The console script. Before and after a command, an interrupt ends it without a word."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Not KeyboardInterrupt: imports, destructors and exits would print it.
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
    sys.unraisablehook = _leave_if_interrupted
    from edgeinfer.cli import main as cli

    cli.main()


def _leave_if_interrupted(ignored: sys.UnraisableHookArgs) -> None:
    """An interrupt may come within a destructor, where Python would print and forget it."""
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        os._exit(INTERRUPTED)
    sys.__unraisablehook__(ignored)


def _forget_current_folder() -> None:
    """`python -m` looks there first for whatever is imported; only our own package may be there."""
    first, ours = sys.path[0] or os.curdir, os.path.dirname(os.path.dirname(__file__))
    try:
        if os.path.samefile(first, os.curdir) and not os.path.samefile(first, ours):
            del sys.path[0]
    except OSError:  # the folder was deleted
        pass


if __name__ == "__main__":
    _forget_current_folder()
    main()
