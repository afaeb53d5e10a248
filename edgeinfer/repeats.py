"""Notices that a text says the same again and again, as small models may do until they are stopped.

Knows nothing of models or tokens.
"""

from __future__ import annotations

_LEAST = 1200  # characters in which nothing new was said; half of them where most are wide
_WIDE = "\u0800"  # from here on a character is three bytes, often a token and more
_TIMES = 5  # that a passage has come, one right after the other
_LONGEST = 1000  # characters of a passage
_SIGN = 32  # characters by which earlier copies of the end are found
_STEP = 100  # characters between two looks


class RepeatGuard:
    """Takes a text part by part, and tells when all that still comes is what has come before."""

    def __init__(self) -> None:
        self._end = ""
        self._n_new = 0

    def push(self, text: str) -> bool:
        """Whether it now ends in a passage of 1,000 characters at most, five times and more.

        Together these are 1,200 characters at least, or 600 of Chinese, symbols and the like: a
        line of dashes or a short refrain is none.
        """
        self._end += text
        self._n_new += len(text)
        if self._n_new < _STEP:
            return False
        self._n_new = 0
        self._end = self._end[-_TIMES * _LONGEST :]
        return _ends_in_repeats(self._end)


def _ends_in_repeats(text: str) -> bool:
    sign, at = text[-_SIGN:], len(text) - _SIGN
    n_wide = sum(each >= _WIDE for each in text[-_LEAST // 2 :])
    least = _LEAST // 2 if n_wide > _LEAST // 4 else _LEAST
    while (at := text.rfind(sign, 0, max(0, at + _SIGN - 1))) >= 0:
        period = len(text) - _SIGN - at
        n = max(least, _TIMES * period)
        if n > len(text):  # as for all longer periods
            return False
        if text[-n:-period] == text[period - n :]:
            return True
    return False
