"""Detokenizes incrementally: turns token ids into text, a token at a time.  Pure: no tokenizer library, no input or output.

`ByteStream`   for tokenizers whose tokens are byte strings: every token is looked up once, and the bytes go through an
               incremental UTF-8 decoder.  The concatenated pieces equal the text of all tokens at once, for any split.
`WindowStream` for the others: decode a short window twice and take the difference.
`StopMatcher`  finds stop strings in text that arrives in pieces and never lets a part of one out.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

REPLACEMENT = "\ufffd"
_MAX_PENDING = 32  # the most tokens that a WindowStream holds back


class DecodeState(Protocol):
    """The text of one sequence of tokens as it grows."""

    def push(self, token: int) -> str:
        """Append a token; returns the text that is certain now (may be empty)."""

    def flush(self) -> str:
        """End the sequence; returns the text that was held back, an incomplete character as U+FFFD."""


class ByteStream:
    """A DecodeState over a table of token bytes.  Ids outside of the table and those in `skip` have no text."""

    __slots__ = ("_skip", "_table", "_tail")

    def __init__(self, table: Sequence[bytes], skip: AbstractSet[int]) -> None:
        self._table = table
        self._skip = skip
        self._tail = b""  # the beginning of a character

    def push(self, token: int) -> str:
        if token in self._skip or not 0 <= token < len(self._table):
            return ""
        data = self._tail + self._table[token]
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._tail = data[used:]
        return text

    def flush(self) -> str:
        text = self._tail.decode("utf-8", "replace")
        self._tail = b""
        return text


class WindowStream:
    """A DecodeState over any `decode(ids) -> text`, with the tokens of the last piece as context for the next one.

    Algorithm: text-generation-inference's `decode_token`.  A piece that ends in U+FFFD may be half a character and waits.
    """

    __slots__ = ("_decode", "_ids", "_read", "_shown")

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        """before: tokens that the text continues, which may decide on a space between."""
        self._decode = decode
        self._ids = list(before)  # context, then tokens without shown text
        self._read = len(self._ids)  # the number of context tokens
        self._shown = decode(self._ids) if before else ""  # the text of the context

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT) and len(self._ids) - self._read < _MAX_PENDING:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._decode(self._ids)) if len(self._ids) > self._read else ""

    def _advance(self, text: str) -> str:
        piece = text[len(self._shown) :]
        if piece:
            self._ids = self._ids[self._read :]
            self._read = len(self._ids)
            self._shown = self._decode(self._ids)
        return piece


class StopMatcher:
    """Cuts a text before the first stop string in it, however the text is split into pieces.

    The longest suffix that may be the beginning of a stop string is held back.  The result equals a search of the full text:
    the match that begins first wins, also over one that ends earlier.
    """

    __slots__ = ("_held", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(s for s in stops if s)
        self._held = ""
        self.matched = False

    def feed(self, text: str) -> tuple[str, bool]:
        """Append text; returns (text that may be shown, whether a stop string was found).  After a match nothing is shown."""
        if not self._stops or self.matched:
            return ("" if self.matched else text), self.matched
        text = self._held + text
        begin = min((i for s in self._stops if (i := _partial(text, s)) >= 0), default=len(text))
        found = self._find(text)
        if found is not None and found <= begin:
            self._held, self.matched = "", True
            return text[:found], True
        self._held = text[begin:]
        return text[:begin], False

    def flush(self) -> tuple[str, bool]:
        """End the text; returns the text that was held back, like `feed`."""
        text, self._held = self._held, ""
        found = self._find(text)
        if found is not None:
            self.matched = True
        return text[:found], self.matched

    def _find(self, text: str) -> int | None:
        return min((i for s in self._stops if (i := text.find(s)) >= 0), default=None)


def _partial(text: str, stop: str) -> int:
    """The start of the longest suffix of `text` that is a proper prefix of `stop`; -1 if there is none."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return at
