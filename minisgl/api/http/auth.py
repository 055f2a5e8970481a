"""Checks API keys.  Runs in the api process."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from minisgl.errors import RequestError

OPEN = frozenset({"/", "/v1", "/docs", "/health", "/ready", "/ping", "/metrics"})  # routes that need no key
_OPEN_PATHS = OPEN | {"/v1/"}


def authenticate(keys: tuple[str, ...]) -> Middleware:
    """Middleware that admits requests with one of `keys`, as a Bearer token or as x-api-key, and requests to open routes.

    All others get 401, unknown paths included.
    """
    valid = key_check(keys)

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        if (resource is None or resource.canonical not in OPEN or request.path not in _OPEN_PATHS) and not valid(request):
            text = "A valid API key is needed: send it as Authorization: Bearer KEY."
            raise RequestError(text, status=401, code="invalid_api_key")
        return await handler(request)

    return check


def key_check(keys: tuple[str, ...]) -> Callable[[web.Request], bool]:
    """Whether a request brings one of `keys`; without keys, every request may have everything."""
    digests = [_digest(key) for key in keys]

    def check(request: web.Request) -> bool:
        given = _digest(key_of(request))
        matches = [hmac.compare_digest(given, digest) for digest in digests]  # all of them, so the time reveals nothing
        return not digests or True in matches

    return check


def key_of(request: web.Request) -> str:
    """The API key that a request brings, valid or not; "" if there is none."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
