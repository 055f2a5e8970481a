"""Serves /v1/files and /v1/batches: uploads, lists, and the state of batches.  Runs in the api process.

What a tenant does not own it cannot tell from what does not exist.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from aiohttp import BodyPartReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_exceptions import HttpProcessingError

from minisgl.api.batches.log import opened, sync_file, write_all
from minisgl.api.batches.store import Store, disk_error, not_found
from minisgl.api.batches.worker import Batches, new_batch
from minisgl.api.endpoints.table import BATCHED
from minisgl.api.http.auth import TENANT
from minisgl.api.http.body import body_too_large, check_encoding, json_handler, read_json
from minisgl.api.requests.fields import Fields, Schema, json_object, required, string, without
from minisgl.api.requests.openai import HARMLESS
from minisgl.api.requests.unknown_fields import ignored_header
from minisgl.config import Config
from minisgl.errors import InvalidParam, RequestError

log = logging.getLogger("minisgl.api")
MAX_FILE_BYTES = 200 << 20
MAX_PAGE = 10_000
MAX_FIELDS, MAX_FIELD_BYTES = 16, 4096  # of the form of an upload, and of its fields beside the file
IDLE_SECONDS, UPLOAD_SECONDS = 30.0, 1800.0  # limits between two pieces of an upload, and for all of it


def _check_metadata(name: str, value: dict[str, Any]) -> dict[str, Any]:
    """As OpenAI has it: the object is kept for as long as the batch."""
    if len(value) > 16 or any(not isinstance(v, str) or len(v) > 512 or len(k) > 64 for k, v in value.items()):
        raise InvalidParam(name, f"{name} may have at most 16 keys of 64 characters, with strings of 512 characters.")
    return value


_STRINGS: Schema = {"additionalProperties": {"type": "string", "maxLength": 512}, "maxProperties": 16}
BATCH = Fields(
    required(string("input_file_id", "An uploaded file of requests, one a line.")),
    required(string("endpoint", "The path that all requests of the file are for.", *BATCHED)),
    required(string("completion_window", "24h; a batch never expires here.", "24h")),
    json_object("metadata", "Comes back with the batch: at most 16 strings.", _check_metadata, _STRINGS),
    *without(HARMLESS, "metadata"),
)
PURPOSES = ("batch", "assistants", "fine-tune", "vision", "user_data", "evals")


class FileRoutes:
    """The handlers.  Without `batches` all of them raise an error that says how to have a data directory."""

    def __init__(self, config: Config, batches: Batches | None) -> None:
        self._config, self._batches_or_none = config, batches

    def add_to(self, router: web.UrlDispatcher) -> None:
        router.add_post("/v1/files", self.upload)
        router.add_get("/v1/files", self.list_files)
        router.add_get("/v1/files/{file_id}", json_handler(lambda r: _shown(self._file(r))))
        router.add_get("/v1/files/{file_id}/content", self.content)
        router.add_delete("/v1/files/{file_id}", self.delete)
        router.add_post("/v1/batches", self.create)
        router.add_get("/v1/batches", self.list_batches)
        router.add_get("/v1/batches/{batch_id}", json_handler(lambda r: _shown(self._batch(r))))
        router.add_post("/v1/batches/{batch_id}/cancel", json_handler(self.cancel))

    @property
    def _store(self) -> Store:
        return self._batches.store

    @property
    def _batches(self) -> Batches:
        if self._batches_or_none is None:
            text = "This server keeps no files: start it with --data-dir DIR to have /v1/files and /v1/batches."
            raise RequestError(text, status=404, code="no_data_dir")
        return self._batches_or_none

    # ---------------- files
    async def upload(self, request: web.Request) -> web.Response:
        part = self._store.new_part()
        taken: list[int] = []  # bytes counted for the part
        adopted = False
        try:
            with _disk():
                filename, purpose = await asyncio.wait_for(self._receive(request, part, taken), UPLOAD_SECONDS)
                await asyncio.to_thread(sync_file, part)  # which may take long; a client that leaves meanwhile leaves nothing
                value = self._store.adopt(part, filename, purpose, owner=request[TENANT].name)
            adopted = True
            return web.json_response(_shown(value))
        except asyncio.TimeoutError:
            text = f"The file did not arrive: at most {IDLE_SECONDS:g} s between two pieces, {UPLOAD_SECONDS:g} s in all."
            raise RequestError(text, status=408, code="request_timeout") from None
        finally:
            if not adopted:
                self._store.give(sum(taken))
            with contextlib.suppress(OSError):  # the next start removes it then
                part.unlink(missing_ok=True)

    async def _receive(self, request: web.Request, part: Path, taken: list[int]) -> tuple[str, str]:
        """Write the form's file to `part`; returns (filename, purpose).  Raises RequestError, or TimeoutError."""
        if not request.content_type.startswith("multipart/"):
            raise RequestError("A file is sent as multipart/form-data.", code="unsupported_content_type")
        check_encoding(request)
        if (request.content_length or 0) > MAX_FILE_BYTES + (1 << 20):
            raise body_too_large(MAX_FILE_BYTES)
        filename, purpose = None, None
        try:
            reader = await request.multipart()
            for _ in range(MAX_FIELDS):
                if (field := await asyncio.wait_for(reader.next(), IDLE_SECONDS)) is None:
                    break
                if not isinstance(field, BodyPartReader):
                    raise InvalidParam("file", "the form must not hold another form.")
                if field.name == "file":
                    filename = (field.filename or "upload")[:256]
                    await self._copy(field, part, taken)
                else:
                    text = await _short(field)
                    purpose = text if field.name == "purpose" else purpose
            else:
                raise RequestError(f"The form has more than {MAX_FIELDS} fields.", code="invalid_form")
        except (ValueError, AssertionError, HttpProcessingError):
            raise RequestError("The form could not be read as multipart/form-data.", code="invalid_form") from None
        if filename is None:
            raise InvalidParam("file", "file is required.", "missing_required_parameter")
        if purpose not in PURPOSES:
            raise InvalidParam("purpose", f"purpose must be one of {', '.join(PURPOSES)}.")
        return filename, purpose

    async def _copy(self, field: BodyPartReader, part: Path, taken: list[int]) -> None:
        size = 0
        self._store.give(sum(taken))  # of an earlier field of the same name
        taken.clear()
        with opened(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:  # to the page cache, in pieces of 64 KiB
            while chunk := await asyncio.wait_for(field.read_chunk(1 << 16), IDLE_SECONDS):
                size += len(chunk)
                if size > MAX_FILE_BYTES:
                    raise body_too_large(MAX_FILE_BYTES)
                self._store.take(len(chunk))
                taken.append(len(chunk))
                write_all(fd, chunk)

    async def list_files(self, request: web.Request) -> web.Response:
        store = self._store
        names = store.names("files", request.query.get("purpose"), request[TENANT].owns)
        return await _page(request, names, lambda n: store.load("files", n, "id"))

    async def list_batches(self, request: web.Request) -> web.Response:
        batches = self._batches
        return await _page(request, batches.store.names("batches", owns=request[TENANT].owns), batches.get)

    async def content(self, request: web.Request) -> web.FileResponse:
        path = self._store.content(self._file(request)["id"])
        return _FileResponse(path, headers={"Content-Type": "application/octet-stream"})

    async def delete(self, request: web.Request) -> web.Response:
        name = self._file(request)["id"]
        if self._batches.uses(name):
            raise RequestError(f"File {name} is the input of a batch that runs.", status=409, param="file_id", code="in_use")
        with _disk():
            self._store.delete(name)
        self._batches.room_made()
        return web.json_response({"id": name, "object": "file", "deleted": True})

    def _file(self, request: web.Request) -> dict[str, Any]:
        name = request.match_info["file_id"]
        return _owned(request, self._store.load("files", name, "file_id"), "file_id")

    def _batch(self, request: web.Request) -> dict[str, Any]:
        return _owned(request, self._batches.get(request.match_info["batch_id"]), "batch_id")

    # ---------------- batches
    async def create(self, request: web.Request) -> web.Response:
        store = self._store
        body = await read_json(request, self._config.server.max_body_bytes)
        values, unknown = BATCH.read(body)
        source = _owned(request, store.load("files", values["input_file_id"], "input_file_id"), "input_file_id")
        if source["purpose"] != "batch":
            raise InvalidParam("input_file_id", "the input file must have been uploaded with the purpose batch.")
        headers = ignored_header(self._config, BATCH, unknown)
        batch = new_batch(source["id"], values["endpoint"], "24h", values.get("metadata"), request[TENANT].name)
        with _disk():
            self._batches.create(batch)
        return web.json_response(_shown(batch), headers=headers)

    def cancel(self, request: web.Request) -> dict[str, Any]:
        with _disk():
            return _shown(self._batches.cancel(self._batch(request)["id"]))


def _owned(request: web.Request, value: dict[str, Any], what: str) -> dict[str, Any]:
    """An object that the request's tenant may have.  Raises RequestError (404) naming the parameter `what`."""
    if not request[TENANT].owns(value.get("owner", "")):
        raise not_found(value["id"], what)
    return value


def _shown(value: dict[str, Any]) -> dict[str, Any]:
    """An object as clients see it."""
    return {name: v for name, v in value.items() if name != "owner"}


class _FileResponse(web.FileResponse):
    """Sends a file through the transport, a piece at a time, so that a client that does not read is noticed.

    The kernel's sendfile, which aiohttp prefers, would wait for it without end.
    """

    async def _sendfile(self, request: web.BaseRequest, fobj: IO[Any], offset: int, count: int) -> AbstractStreamWriter:
        writer = await web.StreamResponse.prepare(self, request)
        if writer is None:
            raise ConnectionResetError("the answer has ended")
        return await self._sendfile_fallback(writer, fobj, offset, count)


async def _short(field: BodyPartReader) -> str:
    """The value of a field that is not the file.  Raises RequestError, or TimeoutError."""
    value = b""
    while chunk := await asyncio.wait_for(field.read_chunk(1 << 10), IDLE_SECONDS):
        value += chunk
        if len(value) > MAX_FIELD_BYTES:
            raise RequestError(f"A field of the form is longer than {MAX_FIELD_BYTES} bytes.", code="invalid_form")
    return value.decode("utf-8", "replace")


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    """What is done inside may fail because the disk is full.  Raises RequestError (507, or 500 if it is broken)."""
    try:
        yield
    except (asyncio.TimeoutError, ConnectionError):
        raise
    except OSError as e:
        log.error("the data directory cannot be written to: %s", e)
        raise disk_error(e) from e


async def _page(request: web.Request, names: list[str], load: Callable[[str], dict[str, Any]]) -> web.Response:
    """One page of a list, newest first: at most `limit` objects after the one with the id `after`.

    `names`: the ids of all.  Only the objects of the page are read, in a thread.
    """
    limit = request.query.get("limit", "100")
    if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit[:6]) <= MAX_PAGE:
        raise InvalidParam("limit", f"limit must be between 1 and {MAX_PAGE}.")
    if (after := request.query.get("after")) is not None:
        if after not in names:
            raise InvalidParam("after", "after must be the id of an object of the list.")
        names = names[names.index(after) + 1 :]
    chosen = names[: int(limit)]
    first, last = (chosen[0], chosen[-1]) if chosen else (None, None)

    def render() -> bytes:
        """In a thread, which gives way to the event loop between two objects."""
        objects = []
        for name in chosen:
            with contextlib.suppress(RequestError):  # deleted meanwhile
                objects.append(json.dumps(_shown(load(name))).encode())
        end = json.dumps({"first_id": first, "last_id": last, "has_more": len(names) > len(chosen)}).encode()
        return b'{"object": "list", "data": [' + b", ".join(objects) + b"], " + end[1:]

    return web.Response(body=await asyncio.to_thread(render), content_type="application/json")
