"""An answer with all that its tokens follow from: kept in a file, computed again on any device."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from edgeinfer import platform
from edgeinfer.engine.generation import check_ids
from edgeinfer.errors import InvalidRequestError, Keyword, reason_of
from edgeinfer.llm import LLM
from edgeinfer.parameters import LOAD, REQUEST, SAMPLING, file_path, id_list, shown
from edgeinfer.stream import Stream
from edgeinfer.values import is_same

FORMAT = 1
_MOST_BYTES = 256 << 20  # of a file: more ids than any context holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """An answer, the model, and every setting that the answer depends on.

    `sampling` has a value for every keyword that picks tokens, the seed among them.
    """

    version: str  # of the edgeinfer that made it
    device: str
    model: str  # the path of its file
    fingerprint: str  # of that file: `GGUFFile.fingerprint`
    n_ctx: int
    kv_type: tuple[str, ...]
    numerics: str
    overflow: str
    n_keep: int
    sampling: Mapping[str, Any]
    stop_token_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_id: int | None  # the token that ended it, where one did
    grammar: str = ""  # that it had to follow, as the keyword of this name takes it

    @classmethod
    def of(cls, llm: LLM, stream: Stream) -> Recording:
        """What reproduces the answer of a stream that has ended.

        InvalidRequestError for one that follows from what no file holds.
        """
        from edgeinfer import __version__

        answer, request, opened = stream.completion, stream.request, llm.runtime
        stream.check_engine(opened.engine, "stream")
        if request.hook is not None and request.hook.logits:
            raise InvalidRequestError(
                "an answer whose on_step was shown logits can't be recorded: it may have edited "
                "them; leave 'logits' out of watch",
                param="watch",
            )
        params = request.params
        names = [name for name in SAMPLING if name != "logprobs"]
        return cls(
            version=__version__,
            device=opened.devices,
            model=str(opened.model.file.path),
            fingerprint=opened.fingerprint,
            n_ctx=llm.n_ctx,
            kv_type=_kv_type(llm),
            numerics=_numerics(llm),
            overflow=request.overflow,
            n_keep=request.n_pinned,
            sampling={name: getattr(params, name) for name in names},
            stop_token_ids=tuple(sorted(request.stop_ids)),
            prompt_ids=tuple(request.ids),
            token_ids=answer.token_ids,
            finish_reason=answer.finish_reason,
            stop_id=answer.stop if isinstance(answer.stop, int) else None,
            grammar=request.constraint.text if request.constraint is not None else "",
        )

    # -- files -----------------------------------------------------------------------------------

    def as_json(self) -> dict[str, Any]:
        """The fields of a file that `read` takes: what `edgeinfer run --json` writes, or less."""
        sampling = dict(self.sampling)
        # JSON has neither infinities, which ban and force tokens, nor keys that are numbers.
        bias: Mapping[int, float] = sampling["logit_bias"]
        sampling["logit_bias"] = [[token, repr(float(value))] for token, value in bias.items()]
        grammar = {"grammar": self.grammar} if self.grammar else {}
        return {
            "prompt_token_ids": list(self.prompt_ids),
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "version": self.version,
            "replay": {
                "format": FORMAT,
                "model": self.model,
                "fingerprint": self.fingerprint,
                "device": self.device,
                "n_ctx": self.n_ctx,
                "kv_type": list(self.kv_type),
                "numerics": self.numerics,
                "overflow": self.overflow,
                "n_keep": self.n_keep,
                "stop_token_ids": list(self.stop_token_ids),
                "stop_id": self.stop_id,
                "sampling": sampling,
                **grammar,
            },
        }

    @classmethod
    def read(cls, path: str | PathLike[str]) -> Recording:
        """What `edgeinfer run --json` wrote; InvalidRequestError says what is wrong with it."""
        fields = _Fields(str(path), _read(file_path(path, "path")))
        inner = _Fields(fields.path, fields.get("replay", _mapping, "an object"))
        inner.get("format", _format, f"{FORMAT}, which this version of edgeinfer reads")
        sampling = {
            name: inner.of(inner.get("sampling", _mapping, "keywords"), name)
            for name in SAMPLING
            if name != "logprobs"
        }
        return cls(
            version=fields.get("version", _text, "a text"),
            device=inner.get("device", _text, "a text"),
            model=inner.get("model", _text, "a path"),
            fingerprint=inner.get("fingerprint", _text, "a text"),
            n_ctx=inner.get("n_ctx", LOAD["n_ctx"].check, LOAD["n_ctx"].supported),
            kv_type=inner.get("kv_type", _types, "two types"),
            numerics=inner.get(
                "numerics", LOAD["numerics"].check, LOAD["numerics"].supported, "exact"
            ),
            overflow=inner.get("overflow", _overflow, "'error' or 'slide'"),
            n_keep=inner.get("n_keep", REQUEST["n_keep"].check, REQUEST["n_keep"].supported),
            sampling=sampling,
            stop_token_ids=inner.get("stop_token_ids", _ids, "token ids"),
            prompt_ids=fields.get("prompt_token_ids", _ids, "token ids"),
            token_ids=fields.get("token_ids", _ids, "token ids"),
            finish_reason=fields.get("finish_reason", _text, "a text"),
            stop_id=inner.get("stop_id", _optional_id, "a token id or null"),
            grammar=inner.get("grammar", _text, "a text", default=""),
        )

    # -- again -----------------------------------------------------------------------------------

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens of the answer, and the one that ended it."""
        return self.token_ids + (() if self.stop_id is None else (self.stop_id,))

    def check(self, llm: LLM) -> None:
        """InvalidRequestError unless this is the model, open as it was."""
        found = llm.runtime.fingerprint
        if found != self.fingerprint:
            raise InvalidRequestError(
                f"the answer is of a model with fingerprint {self.fingerprint[:12]}, "
                f"{llm.runtime.model.file.path.name} has {found[:12]}; give the file that it was "
                f"made with ({shown(self.model)} then)",
                param="recording",
            )
        for name, then, now in (
            ("n_ctx", self.n_ctx, llm.n_ctx),
            ("kv_type", self.kv_type, _kv_type(llm)),
            ("numerics", self.numerics, _numerics(llm)),
        ):
            if then != now:
                raise InvalidRequestError(
                    f"{name} was {then} when the answer was recorded, the model is open with {now}",
                    advice=("open it with ", Keyword(name, then)),
                    param=name,
                )

    def replay(self, llm: LLM) -> Replay:
        """Compute the answer again, as far as it was recorded."""
        self.check(llm)
        check_ids(self.tokens, llm.n_vocab, "recording", "the answer")
        given: dict[str, Any] = {
            **self.sampling,
            "overflow": self.overflow,
            "n_keep": self.n_keep,
            "stop_token_ids": self.stop_token_ids,
            "max_tokens": len(self.tokens),
            "grammar": self.grammar or None,
        }
        answer = llm.generate(self.prompt_ids, **given)
        ended = (answer.stop,) if isinstance(answer.stop, int) else ()
        return Replay(self.tokens, answer.token_ids + ended)


