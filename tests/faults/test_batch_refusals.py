"""What clients of /v1/files and /v1/batches are told when the disk or the engine fails; no line is answered with it."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from disk import Disk
from test_batch_limits import form, post
from test_batches import ENDED, Stored, answers, request_line, serve, submit
from test_server import CHAT, DIED, USER, ScriptedEngine, ask

from minisgl.api.batches import worker
from minisgl.api.batches.store import Store
from minisgl.errors import RequestError, UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(worker, "_DISK_SECONDS", 0.001)
    monkeypatch.setattr(worker, "_WAIT_SECONDS", 0.001)
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def names(directory: Path) -> set[str]:
    return {p.name for p in directory.rglob("*")}


@pytest.mark.parametrize(
    ("number", "status", "code"),
    [
        (errno.ENOSPC, 507, "disk_full"),
        (errno.EDQUOT, 507, "disk_full"),
        (errno.EFBIG, 507, "disk_full"),
        (errno.EIO, 500, "disk_error"),
        (errno.EROFS, 500, "disk_error"),
    ],
)
def test_whatever_call_of_a_request_the_disk_refuses_the_client_is_told_and_nothing_is_left(
    tmp_path: Path, number: int, status: int, code: str
) -> None:
    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        store = server.batches.store
        async with server.sdk() as sdk:
            source = await sdk.files.create(file=("in.jsonl", request_line("a")), purpose="batch")
        batch = {"input_file_id": source.id, "endpoint": CHAT, "completion_window": "24h"}

        async def delete() -> tuple[int, Any]:
            async with aiohttp.ClientSession() as s, s.delete(server.make_url(f"/v1/files/{source.id}")) as answer:
                return answer.status, json.loads(await answer.read())

        requests = (lambda: post(server, form(b"x" * 9)), lambda: post(server, None, "/v1/batches", json=batch), delete)
        for request, least in zip(requests, (8, 5, 1), strict=True):
            for at in range(99):
                used, there = store.used, names(tmp_path)
                with Disk(tmp_path, at, number).attached():
                    told, body = await request()
                if told == 200:
                    break
                assert (told, body["error"]["code"]) == (status, code)
                assert "data directory (--data-dir)" in body["error"]["message"]
                assert os.strerror(number) in body["error"]["message"]
                assert "delete files" in body["error"]["message"]
                assert (store.used, names(tmp_path)) == (used, there)
                assert (await ask(server, CHAT, {"messages": USER}))[0] == 200, "the server goes on"  # type: ignore[arg-type]
            assert at >= least, "fewer calls than it takes"
            while server.batches._live:  # noqa: ASYNC110
                await asyncio.sleep(0)

    serve(tmp_path, scene)


def test_an_engine_that_has_failed_and_goes_on_is_asked_again(tmp_path: Path) -> None:
    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            engine.error, engine.after = DIED, 1
            batch = await submit(sdk, b"".join(request_line(f"q{i}") for i in range(5)))
            await engine.wait_for(lambda: len(engine.opened) > 5)
            engine.error = None
            ended = await server.until(batch.id, *ENDED)
            assert ended["request_counts"] == {"total": 5, "completed": 5, "failed": 0}

    serve(tmp_path, scene)


def test_a_line_that_the_engine_fails_of_each_time_is_told_so_in_the_end(tmp_path: Path) -> None:
    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            engine.error = DIED
            ended = await server.until((await submit(sdk, request_line("q"))).id, *ENDED)
            assert ended["request_counts"] == {"total": 1, "completed": 0, "failed": 1}
            assert len(engine.opened) == worker._ENGINE_TRIES

    serve(tmp_path, scene)


def test_a_poisoned_line_is_answered_while_the_server_still_recovers_from_it(tmp_path: Path) -> None:
    """Asked again, it would end the engine again, at every start of the server."""

    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            engine.stall, engine.after = True, 1
            batch = (await submit(sdk, request_line("q"))).id
            await engine.wait_for(lambda: len(engine.live) == 1)
            engine.state = "recovering"
            for uid in list(engine.live):
                engine.live.pop(uid)(RequestError("poison", status=500, code="poison_request"))
            for _ in range(50):
                await asyncio.sleep(0)
            engine.state, engine.stall = "ready", False
            ended = await server.until(batch, *ENDED)
            assert ended["request_counts"] == {"total": 1, "completed": 0, "failed": 1}
            assert len(engine.opened) == 1

    serve(tmp_path, scene)


@pytest.mark.parametrize("state", ["dead", "stopped"])
def test_lines_in_flight_when_the_engine_ends_stay_open_for_the_next_start(tmp_path: Path, state: str) -> None:
    made: dict[str, str] = {}

    async def first(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            engine.stall, engine.after = True, 1
            made["id"] = (await submit(sdk, b"".join(request_line(f"q{i}") for i in range(5)))).id
            await engine.wait_for(lambda: len(engine.live) == 5)
            engine.state = state
            code = ("engine_error", 500) if state == "dead" else ("server_draining", 503)
            for uid in list(engine.live):
                engine.live.pop(uid)(RequestError("over", status=code[1], code=code[0]))
            for _ in range(50):
                await asyncio.sleep(0)

    serve(tmp_path, first)
    assert [p.read_bytes() for p in (tmp_path / "batches").glob(f"{made['id']}.*") if p.suffix != ".json"] == [b"", b""]

    async def second(engine: ScriptedEngine, server: Stored) -> None:
        ended = await server.until(made["id"], *ENDED)
        assert ended["request_counts"] == {"total": 5, "completed": 5, "failed": 0}
        async with server.sdk() as sdk:
            assert len(answers((await sdk.files.content(ended["output_file_id"])).text)) == 5

    serve(tmp_path, second)


def test_an_input_that_is_gone_or_cannot_be_read_fails_its_batch_and_never_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            file = await sdk.files.create(file=("in.jsonl", request_line("a")), purpose="batch")
            (tmp_path / "files" / file.id).unlink()
            batch = await sdk.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")  # type: ignore[arg-type]
            gone = await server.until(batch.id, *ENDED)
            assert (gone["status"], gone["errors"]["data"][0]["code"]) == ("failed", "input_file_missing")

            def too_much(*_: Any) -> Any:
                raise RequestError("too much", status=413, code="body_too_complex")

            monkeypatch.setattr(worker, "read_requests", too_much)
            unread = await server.until((await submit(sdk, request_line("a"))).id, *ENDED)
            assert (unread["status"], unread["errors"]["data"][0]["code"]) == ("failed", "body_too_complex")

    serve(tmp_path, scene)


def test_a_batch_that_fails_in_the_middle_keeps_its_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        begin = server.batches._request_log.request

        def breaks(*args: Any) -> Any:
            if args[1] == "batch" and len(engine.opened) >= 3:
                raise RuntimeError("a bug")
            return begin(*args)

        monkeypatch.setattr(server.batches._request_log, "request", breaks)
        monkeypatch.setattr(worker, "WINDOW", 1)
        async with server.sdk() as sdk:
            ended = await server.until((await submit(sdk, b"".join(request_line(f"q{i}") for i in range(5)))).id, *ENDED)
            assert (ended["status"], ended["errors"]["data"][0]["code"]) == ("failed", "internal_error")
            assert len(answers((await sdk.files.content(ended["output_file_id"])).text)) == 3

    serve(tmp_path, scene)


def test_a_damaged_object_is_named_and_nothing_is_removed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    part = store.new_part()
    part.write_bytes(b"x")
    name = store.adopt(part, "x", "batch")["id"]
    store.close()
    path = tmp_path / "files" / f"{name}.json"
    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[:20],
        b"[]",
        b"null",
        b"{}",
        whole.replace(b"file-", b"file_", 1),
        whole.replace(b"status", b"x"),
        b"\xff",
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name}.json is damaged"):
            Store(str(tmp_path))
        assert (tmp_path / "files" / name).read_bytes() == b"x"
    path.write_bytes(whole)
    Store(str(tmp_path)).close()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES])
def test_a_file_system_that_cannot_sync_directories_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    sync = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        sync(fd)

    monkeypatch.setattr(os, "fsync", fsync)

    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            assert (await server.until((await submit(sdk, request_line("a"))).id, *ENDED))["status"] == "completed"

    serve(tmp_path, scene)


def test_files_that_are_not_the_servers_are_left_alone(tmp_path: Path) -> None:
    Store(str(tmp_path)).close()
    for room in ("files", "batches"):
        (tmp_path / room / "README").write_text("mine")
        (tmp_path / room / "mine").mkdir()
    Store(str(tmp_path)).close()
    assert {p.name for p in (tmp_path / "files").iterdir()} == {"README", "mine"}


def test_an_input_that_the_disk_does_not_give_back_is_read_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, broken = worker.body_at, [True]

    def body_at(source: int, place: Any) -> Any:
        if broken[0]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(source, place)

    monkeypatch.setattr(worker, "body_at", body_at)

    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            batch = await submit(sdk, b"".join(request_line(f"q{i}") for i in range(5)))
            while not (waiting := server.batches.get(batch.id))["errors"]:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert waiting["errors"]["data"][0]["code"] == "disk_error"
            broken[0] = False
            ended = await server.until(batch.id, *ENDED)
            assert (ended["errors"], ended["request_counts"]) == (None, {"total": 5, "completed": 5, "failed": 0})

    serve(tmp_path, scene)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    where = tmp_path / "small"
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(where)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_a_disk_that_is_really_full_pauses_a_batch_until_a_file_is_deleted(small_disk: Path) -> None:
    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            ballast = await sdk.files.create(file=("ballast", b"x" * 80_000), purpose="user_data")
            batch = await submit(sdk, b"".join(request_line(f"q{i}") for i in range(100)))
            while not (waiting := server.batches.get(batch.id))["errors"]:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert (waiting["status"], waiting["errors"]["data"][0]["code"]) == ("in_progress", "disk_full")
            assert 0 < waiting["request_counts"]["completed"] < 100
            assert (await post(server, form(b"x" * 80_000)))[0] == 507
            assert (await ask(server, CHAT, {"messages": USER}))[0] == 200  # type: ignore[arg-type]
            await sdk.files.delete(ballast.id)
            ended = await server.until(batch.id, *ENDED)
            assert (ended["status"], ended["errors"], ended["request_counts"]["completed"]) == ("completed", None, 100)
            assert len(answers((await sdk.files.content(ended["output_file_id"])).text)) == 100

    serve(small_disk / "data", scene)
