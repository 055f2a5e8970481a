"""Batch files that are too long, too strange, or too much for the disk: told by their lines, bounded, and never lost."""

from __future__ import annotations

import asyncio
import errno
import json
import tracemalloc
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from test_batches import ENDED, Stored, answers, request_line, serve, submit
from test_server import CHAT, ScriptedEngine

from minisgl.api.batches import input as reading
from minisgl.api.batches import worker
from minisgl.api.batches.input import MAX_ID_CHARS, MAX_LINE_BYTES, body_at, read_requests
from minisgl.api.batches.store import Log, Store
from minisgl.api.http import batch_routes
from minisgl.errors import RequestError

Form = aiohttp.FormData


def form(content: bytes, purpose: str | None = "batch") -> Form:
    data = Form()
    data.add_field("file", content, filename="in.jsonl")
    if purpose is not None:
        data.add_field("purpose", purpose)
    return data


async def post(server: Stored, data: Any, path: str = "/v1/files", **more: Any) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as session, session.post(server.make_url(path), data=data, **more) as answer:
        return answer.status, json.loads(await answer.read())


# ---------------- lines
def test_a_long_line_is_refused_by_its_number_and_the_others_are_answered(tmp_path: Path) -> None:
    long = request_line("long", user="x" * MAX_LINE_BYTES)
    content = request_line("a") + long + request_line("b") + long + request_line("c")

    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            ended = await server.until((await submit(sdk, content)).id, *ENDED)
            assert (ended["status"], ended["request_counts"]) == ("completed", {"total": 5, "completed": 3, "failed": 2})
            assert [(p["line"], p["code"]) for p in ended["errors"]["data"]] == [(2, "line_too_long"), (4, "line_too_long")]
            assert str(MAX_LINE_BYTES) in ended["errors"]["data"][0]["message"]
            assert set(answers((await sdk.files.content(ended["output_file_id"])).text)) == {"a", "b", "c"}
            only = await server.until((await submit(sdk, long)).id, *ENDED)
            assert (only["status"], only["errors"]["data"][0]["line"]) == ("failed", 1)

    serve(tmp_path, scene)


def test_a_line_of_exactly_the_limit_is_served_and_one_more_byte_is_not(tmp_path: Path) -> None:
    path = tmp_path / "in"
    padding = MAX_LINE_BYTES - len(request_line("a", user="")) + 1
    for more, last in ((0, b"\n"), (0, b""), (1, b"\n"), (1, b"")):
        path.write_bytes(request_line("a", user="x" * (padding + more)).rstrip(b"\n") + last)
        requests, problems = read_requests(path, CHAT)
        assert (list(requests), [p["code"] for p in problems]) == (([], ["line_too_long"]) if more else (["a"], []))


def test_reading_a_file_holds_no_more_than_a_line(tmp_path: Path) -> None:
    path = tmp_path / "in"
    with open(path, "wb") as f:
        for _ in range(24):
            f.write(b"x" * (1 << 20))
        f.write(b"\n")
        for i in range(24):
            f.write(request_line(f"q{i}", user="y" * 500_000))
    tracemalloc.start()
    requests, problems = read_requests(path, CHAT)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(requests), [p["line"] for p in problems]) == (24, [1])
    assert peak < 12 << 20
    with open(path, "rb") as f:
        assert body_at(f.fileno(), requests["q7"])["user"] == "y" * 500_000


@pytest.mark.parametrize(
    ("line", "param"),
    [
        (b'{"custom_id": "a", "url": "%b", "body": {"temperature": NaN}}' % CHAT.encode(), None),
        (b'{"custom_id": "a", "url": "%b", "body": {"temperature": 1e999}}' % CHAT.encode(), None),
        (b'{"custom_id": "a", "url": "%b", "body": {"user": "\\ud800"}}' % CHAT.encode(), None),
        (b'{"custom_id": "a", "url": "%b", "body": {"user": "\xff"}}' % CHAT.encode(), None),
        (b'{"custom_id": "a", "url": "%b", "body": {"user": %b}}' % (CHAT.encode(), b"[" * 9000 + b"]" * 9000), None),
        (b'{"custom_id": "%b", "url": "%b", "body": {}}' % (b"i" * (MAX_ID_CHARS + 1), CHAT.encode()), "custom_id"),
        (b'{"custom_id": "", "url": "%b", "body": {}}' % CHAT.encode(), "custom_id"),
    ],
)
def test_lines_are_read_as_strictly_as_bodies(tmp_path: Path, line: bytes, param: str | None) -> None:
    (tmp_path / "in").write_bytes(request_line("first") + line)
    _, problems = read_requests(tmp_path / "in", CHAT)
    assert [(p["line"], p["param"]) for p in problems] == [(2, param)]
    assert "line" in problems[0]["message"] or param


