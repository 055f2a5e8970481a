"""Encodes text with the SentencePiece vocabulary of a GGUF file, token for token as llama.cpp does.  No torch.

Of all neighbours whose union is a token, those with the highest score are joined, the leftmost first, until no union is a
token; what is then no token is written in bytes (`llm_tokenizer_spm_session` in llama.cpp's src/llama-vocab.cpp).  The BPE of
the `tokenizers` library cannot say that: its merges have an order of their own, but two tokens of the same score have none.

Text is cut where two neighbouring characters are neighbours in no token, which no join can cross; so most pieces are words,
and common words are looked up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any

import tokenizers

SPACE = "\u2581"  # stands for a space in tokens
_CACHED_CHARS, _CACHED_PIECES = 24, 1 << 16
_BLANKS = " \t\n\v\f\r"


@dataclass(frozen=True, slots=True)
class Encoded:
    """The part of `tokenizers.Encoding` that is used."""

    ids: list[int]
    tokens: list[str]


class SentencePiece:
    """Stands in for a `tokenizers.Tokenizer`, which does everything but the encoding."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        tokens: list[str],
        scores: list[float],
        *,
        special: Iterable[str],
        stripped: Iterable[str] = (),
        unknown: int | None = None,
        space_prefix: bool = True,
        around: tuple[list[int], list[int]] = ([], []),
    ) -> None:
        """`special`: tokens that are found in the text before all else, the longest first.  `stripped`: those of them that
        swallow the white space behind them.  `space_prefix`: text at the beginning and behind special tokens begins with a
        space.  `around`: the ids before and after a text with `add_special_tokens`.
        """
        self._backend = backend
        self._tokens = tokens
        self._ids = {token: i for i, token in enumerate(tokens)}
        self._order = {token: -scores[i] for i, token in enumerate(tokens)}  # the lowest is joined first
        self._neighbours = {token[i : i + 2] for token in tokens for i in range(len(token) - 1)}
        self._special = sorted((s for s in special if s), key=lambda s: -len(s.encode()))
        self._stripped = frozenset(stripped)
        self._unknown = [] if unknown is None else [unknown]
        self._prefix = SPACE if space_prefix else ""
        self._around = around
        self._cache: dict[str, list[int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoded:
        """The tokens of a text.  Raises TypeError, as the library does, for half a surrogate pair."""
        before, after = self._around if add_special_tokens else ([], [])
        ids = list(before)
        begins = True  # the text, or what follows a special token
        try:
            for fragment in self._fragments(text):
                if isinstance(fragment, int):
                    ids.append(fragment)
                else:
                    prefix = self._prefix if begins else ""
                    ids += self._encode_plain(prefix + fragment.replace(" ", SPACE))
                begins = isinstance(fragment, int)
        except UnicodeEncodeError as e:
            raise TypeError(str(e)) from e
        ids += after
        return Encoded(ids, [self._tokens[i] for i in ids])

    def _fragments(self, text: str) -> list[str | int]:
        """The text, cut into special tokens, as ids, and what is between them."""
        fragments: list[str | int] = [text] if text else []
        for special in self._special:
            if special in text:
                fragments = [part for f in fragments for part in (self._cut(f, special) if isinstance(f, str) else (f,))]
        return fragments

    def _cut(self, text: str, special: str) -> Iterator[str | int]:
        first, *others = text.split(special)
        if first:
            yield first
        for part in others:
            yield self._ids[special]
            if part := part.lstrip(_BLANKS) if special in self._stripped else part:
                yield part

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        neighbours, cache, start = self._neighbours, self._cache, 0
        for end in range(1, len(text) + 1):
            if text[end - 1 : end + 1] in neighbours:
                continue
            piece, start = text[start:end], end
            found = cache.get(piece)
            if found is None:
                found = self._join(piece)
                if len(piece) <= _CACHED_CHARS:
                    if len(cache) >= _CACHED_PIECES:
                        cache.clear()
                    cache[piece] = found
            ids += found
        return ids

    def _join(self, piece: str) -> list[int]:
        """The tokens of a piece: the joins wait in a heap by (order, position); one whose parts have grown is out of date."""
        order, n = self._order, len(piece)
        parts = list(piece)  # "" once it has been joined to the part on its left
        before, after = list(range(-1, n - 1)), [*range(1, n), -1]
        joins = [(order[u], i, i + 1, 2) for i in range(n - 1) if (u := piece[i : i + 2]) in order]
        heapify(joins)
        while joins:
            _, left, right, size = heappop(joins)
            if not parts[left] or not parts[right] or len(parts[left]) + len(parts[right]) != size:
                continue
            parts[left] += parts[right]
            parts[right] = ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            for i, j in ((before[left], left), (left, after[left])):
                if i >= 0 and j >= 0 and (union := parts[i] + parts[j]) in order:
                    heappush(joins, (order[union], i, j, len(union)))
        return [i for part in parts if part for i in self._ids_of(part)]

    def _ids_of(self, part: str) -> list[int]:
        if part in self._ids:
            return [self._ids[part]]
        out: list[int] = []
        for byte in part.encode():
            token = self._ids.get(f"<0x{byte:02X}>", self._ids.get(chr(byte)) if byte < 128 else None)
            out += self._unknown if token is None else [token]
        return out


def usable(scores: Any, n: int) -> bool:
    """Whether `scores` has a number for each of `n` tokens."""
    return isinstance(scores, list) and len(scores) == n and all(type(s) in (int, float) and not math.isnan(s) for s in scores)
