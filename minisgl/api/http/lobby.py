"""Keeps new connections until their clients say something, at the cost of a descriptor and two objects each.

A transport and a protocol are fifty times as much, in time and in memory.  When thousands connect at once, most of them say
nothing for a while, or ask for something that is refused as it comes; a connection is made for those that are left.  Runs in
the api process, on the thread of its event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import select
import socket
from collections.abc import Callable

from minisgl.api.http.connection_limits import Connections

_HEARD, _LET_IN = 32, 8  # in one turn of the loop
_LET_IN_TO_A_CROWD = 1  # in one turn: all who come before a free place is taken would be let in for it


class Waiting:
    """A connection whose client has said nothing yet, as its bounds see it.  `since`: when it came, by the loop's clock."""

    __slots__ = ("_lobby", "address", "since", "sock")

    def __init__(self, lobby: Lobby, sock: socket.socket, address: str, since: float) -> None:
        self._lobby, self.sock, self.address, self.since = lobby, sock, address, since

    def show_out(self) -> None:
        self._lobby.leave(self)
        self.sock.close()

    def refuse(self) -> None:
        self.show_out()

    def buffered(self) -> int:
        return 0

    def held(self) -> int:
        return 0


class Lobby:
    """Connections count as silent among all `connections` while they wait here, `seconds` at the longest.

    `hear` is called for one whose client has said something or has left.  It may answer: True ends the connection, False lets
    it in, None leaves it where it is.  `let_in` is called with those whose time is over, too.  `crowded`: places are few.
    """

    def __init__(
        self,
        connections: Connections,
        hear: Callable[[Waiting], bool | None],
        let_in: Callable[[Waiting], object],
        crowded: Callable[[], bool],
        seconds: float,
    ) -> None:
        self._connections, self._hear, self._let_in, self._seconds = connections, hear, let_in, seconds
        self._crowded = crowded
        self._waiting: dict[int, Waiting] = {}  # by descriptor, in the order of their coming
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._epoll = select.epoll()
        self._loop.add_reader(self._epoll.fileno(), self._look)

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, sock: socket.socket, address: str) -> bool:
        """A client has connected from `address`.  False: there is no room, and it was let in at once, to be told."""
        new = Waiting(self, sock, address, self._loop.time())
        if not self._connections.has_room():
            self._let_in(new)
            return False
        self._connections.made(new)
        self._waiting[sock.fileno()] = new
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        if self._timer is None:
            self._timer = self._loop.call_at(new.since + self._seconds, self._sweep)
        return True

    def leave(self, one: Waiting) -> None:
        """It waits no longer.  Its socket is as it was."""
        if self._waiting.pop(one.sock.fileno(), None) is not None:
            self._epoll.unregister(one.sock.fileno())
            self._connections.lost(one)

    def _look(self) -> None:
        """Hear those who say something, some in each turn; the kernel tells of them in turn."""
        let_in, most = 0, _LET_IN_TO_A_CROWD if self._crowded() else _LET_IN
        for fd, _ in self._epoll.poll(0, _HEARD):
            one = self._waiting.get(fd)
            done = None if one is None else self._hear(one)
            if one is None or done is None:
                continue
            if done:
                one.show_out()
                continue
            self._admit(one)
            let_in += 1
            if let_in == most:
                break

    def _admit(self, one: Waiting) -> None:
        self.leave(one)
        self._let_in(one)

    def _sweep(self) -> None:
        """Let in those whose time is over, some in each turn."""
        late = self._loop.time() - self._seconds
        for one in [w for w in itertools.islice(self._waiting.values(), _LET_IN) if w.since <= late]:
            self._admit(one)
        first = next(iter(self._waiting.values()), None)
        self._timer = None if first is None else self._loop.call_at(first.since + self._seconds, self._sweep)

    def close(self) -> None:
        """End all that wait.  Idempotent."""
        if self._epoll.closed:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._epoll.fileno())
        for one in list(self._waiting.values()):
            with contextlib.suppress(OSError):
                one.show_out()
        self._epoll.close()
