"""A conversation's pages and state in one file, for another run of the same model to go on with.

The file: `_MAGIC`, the length of the head (4 bytes), the head as JSON, the ids (int32), then for
each cache group its pages in runs of up to `_RUN`, then the state. A BLAKE2b digest follows the
head with the ids, every run and the state. Numbers are little-endian.

Runs pass through memory in parts: what is held of one is in no plan.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

from edgeinfer import platform
from edgeinfer.backend import Program
from edgeinfer.batch import PAGE
from edgeinfer.engine.cache import CacheLayout
from edgeinfer.engine.cache_store import CacheStore
from edgeinfer.engine.generation import check_ids
from edgeinfer.engine.sequence import Sequence
from edgeinfer.errors import InvalidRequestError, Keyword, SessionError
from edgeinfer.ops import Rotate
from edgeinfer.segment import Segment
from edgeinfer.values import is_same

if TYPE_CHECKING:
    from hashlib import blake2b

    from numpy.typing import NDArray

T = TypeVar("T")

_MAGIC = b"edgeinfer session 1\n"
_MOST_HEAD = 64 << 10  # bytes
_RUN = 16  # pages
_PART_BYTES = 2 << 20  # that are read or written between two steps; a page at least
_DIGEST = 32  # bytes


def model_name(fingerprint: str, segment: Segment) -> str:
    """A name for what K, V and state depend on beside tokens and types: the file, its rotations.

    A context of other length may rotate by other factors.
    """
    ropes = (op.rope for op in segment.ops if isinstance(op, Rotate))
    return " ".join(
        [fingerprint, *sorted({table.name for rope in ropes for table in rope.tables()})]
    )


class _Part(NamedTuple):
    """Pages of a group or, for group -1, the state: the numbers of some, and bytes of one.

    Of the last page `n_last` positions are the conversation's, others hold what was there before.
    """

    group: int
    numbers: list[int]
    n_bytes: int
    n_last: int = PAGE
    ends_run: bool = True


class Sessions:
    """Saves and loads what a store holds; `model` and `layout` are what its contents depend on.

    `model` is `model_name`. Used by any thread but the engine's: `between_steps` calls what it is
    given in that one.
    """

    def __init__(
        self,
        store: CacheStore,
        program: Program,
        layout: CacheLayout,
        model: str,
        n_vocab: int,
        between_steps: Callable[[Callable[[], Any]], Any],
    ) -> None:
        self._store, self._program, self._layout = store, program, layout
        self._model, self._n_vocab, self._between_steps = model, n_vocab, between_steps

    def save(self, path: Path, ids: SequenceOf[int]) -> int:
        """Write what is cached of the beginning of `ids`; of how many tokens that is.

        The file takes the place of one that is there only once it is whole. InvalidRequestError
        where nothing is cached.
        """
        _check_file(path)
        check_ids(ids, self._n_vocab, "of")
        with self._guest(lambda: self._store.lend(ids, self._layout), is_kept=False) as guest:
            n_tokens = guest.cache.n_tokens
            if not n_tokens:
                raise InvalidRequestError(
                    "nothing of these tokens is in the cache; save them once they were read",
                    param="of",
                )
            platform.delete_parts(path)
            with platform.replaced_whole(path) as file:
                self._write(file, guest, ids[:n_tokens])
                platform.sync(file)
            return n_tokens

    def load(self, path: Path) -> tuple[int, ...]:
        """Put what a file holds into the cache; the ids it is of.

        SessionError for a file that is damaged or does not fit, BusyError where what runs leaves
        no room for it.
        """
        _check_file(path)
        with open(path, "rb") as file:
            ids = self._read_head(file, path)
            with self._guest(lambda: self._store.receive(ids, self._layout), is_kept=True) as guest:
                self._fill(guest, file, path)
        return ids

    @contextmanager
    def _guest(self, opens: Callable[[], Sequence], *, is_kept: bool) -> Iterator[Sequence]:
        """What the store opens for a file, until that is done; then kept where it is whole.

        Where an interrupt ends the wait for it, it is opened all the same: it is dismissed behind
        that, since what the engine's thread does for others it does in order.
        """
        opened, is_whole = list[Sequence](), False

        def dismiss() -> None:
            while opened:
                self._store.dismiss(opened.pop(), is_kept=is_kept and is_whole)

        try:
            self._call(lambda: opened.append(opens()))
            yield opened[0]
            is_whole = True
        finally:
            try:
                self._call(dismiss)
            except BaseException:  # an interrupt may have come before the engine was told
                self._call(dismiss)
                raise

    def _call(self, action: Callable[[], T]) -> T:
        result: T = self._between_steps(action)
        return result

    # -- what a file holds -----------------------------------------------------------------------

    def _head(self, n_tokens: int) -> dict[str, Any]:
        """What must be the same for what follows to mean the same."""
        return {
            "model": self._model,
            "cache": self._program.cache_layout,
            "page": PAGE,
            "n_tokens": n_tokens,
        }

    def _parts(self, guest: Sequence) -> Iterator[_Part]:
        cache = guest.cache
        for group, table in enumerate(cache.tables):
            seen = self._layout.seen_pages(group, cache.n_tokens)
            numbers = [int(table.pages[table.slot(page)]) for page in seen]
            n_bytes = self._page_bytes(group)
            most = max(1, min(_RUN, _PART_BYTES // max(1, n_bytes)))
            for start in range(0, len(numbers), _RUN):
                run = numbers[start : start + _RUN]
                for first in range(0, len(run), most):
                    is_last = start + first + most >= len(numbers)
                    n_last = cache.n_tokens % PAGE or PAGE if is_last else PAGE
                    ends_run = first + most >= len(run)
                    yield _Part(group, run[first : first + most], n_bytes, n_last, ends_run)
        if cache.state >= 0:
            yield _Part(-1, [cache.state], self._page_bytes(-1))

    def _page_bytes(self, group: int) -> int:
        none = self._program.read_pages(group, []) if group >= 0 else self._program.read_states([])
        return int(none.shape[1])

    def _n_bytes(self, n_tokens: int) -> int:
        """Of all parts, with their digests."""
        total = self._page_bytes(-1) + _DIGEST if self._layout.has_state else 0
        for group in range(len(self._layout.rings)):
            n_pages = len(self._layout.seen_pages(group, n_tokens))
            total += n_pages * self._page_bytes(group) + -(-n_pages // _RUN) * _DIGEST
        return total

    # -- writing ---------------------------------------------------------------------------------

    def _write(self, file: BinaryIO, guest: Sequence, ids: SequenceOf[int]) -> None:
        head = json.dumps(self._head(len(ids))).encode()
        begin = _MAGIC + len(head).to_bytes(4, "little") + head + np.array(ids, "<i4").tobytes()
        file.write(begin + _digest(begin))
        digest = _hash()
        for part in self._parts(guest):
            data = self._get(part).reshape(-1).data
            file.write(data)
            digest.update(data)
            if part.ends_run:
                file.write(digest.digest())
                digest = _hash()

    def _get(self, part: _Part) -> NDArray[np.uint8]:
        if part.group < 0:
            return self._call(lambda: self._program.read_states(part.numbers))
        pages = self._call(lambda: self._program.read_pages(part.group, part.numbers))
        if part.n_last < PAGE:  # of other conversations, too, where it was copied from one
            pages[-1, self._program.page_positions(part.group) >= part.n_last] = 0
        return pages

    # -- reading ---------------------------------------------------------------------------------

    def _read_head(self, file: BinaryIO, path: Path) -> tuple[int, ...]:
        """The ids, of a file that is as long as it must be and fits."""
        begin = file.read(len(_MAGIC) + 4)
        n_head = int.from_bytes(begin[len(_MAGIC) :], "little")
        if not begin.startswith(_MAGIC[:-2]):
            raise SessionError(f"{path} is no saved session")
        if not begin.startswith(_MAGIC):
            raise SessionError(f"{path} is a session of another version of edgeinfer")
        if not 0 < n_head <= _MOST_HEAD:
            raise _damaged(path, f"its head says that it has {n_head} bytes")
        head = file.read(n_head)
        n_tokens = self._check_head(head, path)
        n_ids = 4 * n_tokens
        expected = len(begin) + n_head + n_ids + _DIGEST + self._n_bytes(n_tokens)
        at, n_bytes = file.tell(), file.seek(0, io.SEEK_END)
        file.seek(at)
        if n_bytes != expected:
            raise _damaged(path, f"it has {n_bytes} bytes, not {expected}")
        ids = file.read(n_ids)
        if file.read(_DIGEST) != _digest(begin + head + ids):
            raise _damaged(path, "its first part does not match its checksum")
        found = np.frombuffer(ids, "<i4")
        if found.min() < 0 or found.max() >= self._n_vocab:
            raise _damaged(path, "it has ids that the vocabulary has not")
        return tuple(found.tolist())

    def _check_head(self, data: bytes, path: Path) -> int:
        """The number of tokens; SessionError names what is another here."""
        try:
            head = json.loads(data)
        except (ValueError, RecursionError):
            raise _damaged(path, "its head is not JSON") from None
        n_tokens = head.get("n_tokens") if isinstance(head, dict) else None
        if type(n_tokens) is not int or n_tokens < 1:
            raise _damaged(path, "its head has no number of tokens")
        for name, expected in self._head(n_tokens).items():
            if not is_same(head.get(name), expected):
                raise SessionError(_ANOTHER[name].format(path=path))
        n_ctx = self._layout.n_ctx
        if n_ctx is not None and n_tokens > n_ctx:
            raise SessionError(
                f"{path} holds {n_tokens} tokens, the context {n_ctx}",
                advice=("raise ", Keyword("n_ctx")),
            )
        return n_tokens

    def _fill(self, guest: Sequence, file: io.BufferedReader, path: Path) -> None:
        """Of what does not match its checksum nothing is kept."""
        digest = _hash()
        for part in self._parts(guest):
            rows = np.empty((len(part.numbers), part.n_bytes), np.uint8)
            data = rows.reshape(-1).data
            digest.update(data[: file.readinto(data)])
            self._put(part, rows)
            if part.ends_run:
                if file.read(_DIGEST) != digest.digest():
                    raise _damaged(path, "a part of it does not match its checksum")
                digest = _hash()

    def _put(self, part: _Part, rows: NDArray[np.uint8]) -> None:
        if part.group < 0:
            self._call(lambda: self._program.write_states(part.numbers, rows))
        else:
            self._call(lambda: self._program.write_pages(part.group, part.numbers, rows))


_ANOTHER = {
    "model": "{path} is of another model, or of a much longer context",
    "cache": "{path} was saved on another kind of device, or with another kv_type or numerics; use "
    "what it was saved with",
    "page": "{path} is a session of another version of edgeinfer",
}


def _check_file(path: Path) -> None:
    if path.exists() and not path.is_file():  # a pipe may have no end, a device no contents
        raise SessionError(f"{path} is no file")


def _digest(data: bytes) -> bytes:
    return _hash(data).digest()


def _hash(data: bytes = b"") -> blake2b:
    import hashlib  # 2 ms that starts don't need

    return hashlib.blake2b(data, digest_size=_DIGEST)


def _damaged(path: Path, why: str) -> SessionError:
    return SessionError(f"{path} is damaged: {why}; read the conversation again")
