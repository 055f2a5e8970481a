"""Reads from /proc what the processes of a server take: processor time, memory, threads and descriptors.

Runs in the api process, when /metrics is read; a second later at the earliest it is read again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

_FRESH_SECONDS = 1.0
_TICKS, _PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")


Processes = Callable[[], Mapping[str, tuple[int, float | None]]]  # by name: pid, seconds since the last sign of life


class Process(NamedTuple):
    """A process of the server.  `beat_age`: seconds since its last sign of life, None where nobody needs one of it."""

    pid: int
    beat_age: float | None = None


class Usage(NamedTuple):
    """What a process takes; `memory`: resident bytes, those that it shares included.  None: /proc does not say."""

    cpu_seconds: float
    memory: int
    threads: int
    descriptors: int | None


def stat_of(pid: int, proc: str = "/proc") -> tuple[float, int, int] | None:
    """Processor seconds, resident bytes and threads of a process; None if it has ended, or there is no /proc."""
    try:
        with open(f"{proc}/{pid}/stat", "rb") as f:
            fields = f.read().rpartition(b")")[2].split()  # its name may hold blanks and brackets
    except OSError:
        return None
    if len(fields) < 22 or fields[0] in (b"Z", b"X"):
        return None
    user, system, threads, pages = (int(fields[i]) for i in (11, 12, 17, 21))
    return (user + system) / _TICKS, pages * _PAGE, threads


def usage_of(pid: int, proc: str = "/proc") -> Usage | None:
    """The usage of a process as the kernel counts it; None if it has ended, or there is no /proc."""
    if (stat := stat_of(pid, proc)) is None:
        return None
    try:
        descriptors = len(os.listdir(f"{proc}/{pid}/fd"))
    except OSError:  # of another user
        descriptors = None
    return Usage(*stat, descriptors)


class ProcessFacts:
    """The processes by name, with what they take.  `processes` tells which there are."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.processes: Processes = dict
        self._now = now
        self._read_at = -_FRESH_SECONDS
        self._last: dict[str, tuple[Process, Usage]] = {}

    def read(self) -> Mapping[str, tuple[Process, Usage]]:
        """Of those that live, at most _FRESH_SECONDS old."""
        if (now := self._now()) - self._read_at >= _FRESH_SECONDS:
            self._read_at = now
            found = ((name, process, usage_of(process[0])) for name, process in self.processes().items())
            self._last = {name: (Process(*process), usage) for name, process, usage in found if usage is not None}
        return self._last
