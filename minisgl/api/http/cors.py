"""Implements CORS (https://fetch.spec.whatwg.org/#http-cors-protocol): which pages of other origins may use the API.

--allow-origin lists them.  Without the flag no response has a CORS header, so browsers let no foreign page read one.  What a
page may send without asking first (a "simple" request: a form, an upload) is refused, because it would be done unread.
Runs in the api process.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from minisgl.errors import RequestError

METHODS = "GET, HEAD, POST, DELETE"
# What the SDKs of OpenAI and Anthropic send.  Other headers that a page asks for are allowed as well: none grants anything.
HEADERS = (
    *("authorization", "content-type", "x-api-key", "x-request-id", "idempotency-key"),
    *("anthropic-version", "anthropic-beta", "anthropic-dangerous-direct-browser-access"),
    *("openai-organization", "openai-project", "openai-beta"),
    *("x-stainless-arch", "x-stainless-lang", "x-stainless-os", "x-stainless-package-version", "x-stainless-runtime"),
    *("x-stainless-runtime-version", "x-stainless-retry-count", "x-stainless-timeout", "x-stainless-helper-method"),
)
EXPOSED = (  # response headers that a page may read
    *("x-request-id", "X-Ignored-Params", "X-Approximated-Schema", "Server-Timing"),
    *("Retry-After", "WWW-Authenticate", "Allow"),
)
_SECONDS = 600  # for which a browser may remember a preflight
_MAX_ASKED = 64  # names in Access-Control-Request-Headers
_SIMPLE = ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data")  # types that are sent unasked
_READS = ("GET", "HEAD", "OPTIONS")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]{1,64}")


def preflights(origins: tuple[str, ...]) -> Middleware:
    """Middleware that answers preflight requests: 204 for pages of `origins`, for others 403 with the flag that allows them.

    It runs before the API key check, because browsers send no key with a preflight.  It does not check that the route exists or
    accepts the method: the request itself does, and the page can read its response.  Requests that pages send without a
    preflight are refused likewise.
    """

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        asked = request.headers
        preflight = request.method == "OPTIONS" and "Origin" in asked and "Access-Control-Request-Method" in asked
        if (preflight or _unasked(request)) and "*" not in origins and _allowed(request, origins) is None:
            origin = asked.get("Origin", "null")[:200]
            text = f"Pages of the origin {origin} may not use this server: start it with --allow-origin ORIGIN"
            raise RequestError(
                f"{text} to allow one, or with --allow-origin '*' to allow all.", status=403, code="origin_not_allowed"
            )
        if not preflight:
            return await handler(request)
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
    """`on_response_prepare`: sets the headers that let pages of `origins` read a response, errors and streams included."""

    async def share(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.add("Vary", "Origin")
        allowed = _allowed(request, origins)
        if allowed is not None:
            response.headers["Access-Control-Allow-Origin"] = allowed
            response.headers["Access-Control-Expose-Headers"] = ", ".join(EXPOSED)

    return share


def _unasked(request: web.Request) -> bool:
    """Whether a page of another origin sends something that its browser has not asked for with a preflight.

    No page can set Sec-Fetch-Site, which browsers send to https and to this machine, or Origin.  Programs have neither.
    """
    headers = request.headers
    site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
    if request.method in _READS or (site is None and origin is None) or site in ("same-origin", "none"):
        return False
    if site is None and origin is not None and origin.partition("://")[2].lower() == headers.get("Host", "").lower():
        return False
    kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    return kind in _SIMPLE and "Authorization" not in headers and "x-api-key" not in headers


def _allowed(request: web.Request, origins: tuple[str, ...]) -> str | None:
    """The value of Access-Control-Allow-Origin; None if the request comes from no page, or from one that is not allowed."""
    origin = request.headers.get("Origin")
    if origin is None:
        return None
    if "*" in origins:
        return "*"
    return origin if origin.lower() in origins else None
