"""Refuses a crowd at its door: from a request's headers and the engine's counters, before anything else is done for it.

aiohttp makes a request, two tasks, five layers of handlers and a response of every message: many times what a refusal needs.
When thousands of requests come at once, this is the time that streams wait, and the last one for its 429.  So a request that
the engine would refuse anyway is answered here, as soon as its headers are parsed.  Whatever is unusual about it (a page's
origin, a body that is not here yet, a key that is not valid) takes the long way, which decides alike.

Runs in the api process, on the thread of its event loop.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from aiohttp import HttpVersion11, web
from aiohttp.helpers import rfc822_formatted_time
from multidict import CIMultiDict

from minisgl.api.caller import Callers
from minisgl.api.endpoints.anthropic_blocks import error_body
from minisgl.api.endpoints.table import ENDPOINTS
from minisgl.api.http.auth import Keys
from minisgl.api.http.errors import for_anthropic, request_id
from minisgl.api.http.metrics import Metered
from minisgl.api.request_log import RequestLog
from minisgl.errors import RequestError

_UNUSUAL = ("Origin", "Expect", "Upgrade", "Transfer-Encoding")
_CROWD_SECONDS = 1.0  # after a refusal: others are likely


class _Message(NamedTuple):
    """What is needed of aiohttp's RawRequestMessage."""

    method: str
    path: str
    version: Any
    headers: CIMultiDict[str]
    should_close: bool = True


class Door:
    """Writes refusals.  `callers`: how clients are numbered."""

    def __init__(self, engine: Metered, keys: Keys, callers: Callers, request_log: RequestLog) -> None:
        self._engine, self._keys, self._callers, self._request_log = engine, keys, callers, request_log
        self._refused = -_CROWD_SECONDS  # when, the last time

    @property
    def crowded(self) -> bool:
        """Whether somebody was refused a moment ago."""
        return time.monotonic() - self._refused < _CROWD_SECONDS

    def refusal_of_bytes(self, raw: bytes, address: str) -> bytes | None:
        """The same for the first bytes of a new connection, if they are one complete request.  The connection ends with it."""
        head, end, body = raw.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        first, headers = lines[0].split(" "), CIMultiDict[str]()
        if not end or len(first) != 3 or first[2] != "HTTP/1.1":
            return None
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                return None
            headers.add(name, value.strip())
        if headers.getall("Content-Length", ()) != [str(len(body))]:
            return None
        return self.refusal(_Message(first[0], first[1], HttpVersion11, headers), None, address)

    def refusal(self, message: Any, body: Any, address: str, last: bool = False) -> bytes | None:
        """The answer to a message (aiohttp's RawRequestMessage) that is refused; None if it is not, or takes the long way.

        `body`: its payload, which arrives or, without one, has arrived.
        """
        endpoint, headers = ENDPOINTS.get(message.path), message.headers
        if endpoint is None or message.method != "POST" or message.version != HttpVersion11:
            return None
        if (tenant := self._keys.find(message)) is None:
            return None
        try:
            self._engine.check_open(self._callers.client(tenant.name or address), endpoint.generates)
        except RequestError as e:
            self._refused = time.monotonic()
            usual = not any(name in headers for name in _UNUSUAL)
            return self._render(message, e, last or message.should_close) if usual and (body is None or body.is_eof()) else None
        return None

    def _render(self, message: Any, error: RequestError, last: bool) -> bytes:
        name, route = request_id(message), message.path
        self._engine.metrics.responses["POST", route, error.status] += 1
        self._request_log.refuse(f"POST {route}", name, error)
        body = json.dumps(error_body(error) if for_anthropic(message) else error.body()).encode()
        retry = "" if error.retry_after is None else f"Retry-After: {error.retry_after}\r\n"
        head = (
            f"HTTP/1.1 {error.status} {_REASONS.get(error.status, 'Refused')}\r\n{retry}"
            f"Content-Type: application/json; charset=utf-8\r\nContent-Length: {len(body)}\r\nx-request-id: {name}\r\n"
            f"Date: {rfc822_formatted_time()}\r\n{'Connection: close' * last}"
        )
        return head.encode() + (b"\r\n\r\n" if last else b"\r\n") + body


_REASONS = {429: "Too Many Requests", 503: "Service Unavailable"}


DOOR = web.AppKey("door", Door)


class Doorkeeper:
    """The parser of one connection.  Messages that the door refuses do not come through.

    `refuse` answers a message, with its payload, or says that it does not.
    """

    def __init__(self, parser: Any, refuse: Callable[[Any, Any], bool]) -> None:
        self._parser, self._refuse = parser, refuse

    def feed_data(self, data: bytes) -> tuple[Any, bool, bytes]:
        messages, upgraded, tail = self._parser.feed_data(data)
        if len(messages) == 1 and not upgraded and self._refuse(*messages[0]):
            if (consumed := getattr(self._parser, "message_consumed", None)) is not None:  # since aiohttp 3.14
                consumed()
            return (), upgraded, tail
        return messages, upgraded, tail

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)
