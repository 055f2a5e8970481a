"""Notices that an answer repeats itself without end, as small models do.  Standard library only."""

from __future__ import annotations

_LONGEST = 400  # characters of what is repeated
_TIMES = 12  # how often it must stand at the end of the answer, in a row and without any change ...
_CHARS = 1200  # ... and how long that must be: tables, code and lists do not get there
_CHARS_WITHOUT_WORDS = 4800  # rules, dots, matrices of zeros, empty base64
_SURE = 8  # characters that are compared first
_EVERY = 64  # characters between two looks


class Repeats:
    """Reads an answer as it grows."""

    def __init__(self) -> None:
        self._tail = ""
        self._unseen = 0

    def add(self, piece: str) -> int:
        """Take the next piece.  Returns how many characters at the end say nothing new, 0 unless it goes in circles."""
        self._tail = (self._tail + piece)[-max(_LONGEST * _TIMES, _CHARS_WITHOUT_WORDS) :]
        self._unseen += len(piece)
        if self._unseen < _EVERY:
            return 0
        self._unseen = 0
        return repeated(self._tail)


def repeated(text: str) -> int:
    """Characters at the end of `text` that only repeat what stands before them, 0 where they are too few to be sure."""
    for period in range(1, _LONGEST + 1):
        if text[-_SURE:] != text[-_SURE - period : -period]:
            continue  # soon seen, for nearly all
        circle = text[-period:]
        words = any(map(str.isalpha, circle)) and circle != circle[0] * period
        length = max(_TIMES * period, _CHARS if words else _CHARS_WITHOUT_WORDS)
        tail = text[-length:]
        if len(tail) == length and tail[period:] == tail[:-period]:
            return (length // period - 1) * period
    return 0
