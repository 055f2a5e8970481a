"""Serves the batch socket: requests and answers as msgpack messages over ZMQ, for clients on the same machine.

It is a ROUTER socket in the private run directory; GET /server_info reports its address.  A client keeps a DEALER socket,
submits with BatchSubmit, reads BatchResults as they finish, in any order, and pings once a second.  The requests of a client
that falls silent are cancelled.  Runs in the api process, on its event loop.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(slots=True)
class _Client:
    """One connected client."""

    timer: asyncio.TimerHandle  # forgets it, unless another message comes before
    tasks: set[asyncio.Task[None]] = field(default_factory=set)  # its running requests


class BatchServer:
    """Binds the socket on construction; must be made and closed inside the running event loop."""

    def __init__(self, ctx: ZmqContext, run_dir: str, engine: Engine, request_log: RequestLog | None = None) -> None:
        self.address = address(run_dir, "batch")
        self._engine, self._callers, self._request_log = engine, Callers(engine), request_log or RequestLog()
        self._reader = Reader()
        self._clients: dict[bytes, _Client] = {}
        self._sock: zmq.Socket[bytes] = ctx.socket(zmq.ROUTER)
        self._sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._sock.setsockopt(zmq.MAXMSGSIZE, _MAX_FRAME)
        self._sock.bind(self.address)
        self._loop = asyncio.get_running_loop()
        self._fd: Any = self._sock.FD
        self._loop.add_reader(self._fd, self._drain)

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
        while True:
            try:
                identity, *frames = self._sock.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._receive(identity, frames)

    def _receive(self, identity: bytes, frames: list[bytes]) -> None:
        try:
            msg = decode(frames[-1] if frames else b"")
        except BadMessage as e:
            self._send(identity, BatchRefused(str(e)))
            return
        timer = self._loop.call_later(SILENT_SECONDS, self._forget, identity)
        if (client := self._clients.get(identity)) is None:
            client = self._clients[identity] = _Client(timer)
        else:
            client.timer.cancel()
            client.timer = timer
        if isinstance(msg, BatchSubmit):
            task = self._loop.create_task(self._serve(identity, msg))
            client.tasks.add(task)
            task.add_done_callback(client.tasks.discard)
        elif isinstance(msg, BatchPing):
            self._send(identity, BatchPong(len(client.tasks)))
        else:
            self._send(identity, BatchRefused(f"{type(msg).__name__} is not for the batch socket"))

    async def _serve(self, identity: bytes, m: BatchSubmit) -> None:
        route, request_id = m.url if m.url in BATCHED else "unknown", f"batch-{uuid.uuid4().hex}"
        with self._request_log.request(f"POST {route}", "socket", request_id) as account:
            account.status, body = await self._answer(identity, m, account)
        self._send(identity, BatchResult(m.custom_id, account.status, request_id, b"".join(json_pieces(body))))
        # The descriptor signals edges, and sending may have consumed one: check for messages that arrived meanwhile.
        self._drain()

    async def _answer(self, identity: bytes, m: BatchSubmit, account: Account) -> tuple[int, Any]:
        """(status, body) of the answer."""
        try:
            if m.url not in BATCHED:
                raise RequestError(f"url must be one of {', '.join(BATCHED)}.", param="url", code="invalid_value")
            endpoint = ENDPOINTS[m.url]
            if len(m.body) <= SMALL:
                request = endpoint.checked(self._engine.config, parse_json(m.body))
            else:
                request = await self._reader.run(_checked, m.url, self._engine.config, m.body)
            engine = self._callers.call(identity.hex(), batch=True, account=account)
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