def test_lines_pass_through_the_parser_of_bodies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a body over HTTP must not be, a line must not be either."""
    read: list[bytes] = []

    def parse(raw: bytes) -> Any:
        read.append(raw)
        raise RequestError("The request body could not be parsed as JSON: a key occurs twice.")

    monkeypatch.setattr(reading, "parse_json", parse)
    (tmp_path / "in").write_bytes(request_line("a"))
    _, problems = read_requests(tmp_path / "in", CHAT)
    assert read == [request_line("a")]
    assert problems[0]["message"] == "The line could not be parsed as JSON: a key occurs twice."


# ---------------- the disk
def test_a_batch_goes_on_when_the_disk_has_room_again_and_others_do_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full: set[str] = set()
    append = Log.append

    def maybe(log: Log, value: dict[str, Any]) -> None:
        if log.path.stem in full and log.path.stat().st_size > 1500:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(log, value)

    monkeypatch.setattr(Log, "append", maybe)
    monkeypatch.setattr(worker, "_DISK_SECONDS", 0.01)

    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            engine.stall, engine.after = True, 0
            first = await submit(sdk, b"".join(request_line(f"q{i}") for i in range(9)))
            full.add(first.id)
            second = await submit(sdk, request_line("z"))
            engine.stall, engine.after = False, 9
            for uid in list(engine.live):
                engine._piece(uid, 0)
            ended = await server.until(second.id, *ENDED)
            assert ended["status"] == "completed"
            waiting = await sdk.batches.retrieve(first.id)
            assert (waiting.status, waiting.errors.data[0].code) == ("in_progress", "disk_full")
            assert "No space left" in waiting.errors.data[0].message
            status, body = await post(server, None, f"/v1/files/{first.input_file_id}/content")
            assert status == 405, body
            async with aiohttp.ClientSession() as s, s.delete(server.make_url(f"/v1/files/{first.input_file_id}")) as kept:
                assert kept.status == 409
            full.clear()
            ended = await server.until(first.id, *ENDED)
            assert (ended["status"], ended["request_counts"]) == ("completed", {"total": 9, "completed": 9, "failed": 0})
            assert ended["errors"] is None
            assert len(answers((await sdk.files.content(ended["output_file_id"])).text)) == 9

    serve(tmp_path, scene)


def test_whatever_write_of_a_batch_fails_it_ends_when_the_disk_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th change of an object's file fails, and the one after it; also that of a batch which has to be failed."""
    monkeypatch.setattr(worker, "_DISK_SECONDS", 0.001)
    write = Store._write
    left = [0, 0]

    def flaky(store: Store, room: str, value: dict[str, Any]) -> None:
        left[0] -= 1
        if left[0] < 0 and left[1] > 0:
            left[1] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        write(store, room, value)

    monkeypatch.setattr(Store, "_write", flaky)

    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            for content, status in ((request_line("a"), "completed"), (b"oops\n", "failed")):
                for n in range(4):
                    left[:] = 99, 0
                    file = await sdk.files.create(file=("in.jsonl", content), purpose="batch")
                    left[:] = n + 1, 2
                    batch = await sdk.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
                    assert (await server.until(batch.id, *ENDED))["status"] == status

    serve(tmp_path, scene)


