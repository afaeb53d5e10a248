"""Numbers as flags take them: in ASCII digits, without "_", and none that is nan."""

from __future__ import annotations

from typing import Any

import click


class Whole(click.IntRange):
    """An integer in a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if not is_plain(value):
            self.fail(f"{value!r} is not a number in plain digits.", param, ctx)
        found: int = super().convert(value, param, ctx)
        return found


class Number(click.FloatRange):
    """A number in a range, which nan is in no range of."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if not is_plain(value) or value != value or str(value).strip().lower().endswith("nan"):
            self.fail(f"{value!r} is not a number in plain digits.", param, ctx)
        found: float = super().convert(value, param, ctx)
        return found


def is_plain(value: object) -> bool:
    """Whether Python reads nothing into a text that nobody meant: 1_0 for 10, digits of others."""
    return not isinstance(value, str) or (value.isascii() and "_" not in value)
