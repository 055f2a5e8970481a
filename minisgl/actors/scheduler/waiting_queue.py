"""The waiting queue: requests that have not started, or were retracted.  Pure data structure; runs in the scheduler process.

Order: higher priority first; among equals, retracted requests first, then in the fair order (fair_queue.py).  One sorted list:
adding and removing bisects, and no operation walks the queue, so its length appears in no cost but that of moving memory.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from minisgl.actors.scheduler.request import Request

Key = tuple[int, float, int]


class WaitQueue:
    """Add, remove and look at the front, each in logarithmic time."""

    def __init__(self) -> None:
        self.tokens = 0  # prompt tokens of all waiting requests
        self._sorted: list[tuple[Key, Request]] = []
        self._keys: dict[int, Key] = {}  # uid -> key
        self._added = 0

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, uid: int) -> bool:
        return uid in self._keys

    def add(self, request: Request, front: bool = False) -> None:
        """Put a request in its place; `front`: before all others of its priority."""
        self._added += 1
        priority = -request.options.priority
        key = (priority, -1.0, -self._added) if front else (priority, request.finish, self._added)
        self._keys[request.uid] = key
        insort(self._sorted, (key, request))
        self.tokens += len(request.ids)

    def remove(self, uid: int) -> Request | None:
        """Take a request out; None if it is not in the queue."""
        key = self._keys.pop(uid, None)
        if key is None:
            return None
        _, request = self._sorted.pop(bisect_left(self._sorted, (key,)))
        self.tokens -= len(request.ids)
        return request

    def front(self, n: int) -> list[Request]:
        """The first `n` requests, in order."""
        return [request for _, request in self._sorted[:n]]