def test_a_request_that_the_full_disk_cannot_take_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            file = await sdk.files.create(file=("in.jsonl", request_line("a")), purpose="batch")

        def no_space(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as m:
            m.setattr(Store, "_write", no_space)
            used = server.batches.store.used
            batch = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
            for status, body in (await post(server, form(b"x")), await post(server, None, "/v1/batches", json=batch)):
                assert (status, body["error"]["code"]) == (507, "disk_full")
            assert server.batches.store.used == used
            assert not server.batches._live

    serve(tmp_path, scene)
    assert not list(tmp_path.rglob("*.part"))


# ---------------- the quota
class Small(Stored):
    """A server whose data directory may take 64 KiB."""

    def __init__(self, engine: ScriptedEngine, directory: Path) -> None:
        super().__init__(engine, directory)
        self.batches.store.max_bytes = 1 << 16


def test_uploads_and_results_are_bounded_together(tmp_path: Path) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with Small(engine, tmp_path) as server, server.sdk() as sdk:
            status, body = await post(server, form(b"x" * (1 << 16)))
            assert (status, body["error"]["code"]) == (413, "data_dir_full")
            assert "--data-dir-gb" in body["error"]["message"]
            assert server.batches.store.used == 0
            ballast = await sdk.files.create(file=("ballast", b"x" * 30_000), purpose="user_data")
            batch = await submit(sdk, b"".join(request_line(f"q{i}") for i in range(60)))
            while not (waiting := server.batches.get(batch.id))["errors"]:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert waiting["status"] == "in_progress"
            assert [p["code"] for p in waiting["errors"]["data"]] == ["data_dir_full"]
            asked, done = len(engine.opened), waiting["request_counts"]["completed"]
            assert 0 < done < 60
            status, _ = await post(server, form(b"x" * 20_000))
            assert status == 413
            await sdk.files.delete(ballast.id)
            ended = await server.until(batch.id, *ENDED)
            assert (ended["status"], ended["errors"], ended["request_counts"]["completed"]) == ("completed", None, 60)
            assert len(engine.opened) == asked + 60 - done
            assert len(answers((await sdk.files.content(ended["output_file_id"])).text)) == 60
            used = server.batches.store.used
        assert not engine.live
        store = Store(str(tmp_path))
        assert store.used == used, "what is counted while it is written is what is there"
        store.close()

    asyncio.run(main())


def test_the_number_of_files_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisgl.api.batches.store.MAX_OBJECTS", 3)

    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        got = [(await post(server, form(b"")))[0] for _ in range(5)]
        assert got == [200, 200, 200, 413, 413]

    serve(tmp_path, scene)


# ---------------- forms
def test_a_form_whose_fields_never_end_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_routes, "IDLE_SECONDS", 0.05)
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nxyz\r\n--b\r\n'
    purpose = b'Content-Disposition: form-data; name="purpose"\r\n\r\n'

    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        for sent in (head + purpose, head + purpose + b"bat", head, head[:60], head + purpose + b"batch\r\n--b\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", server._runner.addresses[0][1])
            writer.write(
                b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
                b"Content-Length: 9999\r\n\r\n" + sent
            )
            assert b" 408 " in await reader.readline(), sent
            writer.close()
        assert server.batches.store.used == 0

    serve(tmp_path, scene)
    assert not list(tmp_path.rglob("*.part"))


def test_nor_is_one_that_comes_in_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_routes, "UPLOAD_SECONDS", 0.1)
    monkeypatch.setattr(batch_routes, "IDLE_SECONDS", 5.0)

    async def drops() -> Any:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        while True:
            yield b"x"
            await asyncio.sleep(0.01)

    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        status, body = await post(server, drops(), headers={"Content-Type": "multipart/form-data; boundary=b"})
        assert (status, body["error"]["code"]) == (408, "request_timeout")

    serve(tmp_path, scene)


def test_a_form_has_few_and_short_fields_beside_the_file(tmp_path: Path) -> None:
    many, long = form(b"x"), form(b"x", None)
    for i in range(40):
        many.add_field(f"f{i}", "x")
    long.add_field("purpose", "b" * 100_000)

    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        for data in (many, long):
            status, body = await post(server, data)
            assert (status, body["error"]["code"]) == (400, "invalid_form")
        status, body = await post(server, None, "/v1/batches", json={"metadata": {str(i): "x" for i in range(17)}})
        assert status == 400

    serve(tmp_path, scene)


# ---------------- lists
def test_a_list_reads_the_objects_of_its_page_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    load = Store.load

    def counted(store: Store, room: str, name: str, what: str) -> dict[str, Any]:
        read.append(name)
        return load(store, room, name, what)

    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            ids = [(await sdk.files.create(file=b"x", purpose=p)).id for p in ("batch", "user_data") * 5]  # type: ignore[arg-type]
            monkeypatch.setattr(Store, "load", counted)
            monkeypatch.setattr(Store, "all", lambda *_: pytest.fail("every object is read"))
            page = await sdk.files.list(limit=3)
            assert [f.id for f in page.data] == ids[::-1][:3] == read
            assert page.has_more
            assert [f.id async for f in sdk.files.list(purpose="batch", limit=2)] == ids[::-1][1::2]
            await sdk.files.delete(ids[4])
            assert ids[4] not in [f.id async for f in sdk.files.list()]

    serve(tmp_path, scene)
