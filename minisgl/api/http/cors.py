"""Lets pages of other origins use the API: those that --allow-origin names (CORS, https://fetch.spec.whatwg.org/#http-cors-protocol).

Without the flag no answer has a CORS header, so no page of another origin can read one.  Runs in the api process.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from minisgl.errors import RequestError

METHODS = "GET, HEAD, POST, DELETE"
# What the SDKs of OpenAI and Anthropic send.  Whatever else a page asks for is allowed, too: no header has a power of its own.
HEADERS = (
    *("authorization", "content-type", "x-api-key", "x-request-id", "idempotency-key"),
    *("anthropic-version", "anthropic-beta", "anthropic-dangerous-direct-browser-access"),
    *("openai-organization", "openai-project", "openai-beta"),
    *("x-stainless-arch", "x-stainless-lang", "x-stainless-os", "x-stainless-package-version", "x-stainless-runtime"),
    *("x-stainless-runtime-version", "x-stainless-retry-count", "x-stainless-timeout", "x-stainless-helper-method"),
)
EXPOSED = (  # headers of our answers that a page may read
    *("x-request-id", "X-Ignored-Params", "X-Approximated-Schema", "Server-Timing"),
    *("Retry-After", "WWW-Authenticate", "Allow"),
)
_SECONDS = 600  # for which a browser may remember a preflight
_MAX_ASKED = 64  # names in Access-Control-Request-Headers
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]{1,64}")


def preflights(origins: tuple[str, ...]) -> Middleware:
    """Middleware that answers preflights: 204 for a page of one of `origins`, 403 with the flag that is missing for others.

    It stands before the check of keys, as browsers send none with a preflight.  Whether there is such a route, and whether it
    takes the method, is left to the request itself, whose answer the page can read.
    """

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        asked = request.headers
        if request.method != "OPTIONS" or "Origin" not in asked or "Access-Control-Request-Method" not in asked:
            return await handler(request)
        if _allowed(request, origins) is None:
            text = f"Pages of the origin {asked['Origin'][:200]} may not use this server: start it with --allow-origin ORIGIN"
            raise RequestError(
                f"{text} to allow one, or with --allow-origin '*' to allow all.", status=403, code="origin_not_allowed"
            )
        names = [name.strip().lower() for name in asked.get("Access-Control-Request-Headers", "").split(",")]
        more = [name for name in names[:_MAX_ASKED] if _TOKEN.fullmatch(name)]
        headers = {
            "Access-Control-Allow-Methods": METHODS,
            "Access-Control-Allow-Headers": ", ".join(dict.fromkeys((*HEADERS, *more))),
            "Access-Control-Max-Age": str(_SECONDS),
        }
        if asked.get("Access-Control-Request-Private-Network") == "true":  # from the web to a server at home
            headers["Access-Control-Allow-Private-Network"] = "true"
        return web.Response(status=204, headers=headers)

    return answer


def sharing(origins: tuple[str, ...]) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """`on_response_prepare`: tells the browser that pages of `origins` may read the answer: errors and streams, too."""

    async def share(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.add("Vary", "Origin")
        allowed = _allowed(request, origins)
        if allowed is not None:
            response.headers["Access-Control-Allow-Origin"] = allowed
            response.headers["Access-Control-Expose-Headers"] = ", ".join(EXPOSED)

    return share


def _allowed(request: web.Request, origins: tuple[str, ...]) -> str | None:
    """The value of Access-Control-Allow-Origin for the page that asks; None if there is none, or it may not read the answer."""
    origin = request.headers.get("Origin")
    if origin is None:
        return None
    if "*" in origins:
        return "*"
    return origin if origin.lower() in origins else None
