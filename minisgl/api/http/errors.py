"""Turns every exception into an OpenAI error body with a status, and puts x-request-id on every answer.

Runs in the api process.
"""

from __future__ import annotations

import difflib
import logging
import re
import secrets
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from minisgl.api.endpoints.anthropic_blocks import error_body
from minisgl.api.request_log import Account
from minisgl.errors import NOT_HTTP, RequestError, internal_error

log = logging.getLogger("minisgl.api")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
ACCOUNT: Any = getattr(web, "RequestKey", lambda name, _: name)("account", Account)  # before aiohttp 3.14 keys are strings


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Middleware: turns every exception into an error body."""
    try:
        return await handler(request)
    except RequestError as e:
        return error_response(e, request)
    except web.HTTPException as e:
        response = error_response(_from_http(e, request), request)
        if "Allow" in e.headers:
            response.headers["Allow"] = e.headers["Allow"]
        return response
    except ConnectionError:  # the client has left; aiohttp ends the connection
        raise
    except Exception:
        log.exception("request %s failed", account_of(request).request_id)
        return error_response(internal_error(), request)


async def name_response(request: web.Request, response: web.StreamResponse) -> None:
    """`on_response_prepare`: sets x-request-id on every answer, streams included."""
    account: Account | None = request.get(ACCOUNT)  # none where no middleware has run
    response.headers.setdefault("x-request-id", account.request_id if account is not None else request_id(request))


def request_id(request: web.Request) -> str:
    """The caller's own id of a request if that is harmless in a header and in a log, otherwise a new one."""
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def account_of(request: web.Request) -> Account:
    """The account of a request, which the first middleware has opened."""
    account: Account = request[ACCOUNT]
    return account


def for_anthropic(request: web.Request) -> bool:
    """Whether the answer has Anthropic's shape: on their paths, and where both have one for a client that says its version."""
    path, version = request.path, "anthropic-version" in request.headers
    return path.startswith("/v1/messages") or (version and path.startswith("/v1/models"))


def error_response(error: RequestError, request: web.Request) -> web.Response:
    """The JSON answer for a RequestError, with Retry-After where a retry makes sense, in the format that the client knows."""
    account_of(request).fail(error)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = error_body(error) if for_anthropic(request) else error.body()
    response = web.json_response(body, status=error.status, headers=headers)
    if error.code == NOT_HTTP:
        response.force_close()  # the end of its body, where another request might begin, is unknown
    return response


def _from_http(e: web.HTTPException, request: web.Request) -> RequestError:
    """The error for a request that aiohttp refuses itself, usually for its path or method."""
    if isinstance(e, web.HTTPNotFound):
        return RequestError(_unknown_path(request), status=404, code="unknown_path")
    if isinstance(e, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(e.allowed_methods))
        text = f"{request.path[:200]} does not take {request.method[:20]}; use {allowed}."
        return RequestError(text, status=405, code="method_not_allowed")
    return RequestError(f"{e.reason}.", status=e.status)


def _unknown_path(request: web.Request) -> str:
    paths = sorted({resource.canonical for resource in request.app.router.resources()})
    near = difflib.get_close_matches(request.path[:200], paths, n=3, cutoff=0.5) or paths
    return f"Unknown path {request.path[:200]}. Did you mean {' or '.join(near)}?"
