"""The exceptions edgeinfer raises, each also the builtin that an embedding program would catch.

A message states what was found, what is supported and what to do, in one line: what a file or
a server put into it can neither hide nor fake a part of it, wherever it is shown.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType
from typing import NamedTuple, TypeAlias


class Keyword(NamedTuple):
    """A keyword of the API in what an error advises, with the value to give it, if one is meant."""

    name: str
    value: int | str | tuple[str, ...] | None = None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value!r}"


Advice: TypeAlias = Sequence[str | Keyword]


class EdgeInferError(Exception):
    """Base of every error that edgeinfer raises on purpose.

    A message ends with its `advice`, after what was `found`, where that names keywords.
    """

    def __init__(self, found: str = "", *, advice: Advice = ()) -> None:
        self.found, self.advice = _clean(found, _MAX_MESSAGE), tuple(advice)
        super().__init__(self.spelled(str))

    def spelled(self, spell: Callable[[Keyword], str]) -> str:
        """The message, with keywords as a program has them: as flags, for example."""
        advice = "".join(spell(each) if isinstance(each, Keyword) else each for each in self.advice)
        return _clean(f"{self.found}; {advice}" if advice else self.found, _MAX_MESSAGE)


_MAX_MESSAGE = 2000
_MAX_PATH = 1000


def _clean(text: str, limit: int = 200) -> str:
    try:
        from edgeinfer.terminal import one_line  # a start needs no errors
    except ImportError:  # nothing can be imported any more: the interpreter is almost gone
        return text[:limit]
    return one_line(text, limit)


class ModelNotFoundError(EdgeInferError, FileNotFoundError):
    """No model by this name or path; `near` are names that it may have been meant for."""

    def __init__(self, found: str = "", *, advice: Advice = (), near: Sequence[str] = ()) -> None:
        self.near = tuple(near)
        super().__init__(found, advice=advice)


class DownloadError(EdgeInferError, OSError):
    """A model could not be fetched."""


class InvalidModelError(EdgeInferError, ValueError):
    """The file is damaged or not what it claims to be.

    `field` names the part of the file, `offset` its byte position (None when it has none).
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        field: str | None = None,
        offset: int | None = None,
    ) -> None:
        self.path, self.offset = path, offset
        self.field = field if field is None else _clean(field)
        where = [_clean(str(path), _MAX_PATH)] if path is not None else []
        where += [f"field {self.field}"] if field is not None else []
        where += [f"offset {offset}"] if offset is not None else []
        super().__init__(f"{message} ({', '.join(where)})" if where else message)


class UnsupportedModelError(EdgeInferError):
    """A sound file that this version can't run; `missing` names the operations or types."""

    def __init__(
        self, message: str, *, architecture: str | None = None, missing: Sequence[str] = ()
    ) -> None:
        self.architecture = architecture if architecture is None else _clean(architecture)
        self.missing = tuple(map(_clean, missing))
        super().__init__(message)


class PlanError(EdgeInferError, MemoryError):
    """The model does not fit: bytes `needed` and `available`; a context of `n_ctx` tokens would.

    `memory` is the one that is short: "host", or a GPU's as "cuda:0".
    """

    def __init__(
        self,
        found: str,
        *,
        advice: Advice = (),
        needed: int | None = None,
        available: int | None = None,
        n_ctx: int | None = None,
        memory: str = "host",
    ) -> None:
        self.needed, self.available, self.n_ctx, self.memory = needed, available, n_ctx, memory
        super().__init__(found, advice=advice)

    @property
    def fits(self) -> str | None:
        """In words, what would fit."""
        return None if self.n_ctx is None else str(Keyword("n_ctx", self.n_ctx))


class ContextLengthError(EdgeInferError, ValueError):
    """More tokens than the context holds."""

    code = "context_length_exceeded"

    # Defaults, or it could not be unpickled: a pool of processes would wait for it for ever.
    def __init__(
        self, found: str, *, advice: Advice = (), n_tokens: int = 0, n_ctx: int = 0
    ) -> None:
        self.n_tokens, self.n_ctx = n_tokens, n_ctx
        super().__init__(found, advice=advice)


class InvalidRequestError(EdgeInferError, ValueError):
    """A parameter has a value that can't be used; `param` is its name."""

    def __init__(self, found: str, *, advice: Advice = (), param: str | None = None) -> None:
        self.param = param
        super().__init__(found, advice=advice)


class SessionError(EdgeInferError, ValueError):
    """A saved session is damaged, or of another model or other settings."""


class TemplateError(EdgeInferError):
    """A chat template failed; `line` is its line number, None when unknown."""

    def __init__(self, found: str = "", *, advice: Advice = (), line: int | None = None) -> None:
        self.line = line
        super().__init__(found, advice=advice)


class DeviceError(EdgeInferError):
    """A device is absent or can't do what was asked."""


class BusyError(EdgeInferError):
    """So many requests wait already that no other is taken on.

    This one would take `n_bytes` while it waits; all that wait may take `most`.
    """

    def __init__(self, found: str = "", *, n_bytes: int = 0, most: int = 0) -> None:
        self.n_bytes, self.most = n_bytes, most
        super().__init__(found)


class ClosedError(EdgeInferError):
    """The object was closed, or belongs to the parent of a forked process."""


class KeptError:
    """An error that one thread keeps for another, which raises it once.

    What is raised keeps the frames that it goes through, and they what they hold: whatever keeps
    it in turn would keep all that until garbage is collected.
    """

    def __init__(self) -> None:
        self._kept: list[BaseException] = []  # one at most

    def keep(self, error: BaseException) -> None:
        self._kept = [error]

    def raise_once(self) -> None:
        if self._kept:
            raise self._kept.pop()  # which no name holds


def another(error: BaseException) -> BaseException:
    """One like it, for one more who is told: what is raised keeps the frames that it went through.

    The same one where its class may make it of something else than it has kept.
    """
    import copy

    is_ours = isinstance(error, EdgeInferError)
    if not is_ours and isinstance(type(error).__init__, FunctionType):
        return error
    try:
        found = copy.copy(error)
    except Exception:
        return error
    found.__cause__, found.__context__ = error.__cause__, error.__context__
    found.__suppress_context__ = error.__suppress_context__
    return found.with_traceback(error.__traceback__)


def memory_ran_out(error: BaseException) -> bool:
    """Whether an error, of whoever raised it, says that there was no memory for something.

    Or the error does that it was raised in place of: libraries tell in their own words.
    """
    # A library that finds no room says so in the middle of how it can be installed.
    is_unmapped = isinstance(error, (ImportError, OSError)) and "failed to map" in str(error)
    is_refused = getattr(error, "errno", 0) == errno.ENOMEM
    if isinstance(error, MemoryError) or is_refused or is_unmapped:
        return True
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return before is not None and memory_ran_out(before)


def reason_of(error: BaseException) -> str:
    """Why something failed, in words: the system's, without its number and a file's name."""
    inner = getattr(error, "reason", None)
    if isinstance(inner, BaseException):  # what urllib puts around it
        return reason_of(inner)
    words = getattr(error, "strerror", None) or (inner if isinstance(error, OSError) else None)
    return str(words or error) or type(error).__name__
