"""Keeps the chunks of a generation until they are taken, and merges them meanwhile.  Runs in the api process."""

from __future__ import annotations

from minisgl.api.engine import Chunk
from minisgl.api.rendering import UNITS, entries

NewChunks = list[tuple[int, Chunk]]  # (index of the prompt, its merged chunks)
_MERGED = 64  # chunks of a prompt that become one while they wait
_TOKEN_BYTES, _ENTRY_BYTES = 64, 160  # of a token that waits, and of a log probability


class ChunkQueue:
    """The chunks that nobody has taken, by the index of their prompt."""

    def __init__(self) -> None:
        self._chunks: dict[int, list[Chunk]] = {}
        self._merged: dict[int, list[Chunk]] = {}  # and before those, where many wait: every _MERGED in one

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def clear(self) -> None:
        self._chunks, self._merged = {}, {}

    def add(self, index: int, chunk: Chunk) -> None:
        """Append a chunk to those of a prompt."""
        waiting = self._chunks.get(index)
        if waiting is None:
            self._chunks[index] = [chunk]
            return
        waiting.append(chunk)
        if len(waiting) == _MERGED:
            self._merged.setdefault(index, []).append(_merge(waiting))
            waiting.clear()

    def indices(self) -> list[int]:
        """The prompts whose chunks wait, in order."""
        return sorted(self._chunks)

    def take_one(self, index: int) -> Chunk:
        """Take what waits of one prompt, as one chunk."""
        return _merge(self._merged.pop(index, []) + self._chunks.pop(index))

    def take(self) -> NewChunks:
        """Take all that waits, merged into as few chunks as a turn has time for each."""
        if self._merged:
            return [(index, part) for index in list(self._chunks) for part in self._parts_of(index)]
        chunks = [(index, _merge(new)) for index, new in self._chunks.items()]
        self._chunks = {}
        return chunks

    def _parts_of(self, index: int) -> list[Chunk]:
        """Take what waits of one prompt, in chunks of a bounded size."""
        parts, part, work = [], list[Chunk](), 0
        for chunk in self._merged.pop(index, []) + self._chunks.pop(index):
            if part and work + work_of(chunk) > UNITS:
                parts.append(_merge(part))
                part, work = [], 0
            part.append(chunk)
            work += work_of(chunk)
        return [*parts, _merge(part)] if part else parts


def _merge(chunks: list[Chunk]) -> Chunk:
    last = chunks[-1]
    if len(chunks) == 1:
        return last
    ids = tuple(t for c in chunks for t in c.token_ids)
    logprobs = tuple(p for c in chunks for p in c.logprobs)
    return last._replace(text="".join(c.text for c in chunks), token_ids=ids, logprobs=logprobs)


def work_of(chunk: Chunk) -> int:
    """What it takes to render a chunk, about, in units of rendering.py."""
    return len(chunk.text) // 2 + 4 * sum(map(entries, chunk.logprobs))


def size_of(chunk: Chunk) -> int:
    """Bytes of a chunk that waits, about."""
    size = _TOKEN_BYTES * len(chunk.token_ids or ()) + len(chunk.text) + 128
    return size + _ENTRY_BYTES * sum(map(entries, chunk.logprobs)) if chunk.logprobs else size
