"""Finds the requests that kill the engine, and leaves all others in peace.  Runs in the api process.

After a death every open request runs again.  One that was in flight at two deaths in a row, without a new token in between, is
suspected: it runs again alone, before all others, until it has said something new.  If the engine dies then, it is poison: it
is refused, and so is the same prompt for an hour.  Deaths that have nothing to do with requests hit each of them at another
token, so they make nobody a suspect; kills from outside are not counted (recovery.py).
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

from minisgl.arrays import I32

_MAX_DEATHS = 2
_REMEMBERED_SECONDS = 3600.0
_REMEMBERED = 1024  # prompts


class Tried(Protocol):
    """What a trial needs to know of an open request."""

    ids: I32 | None
    delivered: list[int]
    deaths: int  # in a row, without a new token in between
    said_at_death: int  # tokens delivered when it died last


T = TypeVar("T", bound=Tried)


class Trials(Generic[T]):
    """The suspects, in order; at most one of them runs."""

    def __init__(self) -> None:
        self.current: T | None = None
        self._suspects: deque[T] = deque()
        self._poison: dict[bytes, float] = {}  # digest of a prompt -> when it was refused

    @property
    def open(self) -> bool:
        """Whether somebody is on trial, or will be: nobody else may run."""
        return self.current is not None or bool(self._suspects)

    def judge(self, in_flight: Iterable[T], now: float) -> bool:
        """The engine died while these ran.  True: a prompt is poison, so `knows` has to be asked about every open request."""
        on_trial, self.current = self.current, None
        poison = None
        for r in in_flight:
            r.deaths = r.deaths + 1 if r.deaths and len(r.delivered) <= r.said_at_death else 1
            r.said_at_death = len(r.delivered)
            if r is on_trial:
                on_trial = None
                poison = r if r.deaths > _MAX_DEATHS else None
            elif r.deaths == _MAX_DEATHS:
                self._suspects.append(r)
        if on_trial is not None:  # it had not begun to run
            self._suspects.appendleft(on_trial)
        if poison is None:
            return False
        digest = _digest(poison.ids)
        self._poison[digest] = now
        while len(self._poison) > _REMEMBERED:
            del self._poison[next(iter(self._poison))]
        self._suspects = deque(r for r in self._suspects if _digest(r.ids) != digest)
        return True

    def next(self) -> T | None:
        """Begin the next trial; None if one is going on, or there is none."""
        if self.current is not None or not self._suspects:
            return None
        self.current = self._suspects.popleft()
        return self.current

    def put_back(self) -> None:
        """The request on trial cannot begin now."""
        if self.current is not None:
            self._suspects.appendleft(self.current)
            self.current = None

    def acquitted(self) -> T | None:
        """The request on trial, if it has said something new: its trial is over."""
        r = self.current
        if r is None or len(r.delivered) <= r.said_at_death:
            return None
        self.current, r.deaths = None, 0
        return r

    def withdraw(self, r: T) -> None:
        """A request has ended."""
        if r is self.current:
            self.current = None
        self._suspects = deque(s for s in self._suspects if s is not r)

    def suspected(self, r: T) -> bool:
        """Whether a request waits for its trial."""
        return any(r is s for s in self._suspects)

    def knows(self, ids: I32, now: float) -> bool:
        """Whether a prompt was refused as poison within the last hour."""
        return bool(self._poison) and now - self._poison.get(_digest(ids), -_REMEMBERED_SECONDS) < _REMEMBERED_SECONDS


def _digest(ids: I32 | None) -> bytes:
    return hashlib.blake2b(b"" if ids is None else ids.tobytes(), digest_size=16).digest()
