"""What every model says of its size."""

from __future__ import annotations

from typing import NamedTuple


class Hparams(NamedTuple):
    """The numbers that every model has; all others are its model file's affair."""

    architecture: str
    n_layers: int
    dim: int
    vocab_size: int
    n_ctx_train: int
