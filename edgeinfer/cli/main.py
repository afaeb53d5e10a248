"""The `edgeinfer` command. stdout carries the answer or the JSON, stderr everything else.

Imports nothing that a command does not need: each command imports for itself.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NoReturn

import click

from edgeinfer import __version__, config, platform
from edgeinfer.cli.console import drop, note, prepare_streams, tell, unheard
from edgeinfer.cli.options import as_flag, common_flags
from edgeinfer.errors import (
    ContextLengthError,
    EdgeInferError,
    InvalidRequestError,
    memory_ran_out,
    reason_of,
)
from edgeinfer.terminal import one_line

_INTERRUPTED = 130
_MAX_LINE = 2000  # characters
_GC_THRESHOLD_OF_START = 200_000  # more than a start makes


def main(args: Sequence[str] | None = None) -> NoReturn:
    """The console script: runs a command and turns whatever ends it into an exit code."""
    arguments = list(sys.argv[1:] if args is None else args)
    # A start makes many objects that all stay: looking through them ten times took 0.03 s.
    gc.set_threshold(_GC_THRESHOLD_OF_START)
    prepare_streams()
    if "reference" not in arguments and "--device=reference" not in arguments:
        # Only that device multiplies in NumPy: threads that nobody uses take 0.06 s of processors
        # while it is imported, and 40 MB of address space each.
        platform.set_for_us("OPENBLAS_NUM_THREADS", "1")
    code = _exit_code(arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop(sys.stdout)
    except OSError as error:
        note(f"edgeinfer: {_one_line(error)}")
        drop(sys.stdout)
        code = code or 1
    if code > platform.SIGNAL_CODE:
        # What still loads or builds in other threads would be waited for.
        os._exit(code)
    sys.exit(code)


def _exit_code(arguments: list[str]) -> int:
    try:
        # click's own main has its own ideas of exit codes for interrupts and pipes.
        with (
            _interrupts_raise(),
            platform.signals_exit(),
            commands.make_context("edgeinfer", [*arguments]) as context,
        ):
            commands.invoke(context)
    except click.ClickException as error:
        error.message = _on_a_line(error.message)  # type: ignore[misc]
        with unheard():
            error.show()
        return error.exit_code
    except click.exceptions.Exit as exit:
        return exit.exit_code
    except (KeyboardInterrupt, click.Abort):
        tell("\n")
        return _INTERRUPTED
    except BrokenPipeError:
        drop(sys.stdout)
    except SystemExit as end:  # a signal
        return int(end.code or 0)
    except Exception as error:
        if "--debug" in arguments or config.is_debug():
            import traceback

            with unheard():
                traceback.print_exc()
        note(f"edgeinfer: {_one_line(error)}")
        is_usage = isinstance(error, InvalidRequestError)
        return 2 if is_usage and not isinstance(error, ContextLengthError) else 1
    return 0


def _interrupts_raise() -> AbstractContextManager[None]:
    """While a command runs, an interrupt is KeyboardInterrupt, whatever it is around it."""
    outside = signal.getsignal(signal.SIGINT)
    is_another = callable(outside) and outside is not signal.default_int_handler
    numbers = [signal.SIGINT] if is_another else []
    return platform.signals_handled(numbers, signal.default_int_handler)


def _message(error: Exception) -> str:
    if isinstance(error, EdgeInferError):
        return error.spelled(as_flag)
    if not isinstance(error, OSError):
        return str(error)
    files = [str(f) or repr("") for f in (error.filename, error.filename2) if f is not None]
    return ": ".join(filter(None, [" to ".join(files), reason_of(error)]))


def _one_line(error: Exception) -> str:
    text = _on_a_line(_message(error))
    if isinstance(error, FileNotFoundError) and not _is_somewhere():
        text += "; the folder you are in was deleted: cd to another"
    if isinstance(error, EdgeInferError):
        return text
    if isinstance(error, OSError) and error.args:
        return text
    if memory_ran_out(error):
        return "memory ran out: close other programs, or raise this one's limits (ulimit -v, -d)"
    return f"unexpected {type(error).__name__}: {text} (--debug shows where)"


def _on_a_line(message: str) -> str:
    return one_line(" ".join(message.split()), _MAX_LINE)


def _is_somewhere() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


_NAMES = (
    "bench", "cache", "chat", "doctor", "history", "info", "list", "load", "perplexity", "plan",
    "pull", "replay", "rm", "run", "selftest", "serve", "tokenize", "warmup",
)  # fmt: skip


class _Commands(click.Group):
    """Each is a file of this folder, imported when it is asked for: flags take 2 ms to make."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_NAMES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _NAMES:
            return None
        command: click.Command = importlib.import_module(f"edgeinfer.cli.{name}").command
        return command

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Says what a word may have been meant for that is no command."""
        if args[0] not in _NAMES and not args[0].startswith("-"):
            from edgeinfer.hub.catalog import nearest

            near = nearest(args[0], _NAMES, 1)
            is_file = args[0].lower().endswith(".gguf")
            meant = near[0] if near else f"chat {args[0]}" if is_file else ""
            hint = f"Did you mean `edgeinfer {meant}`?" if meant else ""
            context.fail(f"No such command {args[0]!r}. {hint}".strip())
        return super().resolve_command(context, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgeinfer")
@common_flags
def commands() -> None:
    """Run GGUF language models on this machine."""
