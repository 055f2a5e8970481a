"""An event loop with few events in a turn, and the engine's always among them.

asyncio handles all sockets that are ready before it looks at any again.  When thousands of connections have something to say at
once, that is one turn of a second, in which no stream gets a token.  Runs in the api process.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import selectors
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

_EVENTS = 32  # in one turn of the loop; the kernel hands out the others in the next ones, in the order of their coming


class FairLoop(asyncio.SelectorEventLoop):
    """asyncio's loop with a bounded number of events in a turn."""

    def __init__(self) -> None:
        selector = selectors.EpollSelector()
        self._bounded: Any = _Bounded(selector._selector)  # type: ignore[attr-defined]
        selector._selector = self._bounded  # type: ignore[attr-defined]
        super().__init__(selector)

    def prefer(self, fds: Iterable[int]) -> None:
        """Have every turn see whether these descriptors, which have readers, are readable."""
        self._bounded.prefer(set(fds))

    def close(self) -> None:
        super().close()
        self._bounded.preferred.close()


def run(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run on such a loop; before Python 3.11, which cannot be told the loop, on the usual one."""
    if (runner_type := getattr(asyncio, "Runner", None)) is None:
        return asyncio.run(main)
    with runner_type(loop_factory=FairLoop) as runner:
        result: T = runner.run(main)
    return result


class _Bounded:
    """An epoll object whose `poll` returns at most _EVENTS events, and besides those that are preferred."""

    def __init__(self, every: select.epoll) -> None:
        self._every, self.preferred = every, select.epoll()
        self._fds: set[int] = set()

    def prefer(self, fds: set[int]) -> None:
        for fd in self._fds:
            with contextlib.suppress(OSError):  # it is closed, and with that forgotten
                self.preferred.unregister(fd)
        for fd in fds:
            self.preferred.register(fd, select.EPOLLIN)
        self._fds = fds

    def poll(self, timeout: float, most: int) -> list[tuple[int, int]]:
        events = self._every.poll(timeout, min(most, _EVENTS))
        if len(events) == _EVENTS and self._fds:
            seen = {fd for fd, _ in events}
            events += [(fd, event) for fd, event in self.preferred.poll(0) if fd not in seen]
        return events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._every, name)
