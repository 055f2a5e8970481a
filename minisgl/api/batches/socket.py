"""Serves the batch socket: requests and answers as msgpack messages over ZMQ.

It is a ROUTER socket in the private run directory, for clients on the same machine; GET /server_info reports its address.
With --batch-socket there is a second one, for clients with a key (curve.py).  A client keeps a DEALER socket, submits with
BatchSubmit, reads BatchResults as they finish, in any order, and pings once a second.  The requests of a client that falls
silent are cancelled.  Runs in the api process, on its event loop.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import zmq

from minisgl.actors.messages import BatchPing, BatchPong, BatchRefused, BatchResult, BatchSubmit
from minisgl.actors.runtime.process import ZmqContext, address
from minisgl.actors.wire import BadMessage, decode, encode
from minisgl.api.caller import Callers
from minisgl.api.endpoints.table import BATCHED, ENDPOINTS, compact
from minisgl.api.engine import Engine
from minisgl.api.reader import SMALL, Reader
from minisgl.api.rendering import json_pieces
from minisgl.api.request_log import Account, RequestLog
from minisgl.api.requests.fields import parse_json
from minisgl.config import Config
from minisgl.errors import RequestError, internal_error

log = logging.getLogger("minisgl.api")
SILENT_SECONDS = 10.0
_MAX_FRAME = 16 << 20


class Peer(NamedTuple):
    """Whose message it is: `client` has a fair share of the engine, `tenant` cached prefixes of its own ("": everybody's)."""

    client: str
    tenant: str


def somebody(identity: bytes, _: zmq.Frame) -> Peer:
    """The peer of a socket that is the operator's alone: every connection has a share."""
    return Peer(identity.hex(), "")


def router(sock: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """A ROUTER socket with the settings of all batch sockets."""
    sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
    sock.setsockopt(zmq.MAXMSGSIZE, _MAX_FRAME)
    return sock


def local_socket(ctx: ZmqContext, run_dir: str) -> zmq.Socket[bytes]:
    """The batch socket of this machine, in the run directory."""
    sock = router(ctx.socket(zmq.ROUTER))
    sock.bind(address(run_dir, "batch"))
    return sock


@dataclass(slots=True)
class _Client:
    """One connected client."""

    peer: Peer
    timer: asyncio.TimerHandle  # forgets it, unless another message comes before
    tasks: set[asyncio.Task[None]] = field(default_factory=set)  # its running requests


class BatchServer:
    """Serves a bound socket, and closes it; must be made and closed inside the running event loop.

    `peer`: whose message it is that has come from an identity; raises BadMessage with the reason why it is not heard.
    """

    def __init__(
        self,
        sock: zmq.Socket[bytes],
        engine: Engine,
        request_log: RequestLog | None = None,
        peer: Callable[[bytes, zmq.Frame], Peer] = somebody,
    ) -> None:
        self._sock, self._peer = sock, peer
        self._engine, self._callers, self._request_log = engine, Callers(engine), request_log or RequestLog()
        self._reader = Reader()
        self._clients: dict[bytes, _Client] = {}
        self._loop = asyncio.get_running_loop()
        self._fd: Any = self._sock.FD
        self._loop.add_reader(self._fd, self._drain)
        self._loop.call_soon(self._drain)

    @property
    def address(self) -> str:
        return self._sock.get_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def close(self) -> None:
        """Cancel all running requests and close the socket."""
        self._loop.remove_reader(self._fd)
        for identity in list(self._clients):
            self._forget(identity)
        self._sock.close()
        self._reader.close()

    # ---------------- in
    def _drain(self) -> None:
        """Read until nothing is left: ZMQ's descriptor signals edges."""
        while not self._sock.closed:
            try:
                identity, *frames = self._sock.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._receive(identity.bytes, frames[-1] if frames else identity)

    def _receive(self, identity: bytes, frame: zmq.Frame) -> None:
        try:
            peer = self._peer(identity, frame)
            msg = decode(frame.bytes)
        except BadMessage as e:
            self._send(identity, BatchRefused(str(e)))
            return
        timer = self._loop.call_later(SILENT_SECONDS, self._forget, identity)
        if (client := self._clients.get(identity)) is not None and client.peer != peer:  # another has taken its place
            self._forget(identity)
        if (client := self._clients.get(identity)) is None:
            client = self._clients[identity] = _Client(peer, timer)
        else:
            client.timer.cancel()
            client.timer = timer
        if isinstance(msg, BatchSubmit):
            task = self._loop.create_task(self._serve(identity, peer, msg))
            client.tasks.add(task)
            task.add_done_callback(client.tasks.discard)
        elif isinstance(msg, BatchPing):
            self._send(identity, BatchPong(len(client.tasks)))
        else:
            self._send(identity, BatchRefused(f"{type(msg).__name__} is not for the batch socket"))

    async def _serve(self, identity: bytes, peer: Peer, m: BatchSubmit) -> None:
        route, request_id = m.url if m.url in BATCHED else "unknown", f"batch-{uuid.uuid4().hex}"
        with self._request_log.request(f"POST {route}", "socket", request_id) as account:
            account.status, body = await self._answer(peer, m, account)
        self._send(identity, BatchResult(m.custom_id, account.status, request_id, b"".join(json_pieces(body))))
        # The descriptor signals edges, and sending may have consumed one: check for messages that arrived meanwhile.
        self._drain()

    async def _answer(self, peer: Peer, m: BatchSubmit, account: Account) -> tuple[int, Any]:
        """(status, body) of the answer."""
        try:
            if m.url not in BATCHED:
                raise RequestError(f"url must be one of {', '.join(BATCHED)}.", param="url", code="invalid_value")
            endpoint = ENDPOINTS[m.url]
            if len(m.body) <= SMALL:
                request = endpoint.checked(self._engine.config, parse_json(m.body))
            else:
                request = await self._reader.run(_checked, m.url, self._engine.config, m.body)
            engine = self._callers.call(peer.client, batch=True, account=account, tenant=peer.tenant)
            return 200, await endpoint.answer(engine, request)
        except RequestError as e:
            error = e
        except Exception:
            log.exception("a batch request failed")
            error = internal_error()
        account.fail(error)
        body = error.body()
        if error.retry_after is not None:
            body["error"]["retry_after"] = error.retry_after
        return error.status, body

    # ---------------- out
    def _send(self, identity: bytes, msg: Any) -> None:
        try:
            self._sock.send_multipart([identity, encode(msg)], zmq.NOBLOCK)
        except zmq.ZMQError as e:
            if e.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self._forget(identity)

    def _forget(self, identity: bytes) -> None:
        if (client := self._clients.pop(identity, None)) is not None:
            client.timer.cancel()
            for task in client.tasks:
                task.cancel()


def _checked(url: str, config: Config, raw: bytes) -> Any:
    """Check the body of a request.  Runs in the reader process.  Raises RequestError."""
    return compact(config, ENDPOINTS[url].checked(config, parse_json(raw)))
