"""The process in which chat templates run: Jinja, and limits that the system enforces.

It answers one request after another and ends when whoever started it closes its input.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import marshal
import struct
import sys
import time
from collections.abc import Iterable
from datetime import datetime
from typing import Any, BinaryIO, NamedTuple

from edgeinfer.platform.limits import ProcessLimits

# What a template may take beyond what the process has when it is ready.
MEMORY = 112 << 20
LENGTH = struct.Struct("<Q")
REPLY = struct.Struct("<BdqQ")  # kind, processor seconds, line (0: unknown), bytes that follow
TEXT, ERROR, LIMIT = range(3)
_FREE_CHARS, _CHARS_PER_BYTE = 1 << 20, 16
_KEPT_TEMPLATES = 8
_LONGEST_ERROR = 500


class Request(NamedTuple):
    """One text to render, in at most `seconds` of processor time.

    Without variables the source is compiled, and nothing of it runs.
    """

    source: str
    variables: dict[str, Any] | None
    seconds: float


class Answer(NamedTuple):
    kind: int
    text: str
    line: int | None = None


def most_chars(n_request_bytes: int) -> int:
    """Of a text, for a request of so many bytes: real templates add little to what they get."""
    return _FREE_CHARS + _CHARS_PER_BYTE * n_request_bytes


def main() -> None:
    """Serve standard input; first comes one byte, 1 if the system keeps processor time."""
    requests, replies = open(0, "rb", closefd=False), open(1, "wb", closefd=False)
    templates = _Templates()
    gc.enable()
    limits = ProcessLimits(MEMORY)
    _send(replies, bytes([limits.ends_loops]))
    while header := requests.read(LENGTH.size):
        data = requests.read(*LENGTH.unpack(header))
        start = time.process_time()
        try:
            answer, body = _answer(templates, limits, data)
            limits.allow_seconds(None)
        except (MemoryError, TimeoutError) as error:
            limits.allow_seconds(None)
            answer = _over(error)
            body = answer.text.encode()
        seconds = time.process_time() - start
        _send(replies, REPLY.pack(answer.kind, seconds, answer.line or 0, len(body)) + body)


def _over(error: MemoryError | TimeoutError) -> Answer:
    return Answer(LIMIT, "memory" if isinstance(error, MemoryError) else "time", _error_line(error))


def _answer(templates: _Templates, limits: ProcessLimits, data: bytes) -> tuple[Answer, bytes]:
    request = Request(*marshal.loads(data))
    limits.allow_seconds(request.seconds)
    answer = templates.answer(request, most_chars(len(data)))
    return answer, answer.text.encode("utf-8", "surrogatepass")


def _send(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()


def _import_jinja() -> None:
    """Jinja without what its package imports for loaders and caches of files: a third of it."""
    spec = importlib.util.find_spec("jinja2")
    if spec is None:
        return
    sys.modules["jinja2"] = importlib.util.module_from_spec(spec)
    try:
        importlib.import_module("jinja2.sandbox")
    except ImportError:  # a version whose modules need the whole package
        for name in [name for name in sys.modules if name.partition(".")[0] == "jinja2"]:
            del sys.modules[name]


class _TooLongError(Exception):
    """The text has more characters than were asked for."""


class _Templates:
    """Compiled templates, and the environment that they share."""

    def __init__(self) -> None:
        # Loaded before limits hold, and only here: who imports this module needs no Jinja.
        _import_jinja()
        from jinja2.ext import Extension
        from jinja2.parser import Parser
        from jinja2.runtime import Undefined
        from jinja2.sandbox import SandboxedEnvironment

        class GenerationTag(Extension):
            """{% generation %} marks the assistant's text for training; here it is a block."""

            tags = {"generation"}

            def parse(self, parser: Parser) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        self._undefined = Undefined
        self._compiled: dict[str, Any] = {}
        self._environment = SandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
        )
        self._environment.filters |= {"tojson": self._to_json, "from_json": json.loads}
        del self._environment.globals["lipsum"]
        self._environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def answer(self, request: Request, n_chars: int) -> Answer:
        """The text, or what went wrong: a template may raise anything."""
        try:
            return Answer(TEXT, _joined(self._parts(request), n_chars))
        except (MemoryError, TimeoutError) as error:
            return _over(error)
        except _TooLongError as error:
            return Answer(LIMIT, "text", _error_line(error))
        except Exception as error:
            text = str(error) or type(error).__name__
            return Answer(ERROR, text[:_LONGEST_ERROR], _error_line(error))

    def _parts(self, request: Request) -> Iterable[str]:
        template = self._compiled.get(request.source)
        if template is None:
            template = self._environment.from_string(request.source)
            if len(self._compiled) >= _KEPT_TEMPLATES:
                self._compiled.clear()
            self._compiled[request.source] = template
        return () if request.variables is None else template.generate(request.variables)

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as it is, without the escapes for HTML that Jinja's own filter makes."""

        def default(value: Any) -> list[Any]:
            if isinstance(value, self._undefined):
                raise TypeError("tojson was given an undefined value")
            return list(value)

        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
            default=default,
        )


def _joined(parts: Iterable[str], n_chars: int) -> str:
    kept = []
    for part in parts:
        kept.append(part)
        n_chars -= len(part)
        if n_chars < 0:
            raise _TooLongError
    return "".join(kept)


def _error_line(error: BaseException) -> int | None:
    """The line of the template in which `error` arose."""
    line, frame = getattr(error, "lineno", None), error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "<template>":
            line = frame.tb_lineno
        frame = frame.tb_next
    return line if isinstance(line, int) else None


class _RaisedByTemplateError(Exception):
    """The template called raise_exception."""


def _raise_exception(message: object) -> None:
    raise _RaisedByTemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
