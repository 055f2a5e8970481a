"""Accepts connections: all that wait at once, so that the kernel drops none, but serves few in a turn of the event loop.

asyncio's server does both in one step, with one number for both.  With a small one, a crowd overflows the kernel's queue, and
who finds that full tries again only after one, three and seven seconds.  With a large one, a thousand new connections are
served before the loop looks at a stream again.

A request that came with its connection and that the door (door.py) refuses costs no transport and no protocol, either.  Runs in
the api process, on the thread of its event loop.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
from collections import deque
from collections.abc import Callable

from minisgl.api.http.door import Door

BACKLOG = 1 << 14  # connections that wait in the kernel, which takes its own limit (somaxconn) where that is lower
_ACCEPTED, _SERVED, _REFUSED = 256, 8, 32  # in one turn of the loop
_PEEKED = 1 << 14  # bytes of a request that is refused at once
_PAUSE = 0.05  # seconds, where no descriptor is left, or enough connections wait here
HANDSHAKE_SECONDS = 30.0
_HANDSHAKES = 256  # of TLS, at a time


class Acceptor:
    """Serves a listening socket until it is closed, with a protocol of `make` for each connection."""

    def __init__(
        self,
        sock: socket.socket,
        make: Callable[[], asyncio.Protocol],
        door: Door,
        no_descriptor: Callable[[OSError], object] = lambda e: None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`no_descriptor` is called when no connection can be accepted."""
        self._sock, self._make, self._door = sock, make, door
        self._no_descriptor, self._tls = no_descriptor, tls
        self._waiting: deque[tuple[socket.socket, str]] = deque()  # with their clients' addresses
        self._most = max(_ACCEPTED, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8)  # wait here; others in the kernel
        self._tasks: dict[asyncio.Task[object], None] = {}  # in the order of their connections
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._serving = False
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
        while self._waiting:
            self._waiting.popleft()[0].close()

    def _accept(self) -> None:
        for _ in range(_ACCEPTED):
            try:
                connection, address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                break
            except OSError as e:  # mostly too many open files
                self._no_descriptor(e)
                self._pause()
                break
            connection.setblocking(False)
            self._waiting.append((connection, str(address[0]) if address else ""))
        if len(self._waiting) >= self._most:
            self._pause()
        if self._waiting and not self._serving:
            self._serving = True
            self._serve()

    def _pause(self) -> None:
        """Accept nothing for a moment."""
        if self._loop.remove_reader(self._sock):
            self._timer = self._loop.call_later(_PAUSE, self._loop.add_reader, self._sock, self._accept)

    def _serve(self) -> None:
        served = refused = 0
        while self._waiting and served < _SERVED and refused < _REFUSED:
            connection, address = self._waiting.popleft()
            if self._door.crowded and self._tls is None and self._refuse(connection, address):
                refused += 1
                continue
            served += 1
            task = self._loop.create_task(self._connect(connection))
            self._tasks[task] = None
            task.add_done_callback(lambda task: self._tasks.pop(task, None))
            if len(self._tasks) > _HANDSHAKES:  # the oldest has said nothing for longest
                next(iter(self._tasks)).cancel()
        self._serving = bool(self._waiting)
        if self._serving:
            self._loop.call_soon(self._serve)

    def _refuse(self, connection: socket.socket, address: str) -> bool:
        """Answer the request that has come with a connection if it is to be refused.  False: the connection is as it was."""
        try:
            raw = connection.recv(_PEEKED, socket.MSG_PEEK)
            answer = self._door.refusal_of_bytes(raw, address) if len(raw) < _PEEKED else None
            if answer is None:
                return False
            connection.send(answer)  # a new connection has room for it
            connection.recv(_PEEKED)  # closed with something unread, it would be reset, and the answer lost
        except BlockingIOError:  # nothing has come
            return False
        except OSError:
            pass  # the client has left
        connection.close()
        return True

    async def _connect(self, connection: socket.socket) -> None:
        try:
            seconds = HANDSHAKE_SECONDS if self._tls is not None else None
            await self._loop.connect_accepted_socket(self._make, connection, ssl=self._tls, ssl_handshake_timeout=seconds)
        except OSError:  # the client has left, or speaks no TLS
            connection.close()
