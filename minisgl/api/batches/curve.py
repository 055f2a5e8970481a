"""Opens the batch socket to other machines: a ROUTER socket over TCP with CURVE, for clients whose public key is known.

CURVE (rfc.zeromq.org/spec/26) encrypts, proves each side to the other, and ends whatever else comes, before a message can.
libzmq asks a ZAP handler (spec/27) who may enter; it is here, on the event loop of the api process.  The socket has a context
and with it a thread of its own, so that bytes of strangers take nothing from the mailboxes of the actors.  What strangers may
hold is bounded by `_Guests`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from minisgl import logs
from minisgl.actors.wire import BadMessage
from minisgl.api.batches.socket import BatchServer, Peer, router
from minisgl.api.engine import Engine
from minisgl.api.request_log import RequestLog

CONNECTIONS = 256  # at most; each takes a descriptor
STRANGERS = 16  # of them at most are in the handshake, where each may hold a frame of the largest size
HANDSHAKE_SECONDS = 5.0
_IDENTITY_BYTES = 16  # at least: nobody can guess the name of another's connection, and take it over when that has ended
_WAITING = 4096  # results that wait for a client; one that does not read them is forgotten
_UNREAD = 16  # messages of a client that wait to be read; more stay with it
_HEARTBEAT_MS, _DEAD_MS = 5_000, 15_000
_LINGER_MS = 500
_BURST = 64  # events that are handled before the loop goes on
_SAY_SECONDS = 60.0  # between two lines about refused keys
_SERVER_BYTES = 64 + 170 + 4  # of the server in a handshake at most: greeting, WELCOME; then comes READY
_CLIENT_BYTES = 4096  # of a client: greeting, HELLO, INITIATE with a few properties
_LOOK_SECONDS = 0.02  # between two looks at what strangers send
_TCP_INFO = struct.Struct("120xQQ")  # tcpi_bytes_acked and tcpi_bytes_received in struct tcp_info of Linux


class ClientKeys:
    """The public keys (Z85, 40 characters) that may use the socket, each a tenant.  `name`: of the tenant of a key."""

    def __init__(self, keys: Iterable[str], name: Callable[[str], str]) -> None:
        self._name = name
        self.replace(keys)

    def replace(self, keys: Iterable[str]) -> None:
        """Have these keys instead, from the next handshake and the next message on."""
        self._tenants = {key: self._name(f"curve\n{key}") for key in keys}  # no API key has a line break

    def __len__(self) -> int:
        return len(self._tenants)

    def tenant(self, key: str) -> str | None:
        """The name of the tenant with a key; None where it is not, or no longer, allowed."""
        return self._tenants.get(key)


class CurveServer:
    """Serves on construction; must be made and closed inside the running event loop.

    `listener`: bound; its port is taken over.  `secret`: the server's secret key, Z85.
    """

    def __init__(
        self,
        listener: socket.socket,
        secret: bytes,
        clients: ClientKeys,
        engine: Engine,
        request_log: RequestLog | None = None,
    ) -> None:
        host, port = listener.getsockname()[:2]
        self.address = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
        listener.setblocking(False)
        self._clients, self._guests = clients, _Guests(port, asyncio.get_running_loop())
        self._refused, self._say_at = 0, 0.0
        self._loop, self._closed = asyncio.get_running_loop(), False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._zap = self._context.socket(zmq.REP)
        self._zap.linger = 0
        self._zap.bind("inproc://zeromq.zap.01")
        sock = router(self._context.socket(zmq.ROUTER))
        sock.linger, sock.sndhwm, sock.rcvhwm = _LINGER_MS, _WAITING, _UNREAD
        sock.handshake_ivl = int(HANDSHAKE_SECONDS * 1000)
        sock.heartbeat_ivl, sock.heartbeat_timeout = _HEARTBEAT_MS, _DEAD_MS
        sock.curve_secretkey, sock.curve_server, sock.zap_domain = secret, True, b"batch"
        self._monitor: zmq.Socket[bytes] = sock.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        sock.setsockopt(zmq.USE_FD, listener.detach())
        sock.bind(f"tcp://127.0.0.1:{port}")  # the descriptor has the address
        self._watched = [(self._zap, self._authenticate), (self._monitor, self._watch)]
        for watched, handle in self._watched:
            self._loop.add_reader(watched.FD, self._pump, watched, handle)
            self._pump(watched, handle)  # descriptors signal edges
        self._server = BatchServer(sock, engine, request_log, self.peer)

    def close(self) -> None:
        """Cancel all running requests and close the sockets."""
        self._closed = True
        self._guests.close()
        self._server.close()
        for sock, _ in self._watched:
            self._loop.remove_reader(sock.FD)
            sock.close()
        self._context.term()

    def peer(self, identity: bytes, frame: zmq.Frame) -> Peer:
        """Who has sent a frame.  Raises BadMessage with the reason why it is not heard."""
        tenant = self._clients.tenant(str(frame.get("User-Id")))
        if tenant is None:
            raise BadMessage("the key of this client is not allowed any more")
        if len(identity) < _IDENTITY_BYTES:
            raise BadMessage(f"the socket's routing id must be {_IDENTITY_BYTES} random bytes or more")
        return Peer(tenant, tenant)

    # ---------------- on the event loop
    def _pump(self, sock: zmq.Socket[bytes], handle: Callable[[list[bytes]], None]) -> None:
        for _ in range(_BURST):
            if self._closed:
                return
            try:
                frames = sock.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            handle(frames)
        self._loop.call_soon(self._pump, sock, handle)

    def _authenticate(self, request: list[bytes]) -> None:
        """Answer ZAP: version, request id, domain, address, identity, mechanism, and the client's public key."""
        version, number, _, address, _, mechanism, *credentials = request
        key = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" and credentials else ""
        known = self._clients.tenant(key) is not None
        answer = (b"200", b"OK", key.encode()) if known else (b"400", b"this key is not allowed", b"")
        self._zap.send_multipart([version, number, *answer, b""], zmq.NOBLOCK)
        if not known:
            self._say_refused(address.decode("ascii", "replace"), key)

    def _say_refused(self, address: str, key: str) -> None:
        self._refused += 1
        if (now := time.monotonic()) >= self._say_at:
            text = f"batch socket: refused {self._refused} handshakes with keys that are not in --batch-keys; "
            text += f"the last came from {address}, with the public key {key}"
            logs.say("batch_refused", text, logging.WARNING, refused=self._refused, address=address, public_key=key)
            self._refused, self._say_at = 0, now + _SAY_SECONDS

    def _watch(self, frames: list[bytes]) -> None:
        event: Any = parse_monitor_message(frames)
        if event["event"] == zmq.EVENT_ACCEPTED:
            self._guests.came(event["value"])
        else:
            self._guests.left(event["value"])


