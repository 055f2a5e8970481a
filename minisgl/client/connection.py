"""Connects a batch client to a server: a ZMQ socket, and the one thread that uses it.

The thread pings the server once a second, so that a caller who is slow between two results is not taken for dead.
"""

from __future__ import annotations

import collections
import contextlib
import os
import queue
import socket
import threading
import time

import zmq

from minisgl.actors.messages import BatchPing, BatchPong, BatchRefused, BatchResult, BatchSubmit
from minisgl.actors.wire import BadMessage, decode, encode
from minisgl.errors import UserError

PING_SECONDS = 1.0
SILENT_SECONDS = 15.0  # of silence after which the server counts as gone


class Link:
    """Connects on construction.  `send`, `receive` and `close` are for the caller's thread."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._out: collections.deque[bytes] = collections.deque()
        self._inbox: queue.SimpleQueue[BatchResult | UserError] = queue.SimpleQueue()
        self._tickets = 0
        self._closing = False
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self._submitted = self._answered = 0
        self._pings: collections.deque[int] = collections.deque()  # requests submitted before each ping that has no pong
        self._thread = threading.Thread(target=self._main, name="minisgl-batch", daemon=True)
        self._thread.start()

    def ticket(self) -> str:
        self._tickets += 1
        return str(self._tickets)

    def send(self, msg: BatchSubmit) -> None:
        self._out.append(encode(msg))
        self._ring()

    def receive(self, seconds: float | None) -> BatchResult | None:
        """The next answer; None after `seconds`.  Raises UserError when the server is gone."""
        try:
            item = self._inbox.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(item, UserError):
            self._inbox.put(item)  # for later calls
            raise item
        return item

    def close(self) -> None:
        self._closing = True
        self._ring()
        self._thread.join()
        self._bell.close()
        self._ear.close()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # full: the thread will wake anyway; closed: it has ended
            self._bell.send(b"\0")

    # ---------------- in the thread
    def _main(self) -> None:
        context = zmq.Context()
        sock = context.socket(zmq.DEALER)
        sock.linger, sock.sndhwm, sock.rcvhwm = 0, 0, 0
        try:
            sock.connect(self._address)
            self._serve(sock)
        except UserError as e:
            self._inbox.put(e)
        except zmq.ZMQError as e:
            self._inbox.put(UserError(f"the batch socket {self._address} cannot be used: {e}"))
        finally:
            sock.close()
            context.term()
            self._inbox.put(UserError("the batch client is closed"))

    def _serve(self, sock: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(sock, zmq.POLLIN)
        poller.register(self._ear, zmq.POLLIN)
        heard = next_ping = time.monotonic()
        while not self._closing:
            if time.monotonic() >= next_ping:
                check_path(self._address)
                if time.monotonic() - heard > SILENT_SECONDS:
                    raise UserError(f"the server has not answered for {SILENT_SECONDS:.0f} seconds; is it still running?")
                sock.send(encode(BatchPing()), zmq.NOBLOCK)
                self._pings.append(self._submitted)
                next_ping = time.monotonic() + PING_SECONDS
            poller.poll(max(0, round((next_ping - time.monotonic()) * 1000)))
            self._drain_bell()
            while self._out:
                sock.send(self._out.popleft(), zmq.NOBLOCK)
                self._submitted += 1
            while sock.poll(0):
                self._handle(sock.recv(zmq.NOBLOCK))
                heard = time.monotonic()

    def _drain_bell(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._ear.recv(4096):
                pass

    def _handle(self, raw: bytes) -> None:
        try:
            msg = decode(raw)
        except BadMessage as e:
            raise UserError(f"the server speaks another protocol: {e}; use the client that came with it") from e
        if isinstance(msg, BatchResult):
            self._answered += 1
            self._inbox.put(msg)
        elif isinstance(msg, BatchRefused):
            raise UserError(f"the server refused a message: {msg.text}")
        elif isinstance(msg, BatchPong) and self._pings:
            # Both directions keep their order: a request submitted before the ping is answered, or counted in the pong.
            lost = self._pings.popleft() - self._answered - msg.open_requests
            if lost > 0:
                raise UserError(f"the server has lost {lost} requests of this client: the connection was interrupted")


def check_path(address: str) -> None:
    """Raises UserError where an ipc:// address has no socket file on this machine."""
    path = address.removeprefix("ipc://")
    if path != address and not os.path.exists(path):
        raise UserError(
            f"the batch socket {path} does not exist here: the server has ended, or runs on another machine "
            "(the batch socket works on the server's own machine only)"
        )
