"""Steps that are on a device, and the tokens that it picks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeinfer.kernels.cuda.device import Event
from edgeinfer.kernels.cuda.steps import Result
from edgeinfer.sampling.params import Sampled, SampleTable

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Picked(NamedTuple):
    """The tokens that the device has picked for R rows."""

    ids: NDArray[np.int32]
    status: NDArray[np.int32]
    mu: NDArray[np.float64]  # of SAMPLED


@dataclass(eq=False, slots=True)
class Running:
    """A step on the device."""

    result: Result
    is_over: Event
    picked: Picked | None  # once it is over, where the device picks
    is_aborted: bool = False


def store(picked: Picked, result: Result, table: SampleTable) -> None:
    """Fill the outputs of a table as a sampler does."""
    nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
    for i in range(len(picked.ids)):
        mu = picked.mu[i] if result is Result.SAMPLED else table.row(i).mu
        status = int(picked.status[i])
        table.store(i, Sampled(int(picked.ids[i]), float("nan"), nothing, float(mu), status))