class _Guests:
    """Bounds the connections of a port, which libzmq does not, by their descriptors; it closes them when they are shut down."""

    def __init__(self, port: int, loop: asyncio.AbstractEventLoop) -> None:
        self._port, self._loop = port, loop
        self._all: set[int] = set()
        self._new: dict[int, float] = {}  # those that may still be in the handshake, and when it ends at the latest
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._all)

    def close(self) -> None:
        self._new.clear()
        if self._timer is not None:
            self._timer.cancel()

    def came(self, fd: int) -> None:
        self._all.add(fd)
        self._new.pop(fd, None)
        self._new[fd] = time.monotonic() + HANDSHAKE_SECONDS
        self._look()
        if len(self._new) > STRANGERS:
            self._shut(next(iter(self._new)))
        elif len(self._all) > CONNECTIONS:
            self._shut(fd)

    def left(self, fd: int) -> None:
        self._all.discard(fd)
        self._new.pop(fd, None)

    def _look(self) -> None:
        """Shut out strangers that send what belongs to no handshake, before libzmq has all of it."""
        now = time.monotonic()
        for fd, end in list(self._new.items()):
            said, heard = _traffic(fd)
            if end < now or said > _SERVER_BYTES:
                del self._new[fd]
            elif heard > _CLIENT_BYTES:
                self._shut(fd)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(_LOOK_SECONDS, self._look) if self._new else None

    def _shut(self, fd: int) -> None:
        self._new.pop(fd, None)
        with contextlib.suppress(OSError, IndexError), _held(fd) as held:  # it has ended, or is a socket of another kind
            if held.type == socket.SOCK_STREAM and held.getsockname()[1] == self._port:
                held.shutdown(socket.SHUT_RDWR)


def _held(fd: int) -> socket.socket:
    """What has this number now, kept from closing.  Raises OSError where that is no socket."""
    own = os.dup(fd)
    try:
        return socket.socket(fileno=own)
    except OSError:
        os.close(own)
        raise


def _traffic(fd: int) -> tuple[int, int]:
    """Bytes that the server has sent on a connection, and received; where the system does not say, it is no stranger's."""
    with contextlib.suppress(OSError), _held(fd) as held:
        info = held.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        if len(info) == _TCP_INFO.size:
            acked, received = _TCP_INFO.unpack(info)
            return acked, received
    return _SERVER_BYTES + 1, 0
