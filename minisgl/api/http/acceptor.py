"""Accepts connections: all that wait at once, so that the kernel drops none, but serves few in a turn of the event loop.

asyncio's server does both in one step, with one number for both.  With a small one, a crowd overflows the kernel's queue, and
who finds that full tries again only after one, three and seven seconds.  With a large one, a thousand new connections are
served before the loop looks at a stream again.

New connections wait in the lobby (lobby.py) until their clients say something.  A request that the door (door.py) refuses is
answered there, and costs no transport and no protocol.  Runs in the api process, on the thread of its event loop.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Any

from minisgl.api.http.connection import HEADER_SECONDS
from minisgl.api.http.connection_limits import Connections
from minisgl.api.http.door import Door
from minisgl.api.http.lobby import Lobby, Waiting

BACKLOG = 1 << 14  # connections that wait in the kernel, which takes its own limit (somaxconn) where that is lower
_ACCEPTED, _TURNED_AWAY = 128, 8  # in one turn of the loop: connections, and those of them for which there is no room
_PEEKED = 1 << 14  # bytes of a request that is refused at once
_PEEK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
_LAST = int(socket.MSG_MORE | socket.MSG_DONTWAIT)  # to be sent with the connection's end
_PAUSE = 0.05  # seconds, where no descriptor is left
_HANDSHAKES = 256  # of TLS, at a time


class Acceptor:
    """Serves a listening socket until it is closed, with a protocol of `make` for each connection whose client speaks."""

    def __init__(
        self,
        sock: socket.socket,
        make: Callable[[], Any],
        door: Door,
        connections: Connections | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """What `make` returns is an asyncio.Protocol with an attribute `since`: when its client connected."""
        self._sock, self._make, self._door, self._tls = sock, make, door, tls
        self._connections = Connections() if connections is None else connections
        self._lobby = Lobby(self._connections, self._hear, self._let_in, lambda: door.crowded, HEADER_SECONDS)
        self._tasks: dict[asyncio.Task[object], None] = {}  # in the order of their connections
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        sock.listen(BACKLOG)
        self._loop.add_reader(sock, self._accept)

    def close(self) -> None:
        """Accept no more.  Connections that nobody has served are closed, those that are served go on.  Idempotent."""
        if self._sock.fileno() < 0:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()
        self._lobby.close()

    def _accept(self) -> None:
        turned_away = 0
        for _ in range(_ACCEPTED):
            try:
                connection, address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                break
            except OSError as e:  # mostly too many open files
                self._connections.no_descriptor(e)
                self._pause()
                break
            if not self._lobby.enter(connection, str(address[0]) if address else ""):
                turned_away += 1
                if turned_away == _TURNED_AWAY:
                    break

    def _pause(self) -> None:
        """Accept nothing for a moment."""
        if self._loop.remove_reader(self._sock):
            self._timer = self._loop.call_later(_PAUSE, self._loop.add_reader, self._sock, self._accept)

    def _hear(self, one: Waiting) -> bool | None:
        """See what has come from a client; answer a request that has come whole, if it is to be refused."""
        try:
            raw = one.sock.recv(_PEEKED, _PEEK)
            if raw:
                plain = self._tls is None and self._door.crowded and len(raw) < _PEEKED
                answer = self._door.refusal_of_bytes(raw, one.address) if plain else None
                if answer is None:
                    return False
                one.sock.send(answer, _LAST)
                one.sock.recv(len(raw))  # closed with something unread, it would be reset, and the answer lost
        except BlockingIOError:  # nothing has come
            return None
        except OSError:
            pass  # the client has left
        return True

    def _let_in(self, one: Waiting) -> None:
        task = self._loop.create_task(self._connect(one))
        self._tasks[task] = None
        task.add_done_callback(lambda task: self._tasks.pop(task, None))
        if len(self._tasks) > _HANDSHAKES:  # the oldest has said nothing for longest
            next(iter(self._tasks)).cancel()

    async def _connect(self, one: Waiting) -> None:
        def make() -> Any:
            protocol = self._make()
            protocol.since = one.since
            return protocol

        left = max(0.1, one.since + HEADER_SECONDS - self._loop.time())
        try:
            await self._loop.connect_accepted_socket(
                make, one.sock, ssl=self._tls, ssl_handshake_timeout=left if self._tls is not None else None
            )
        except OSError:  # the client has left, or speaks no TLS
            one.sock.close()
