"""Checks API keys.  Runs in the api process."""

from __future__ import annotations

import hashlib
import hmac

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from minisgl.errors import RequestError

OPEN = frozenset({"/health", "/ready", "/ping", "/metrics"})  # routes that need no key


def authenticate(keys: tuple[str, ...]) -> Middleware:
    """Middleware that admits requests with one of `keys`, as a Bearer token or as x-api-key, and requests to open routes.

    All others get 401, unknown paths included.
    """
    digests = [_digest(key) for key in keys]

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        if resource is None or resource.canonical not in OPEN or request.path.endswith("/"):
            given = _digest(key_of(request))
            matches = [hmac.compare_digest(given, digest) for digest in digests]  # all of them, so the time reveals nothing
            if True not in matches:
                text = "A valid API key is needed: send it as Authorization: Bearer KEY."
                raise RequestError(text, status=401, code="invalid_api_key")
        return await handler(request)

    return check


def key_of(request: web.Request) -> str:
    """The API key that a request brings, valid or not; "" if there is none."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
