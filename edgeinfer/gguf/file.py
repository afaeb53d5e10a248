"""A model file, or the parts of a split one, and the tensors they hold."""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from edgeinfer.errors import InvalidModelError, ModelNotFoundError
from edgeinfer.gguf.header import AGAIN, CUT, MAGIC, MAX_KEYS, MAX_TENSORS, Header, TensorInfo
from edgeinfer.gguf.source import FileBytes, Opener, TensorBytes, open_local
from edgeinfer.quant import Weight, quant_type
from edgeinfer.terminal import one_line

if TYPE_CHECKING:
    import hashlib

_MAX_PARTS = 99_999
_SAMPLE_BYTES = 4096  # of each tensor, in a fingerprint
_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")


class GGUFFile:
    """A model file, or all parts of a split one, open until `close`.

    Nothing is mapped: a file that is cut short or written to while it is read is an error.

    `metadata` is that of the first part; `tensors` are those of all parts in file order, also
    the ones whose type this version can't run.
    """

    @classmethod
    def open(cls, path: str | Path, opener: Opener = open_local) -> GGUFFile:
        """Open a GGUF file; of a split one any part may be named, all must be present.

        `opener` opens it and, beside it, the others, by paths.
        """
        parts = [_Part(Path(path), opener)]
        try:
            if parts[0].metadata.get_int("split.count", 1, high=_MAX_PARTS) > 1:
                siblings = _siblings(parts[0])
                parts.pop().close()
                for no, sibling in enumerate(siblings, 1):
                    parts.append(_sibling(sibling, opener, no, len(siblings)))
                _check_parts(parts)
                for part in parts:
                    part.check_in_place()
            return cls(parts)
        except BaseException:
            for part in parts:
                part.close()
            raise

    def __init__(self, parts: list[_Part]) -> None:
        self._parts = parts
        self.path = parts[0].path
        self.paths = tuple(part.path for part in parts)
        self.version = parts[0].version
        self.metadata = parts[0].metadata
        self.tensors: dict[str, Weight] = {}
        for part in parts:
            for name, weight in part.tensors.items():
                if name in self.tensors:
                    raise InvalidModelError(
                        f"a second tensor of this name; {AGAIN}", path=part.path, field=name
                    )
                self.tensors[name] = weight

    @property
    def name(self) -> str:
        """What the file calls its model, else the file's own name; one cleaned line."""
        return one_line(self.metadata.get_str("general.name", "") or self.path.stem)

    @property
    def n_bytes(self) -> int:
        """Size on disk of all parts."""
        return sum(part.size for part in self._parts)

    def fingerprint(self) -> str:
        """A SHA-256 that tells this model from others: of the headers and a sample of each tensor.

        Training or quantising changes a tensor everywhere, but may leave out all of a kind, as
        adapters do. Reading all of a large file would take a minute.
        """
        import hashlib  # 2 ms that starts don't need

        digest = hashlib.sha256()
        for part in self._parts:
            part.add_header_to(digest)
        for weight in self.tensors.values():
            middle = len(weight.data) // 2
            digest.update(weight.data[middle : middle + _SAMPLE_BYTES])
        return digest.hexdigest()

    def close(self) -> None:
        """Close the file and drop its header; what was read of tensors stays."""
        for part in self._parts:
            part.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Part:
    """One file and what its header says."""

    def __init__(self, path: Path, opener: Opener) -> None:
        self.path = path
        self._bytes = FileBytes(path, opener)
        self.size = self._bytes.size
        self.tensors: dict[str, Weight] = {}
        try:
            _check_magic(path, bytes(self._bytes.header(min(64, self.size))[:64]))
            self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._bytes.close()

    def add_header_to(self, digest: hashlib._Hash) -> None:
        digest.update(self._bytes.all())

    def check_in_place(self) -> None:
        """InvalidModelError where another file got this name since it was opened."""
        if not self._bytes.is_in_place():
            raise InvalidModelError(
                "the file was replaced while the parts of its model were opened; load it again "
                "once all are complete",
                path=self.path,
            )

    def _read(self) -> None:
        header = Header(self.path, self._bytes)
        self.version = header.version()
        n_tensors = header.count("tensor count", MAX_TENSORS)
        n_keys = header.count("metadata count", MAX_KEYS)
        self.metadata = header.metadata(n_keys)
        infos = [header.tensor() for _ in range(n_tensors)]
        header.end()
        alignment = self._alignment()
        start = -(-header.at // alignment) * alignment
        _check_tensors(self.path, infos, start, alignment, self.size)
        for info in infos:
            begin = start + info.offset
            data = TensorBytes(self._bytes, begin, info.n_bytes)
            self.tensors[info.name] = Weight(info.name, info.shape, quant_type(info.type), data)

    def _alignment(self) -> int:
        key = "general.alignment"
        alignment = self.metadata.get_int(key, 32, low=1, high=1 << 30)
        if alignment & (alignment - 1):
            raise InvalidModelError(
                f"found {alignment}, need a power of two; {AGAIN}", path=self.path, field=key
            )
        return alignment


def _check_tensors(
    path: Path, infos: list[TensorInfo], start: int, alignment: int, size: int
) -> None:
    seen: set[str] = set()
    for info in infos:
        if info.name in seen:
            message = f"a second tensor of this name; {AGAIN}"
            raise InvalidModelError(message, path=path, field=info.name, offset=info.at)
        seen.add(info.name)
        if info.offset % alignment:
            message = f"data at {info.offset}, need a multiple of {alignment}; {AGAIN}"
            raise InvalidModelError(message, path=path, field=info.name, offset=info.at)
    ordered = sorted(infos, key=lambda info: (info.offset, info.n_bytes))
    need = max((start + info.offset + info.n_bytes for info in infos), default=0)
    if need > size:
        bad = next(info for info in ordered if start + info.offset + info.n_bytes > size)
        message = f"the tensors need {need} bytes, the file has {size}; {CUT}"
        raise InvalidModelError(message, path=path, field=bad.name, offset=start + bad.offset)
    for left, right in zip(ordered, ordered[1:], strict=False):
        # Overlaps would let a small file describe a model of any size.
        if left.offset + left.n_bytes > right.offset:
            message = f"its data overlaps that of {one_line(left.name)}; {AGAIN}"
            raise InvalidModelError(message, path=path, field=right.name, offset=right.at)


def _siblings(part: _Part) -> list[Path]:
    """The paths of all parts of the split file that `part` belongs to."""
    count = part.metadata.get_int("split.count")
    match = _SPLIT_NAME.fullmatch(part.path.name)
    if match is None or int(match["count"]) != count:
        raise InvalidModelError(
            f"a part of a model split into {count} files, which must be named "
            f"NAME-00001-of-{count:05}.gguf and so on; give the files their original names",
            path=part.path,
            field="split.count",
        )
    return [
        part.path.with_name(f"{match['stem']}-{no:05}-of-{count:05}.gguf")
        for no in range(1, count + 1)
    ]


def _sibling(path: Path, opener: Opener, no: int, count: int) -> _Part:
    try:
        return _Part(path, opener)
    except ModelNotFoundError:
        raise InvalidModelError(
            f"part {no} of {count} is missing: {path.name}; download it to the same folder",
            path=path,
            field="split.count",
        ) from None


def _check_parts(parts: list[_Part]) -> None:
    for no, part in enumerate(parts):
        for key, wanted in (("split.count", len(parts)), ("split.no", no)):
            found = part.metadata.get_int(key)
            if found != wanted:
                raise InvalidModelError(
                    f"found {found}, need {wanted}: a part of another model or under a wrong "
                    "name; download the parts again",
                    path=part.path,
                    field=key,
                )
    key, n_tensors = "split.tensors.count", sum(len(part.tensors) for part in parts)
    counts = [part.metadata.get_int(key, n_tensors) for part in parts]
    for part, count in zip(parts, counts, strict=True):
        if count != counts[0]:
            raise InvalidModelError(
                f"found {count}, {parts[0].path.name} has {counts[0]}: parts of two models; "
                "download the parts again",
                path=part.path,
                field=key,
            )
    if counts[0] != n_tensors:
        raise InvalidModelError(
            f"the parts hold {n_tensors} tensors, need {counts[0]}; download the parts again",
            path=parts[0].path,
            field=key,
        )


def _check_magic(path: Path, head: bytes) -> None:
    if head.startswith(MAGIC):
        return
    hint = "name a .gguf file"
    if not head:
        hint = "it is empty; download it again"
    elif not head.strip(b"\0"):
        hint = "it begins with zeros, as an unfinished download does; download it again"
    elif head.startswith(b"version https://git-lfs"):
        hint = "a git-lfs pointer, not the model itself; run `git lfs pull` or download the file"
    elif head[8:9] == b"{":
        hint = "probably safetensors; download a GGUF of this model"
    elif head.lstrip()[:1] == b"<":
        hint = "a web page; download the file itself (its link has `resolve`, not `blob`)"
    elif head.startswith(b"PK"):
        hint = "a zip archive or PyTorch checkpoint; unpack it or download a GGUF of this model"
    elif head[:4] in (b"lmgg", b"tjgg", b"fmgg", b"algg"):
        hint = "a GGML file from before GGUF (2023); download a GGUF of this model"
    elif head.startswith(b"FUGG"):
        hint = "a byte-swapped GGUF; download it again"
    raise InvalidModelError(
        f"not a GGUF file, it begins with {head[:16]!r}: {hint}", path=path, field="magic", offset=0
    )
