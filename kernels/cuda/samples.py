"""What a step says about how its tokens are picked, in host memory as it will lie on the device.

Which rows the device picks itself is said here, once: `fits`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeinfer.batch import StepLimits
from edgeinfer.kernels.cuda.layout import ALIGNMENT
from edgeinfer.sampling.params import ROW, SampleRow, SampleTable, SamplingParams

ROWS_OFFSET = ALIGNMENT
MOST_WORDS = 16384  # of tokens and biases of all rows of a step
MOST_TYPICAL = 1024  # candidates among which typical_p chooses: WEIGHTS in candidates.cuh


class SampleArrays:
    """The rows of a table, and the words that they refer to: tokens of histories, biases.

    Whether the step goes on from results that only the device has; then, as one array of words,
    the rows as in `SampleTable.rows`, with indices into it for addresses, and what they refer to.
    """

    def __init__(self, limits: StepLimits, n_vocab: int) -> None:
        self._n_vocab, n_rows = n_vocab, limits.max_outputs
        n_bytes = n_rows * ROW.itemsize + 4 * MOST_WORDS
        self.memory: NDArray[np.uint8] = np.zeros(ROWS_OFFSET + n_bytes, np.uint8)
        self._goes_on = np.ndarray(1, np.int32, self.memory.data)
        self._rows = np.ndarray(n_rows, ROW, self.memory.data, ROWS_OFFSET)
        self._words = np.ndarray(n_bytes // 4, np.int32, self.memory.data, ROWS_OFFSET)
        self._newest: list[int] = []  # of every row: which word is its history's last, or -1
        self._n_words = 0

    @property
    def n_bytes(self) -> int:
        """How much of `memory` says what was filled in."""
        return ROWS_OFFSET + 4 * self._n_words

    def fits(self, table: SampleTable, n_rows: int) -> bool:
        """Whether the device can pick the tokens of these rows; else the host picks all."""
        rows = [table.row(i) for i in range(n_rows)]
        n_words = sum(len(row.history) + 1 + 2 * len(row.params.bias_arrays[0]) for row in rows)
        return n_words <= MOST_WORDS and all(self._knows(row.params) for row in rows)

    def _knows(self, params: SamplingParams) -> bool:
        n = self._n_vocab if params.top_k <= 0 else min(params.top_k, self._n_vocab)
        is_typical = params.typical_p < 1 and params.temperature > 0 and params.mirostat == 0
        is_short = not is_typical or n <= MOST_TYPICAL
        return is_short and not params.has_dry and params.logprobs is None

    def fill(self, table: SampleTable, n_rows: int) -> None:
        """Take in the rows of a step, which `fits`."""
        self._goes_on[0] = 0
        self._fill(table, n_rows, [table.row(i).history for i in range(n_rows)])

    def go_on(self, table: SampleTable, n_rows: int) -> None:
        """The step after that of a table, whose tokens and states are only on the device yet."""
        histories = [_longer(table.row(i)) for i in range(n_rows)]
        self._fill(table, n_rows, histories)
        self._goes_on[0] = 1
        self._rows["index"][:n_rows] += 1

    def set_picked(self, ids: NDArray[np.int32], mu: NDArray[np.float64]) -> None:
        """What the device goes on from, now that it is known."""
        self._goes_on[0] = 0
        self._rows["mu"][: len(mu)] = mu
        for token, at in zip(ids.tolist(), self._newest, strict=True):
            if at >= 0:
                self._words[at] = token

    def says_the_same(self, other: SampleArrays) -> bool:
        """Whether both have the same rows."""
        n_bytes = self.n_bytes
        return (
            n_bytes == other.n_bytes
            and self._newest == other._newest
            and bool(np.array_equal(self.memory[:n_bytes], other.memory[:n_bytes]))
        )

    def _fill(self, table: SampleTable, n_rows: int, histories: list[NDArray[np.int32]]) -> None:
        rows, self._newest = self._rows[:n_rows], []
        self._n_words = rows.nbytes // 4
        rows[:] = table.rows[:n_rows]
        rows["breakers"] = 0  # an address of the host's
        for i, history in enumerate(histories):
            ids, values = table.row(i).params.bias_arrays
            rows["history"][i], rows["n_history"][i] = self._put(history), len(history)
            self._newest.append(self._n_words - 1 if len(history) else -1)
            rows["bias_ids"][i] = self._put(ids)
            rows["bias_values"][i] = self._put(values.view(np.int32))

    def _put(self, words: NDArray[np.int32]) -> int:
        """Where they begin."""
        start, self._n_words = self._n_words, self._n_words + len(words)
        self._words[start : self._n_words] = words
        return start


def _longer(row: SampleRow) -> NDArray[np.int32]:
    """The history of the token that comes next, 0 for this one."""
    n = row.params.n_history
    if n == 0:
        return row.history
    longer = np.append(row.history, np.int32(0))
    return longer if n < 0 else longer[-n:]
