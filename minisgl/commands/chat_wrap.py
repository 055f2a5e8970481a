"""Breaks the lines of a streamed answer between words, at the terminal's edge.  Standard library only."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Callable

_LONG = 24  # columns that hardly any word exceeds: a word that begins so far from the edge is shown as it comes


def columns(text: str) -> int:
    """Columns that a text without control characters takes on a terminal."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


class Wrap:
    """Takes pieces of a text and returns what to print now; the beginning of a word near the edge is kept until it is whole.

    Tables and code (lines behind ```) keep their lines.  A word as long as a line is left to the terminal.
    """

    def __init__(self, width: Callable[[], int] = lambda: shutil.get_terminal_size().columns) -> None:
        self._width = width
        self._column = 0  # of what is printed
        self._kept = ""  # of a word
        self._line = ""  # its first characters
        self._code = False

    def add(self, text: str) -> str:
        """What to print of a further piece."""
        out: list[str] = []
        width = self._width()
        for c in text:
            if len(self._line) < 3:
                self._line += c
            if c == "\n":
                out += [self._word(width), c]
                self._code ^= self._line.startswith("```")
                self._column, self._line = 0, ""
            elif self._code or self._line.startswith(("```", "|")):
                out.append(self._kept + c)
                self._kept = ""
            elif c in " \t":
                out.append(self._word(width))
                if self._column < width:
                    out.append(c)
                    self._column += 1 if c == " " else 8 - self._column % 8
            elif unicodedata.east_asian_width(c) in "WF":  # a line may end at any of these
                out += [self._word(width), self._put(c, width)]
            else:
                self._kept += c
        if self._kept and self._column + _LONG <= width:
            out.append(self._kept)
            self._column += columns(self._kept)
            self._kept = ""
        return "".join(out)

    def end(self) -> str:
        """What is left of the text; the next piece begins a new line."""
        rest = self._word(self._width())
        self._column, self._line, self._code = 0, "", False
        return rest

    def _word(self, width: int) -> str:
        word, self._kept = self._kept, ""
        return self._put(word, width) if word else ""

    def _put(self, word: str, width: int) -> str:
        """A word, on a line of its own if this one has no room for it."""
        n = columns(word)
        if self._column + n > width and self._column > 0 and n <= width:
            self._column = n
            return "\n" + word
        self._column = (self._column + n) if n <= width else (self._column + n) % width
        return word
