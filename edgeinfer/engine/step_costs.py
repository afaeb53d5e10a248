"""What steps cost by their rows, as measured lately: how many guesses pay, how much of a prompt.

Knows nothing of sequences.
"""

from __future__ import annotations

from edgeinfer.batch import ROW_COST


class StepCosts:
    """What a decode step costs by its rows, in seconds, as measured lately.

    A shared machine is twice as slow for a while: every step tells about the machine's speed,
    and only what is left about the rows it had. `row_cost` is what a row after the first costs, of
    the first, until steps tell.
    """

    def __init__(self, row_cost: float = ROW_COST) -> None:
        self._row_cost = row_cost
        self._row_seconds = 0.0  # of a step of one row, at the machine's present speed
        # By rows: times the usual cost, how often measured, and when last.
        self._factors: dict[int, tuple[float, int, int]] = {}
        self._n_steps = 0
        # What a row of a prompt adds to a step, of a step of one row: too large at first.
        self._prompt_row = 2 * row_cost
        self._counted: list[tuple[int, int, float]] = []  # steps that nothing was learnt from yet

    def count(self, n_rows: int, n_prompt_rows: int, seconds: float) -> None:
        """Count a step of `n_rows` rows that decode, and others of prompts.

        What that tells is found out when somebody asks: between steps the processors wait.
        """
        self._counted.append((n_rows, n_prompt_rows, seconds))
        if len(self._counted) == _SWEEP:
            self._learn()

    def _learn(self) -> None:
        counted, self._counted = self._counted, []
        for n_rows, n_prompt_rows, seconds in counted:
            if n_prompt_rows:
                self._measure_beside(n_rows, n_prompt_rows, seconds)
            else:
                self.measure(n_rows, seconds)

    def measure(self, n_rows: int, seconds: float) -> None:
        """Count a step of rows that decode.

        What has not been measured for long is forgotten, and so tried again; the sooner, the less
        often it was: one step that took long would forbid its number of rows else.
        """
        self._n_steps += 1
        if not self._row_seconds:
            self._row_seconds = seconds / self._usual(n_rows)
        # A hiccup must not outweigh what many steps have shown.
        surprise = min(max(seconds / self._of(n_rows), 1 / _JUMP), _JUMP)
        if n_rows > 1:
            n = self._factors.get(n_rows, (0.0, 0, 0))[1] + 1
            factor = self._factor(n_rows) * surprise ** max(_RATE, 1 / (n + 1))
            self._factors[n_rows] = factor, n, self._n_steps
        self._row_seconds *= surprise**_SPEED_RATE
        if self._n_steps % _SWEEP == 0:
            self._forget()

    def _forget(self) -> None:
        for n_rows, (_, n, at) in tuple(self._factors.items()):
            if self._n_steps - at > min(_KEEP, n * _SWEEP):
                del self._factors[n_rows]

    def _measure_beside(self, n_rows: int, n_prompt_rows: int, seconds: float) -> None:
        if not (n_rows and self._row_seconds):
            return
        each = (seconds - self._of(n_rows)) / n_prompt_rows / self._row_seconds
        surprise = min(max(each / self._prompt_row, 1 / _JUMP), _JUMP)
        self._prompt_row = max(_LEAST_ROW, self._prompt_row * surprise**_PROMPT_RATE)

    def rows_beside(self, n_rows: int) -> int:
        """Rows of prompts beside `n_rows` that decode: these wait _SLOWER times as long then."""
        self._learn()
        n = (_SLOWER - 1) * self._of(n_rows) / ((self._row_seconds or 1.0) * self._prompt_row)
        return max(1, int(n))

    def of(self, n_rows: int) -> float:
        """Seconds of a step of rows that decode."""
        if self._counted:
            self._learn()
        return self._of(n_rows)

    def _of(self, n_rows: int) -> float:
        return (self._row_seconds or 1.0) * self._usual(n_rows) * self._factor(n_rows)

    def _usual(self, n_rows: int) -> float:
        """Times what a step of one row costs."""
        return 1.0 + self._row_cost * (n_rows - 1)

    def _factor(self, n_rows: int) -> float:
        """Measured, else between its neighbours, else that of the nearest below."""
        if n_rows in self._factors:
            return self._factors[n_rows][0]
        below = max((n for n in self._factors if n < n_rows), default=1)
        above = min((n for n in self._factors if n > n_rows), default=0)
        low = self._factors[below][0] if below > 1 else 1.0
        high = self._factors[above][0] if above else low
        share = (n_rows - below) / (above - below) if above else 0.0
        return low + share * (high - low)


# Kernels cost the same for ever, a shared machine changes within steps.
_RATE, _SPEED_RATE, _JUMP = 0.05, 0.25, 2.0
# Steps until a cost is forgotten at the latest, and from one look for those to the next, which is
# how long each time that it was measured counts; as many wait to be told.
_KEEP, _SWEEP = 512, 64

# Prompts are read at more than half their speed so, and steps last less than three times as long.
_SLOWER, _PROMPT_RATE, _LEAST_ROW = 2.35, 0.5, 1e-4
