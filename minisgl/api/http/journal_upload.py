"""Receives a journal that somebody has on their own computer, to be shown on the page.  Runs in the api process."""

from __future__ import annotations

import asyncio
import tempfile
from typing import IO

from aiohttp import web

from minisgl.api.http.body import body_too_large, check_encoding
from minisgl.errors import RequestError

MAX_BYTES = 256 << 20
_IDLE_SECONDS, _SECONDS = 30.0, 1800.0  # limits between two pieces of it, and for all of it


async def receive(request: web.Request, folder: str | None) -> IO[bytes]:
    """The body of a request, in a file without a name: nothing of it is left when it is closed, or this process dies.

    `folder`: on whose disk; None: where the system keeps temporary files.  Raises RequestError (400, 408, 413, 507).
    """
    if request.content_type != "application/octet-stream":
        text = "The Content-Type header must be application/octet-stream; the body is the file as it is."
        raise RequestError(text, code="unsupported_content_type")
    check_encoding(request)
    if (request.content_length or 0) > MAX_BYTES:
        raise body_too_large(MAX_BYTES)
    try:
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - the caller closes it
        try:
            await asyncio.wait_for(_copy(request, file), _SECONDS)
            return file
        except BaseException:
            file.close()
            raise
    except asyncio.TimeoutError:
        text = f"The journal did not arrive: at most {_IDLE_SECONDS:g} s between two pieces, {_SECONDS:g} s in all."
        raise RequestError(text, status=408, code="request_timeout") from None
    except ConnectionError:
        raise
    except OSError as e:
        raise RequestError(f"The journal cannot be kept: {e.strerror}.", status=507, code="journal_not_kept") from None


async def _copy(request: web.Request, file: IO[bytes]) -> None:
    size = 0
    while piece := await asyncio.wait_for(request.content.readany(), _IDLE_SECONDS):
        size += len(piece)
        if size > MAX_BYTES:
            raise body_too_large(MAX_BYTES)
        rest = memoryview(piece)
        while rest:
            rest = rest[file.write(rest) :]