@dataclass(frozen=True, slots=True)
class Replay:
    """The tokens of a recorded answer, and those that came when it was computed again."""

    expected: tuple[int, ...]
    found: tuple[int, ...]

    @property
    def is_equal(self) -> bool:
        return self.expected == self.found

    @property
    def differs_at(self) -> int | None:
        """The first token that is another one, or missing; None where all are equal."""
        pairs = zip(self.expected, self.found, strict=False)
        n = min(len(self.expected), len(self.found))
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), n)
        return None if self.is_equal else at


def _kv_type(llm: LLM) -> tuple[str, ...]:
    """As the option spells it; all layers have the same."""
    kinds = ((kv.k_type, kv.v_type) for kv in llm.runtime.segment.caches.values())
    return next(kinds, ("f16", "f16"))


def _numerics(llm: LLM) -> str:
    """Those of a part, where it has others than the rest."""
    return str(llm.runtime.program.describe().get("numerics", "exact"))


# -- fields of a file ------------------------------------------------------------------------------


class _Fields:
    """Fields of an object in a file, each checked as it is asked for."""

    def __init__(self, path: str, values: Mapping[str, Any]) -> None:
        self.path, self._values = path, values

    def get(
        self, name: str, read: Callable[[Any], Any], supported: str, default: Any = None
    ) -> Any:
        if name not in self._values and default is not None:
            return default
        if name not in self._values:
            raise InvalidRequestError(
                f"{shown(self.path)} has no field {name!r}: it is not what `edgeinfer run --json` "
                "of this version writes; record the answer again",
                param="recording",
            )
        try:
            return read(self._values[name])
        except (TypeError, ValueError, OverflowError):
            self.refuse(name, supported)

    def of(self, sampling: Mapping[str, Any], name: str) -> Any:
        """A keyword that picks tokens."""
        fields = _Fields(self.path, sampling)
        parameter = SAMPLING[name]
        read = _biases if name == "logit_bias" else parameter.check
        return fields.get(name, read, parameter.supported)

    def refuse(self, name: str, supported: str) -> NoReturn:
        found = shown(self._values[name])
        raise InvalidRequestError(
            f"{name} in {shown(self.path)} is {found}; it must be {supported}", param="recording"
        ) from None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        with open(path, "rb") as file:
            return _mapping(json.loads(platform.read_whole(file, _MOST_BYTES)))
    except OSError as error:
        raise InvalidRequestError(
            f"{shown(str(path))} can't be read ({reason_of(error)})", param="recording"
        ) from error
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise InvalidRequestError(
            f"{shown(str(path))} is not what `edgeinfer run --json` writes ({shown(str(error))})",
            param="recording",
        ) from None


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError("no JSON object")
    return value


def _format(value: Any) -> int:
    if not is_same(value, FORMAT):
        raise ValueError
    return FORMAT


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _types(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError
    return tuple(map(_text, value))


def _overflow(value: Any) -> str:
    if value not in ("error", "slide"):
        raise ValueError
    return str(value)


def _ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError
    return tuple(id_list(value, "recording"))


def _optional_id(value: Any) -> int | None:
    return None if value is None else _ids([value])[0]


def _biases(value: Any) -> dict[int, float]:
    pairs = [(token, float(_text(bias))) for token, bias in value]
    checked: dict[int, float] = SAMPLING["logit_bias"].check(dict(pairs))
    return checked
