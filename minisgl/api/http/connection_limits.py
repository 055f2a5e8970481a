"""Bounds what connections may take together: descriptors, and memory for answers that nobody reads.

A connection is *silent* until its first request is complete, *idle* between two requests, *busy* while one is served, and it
*lags* while bytes that were written for its client wait in this process.  Runs in the api process, on the thread of its event
loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, Protocol

from minisgl.api.engine import Kept
from minisgl.api.generation import MAX_KEPT_BYTES

log = logging.getLogger("minisgl.api")
MAX_DESCRIPTORS = 1 << 16  # that this process asks for, where the system allows more
ACCEPTED_AT_ONCE = 64  # connections that make room when none can be accepted
WRITE_SECONDS = 60.0  # without a byte that a client reads, although some wait for it
UNREAD_BYTES = MAX_KEPT_BYTES // 2  # of answers in this process; beyond it clients that lag are shown out
_AGE = 1.0  # seconds for which a client may lag even then, unless twice as much waits
_REFUSED = 32  # connections that are told of a refusal at a time
_LOG_SECONDS = 60.0  # between two lines about a want of descriptors


def raise_descriptors(most: int = MAX_DESCRIPTORS) -> int:
    """Raise this process's soft limit of descriptors as far as `most` and the hard limit; returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return most if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def connections_within(descriptors: int) -> int:
    """How many connections a process with so many descriptors may have.

    Kept back: what is open already, and a reserve for files, child processes, sockets of other actors and connections that
    have been accepted but not counted yet.
    """
    reserve = min(max(4 * ACCEPTED_AT_ONCE, 3 * descriptors // 16), descriptors // 4)
    return max(16, descriptors - len(os.listdir("/proc/self/fd")) - reserve)


class Client(Protocol):
    """A connection, as its bounds see it."""

    def show_out(self) -> None:
        """End it at once; what waits for its client is dropped."""

    def refuse(self) -> None:
        """Answer 503 as soon as the client speaks, then end."""

    def buffered(self) -> int:
        """Bytes that were written for the client and wait in the transport."""

    def held(self) -> int:
        """Bytes of its answer that wait in this process: those, and what is counted in `Kept`."""


class _Lag(NamedTuple):
    began: float
    size: int
    since: float  # when `size` changed last


class Connections:
    """All connections of a server.  `limit`: how many there may be; `now`: seconds of a monotonic clock.

    `closed` counts those that were ended for the good of others, by reason: `room`, `refused`, `headers`, `slow_reader` or
    `memory`.
    """

    def __init__(
        self,
        limit: int = MAX_DESCRIPTORS,
        kept: Kept | None = None,
        closed: Counter[str] | None = None,
        *,
        write_seconds: float = WRITE_SECONDS,
        unread_bytes: int = UNREAD_BYTES,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.closed: Counter[str] = Counter() if closed is None else closed
        self.draining = False
        self._limit, self._kept, self._now = limit, kept or Kept(), now
        self._write_seconds, self._unread_bytes = write_seconds, unread_bytes
        self._open: set[Client] = set()
        self._silent: dict[Client, None] = {}  # in the order of their coming
        self._idle: dict[Client, None] = {}  # in the order in which they became so
        self._refused: dict[Client, None] = {}
        self._lagging: dict[Client, _Lag] = {}  # in the order in which they began to
        self._fresh = 0  # bytes with which clients have begun to lag since the last sweep
        self._timer: asyncio.Handle | None = None
        self._logged = -_LOG_SECONDS

    def __len__(self) -> int:
        return len(self._open)

    @property
    def busy(self) -> int:
        """Connections with a request that is being served."""
        return len(self._open) - len(self._silent) - len(self._idle) - len(self._refused)

    # ---------------- what a connection reports
    def has_room(self) -> bool:
        """Whether another client may connect.  If there is no room one of the others must go; False: all are being served."""
        return len(self._open) < self._limit or self.make_room()

    def made(self, c: Client) -> bool:
        """A client has connected.  False: there is no room for it (see `has_room`)."""
        full = not self.has_room()
        self._open.add(c)
        if not full:
            self._silent[c] = None
            return True
        self.closed["refused"] += 1
        if len(self._refused) >= _REFUSED:
            self._end(next(iter(self._refused)))
        self._refused[c] = None
        c.refuse()
        return False

    def asked(self, c: Client) -> None:
        """The head of a request is complete."""
        self._silent.pop(c, None)
        self._idle.pop(c, None)

    def rests(self, c: Client) -> None:
        """A request has been answered, and no other has come."""
        if c in self._open:
            self._idle[c] = None

    def lost(self, c: Client) -> None:
        """The connection has ended."""
        self._open.discard(c)
        for some in (self._silent, self._idle, self._refused, self._lagging):
            some.pop(c, None)

    def lags(self, c: Client) -> None:
        """Bytes wait for the client, from now until `reads` or `lost`."""
        size, now = c.buffered(), self._now()
        self._lagging[c] = _Lag(now, size, now)
        self._fresh += size
        if self._timer is None or self._fresh > self._unread_bytes // 4:
            self._again(0.0 if self._fresh > self._unread_bytes // 4 else self._seconds)

    def reads(self, c: Client) -> None:
        """Nothing waits for the client."""
        self._lagging.pop(c, None)

    # ---------------- what is done about it
    def make_room(self, n: int = 1) -> bool:
        """End the `n` connections that are of least use, if there are any: those silent for longest, then those idle."""
        found = False
        for _ in range(n):
            c = next(iter(self._silent or self._idle), None)
            if c is None:
                return found
            found = True
            self.closed["room"] += 1
            self._end(c)
        return found

    def _end(self, c: Client) -> None:
        self.lost(c)
        c.show_out()

    def drain(self) -> None:
        """End the idle connections; others end with the request that they have, or send."""
        self.draining = True
        for c in list(self._idle):
            self._end(c)

    @property
    def _seconds(self) -> float:
        return min(_AGE, self._write_seconds / 4)

    def _again(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self.sweep)

    def sweep(self) -> None:
        """End connections whose clients read nothing; if too much waits, those that have lagged for longest."""
        now, self._fresh, total = self._now(), 0, self._kept.bytes
        for c, lag in list(self._lagging.items()):
            if (size := c.buffered()) != lag.size:
                self._lagging[c] = lag._replace(size=size, since=now)
            elif now - lag.since >= self._write_seconds:
                self.closed["slow_reader"] += 1
                self._end(c)
                continue
            total += size
        for c, lag in list(self._lagging.items()):
            if total <= self._unread_bytes:
                break
            if now - lag.began >= _AGE or total > 2 * self._unread_bytes:
                total -= c.held()
                self.closed["memory"] += 1
                self._end(c)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._lagging:
            self._again(self._seconds)

    def no_descriptor(self, error: OSError) -> None:
        """No connection can be accepted, mostly for want of descriptors: make room, and say so now and then."""
        self.make_room(ACCEPTED_AT_ONCE)
        if self._now() - self._logged >= _LOG_SECONDS:
            self._logged = self._now()
            log.warning("connections cannot be accepted: %s; %d are open (ulimit -n raises the limit)", error, len(self._open))
