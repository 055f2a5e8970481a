"""Reads how much waits in the rings of shared memory, from beside them: nobody who writes or reads there does a thing for it.

Runs in the api process, once a second while somebody looks on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from minisgl.actors.runtime.ring import _LINE, _RECORD, _WRAP, RingSpec, _Mapped, _span
from minisgl.actors.runtime.shared_memory import Arenas, tokenizer_names

_MOST = 1000  # records that are counted
Depth = tuple[int, int, int]  # records and bytes that the slowest reader has not read, and bytes that there is room for
Depths = Callable[[], Mapping[str, Depth]]


class RingGauge(_Mapped):
    """Looks at a ring.  Writer and readers go on meanwhile: what it says was so a moment ago."""

    def depth(self) -> Depth:
        """What waits.  Records are counted by their headers, up to _MOST of them and the first that is being overwritten."""
        words, capacity = self._words, self.spec.capacity
        head = min(words[_LINE * (1 + r)] for r in range(self.spec.readers))  # before the tail, which is never behind it then
        tail = words[0]
        at, n = head, 0
        while at < tail and n < _MOST:
            place = at % capacity
            _, size, position = _RECORD.unpack_from(self._data, place)
            if position != at:
                break
            n += size != _WRAP
            at += capacity - place if size == _WRAP else _span(size)
        return n, tail - head, capacity


class Rings:
    """The rings of a run by name: requests, plans, results, and the prompts of each tokenizer.  `arenas`: those in use now."""

    def __init__(self, arenas: Callable[[], Arenas]) -> None:
        self._arenas = arenas
        self._gauges: dict[str, tuple[RingSpec, RingGauge]] = {}

    def depths(self) -> dict[str, Depth]:
        """How much waits in each."""
        arenas = self._arenas()
        specs = {"requests": arenas.requests, "plans": arenas.plans, "results": arenas.results}
        specs |= dict(zip(tokenizer_names(len(arenas.prompts)), arenas.prompts, strict=True))
        for name, spec in specs.items():
            if name not in self._gauges or self._gauges[name][0] != spec:  # it is another one since a restart
                self._gauges[name] = spec, RingGauge(spec)
        return {name: self._gauges[name][1].depth() for name in specs}
