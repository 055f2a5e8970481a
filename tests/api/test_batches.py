"""/v1/files and /v1/batches: with the SDK, through restarts, crashes, torn files and cancellations."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web
from test_server import CHAT, OVERLOADED, TEXT, USER, ScriptedEngine, ask, check_error

from minisgl.api.batches import input as reading
from minisgl.api.batches import worker as module
from minisgl.api.batches.input import read_requests
from minisgl.api.batches.store import Log, Store
from minisgl.api.batches.worker import Batches, new_batch
from minisgl.api.http.app import BATCHES, RUN_KWARGS, build_app
from minisgl.errors import UserError

ENDED = ("completed", "failed", "cancelled")


def request_line(custom_id: str, url: str = CHAT, **body: Any) -> bytes:
    line = {"custom_id": custom_id, "method": "POST", "url": url, "body": {"messages": USER, **body}}
    return json.dumps(line).encode() + b"\n"


class Stored:
    """A server with a data directory."""

    def __init__(self, engine: ScriptedEngine, directory: Path) -> None:
        self.app = build_app(engine, store=Store(str(directory)))
        self._runner = web.AppRunner(self.app, **RUN_KWARGS)

    def make_url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}{path}"

    @property
    def batches(self) -> Batches:
        return self.app[BATCHES]

    async def __aenter__(self) -> Stored:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    def sdk(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.make_url("/v1"), api_key="none", max_retries=0)

    async def until(self, batch_id: str, *statuses: str) -> dict[str, Any]:
        async def wait() -> dict[str, Any]:
            while (batch := self.batches.get(batch_id))["status"] not in statuses:  # noqa: ASYNC110
                await asyncio.sleep(0)
            return batch

        return await asyncio.wait_for(wait(), 20)

    async def until_answered(self, batch_id: str, n: int) -> None:
        while self.batches.get(batch_id)["request_counts"]["completed"] < n:  # noqa: ASYNC110
            await asyncio.sleep(0)


Scene = Callable[[ScriptedEngine, Stored], Awaitable[None]]


def serve(directory: Path, scene: Scene, engine: ScriptedEngine | None = None) -> None:
    async def main() -> None:
        used = engine or ScriptedEngine()
        async with Stored(used, directory) as server:
            await scene(used, server)
        assert not used.live, "a request is left running"

    asyncio.run(main())


async def submit(sdk: openai.AsyncOpenAI, content: bytes, endpoint: Any = CHAT) -> Any:
    file = await sdk.files.create(file=("in.jsonl", content), purpose="batch")
    return await sdk.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"a": "b"})


def answers(raw: str) -> dict[str, Any]:
    lines = [json.loads(line) for line in raw.splitlines()]
    out = {line["custom_id"]: line["response"] for line in lines}
    assert len(out) == len(lines), "a request has two answers"
    return out


def test_the_sdk_sends_a_batch_and_reads_its_answers_and_errors(tmp_path: Path) -> None:
    content = b"".join(request_line(f"q{i}", **({"temperature": 9} if i == 2 else {})) for i in range(5))

    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            batch = await submit(sdk, content)
            assert (batch.status, batch.endpoint, batch.metadata) == ("validating", CHAT, {"a": "b"})
            await server.until(batch.id, "completed")
            batch = await sdk.batches.retrieve(batch.id)
            counts = batch.request_counts
            assert (counts.total, counts.completed, counts.failed) == (5, 4, 1)
            assert batch.completed_at >= batch.in_progress_at >= batch.created_at
            done = answers((await sdk.files.content(batch.output_file_id)).text)
            assert set(done) == {"q0", "q1", "q3", "q4"}
            assert done["q0"]["status_code"] == 200
            assert done["q0"]["body"]["choices"][0]["message"]["content"] == TEXT
            failed = answers((await sdk.files.content(batch.error_file_id)).text)
            assert failed["q2"]["status_code"] == 400
            assert failed["q2"]["body"]["error"]["param"] == "temperature"
            ids = [f.id async for f in sdk.files.list(limit=1)]  # page by page
            assert len(ids) == 3
            assert [f.id async for f in sdk.files.list(purpose="batch")] == [batch.input_file_id]
            assert [b.id async for b in sdk.batches.list()] == [batch.id]
            file = await sdk.files.retrieve(batch.input_file_id)
            assert (file.bytes, file.filename, file.purpose) == (len(content), "in.jsonl", "batch")
            assert (await sdk.files.delete(file.id)).deleted
            with pytest.raises(openai.NotFoundError):
                await sdk.files.retrieve(file.id)
            assert (await sdk.batches.retrieve(batch.id)).status == "completed"

    serve(tmp_path, scene)
    assert not list(tmp_path.rglob("*.part"))


def test_other_endpoints_can_be_asked_too(tmp_path: Path) -> None:
    line = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": {"input": "hi"}}).encode()

    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            batch = await submit(sdk, line, "/v1/responses")
            ended = await server.until(batch.id, *ENDED)
            assert ended["request_counts"]["completed"] == 1, ended
            body = answers((await sdk.files.content(ended["output_file_id"])).text)["a"]["body"]
            assert body["output"][0]["content"][0]["text"] == TEXT

    serve(tmp_path, scene)


def test_a_batch_waits_while_the_server_is_full_and_lets_others_go_first(tmp_path: Path, monkeypatch: Any) -> None:
    waits: list[float] = []
    sleep = asyncio.sleep

    async def nap(seconds: float) -> None:
        if seconds:
            waits.append(seconds)
            engine.refuse = None
        await sleep(0)

    monkeypatch.setattr(module.asyncio, "sleep", nap)
    engine = ScriptedEngine()
    engine.refuse = OVERLOADED

    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            batch = await submit(sdk, request_line("a") + request_line("b", priority=3))
            ended = await server.until(batch.id, *ENDED)
            assert ended["request_counts"] == {"total": 2, "completed": 2, "failed": 0}

    serve(tmp_path, scene, engine)
    assert waits[0] == 1


def test_a_server_that_starts_again_goes_on_where_it_was(tmp_path: Path) -> None:
    """The first server ends with some requests answered and some running; a line of its log is torn as by a crash."""
    content = b"".join(request_line(f"q{i}") for i in range(module.WINDOW + 30))
    made: dict[str, str] = {}

    async def first(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            batch = await submit(sdk, content)
            made["id"] = batch.id
            await server.until(batch.id, "in_progress")
            await server.until_answered(batch.id, 10)
            engine.stall, engine.after = True, 1

    serve(tmp_path, first)
    log = tmp_path / "batches" / f"{made['id']}.output"
    before = log.read_bytes()
    known = answers(before.decode())
    assert 10 <= len(known) < module.WINDOW + 30
    log.write_bytes(before + b'{"id": "batch_req_torn", "custom_id": "q0"')
    stored = json.loads((tmp_path / "batches" / f"{made['id']}.json").read_text())
    assert stored["status"] == "in_progress"

    async def second(engine: ScriptedEngine, server: Stored) -> None:
        ended = await server.until(made["id"], *ENDED)
        total = module.WINDOW + 30
        assert ended["request_counts"] == {"total": total, "completed": total, "failed": 0}
        assert len(engine.opened) == total - len(known), "a request was asked twice, or never"
        async with server.sdk() as sdk:
            done = answers((await sdk.files.content(ended["output_file_id"])).text)
        assert set(done) == {f"q{i}" for i in range(total)}
        assert {k: done[k] for k in known} == known

    serve(tmp_path, second)


def test_a_log_that_is_torn_at_any_byte_keeps_every_line_before_the_tear(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = [{"custom_id": name, "text": "é\n"} for name in "abc"]
    log = Log(path)
    for line in lines:
        log.append(line)
    log.close()
    log.close()
    complete = path.read_bytes()
    for size in range(len(complete) + 1):
        path.write_bytes(complete[:size])
        torn = Log(path)
        kept = list(torn.recover())
        assert kept == [line["custom_id"] for line in lines[: complete[:size].count(b"\n")]]
        torn.append({"custom_id": "next"})
        torn.close()
        assert [json.loads(line) for line in path.read_bytes().splitlines()] == [*lines[: len(kept)], {"custom_id": "next"}]


def test_a_full_disk_pauses_a_batch_which_the_next_start_finishes(tmp_path: Path, monkeypatch: Any) -> None:
    made: dict[str, str] = {}
    append = Log.append

    def run_out_of_space(log: Log, value: dict[str, Any]) -> None:
        if log.path.stat().st_size > 3000:
            log._file.write(b'{"custom_id": "q0", "resp')  # the part that fits
            log._file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")
        append(log, value)

    async def first(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            made["id"] = (await submit(sdk, b"".join(request_line(f"q{i}") for i in range(20)))).id
            await server.until(made["id"], "in_progress")
            while not server.batches.get(made["id"])["errors"]:  # noqa: ASYNC110
                await asyncio.sleep(0)
            waiting = await sdk.batches.retrieve(made["id"])
            assert (waiting.status, waiting.errors.data[0].code) == ("in_progress", "disk_full")
            with pytest.raises(openai.ConflictError):
                await sdk.files.delete(waiting.input_file_id)
            assert not engine.live
            assert (await ask(server, CHAT, {"messages": USER}))[0] == 200, "the server goes on"  # type: ignore[arg-type]

    with monkeypatch.context() as m:
        m.setattr(Log, "append", run_out_of_space)
        serve(tmp_path, first)
    written = (tmp_path / "batches" / f"{made['id']}.output").read_bytes().count(b"\n")
    assert 0 < written < 20

    async def second(engine: ScriptedEngine, server: Stored) -> None:
        ended = await server.until(made["id"], *ENDED)
        assert (ended["status"], ended["request_counts"]) == ("completed", {"total": 20, "completed": 20, "failed": 0})
        assert len(engine.opened) == 20 - written
        async with server.sdk() as sdk:
            assert len(answers((await sdk.files.content(ended["output_file_id"])).text)) == 20

    serve(tmp_path, second)


@pytest.mark.parametrize("dies_at", [0, 1, 2, 3, 4])
def test_a_crash_between_the_last_answer_and_the_end_is_finished_by_the_next_start(
    tmp_path: Path, monkeypatch: Any, dies_at: int
) -> None:
    """The server dies at its n-th write to the disk after the last answer."""
    store = Store(str(tmp_path))
    part = store.new_part()
    part.write_bytes(request_line("a") + request_line("b"))
    file = store.adopt(part, "in.jsonl", "batch")
    batch = {**new_batch(file["id"], CHAT, "24h", None), "status": "in_progress"}
    batch["request_counts"]["total"] = 2
    store.save("batches", batch)
    log = store.log(batch["id"], "output")
    for name in "ab":
        log.append({"custom_id": name, "response": {"status_code": 200}})
    log.close()
    calls = 0
    rename = os.replace

    def replace(*paths: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == dies_at:
            raise KeyboardInterrupt
        rename(*paths)

    if dies_at:
        with monkeypatch.context() as m:
            m.setattr("minisgl.api.batches.store.os.replace", replace)
            batches = Batches(store, ScriptedEngine())
            batch["request_counts"]["completed"] = 2
            with pytest.raises(KeyboardInterrupt):
                batches._finish(batch)
    store.close()

    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        ended = await server.until(batch["id"], *ENDED)
        assert (ended["status"], ended["request_counts"]["completed"]) == ("completed", 2)
        assert not engine.opened
        async with server.sdk() as sdk:
            assert set(answers((await sdk.files.content(ended["output_file_id"])).text)) == {"a", "b"}
            assert len([f async for f in sdk.files.list()]) == 2

    serve(tmp_path, scene)


def test_a_cancelled_batch_keeps_what_was_answered(tmp_path: Path) -> None:
    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            engine.stall, engine.after = True, 9  # until the fifth request
            batch = await submit(sdk, b"".join(request_line(f"q{i}") for i in range(6)))
            await server.until(batch.id, "in_progress")
            await server.until(batch.id, "completed")
            engine.after = 1
            held = await submit(sdk, request_line("x") + request_line("y"))
            behind = await submit(sdk, request_line("z"))
            await engine.wait_for(lambda: len(engine.live) == 2)
            assert (await sdk.batches.cancel(behind.id)).status == "cancelled"  # it had not begun
            assert (await sdk.batches.cancel(held.id)).status == "cancelling"
            ended = await server.until(held.id, *ENDED)
            assert (ended["status"], ended["output_file_id"]) == ("cancelled", None)
            assert not engine.live
            for name in (held.id, batch.id):
                with pytest.raises(openai.ConflictError, match="cannot be cancelled"):
                    await sdk.batches.cancel(name)

    serve(tmp_path, scene)


def test_what_is_wrong_with_the_lines_of_a_file_is_told_line_by_line(tmp_path: Path) -> None:
    lines = [
        request_line("a"),
        b"\n",
        b"{oops\n",
        b"[1]\n",
        b'{"custom_id": 5}\n',
        request_line("a"),
        request_line("b", url="/v1/completions"),
        json.dumps({"custom_id": "c", "method": "GET", "url": CHAT, "body": {}}).encode() + b"\n",
        json.dumps({"custom_id": "d", "url": CHAT, "body": [1]}).encode() + b"\n",
    ]

    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            ended = await server.until((await submit(sdk, b"".join(lines))).id, *ENDED)
            assert ended["status"] == "failed"
            told = {p["line"]: p["param"] for p in ended["errors"]["data"]}
            assert told == {3: None, 4: None, 5: "custom_id", 6: "custom_id", 7: "url", 8: "method", 9: "body"}
            empty = await server.until((await submit(sdk, b"\n")).id, *ENDED)
            assert empty["errors"]["data"][0]["code"] == "empty_file"
            assert (await sdk.batches.retrieve(empty["id"])).errors.data[0].code == "empty_file"

    serve(tmp_path, scene)
    many = tmp_path / "many"
    many.write_bytes(b"".join(request_line(str(i)) for i in range(20)))
    limit, reading.MAX_LINES = reading.MAX_LINES, 10
    try:
        assert read_requests(many, CHAT)[1][0]["code"] == "too_many_requests"
    finally:
        reading.MAX_LINES = limit


def test_what_is_wrong_with_a_request_for_files_or_batches_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("minisgl.api.http.batch_routes.MAX_FILE_BYTES", 100)

    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            with pytest.raises(openai.BadRequestError, match="purpose"):
                await sdk.files.create(file=b"x", purpose="nonsense")  # type: ignore[arg-type]
            with pytest.raises(openai.APIStatusError, match="larger than 100"):
                await sdk.files.create(file=b"x" * 101, purpose="batch")
            odd = await sdk.files.create(file=("../../etc/passwd", b"x"), purpose="user_data")
            file = await sdk.files.create(file=b"x", purpose="batch")
        good = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
        for change, param in (
            ({"input_file_id": None}, "input_file_id"),
            ({"input_file_id": "file-" + "0" * 32}, "input_file_id"),
            ({"input_file_id": "../lock"}, "input_file_id"),
            ({"input_file_id": odd.id}, "input_file_id"),
            ({"endpoint": "/v1/audio"}, "endpoint"),
            ({"completion_window": "1h"}, "completion_window"),
            ({"metadata": "x"}, "metadata"),
        ):
            status, headers, raw = await ask(server, "/v1/batches", {**good, **change})  # type: ignore[arg-type]
            assert check_error(status, headers, raw)["param"] == param, change
        for method, path, want in (
            ("GET", "/v1/files/..%2f..%2flock", 404),
            ("GET", "/v1/files/x/content", 404),
            ("DELETE", "/v1/files/x", 404),
            ("GET", "/v1/batches/x", 404),
            ("POST", "/v1/batches/x/cancel", 404),
            ("GET", "/v1/files?limit=0", 400),
            ("GET", "/v1/files?limit=x", 400),
            ("GET", "/v1/files?after=x", 400),
            ("POST", "/v1/files", 400),
        ):
            status, headers, raw = await ask(server, path, method=method)  # type: ignore[arg-type]
            check_error(status, headers, raw)
            assert status == want, (method, path, raw)
        assert not engine.opened

    serve(tmp_path, scene)
    assert not list(tmp_path.rglob("*.part"))
    assert {p.name for p in tmp_path.iterdir()} == {"files", "batches", "lock"}


def test_the_input_of_a_running_batch_is_not_deleted(tmp_path: Path) -> None:
    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            engine.stall, engine.after = True, 1
            batch = await submit(sdk, request_line("a"))
            await engine.wait_for(lambda: len(engine.live) == 1)
            with pytest.raises(openai.ConflictError):
                await sdk.files.delete(batch.input_file_id)

    serve(tmp_path, scene)


def test_a_data_directory_serves_one_server_at_a_time(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "new" / "dir"))
    with pytest.raises(UserError, match="another server"):
        Store(str(tmp_path / "new" / "dir"))
    store.close()
    Store(str(tmp_path / "new" / "dir")).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--data-dir"):
        Store(str(tmp_path / "file"))


def test_an_object_is_whole_whenever_the_writer_dies(tmp_path: Path, monkeypatch: Any) -> None:
    store = Store(str(tmp_path))
    batch = new_batch("file-x", CHAT, "24h", None)
    store.save("batches", batch)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("replace", "fsync"):
        with monkeypatch.context() as m:
            m.setattr(f"minisgl.api.batches.store.os.{name}", die)
            with pytest.raises(KeyboardInterrupt):
                store.save("batches", {**batch, "status": "completed"})
        assert store.load("batches", batch["id"], "batch_id") == batch
        assert store.all("batches") == [batch]
    store.close()
