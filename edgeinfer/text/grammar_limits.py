"""What of grammars and schemas is refused before llguidance reads it.

It keeps limits of its own, but not of what some few characters make it compute, nor of its stack.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from typing import Any, TypeVar

from edgeinfer import platform
from edgeinfer.errors import InvalidRequestError
from edgeinfer.text.closed_schema import BY_NAME, VALUES
from edgeinfer.text.pattern_size import n_counted

T = TypeVar("T")
# A rule that refers to another takes up to 9 KB of stack, and 6 characters of a text.
_STACK = 256 << 20
_MOST_REPEATS = 2000  # in regular expressions: these take memory by the square of their number
_REPEAT = re.compile(r"[?*+{]")
_MOST_EXACT = 2**53  # above it llguidance takes one whole number for another
_MOST_MULTIPLE = 100_000  # each remainder is a state
_MOST_LETTERS = 3000  # that can be counted: each is up to ten states
_MOST_COUNTED = 40_000  # states that patterns count: as many as a lexer may have
_LEAST, _MOST = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


def deeply(work: Callable[[], T], param: str) -> T:
    """What llguidance gives: it goes down as far as a grammar refers from one rule to another."""
    try:
        return platform.with_stack(_STACK, work)
    except MemoryError as error:
        raise InvalidRequestError(
            f"{param} can't be read: {error}; make room, or leave it out", param=param
        ) from error


def check_repeats(text: str, param: str) -> None:
    """InvalidRequestError for a regular expression, or a grammar, that repeats too many parts."""
    n = len(_REPEAT.findall(text))
    if n > _MOST_REPEATS:
        raise InvalidRequestError(
            f"{param} has {n:,} repetitions (? * + {{); at most {_MOST_REPEATS:,} are read",
            param=param,
        )


def check_counts(patterns: Iterable[str], param: str) -> None:
    """InvalidRequestError for patterns that count so far that an answer would break off."""
    n = sum(map(n_counted, patterns))
    if n > _MOST_COUNTED:
        raise InvalidRequestError(
            f"{param} counts in its patterns to some {n:,} states, at most {_MOST_COUNTED:,} can "
            "be kept: 4,400 of any letter (.), 660 of \\w, 40,000 of [a-z]; count to less, or take "
            "* and limit the answer",
            param=param,
        )


def check_schema(schema: Any, param: str) -> None:
    """InvalidRequestError for what can't be enforced exactly, or in reasonable time."""
    patterns: list[str] = []
    for keyword, value, path in _keywords(schema):
        if keyword == "pattern" and isinstance(value, str):
            patterns.append(value)
        elif keyword == "patternProperties" and isinstance(value, dict):
            patterns += value
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if type(value) is int and (
            (keyword in _LEAST and value > _MOST_EXACT)
            or (keyword in _MOST and value < -_MOST_EXACT)
        ):
            raise _refused(keyword, path, "a number from -2**53 to 2**53", param)
        if keyword == "minLength" and is_number and value > _MOST_LETTERS:
            raise _refused(keyword, path, f"at most {_MOST_LETTERS:,}", param)
        if keyword == "multipleOf" and is_number and _significant(value) > _MOST_MULTIPLE:
            raise _refused(keyword, path, f"a number of at most {_MOST_MULTIPLE:,}", param)
    check_repeats("".join(patterns), param)
    check_counts(patterns, param)


def check_flags(schema: Any, param: str) -> None:
    """InvalidRequestError for a flag of draft 4 that a bound is out, where there is no bound.

    llguidance would take any number: it passes over what it takes for no number.
    """
    found = [(path, keyword, value) for keyword, value, path in _keywords(schema)]
    there = {(path, keyword) for path, keyword, _ in found}
    for path, keyword, value in found:
        for bound, exclusive in (_LEAST, _MOST):
            if keyword == exclusive and value is True and (path, bound) not in there:
                raise InvalidRequestError(
                    f"{param} has {keyword!r}: true at {path} without {bound!r}, which draft 4 has "
                    f"beside it; give that, or a number as {keyword!r}",
                    param=param,
                )


def narrowed(schema: Any) -> Any:
    """With bounds as llguidance has them, of whole numbers that are exact, and counts it can keep.

    What they allow is allowed as it was given.
    """
    if isinstance(schema, list):
        return [narrowed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, each in schema.items():
        if key in BY_NAME and isinstance(each, dict):
            found[key] = {name: narrowed(inner) for name, inner in each.items()}
        elif key in _COUNTS and isinstance(each, (int, float)) and not isinstance(each, bool):
            is_whole = isinstance(each, float) and each.is_integer()  # JSON's 2.0 is 2
            count = int(each) if is_whole else each
            found[key] = min(count, _MOST_LETTERS) if key == "maxLength" else count
        elif key in (*_LEAST, *_MOST) and type(each) is int:
            found[key] = max(-_MOST_EXACT, min(each, _MOST_EXACT))
        else:
            found[key] = each if key in VALUES else narrowed(each)
    for bound, exclusive in (_LEAST, _MOST):  # in draft 4 a flag says that the bound is out
        if isinstance(found.get(exclusive), bool) and bound in found and found.pop(exclusive):
            found[exclusive] = found.pop(bound)
    return found


def _significant(value: float) -> float:
    """Its digits as a whole number, without zeros at their ends."""
    if isinstance(value, float) and not math.isfinite(value):
        return math.inf
    digits = "".join(map(str, Decimal(repr(value)).as_tuple().digits)).strip("0")
    return int(digits or 0)


def _refused(keyword: str, path: str, needed: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{param} has {keyword!r} at {path}, which can only be enforced for {needed}; leave it "
        "out, and check answers for it",
        param=param,
    )


def _keywords(schema: Any, path: str = "$") -> Iterator[tuple[str, Any, str]]:
    """Each keyword of a schema with its value, and where it stands."""
    if isinstance(schema, list):
        for i, each in enumerate(schema):
            yield from _keywords(each, f"{path}[{i}]")
    elif isinstance(schema, dict):
        for key, each in schema.items():
            yield key, each, path
            if key in BY_NAME and isinstance(each, dict):
                for name, inner in each.items():
                    yield from _keywords(inner, f"{path}.{key}.{name}")
            elif key not in VALUES:
                yield from _keywords(each, f"{path}.{key}")
