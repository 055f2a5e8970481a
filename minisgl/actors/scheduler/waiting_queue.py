"""The waiting queue: requests that have not started, or were retracted.  Pure data structure; runs in the scheduler process.

Order: higher priority first; among equals, retracted requests first, then by arrival.  No operation walks the queue, so its
length appears in no cost.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice

from minisgl.actors.scheduler.request import Request


class WaitQueue:
    """Add, remove and look at the front, each in constant time (for a bounded number of distinct priorities)."""

    def __init__(self) -> None:
        self.tokens = 0  # prompt tokens of all waiting requests
        self._lanes: dict[int, OrderedDict[int, Request]] = {}  # priority -> uid -> request
        self._where: dict[int, int] = {}  # uid -> priority

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, uid: int) -> bool:
        return uid in self._where

    def add(self, request: Request, front: bool = False) -> None:
        """Append to the lane of its priority; `front`: put it before all others in this lane."""
        priority = request.options.priority
        self._lanes.setdefault(priority, OrderedDict())[request.uid] = request
        if front:
            self._lanes[priority].move_to_end(request.uid, last=False)
        self._where[request.uid] = priority
        self.tokens += len(request.ids)

    def remove(self, uid: int) -> Request | None:
        """Take a request out; None if it is not in the queue."""
        priority = self._where.pop(uid, None)
        if priority is None:
            return None
        lane = self._lanes[priority]
        request = lane.pop(uid)
        self.tokens -= len(request.ids)
        if not lane:
            del self._lanes[priority]
        return request

    def front(self, n: int) -> list[Request]:
        """The first `n` requests, in order."""
        return list(islice(self._walk(), n))

    def _walk(self) -> Iterator[Request]:
        for priority in sorted(self._lanes, reverse=True):
            yield from self._lanes[priority].values()
