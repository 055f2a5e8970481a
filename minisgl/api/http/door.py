"""Refuses a crowd at its door: from a request's headers and the engine's counters, before anything else is done for it.

aiohttp makes a request, two tasks, five layers of handlers and a response of every message: many times what a refusal needs.
When thousands of requests come at once, this is the time that streams wait, and the last one for its 429.  So a request that
the engine would refuse anyway is answered here, as soon as its headers are parsed.  Whatever is unusual about it (a page's
origin, a body that is not here yet, a key that is not valid) takes the long way, which decides alike.

Runs in the api process, on the thread of its event loop.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http_exceptions import BadHttpMessage
from multidict import CIMultiDict

from minisgl.api.caller import Callers
from minisgl.api.endpoints.anthropic_blocks import error_body
from minisgl.api.endpoints.table import ENDPOINTS
from minisgl.api.http.auth import Keys
from minisgl.api.http.errors import for_anthropic, request_id
from minisgl.api.http.metrics import Metered
from minisgl.api.request_log import RequestLog
from minisgl.errors import RequestError

_UNUSUAL = ("Origin", "Expect", "Upgrade", "Transfer-Encoding", "Sec-WebSocket-Key1")
# Requests as nearly all are written, a subset of HTTP.  A name has no space around it, a value no control character.
_REQUEST = re.compile(r"POST (/[!-~]*) HTTP/1\.1")
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~]*)")
_FIELDS = re.compile(rf"(?:{_FIELD.pattern}\r\n)*{_FIELD.pattern}".replace("([", "(?:["))
_MAX_HEAD = 8000  # bytes
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
        self._key: tuple[object, ...] = ()  # of the latest refusal, and its constant parts
        self._parts = (b"", b"")

    @property
    def crowded(self) -> bool:
        """Whether somebody was refused a moment ago."""
        return time.monotonic() - self._refused < _CROWD_SECONDS

    def refusal_of_bytes(self, raw: bytes, address: str) -> bytes | None:
        """The same for the first bytes of a new connection, if they are one complete request.  The connection ends with it.

        What a parser of HTTP might see in another way, or refuse, is not for this one.
        """
        head, end, body = raw.partition(b"\r\n\r\n")
        if not end or len(head) > _MAX_HEAD or not head.isascii():
            return None
        line, _, lines = head.decode().partition("\r\n")
        path = _REQUEST.fullmatch(line)
        if path is None or _FIELDS.fullmatch(lines) is None:
            return None
        fields = _FIELD.findall(lines)
        headers = CIMultiDict([(name, value.strip()) for name, value in fields])
        twice = len({name.lower() for name, _ in fields}) < len(fields)
        if twice or "Host" not in headers or headers.get("Content-Length") != str(len(body)):
            return None
        return self.refusal(_Message("POST", path[1], HttpVersion11, headers), None, address)

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
            for name in _UNUSUAL:
                if name in headers:
                    return None
            return self._render(message, e, last or message.should_close) if body is None or body.is_eof() else None
        return None

    def _render(self, message: Any, error: RequestError, last: bool) -> bytes:
        name, route = request_id(message), f"POST {message.path}"
        self._engine.metrics.responses["POST", message.path, error.status] += 1
        self._request_log.refuse(route, name, error)
        anthropic = for_anthropic(message)
        key = (error.message, error.status, error.code, error.retry_after, anthropic, last)
        if key != self._key:
            self._key, self._parts = key, _parts(error, anthropic, last)
        head, body = self._parts
        return b"%bx-request-id: %b\r\nDate: %b\r\n\r\n%b" % (head, name.encode(), rfc822_formatted_time().encode(), body)


def _parts(error: RequestError, anthropic: bool, last: bool) -> tuple[bytes, bytes]:
    """The first lines of an answer, and its body: all that is the same for many."""
    body = json.dumps(error_body(error) if anthropic else error.body()).encode()
    retry = "" if error.retry_after is None else f"Retry-After: {error.retry_after}\r\n"
    head = (
        f"HTTP/1.1 {error.status} {_REASONS.get(error.status, 'Refused')}\r\n{retry}"
        f"Content-Type: application/json; charset=utf-8\r\nContent-Length: {len(body)}\r\n" + "Connection: close\r\n" * last
    )
    return head.encode(), body


_REASONS = {429: "Too Many Requests", 503: "Service Unavailable"}


DOOR = web.AppKey("door", Door)


class Doorkeeper:
    """The parser of one connection.  Messages that the door refuses do not come through.

    `refuse` answers a message, with its payload, or says that it does not.  A version other than 1.0 and 1.1, which the parser
    takes and answers would repeat, is no HTTP here.
    """

    def __init__(self, parser: Any, refuse: Callable[[Any, Any], bool]) -> None:
        self._parser, self._refuse = parser, refuse

    def feed_data(self, data: bytes) -> tuple[Any, bool, bytes]:
        """Raises BadHttpMessage."""
        messages, upgraded, tail = self._parser.feed_data(data)
        for message, _ in messages:
            if message.version not in (HttpVersion11, HttpVersion10):
                raise BadHttpMessage("it is of another version")
        if len(messages) == 1 and not upgraded and self._refuse(*messages[0]):
            if (consumed := getattr(self._parser, "message_consumed", None)) is not None:  # since aiohttp 3.14
                consumed()
            return (), upgraded, tail
        return messages, upgraded, tail

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)
