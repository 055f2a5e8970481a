"""Answers batches, files of requests, in the background, across restarts and crashes of the server.

One batch after another, oldest first, `WINDOW` of its requests at a time and with a lower priority than clients that wait.
Every answer is written before it counts; a server that starts again continues with the requests without an answer.  Runs in
the api process, as one task of its event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from contextlib import ExitStack
from typing import Any

from minisgl.api.batches.input import MAX_ERRORS, TOO_LONG, Place, body_at, checked_at, problem, read_requests
from minisgl.api.batches.log import Log
from minisgl.api.batches.recovery import FILES, logs_of, recover
from minisgl.api.batches.store import ENDED, FULL, Store, disk_error, new_file_id
from minisgl.api.caller import Callers
from minisgl.api.endpoints.table import ENDPOINTS
from minisgl.api.engine import Engine
from minisgl.api.reader import SMALL, Reader
from minisgl.api.request_log import Account, RequestLog
from minisgl.errors import RequestError, internal_error

log = logging.getLogger("minisgl.api")
WINDOW = 128
_WAIT_SECONDS = 0.2  # between two checks of an engine that is not ready
_LARGE_FILE = 1 << 20  # bytes; it is checked in another process
_DISK_SECONDS = 5.0  # before a batch that the disk has no room for is tried again; twice as long each time, up to
_MOST_WAITS = 12  # times that
_ENGINE_ERROR = "engine_error"  # code of the answer to requests that an engine took along when it failed
_ENGINE_TRIES = 3  # of such a request, which may be the reason


class Batches:
    """All batches of a data directory.  Call `start` once the event loop runs; `close` leaves unfinished batches for the next
    start."""

    def __init__(self, store: Store, engine: Engine, request_log: RequestLog | None = None) -> None:
        self.store, self._engine, self._callers = store, engine, Callers(engine)
        self._request_log = request_log or RequestLog()
        self._live = {b["id"]: b for b in reversed(store.all("batches")) if b["status"] not in ENDED}  # oldest first
        self._reader = Reader()
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._current: asyncio.Task[None] | None = None
        self._paused: set[str] = set()  # batches that wait for room on the disk
        # Of batches that have not gone on since they had to wait: why, and the seconds until the next trial.
        self._waits: dict[str, tuple[dict[str, Any], float]] = {}
        self._current_id = ""

    def start(self) -> None:
        self._news.set()
        self._task = asyncio.get_running_loop().create_task(self._main())

    async def close(self) -> None:
        """Stop working.  Idempotent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._reader.close()

    # ---------------- for clients
    def create(self, batch: dict[str, Any]) -> None:
        """Add a new batch, whose input file exists."""
        self.store.save("batches", batch)
        self._live[batch["id"]] = batch
        self._news.set()

    def get(self, name: str) -> dict[str, Any]:
        """The object of a batch; while it waits for room, its `errors` say so.  Raises RequestError (404)."""
        batch = self._live.get(name) or self.store.load("batches", name, "batch_id")
        return {**batch, "errors": _listed([self._waits[name][0]])} if name in self._waits else batch

    def room_made(self) -> None:
        """Something was deleted: batches that wait for room try again."""
        self._paused.clear()
        self._news.set()

    def uses(self, file_id: str) -> bool:
        """Whether an unfinished batch reads this file."""
        return any(b["input_file_id"] == file_id for b in self._live.values())

    def cancel(self, name: str) -> dict[str, Any]:
        """Cancel the requests of a batch that have no answer; answers stay.  Raises RequestError."""
        batch = self._live.get(name) or self.get(name)
        if batch["status"] not in ("validating", "in_progress"):
            text = f"Batch {name} cannot be cancelled: it is {batch['status']}."
            raise RequestError(text, status=409, param="batch_id", code="invalid_status")
        self._set(batch, "cancelling")
        self._paused.discard(name)
        if self._current is not None and self._current_id == name:
            self._current.cancel()
        elif not logs_of(self.store, batch):
            try:
                self._finish(batch)
            except OSError as e:
                self._suffer(batch, e)
        self._news.set()
        return self.get(name)

    # ---------------- in the background
    async def _main(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            while (batch := next((b for b in self._live.values() if b["id"] not in self._paused), None)) is not None:
                self._current_id = batch["id"]
                self._current = asyncio.get_running_loop().create_task(self._serve(batch))
                try:
                    await asyncio.wait([self._current])
                finally:
                    if not self._current.done():  # the server shuts down
                        self._current.cancel()
                        await asyncio.wait([self._current])
                self._current_id = ""
                if not self._current.cancelled() and (error := self._current.exception()) is not None:
                    self._suffer(batch, error)

    def _suffer(self, batch: dict[str, Any], error: BaseException) -> None:
        """A batch could not go on.  Where there is no room it waits, and the others go on; otherwise it has failed."""
        try:
            if isinstance(error, OSError) or (isinstance(error, RequestError) and (error.code == FULL or error.status == 503)):
                raise error
            if isinstance(error, RequestError):  # its file cannot be read
                return self._fail(batch, [problem(error.code or "", error.message, None)])
            log.error("batch %s failed", batch["id"], exc_info=error)
            self._fail(batch, [problem("internal_error", "The server failed while it worked on this batch.", None)])
        except (OSError, RequestError) as e:
            error, name = disk_error(e) if isinstance(e, OSError) else e, batch["id"]
            why = problem(error.code or "", f"{error.message} The batch goes on by itself when it can.", None)
            before, seconds = self._waits.get(name, (None, _DISK_SECONDS / 2))
            if why != before:
                log.error("batch %s waits: %s", name, e)
            self._waits[name] = why, min(2 * seconds, _MOST_WAITS * _DISK_SECONDS)
            self._paused.add(name)
            asyncio.get_running_loop().call_later(self._waits[name][1], self._resume, name)

    def _resume(self, name: str) -> None:
        self._paused.discard(name)
        self._news.set()

    def _set(self, batch: dict[str, Any], status: str) -> None:
        changed = {**batch, "status": status, f"{status}_at": int(time.time())}
        self.store.save("batches", changed)
        batch.update(changed)

    async def _serve(self, batch: dict[str, Any]) -> None:
        if batch["status"] not in ("cancelling", "finalizing"):
            try:
                await self._work(batch)
            except asyncio.CancelledError:
                if batch["status"] != "cancelling":
                    raise
        if batch["status"] == "cancelling":
            await asyncio.to_thread(recover, self.store, batch)
        if batch["status"] not in ENDED:
            self._finish(batch)

    async def _work(self, batch: dict[str, Any]) -> None:
        """Answer the requests that have no answer yet.  The batch fails if its input is not valid."""
        path = self.store.content(batch["input_file_id"])
        if not path.exists():
            return self._fail(batch, [problem("input_file_missing", f"The file {batch['input_file_id']} is gone.", None)])
        read = self._reader.run if path.stat().st_size > _LARGE_FILE else asyncio.to_thread
        requests, problems = await read(read_requests, path, batch["endpoint"])
        refused = [p for p in problems if p["code"] == TOO_LONG]
        if len(problems) > len(refused) or not requests:
            return self._fail(batch, problems)
        batch["errors"] = _listed(refused) if refused else None
        if batch["status"] == "validating":
            batch["request_counts"]["total"] = len(requests) + len(refused)
            self._set(batch, "in_progress")
        done = await asyncio.to_thread(recover, self.store, batch)
        todo = [(name, place) for name, place in requests.items() if name not in done]
        with ExitStack() as stack:
            source = stack.enter_context(open(path, "rb"))  # noqa: ASYNC230  read in threads
            output, errors = (self.store.log(batch["id"], kind) for kind in ("output", "errors"))
            stack.callback(errors.close)
            stack.callback(output.close)
            await self._answer(batch, todo, source.fileno(), output, errors)

    async def _answer(
        self, batch: dict[str, Any], todo: list[tuple[str, Place]], source: int, output: Log, errors: Log
    ) -> None:
        queue = iter(todo)
        window = max(1, min(WINDOW, self._engine.config.server.max_open_requests // 2))

        async def work() -> None:
            for custom_id, place in queue:  # which all workers share
                request_id = f"batch-{uuid.uuid4().hex}"
                with self._request_log.request(f"POST {batch['endpoint']}", "batch", request_id) as account:
                    account.status, answer = await self._ask(batch, source, place, account)
                status = account.status
                response = {"status_code": status, "request_id": request_id, "body": answer}
                line = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": None}
                (output if status == 200 else errors).append(line)
                batch["request_counts"]["completed" if status == 200 else "failed"] += 1
                self._waits.pop(batch["id"], None)

        workers = [asyncio.get_running_loop().create_task(work()) for _ in range(min(window, len(todo)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _ask(self, batch: dict[str, Any], source: int, place: Place, account: Account) -> tuple[int, dict[str, Any]]:
        """(status, body) of the answer.  The request waits while the server is full, not ready, or about to end.

        What only says that the engine has failed or ends is no answer: the request stays open, if need be for the next start.
        Raises OSError if the request cannot be read.
        """
        endpoint, config = ENDPOINTS[batch["endpoint"]], self._engine.config
        failures = 0  # of an engine that has gone on
        while True:
            if self._engine.state != "ready":
                await asyncio.sleep(_WAIT_SECONDS)
                continue
            small = await asyncio.to_thread(body_at, source, place) if place[1] <= SMALL else None
            try:
                account.try_again()
                engine = self._callers.call("batches", batch=True, account=account, tenant=batch.get("owner", ""))
                if small is not None:
                    return 200, await endpoint.ask(engine, small)
                path = self.store.content(batch["input_file_id"])
                request = await self._reader.run(checked_at, path, place, batch["endpoint"], config)
                return 200, await endpoint.answer(engine, request)
            except RequestError as e:
                failures += e.code == _ENGINE_ERROR and self._engine.state == "ready"
                if e.status in (429, 503) or (e.code == _ENGINE_ERROR and failures < _ENGINE_TRIES):
                    await asyncio.sleep(e.retry_after or _WAIT_SECONDS)
                elif self._engine.state == "ready" or e.code == "poison_request":
                    account.fail(e)
                    return e.status, e.body()
            except Exception:
                log.exception("a request of a batch failed")
                error = internal_error()
                account.fail(error)
                return 500, error.body()

    def _fail(self, batch: dict[str, Any], problems: list[dict[str, Any]]) -> None:
        """The batch has failed; answers stay."""
        batch["errors"] = _listed(problems)
        if logs_of(self.store, batch):
            recover(self.store, batch)
            return self._finish(batch)
        self._set(batch, "failed")
        self._forget(batch)

    def _finish(self, batch: dict[str, Any]) -> None:
        """Make the logs files.  Their ids are on disk first, so that the next start can finish after a crash in between."""
        cancelled = batch["status"] == "cancelling"
        failed = any(p["code"] not in (TOO_LONG, "disk_full") for p in (batch["errors"] or {"data": ()})["data"])
        parts = [(kind, key, self.store.log_path(batch["id"], kind)) for kind, key in FILES]
        for _, key, part in parts:
            if part.exists() and part.stat().st_size and batch[key] is None:
                batch[key] = new_file_id()
            elif batch[key] is not None and not part.exists() and not self.store.content(batch[key]).exists():
                batch[key] = None  # somebody has removed it
        self._set(batch, "cancelling" if cancelled else "finalizing")
        for kind, key, part in parts:
            if batch[key] is not None:
                name, owner = f"{batch['id']}_{kind}.jsonl", batch.get("owner", "")
                self.store.adopt(part, name, "batch_output", batch[key], owner=owner)
            part.unlink(missing_ok=True)
        self._set(batch, "cancelled" if cancelled else "failed" if failed else "completed")
        self._forget(batch)

    def _forget(self, batch: dict[str, Any]) -> None:
        self._live.pop(batch["id"], None)
        self._waits.pop(batch["id"], None)


def new_batch(
    input_file_id: str, endpoint: str, window: str, metadata: dict[str, Any] | None, owner: str = ""
) -> dict[str, Any]:
    """The object of a new batch."""
    return {
        "id": f"batch_{uuid.uuid4().hex}",
        "object": "batch",
        "endpoint": endpoint,
        "input_file_id": input_file_id,
        "completion_window": window,
        "status": "validating",
        "created_at": int(time.time()),
        "errors": None,
        "output_file_id": None,
        "error_file_id": None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": metadata,
        **({"owner": owner} if owner else {}),
    }


def _listed(problems: list[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": problems[:MAX_ERRORS]}
