"""What a model file asks of the numbers in a GGUF file, whoever reads them."""

from __future__ import annotations

from typing import NoReturn, Protocol


class Settings(Protocol):
    """What a file says of its model. Each getter raises for what can't be, by the key's name."""

    def has(self, name: str) -> bool: ...

    def is_array(self, name: str) -> bool: ...

    def count(
        self,
        name: str,
        default: int | None = None,
        *,
        layer: int | None = None,
        low: int = 1,
        high: int = ...,
    ) -> int: ...

    def number(
        self,
        name: str,
        default: float | None = None,
        *,
        layer: int | None = None,
        low: float = ...,
        high: float = ...,
    ) -> float: ...

    def flag(self, name: str, default: bool | None = None, *, layer: int | None = None) -> bool: ...

    def text(self, name: str, default: str | None = None) -> str: ...

    def wrong(self, name: str, value: object, wanted: str) -> NoReturn: ...

    def unsupported(self, name: str, operation: str) -> NoReturn: ...
