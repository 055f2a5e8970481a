"""Connects a batch client to a server: a ZMQ socket, and the one thread that uses it.

The thread pings the server once a second, so that a caller who is slow between two results is not taken for dead.  Over TCP
it also follows the handshake (curve.py).
"""

from __future__ import annotations

import collections
import contextlib
import os
import queue
import threading
import time
import weakref

import zmq

from minisgl.actors.messages import BatchPing, BatchPong, BatchRefused, BatchResult, BatchSubmit
from minisgl.actors.wire import BadMessage, decode, encode
from minisgl.client.curve import Curve, Entrance, ServerGone
from minisgl.errors import UserError

PING_SECONDS = 1.0
SILENT_SECONDS = 15.0  # of silence after which the server counts as gone


class Link:
    """Connects on construction.  `send`, `receive` and `close` are for the caller's thread.

    With keys (`curve`, for tcp://) it waits for the server to let it in.  Raises UserError where that does not.
    """

    def __init__(self, address: str, curve: Curve | None = None) -> None:
        self._address, self._curve = address, curve
        self._context = zmq.Context()
        self._context.linger = self._context.sndhwm = self._context.rcvhwm = 0  # of every socket
        self._outbox, requests = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)  # b"" ends the thread
        # Also where nobody closes this: a context that is collected as garbage with an open socket waits for it for ever.
        self._end = weakref.finalize(self, _close, self._context, self._outbox)
        self._end.atexit = False
        self._outbox.bind("inproc://outbox")
        requests.connect("inproc://outbox")
        self._inbox: queue.SimpleQueue[BatchResult | UserError] = queue.SimpleQueue()
        self._submitted = self._answered = 0
        self._pings: collections.deque[int] = collections.deque()  # requests submitted before each ping that has no pong
        self._entered: queue.SimpleQueue[UserError | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, args=(requests,), name="minisgl-batch", daemon=True)
        self._thread.start()
        if curve is not None and (fault := self._entered.get()) is not None:
            self.close()
            raise fault

    def send(self, msg: BatchSubmit) -> None:
        self._post(encode(msg))

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
        self._post(b"")
        self._thread.join()
        self._end()

    def _post(self, raw: bytes) -> None:
        with contextlib.suppress(zmq.ZMQError):  # the thread has ended: `receive` says why
            self._outbox.send(raw, zmq.NOBLOCK)

    # ---------------- in the thread
    def _main(self, requests: zmq.Socket[bytes]) -> None:
        fault = UserError("the batch client is closed")
        try:
            with requests, self._context.socket(zmq.DEALER) as sock:
                if self._curve is None:
                    sock.connect(self._address)
                    self._serve(sock, requests, None)
                else:
                    entrance = Entrance(sock, self._address, self._curve)
                    with entrance.monitor:
                        self._enter(entrance)
                        self._serve(sock, requests, entrance)
        except UserError as e:
            fault = e
        except zmq.ZMQError as e:
            fault = UserError(f"the batch socket {self._address} cannot be used: {e}")
        finally:
            self._entered.put(fault)
            self._inbox.put(fault)

    def _enter(self, entrance: Entrance) -> None:
        while not entrance.inside:
            entrance.monitor.poll(100)
            entrance.look()
        self._entered.put(None)

    def _serve(self, sock: zmq.Socket[bytes], requests: zmq.Socket[bytes], entrance: Entrance | None) -> None:
        poller = zmq.Poller()
        poller.register(sock, zmq.POLLIN)
        poller.register(requests, zmq.POLLIN)
        heard = next_ping = time.monotonic()
        while True:
            if time.monotonic() >= next_ping:
                if entrance is None:
                    check_path(self._address)
                else:
                    entrance.look()
                if time.monotonic() - heard > SILENT_SECONDS:
                    raise ServerGone(f"the server has not answered for {SILENT_SECONDS:.0f} seconds; is it still running?")
                sock.send(encode(BatchPing()), zmq.NOBLOCK)
                self._pings.append(self._submitted)
                next_ping = time.monotonic() + PING_SECONDS
            poller.poll(max(0, round((next_ping - time.monotonic()) * 1000)))
            while requests.poll(0):
                if not (raw := requests.recv()):
                    return
                sock.send(raw, zmq.NOBLOCK)
                self._submitted += 1
            while sock.poll(0):
                self._handle(sock.recv(zmq.NOBLOCK))
                heard = time.monotonic()

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
                raise ServerGone(f"the server has lost {lost} requests of this client: the connection was interrupted")


def _close(context: zmq.Context[zmq.Socket[bytes]], outbox: zmq.Socket[bytes]) -> None:
    outbox.close()
    context.term()


def check_address(address: str, curve: Curve | None) -> None:
    """Raises UserError where an address is of no kind that has a batch socket, or not of that for which there are keys."""
    if address.startswith("tcp://"):
        if curve is None:
            raise UserError(
                f"the batch socket {address[:80]!r} needs keys, as it is reached through a network: --server-key FILE and "
                "--client-key FILE; `minisgl batch-keys` makes them"
            )
    elif curve is not None:
        raise UserError("--server-key and --client-key are for a batch socket over TCP: name it with --socket tcp://HOST:PORT")
    else:
        check_path(address)


def check_path(address: str) -> None:
    """Raises UserError where an address is not that of a socket of this user, or of root, and ServerGone where it is none."""
    path = address.removeprefix("ipc://")
    if path == address:
        raise UserError(
            f"the batch socket {address[:80]!r} cannot be used: its address begins with ipc:// on the server's own machine, "
            "and with tcp:// elsewhere (--batch-socket of the server)"
        )
    try:
        owner = os.stat(path).st_uid
    except OSError as e:
        raise ServerGone(
            f"the batch socket {path} does not exist here: the server has ended, or runs on another machine "
            "(this socket works on the server's own machine only; from another --socket tcp://HOST:PORT, or /v1/batches)"
        ) from e
    if os.geteuid() and owner not in (0, os.geteuid()):
        raise UserError(
            f"the batch socket {path} belongs to another user: it could be anybody's who wants to read your requests"
        )
