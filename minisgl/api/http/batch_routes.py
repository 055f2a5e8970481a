"""Serves /v1/files and /v1/batches: uploads, lists, and the state of batches.  Runs in the api process."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from minisgl.api.batches.store import Store
from minisgl.api.batches.worker import Batches, new_batch
from minisgl.api.endpoints.table import BATCHED
from minisgl.api.http.body import body_too_large, check_encoding, json_handler, read_json
from minisgl.api.requests.fields import Fields, json_object, required, string, without
from minisgl.api.requests.openai import HARMLESS
from minisgl.api.requests.unknown_fields import ignored_header
from minisgl.config import Config
from minisgl.errors import InvalidParam, RequestError

MAX_FILE_BYTES = 200 << 20
MAX_PAGE = 10_000
_IDLE_SECONDS = 30.0  # limit between two pieces of an upload
BATCH = Fields(
    required(string("input_file_id", "An uploaded file of requests, one a line.")),
    required(string("endpoint", "The path that all requests of the file are for.", *BATCHED)),
    required(string("completion_window", "24h; a batch never expires here.", "24h")),
    json_object("metadata", "Comes back with the batch."),
    *without(HARMLESS, "metadata"),
)
PURPOSES = ("batch", "assistants", "fine-tune", "vision", "user_data", "evals")


class FileRoutes:
    """The handlers.  Without `batches` all of them raise an error that says how to have a data directory."""

    def __init__(self, config: Config, batches: Batches | None) -> None:
        self._config, self._batches_or_none = config, batches

    def add_to(self, router: web.UrlDispatcher) -> None:
        router.add_post("/v1/files", self.upload)
        router.add_get("/v1/files", json_handler(self.list_files))
        router.add_get("/v1/files/{file_id}", json_handler(self._file))
        router.add_get("/v1/files/{file_id}/content", self.content)
        router.add_delete("/v1/files/{file_id}", self.delete)
        router.add_post("/v1/batches", self.create)
        router.add_get("/v1/batches", json_handler(lambda r: _page(r, self._batches.all())))
        router.add_get("/v1/batches/{batch_id}", json_handler(lambda r: self._batches.get(r.match_info["batch_id"])))
        router.add_post("/v1/batches/{batch_id}/cancel", json_handler(lambda r: self._batches.cancel(r.match_info["batch_id"])))

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
        try:
            filename, purpose = await self._receive(request, part)
            return web.json_response(await asyncio.to_thread(self._store.adopt, part, filename, purpose))
        finally:
            part.unlink(missing_ok=True)

    async def _receive(self, request: web.Request, part: Path) -> tuple[str, str]:
        """Write the form's file to `part`; returns (filename, purpose).  Raises RequestError."""
        if not request.content_type.startswith("multipart/"):
            raise RequestError("A file is sent as multipart/form-data.", code="unsupported_content_type")
        check_encoding(request)
        if (request.content_length or 0) > MAX_FILE_BYTES + (1 << 20):
            raise body_too_large(MAX_FILE_BYTES)
        filename, purpose = None, None
        try:
            reader = await request.multipart()
            while (field := await asyncio.wait_for(reader.next(), _IDLE_SECONDS)) is not None:
                if not isinstance(field, BodyPartReader):
                    raise InvalidParam("file", "the form must not hold another form.")
                if field.name == "file":
                    filename = (field.filename or "upload")[:256]
                    await self._copy(field, part)
                elif field.name == "purpose":
                    purpose = (await field.read_chunk(256)).decode("utf-8", "replace")
        except (ValueError, AssertionError, HttpProcessingError):
            raise RequestError("The form could not be read as multipart/form-data.", code="invalid_form") from None
        except asyncio.TimeoutError:
            raise RequestError("The file did not arrive.", status=408, code="request_timeout") from None
        if filename is None:
            raise InvalidParam("file", "file is required.", "missing_required_parameter")
        if purpose not in PURPOSES:
            raise InvalidParam("purpose", f"purpose must be one of {', '.join(PURPOSES)}.")
        return filename, purpose

    async def _copy(self, field: BodyPartReader, part: Path) -> None:
        size = 0
        with open(part, "wb") as f:  # noqa: ASYNC230  to the page cache, in pieces of 64 KiB
            while chunk := await asyncio.wait_for(field.read_chunk(1 << 16), _IDLE_SECONDS):
                size += len(chunk)
                if size > MAX_FILE_BYTES:
                    raise body_too_large(MAX_FILE_BYTES)
                f.write(chunk)

    def list_files(self, request: web.Request) -> dict[str, Any]:
        purpose = request.query.get("purpose")
        return _page(request, [f for f in self._store.all("files") if purpose in (None, f["purpose"])])

    async def content(self, request: web.Request) -> web.FileResponse:
        path = self._store.content(self._file(request)["id"])
        return web.FileResponse(path, headers={"Content-Type": "application/octet-stream"})

    async def delete(self, request: web.Request) -> web.Response:
        name = self._file(request)["id"]
        if self._batches.uses(name):
            raise RequestError(f"File {name} is the input of a batch that runs.", status=409, param="file_id", code="in_use")
        self._store.delete(name)
        return web.json_response({"id": name, "object": "file", "deleted": True})

    def _file(self, request: web.Request) -> dict[str, Any]:
        return self._store.load("files", request.match_info["file_id"], "file_id")

    # ---------------- batches
    async def create(self, request: web.Request) -> web.Response:
        store = self._store
        body = await read_json(request, self._config.server.max_body_bytes)
        values, unknown = BATCH.read(body)
        source = store.load("files", values["input_file_id"], "input_file_id")
        if source["purpose"] != "batch":
            raise InvalidParam("input_file_id", "the input file must have been uploaded with the purpose batch.")
        headers = ignored_header(self._config, BATCH, unknown)
        batch = new_batch(source["id"], values["endpoint"], "24h", values.get("metadata"))
        self._batches.create(batch)
        return web.json_response(batch, headers=headers)


def _page(request: web.Request, values: list[dict[str, Any]]) -> dict[str, Any]:
    """One page of a list, newest first: at most `limit` values after the one with the id `after`."""
    limit = request.query.get("limit", "100")
    if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit[:6]) <= MAX_PAGE:
        raise InvalidParam("limit", f"limit must be between 1 and {MAX_PAGE}.")
    ids = [v["id"] for v in values]
    if (after := request.query.get("after")) is not None:
        if after not in ids:
            raise InvalidParam("after", "after must be the id of an object of the list.")
        values = values[ids.index(after) + 1 :]
    page = values[: int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(values) > len(page),
    }
