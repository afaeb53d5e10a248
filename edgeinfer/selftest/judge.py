"""Whether results are those that the CPU computes: by hashes, and where they differ by the law.

Knows nothing of what was computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeinfer import platform
from edgeinfer.backend import compile_law
from edgeinfer.errors import EdgeInferError
from edgeinfer.sampling.sampler import ReferenceSampler
from edgeinfer.selftest.cases import Case, Results, limits

COMMITTED = Path(__file__).parent / "hashes.json"
_HEX_DIGITS = 16  # of a hash: 64 bits
_MOST_EXPLAINED = 3  # cases that the law is asked about: it takes seconds


class Difference(NamedTuple):
    """A result that is not what it should be."""

    case: str
    what: str
    why: str


class Judge:
    """Compares results with hashes, of each step by case and by what was computed."""

    def __init__(self, hashes: Mapping[str, Mapping[str, str]]) -> None:
        self._hashes = hashes
        self._n_explained = 0

    @classmethod
    def committed(cls) -> Judge:
        """By the hashes that come with the package."""
        return cls(json.loads(COMMITTED.read_text("utf-8")))

    def differences(self, case: Case, results: Results) -> Iterator[Difference]:
        expected = self._hashes.get(case.name, {})
        wrong = [name for name, array in results.items() if hash_of(array) != expected.get(name)]
        missing = expected.keys() - results.keys()
        yield from (Difference(case.name, name, "was not computed") for name in sorted(missing))
        if wrong:
            law = self._law(case)
            for name in wrong:
                unknown = "" if name in expected else "there is no hash of it; "
                why = _first_difference(results[name], law[name]) if law else "another hash"
                yield Difference(case.name, name, unknown + why)

    def _law(self, case: Case) -> Results:
        """What the case's results must be, computed here; nothing if that was done often."""
        self._n_explained += 1
        if self._n_explained > _MOST_EXPLAINED:
            return {}
        segment = case.segment()
        program = compile_law(segment, limits(segment), ReferenceSampler())
        try:
            return case.results(program, segment)
        finally:
            program.close()


def hash_of(array: NDArray[Any]) -> str:
    """Of the bytes of an array; its shape has no part in it."""
    whole = np.ascontiguousarray(array)
    return hashlib.sha256(whole.astype(whole.dtype.newbyteorder("<")).tobytes()).hexdigest()[
        :_HEX_DIGITS
    ]


def check_writable(path: Path) -> None:
    """EdgeInferError where `write` will fail: computing what it is given takes minutes."""
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir() or not platform.is_writable(folder):
        raise EdgeInferError(f"{path} can't be written: choose a file in a folder that can")


def write(path: Path, hashes: Mapping[str, Mapping[str, str]]) -> None:
    """Make of hashes what `Judge.committed` reads."""
    text = json.dumps(hashes, indent=0, sort_keys=True) + "\n"
    with platform.replaced_whole(path) as file:
        file.write(text.encode())


def _first_difference(found: NDArray[Any], law: NDArray[Any]) -> str:
    if found.shape != law.shape:
        return f"shape {found.shape}, it must be {law.shape}"
    same = (found == law) | ((found != found) & (law != law))
    if same.all():
        return "another hash than the CPU's, though NumPy here computes the same"
    at = tuple(int(i) for i in np.argwhere(~same)[0])
    n = int((~same).sum())
    return f"{n} of {same.size} values differ, the first at {at}: {found[at]!s}, not {law[at]!s}"
