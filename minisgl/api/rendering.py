"""Renders large answers a little at a time, so that no answer keeps the event loop from the others.

Whoever renders says what it has done, in units of about a microsecond, and gives way when that is enough for one turn.  What is
rendered becomes `Rendered`, pieces of JSON that other values may hold.  Runs in the api process.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from minisgl.api.engine import Chunk, TokenLogprob
from minisgl.sampling_params import Finish

WRITE = 1 << 16  # bytes that are sent at a time
UNITS = 2000  # in one turn of the event loop
SLICE = 500  # log probabilities or numbers that are rendered at a time
TEXT = 2000  # characters that are parsed at a time


class Rendered:
    """JSON text in pieces."""

    __slots__ = ("pieces",)

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces


class Turns:
    """Counts the work of the present turn."""

    def __init__(self) -> None:
        self._done = 0

    async def spend(self, units: int) -> None:
        """Note work that was done; gives way to others when it is enough for a turn."""
        self._done += units
        if self._done >= UNITS:
            self._done = 0
            await asyncio.sleep(0)


async def rendered_list(values: Iterator[Any] | Sequence[Any], turns: Turns, units: int) -> Rendered:
    """A JSON array of values that cost so many units each; they may hold `Rendered` parts."""
    pieces: list[bytes] = []
    for value in values:
        pieces += [b", " if pieces else b"[", *json_pieces(value)]
        await turns.spend(units)
    return Rendered([*pieces, b"]"] if pieces else [b"[]"])


async def rendered_numbers(values: Sequence[Any], turns: Turns) -> Rendered:
    """A JSON array of many numbers."""
    pieces: list[bytes] = []
    for at in range(0, len(values), SLICE):
        pieces += [b", " if pieces else b"[", json.dumps(values[at : at + SLICE])[1:-1].encode()]
        await turns.spend(SLICE // 4)
    return Rendered([*pieces, b"]"] if pieces else [b"[]"])


async def by_tokens(
    tokens: Sequence[TokenLogprob], render: Callable[[Sequence[TokenLogprob]], Mapping[str, Any]], turns: Turns
) -> dict[str, Any]:
    """`render(tokens)`, an object of lists along the tokens, but rendered in slices.  Values that are no lists are the same."""
    out: dict[str, Any] = {}
    for part in slices(tokens):
        for name, value in render(part).items():
            if isinstance(value, list):
                pieces = out.setdefault(name, Rendered([])).pieces
                pieces += [b", " if pieces else b"[", json.dumps(value)[1:-1].encode()] if value else []
            else:
                out[name] = value
        await turns.spend(sum(map(entries, part)))
    for value in out.values():
        if isinstance(value, Rendered):
            value.pieces.append(b"]" if value.pieces else b"[]")
    return out or dict(render(()))


def slices(tokens: Sequence[TokenLogprob]) -> Iterator[Sequence[TokenLogprob]]:
    """Slices of about SLICE entries."""
    start = held = 0
    for i, token in enumerate(tokens, 1):
        held += entries(token)
        if held >= SLICE:
            yield tokens[start:i]
            start, held = i, 0
    if start < len(tokens):
        yield tokens[start:]


def parts_of(chunk: Chunk) -> Iterator[Chunk]:
    """A chunk with a long text in several, of which the last has its end and its log probabilities."""
    text, at = chunk.text, 0
    while len(text) - at > TEXT:
        yield chunk._replace(text=text[at : at + TEXT], token_ids=(), logprobs=(), finish=Finish.NONE)
        at += TEXT
    yield chunk._replace(text=text[at:])


def entries(token: TokenLogprob) -> int:
    """The log probabilities of a token and of its alternatives."""
    return 1 + len(token.top)


def json_pieces(value: Any) -> list[bytes]:
    """The JSON text of a value that may hold `Rendered` parts, in pieces."""
    if isinstance(value, Rendered):
        return value.pieces
    if not holds_rendered(value):
        return [json.dumps(value).encode()]
    out: list[bytes] = []
    if isinstance(value, Mapping):
        for key, inner in value.items():
            out += [b", " if out else b"{", json.dumps(key).encode(), b": ", *json_pieces(inner)]
        return [*out, b"}"]
    for inner in value:
        out += [b", " if out else b"[", *json_pieces(inner)]
    return [*out, b"]"]


def joined(pieces: list[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of a size that is worth a system call.  The list is emptied on the way."""
    pieces.reverse()
    while pieces:
        part, size = [], 0
        while pieces and size < WRITE:
            part.append(pieces.pop())
            size += len(part[-1])
        yield b"".join(part)


def holds_rendered(value: Any) -> bool:
    """Whether some part of a value is `Rendered`.  Such values are small but for these parts."""
    if isinstance(value, Mapping):
        return any(map(holds_rendered, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_rendered, value))
    return isinstance(value, Rendered)
