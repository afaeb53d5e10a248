"""Numbers as flags take them: in ASCII digits, without "_", and none that is nan."""

from __future__ import annotations

from typing import Any

import click

from edgeinfer.values import is_plain


class Whole(click.IntRange):
    """An integer in a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, str) and not is_plain(value):
            self.fail(f"{value!r} is not a number in plain digits.", param, ctx)
        found: int = super().convert(value, param, ctx)
        return found


class Number(click.FloatRange):
    """A number in a range, which nan is in no range of."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        is_nan = value != value or str(value).strip().lower().endswith("nan")
        if is_nan or (isinstance(value, str) and not is_plain(value)):
            self.fail(f"{value!r} is not a number in plain digits.", param, ctx)
        found: float = super().convert(value, param, ctx)
        return found
