"""Keeps the deadlines of requests, whatever stands still behind the api process.  Pure; runs in the api process."""

from __future__ import annotations

import heapq
import math

_SLACK = 64  # entries of ended requests that nobody clears away


class Deadlines:
    """A heap of (when, uid, timeout), in seconds of one clock.  Entries of requests that have ended are skipped."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[float, int, float]] = {}  # by uid
        self._heap: list[tuple[float, int, float]] = []

    def __len__(self) -> int:
        return len(self._open)

    def add(self, uid: int, began: float, timeout: float) -> float:
        """Have a request that began then end after `timeout`.  Returns when that is."""
        entry = self._open[uid] = began + timeout, uid, timeout
        heapq.heappush(self._heap, entry)
        return entry[0]

    def discard(self, uid: int) -> None:
        """The request has ended; one without a deadline is ignored."""
        if self._open.pop(uid, None) is not None and len(self._heap) > _SLACK + 2 * len(self._open):
            self._heap = sorted(self._open.values())

    @property
    def next(self) -> float:
        """When the next one passes; infinity if there is none."""
        heap = self._heap
        while heap and heap[0][1] not in self._open:
            heapq.heappop(heap)
        return heap[0][0] if heap else math.inf

    def passed(self, now: float, most: int) -> list[tuple[int, float]]:
        """Take the requests whose deadline has passed at `now`, in order, at most so many: their uids and timeouts."""
        found: list[tuple[int, float]] = []
        while len(found) < most and self.next <= now:
            _, uid, timeout = heapq.heappop(self._heap)
            del self._open[uid]
            found.append((uid, timeout))
        return found
