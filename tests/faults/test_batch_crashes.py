"""The data directory after a crash at every call that changes the disk: what was acknowledged is there once, and no more."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MORE
from disk import MODES, NO_ROOM, Died, Disk
from test_batches import request_line
from test_server import CHAT, ScriptedEngine

from minisgl.api.batches import log as log_module
from minisgl.api.batches import worker
from minisgl.api.batches.log import Log, opened, write_all
from minisgl.api.batches.store import ENDED, Store
from minisgl.api.batches.worker import Batches, new_batch
from minisgl.errors import RequestError, UserError

NAMES = [f"q{i}" for i in range(6)]
LINES = b"".join(request_line(name, **({"temperature": 9} if name == "q3" else {})) for name in NAMES)


class Acknowledged:
    """What a client was told, and which lines were written and synced."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.gone: list[str] = []
        self.batches: dict[str, str] = {}  # status, where it has ended
        self.lines: dict[str, dict[str, str]] = {}  # by batch and custom_id: the line's own id
        self.synced: dict[str, dict[str, str]] = {}
        self.used = 0  # bytes, as the server has counted them

    def watch(self, m: pytest.MonkeyPatch) -> None:
        append, sync = Log.append, Log.sync

        def appended(log: Log, value: dict[str, Any]) -> None:
            append(log, value)
            self.lines.setdefault(str(log.path.name), {})[value["custom_id"]] = value["id"]

        def synced(log: Log) -> None:
            sync(log)
            self.synced[log.path.name] = dict(self.lines.get(log.path.name, {}))

        m.setattr(Log, "append", appended)
        m.setattr(Log, "sync", synced)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(log_module, "_SYNC_LINES", 2)
    monkeypatch.setattr(worker, "_DISK_SECONDS", 0.0)
    logging.disable()  # the traceback of every death
    yield
    logging.disable(logging.NOTSET)


def upload(store: Store, content: bytes) -> str:
    part = store.new_part()
    store.take(len(content))
    try:
        with opened(part, os.O_RDWR | os.O_CREAT) as fd:
            write_all(fd, content)
        return str(store.adopt(part, "in.jsonl", "batch")["id"])
    except BaseException:
        store.give(len(content))
        raise
    finally:
        part.unlink(missing_ok=True)


async def ended(batches: Batches, disk: Disk | None = None) -> None:
    async def wait() -> None:
        while batches._live:
            if (disk is not None and disk.dead) or (batches._task is not None and batches._task.done()):
                raise Died
            await asyncio.sleep(0.0005)  # in which its threads get on

    await asyncio.wait_for(wait(), 20)


async def close(batches: Batches) -> None:
    with contextlib.suppress(Died):
        await batches.close()
    for task in (batches._task, batches._current):
        if task is not None and task.done() and not task.cancelled():
            task.exception()  # so that nobody complains of it


def again(function: Callable[..., Any], *args: Any) -> Any:
    """What a client does that is refused for want of room: try again."""
    for _ in range(5):
        try:
            return function(*args)
        except FileNotFoundError:  # a deletion that was done, but for the sync
            return None
        except (OSError, UserError) as e:
            error = e
    raise error


async def use(directory: Path, told: Acknowledged, disk: Disk) -> None:
    """All operations of the store: an upload, a deletion, a batch that ends, one that is cancelled, one that fails."""
    store = again(Store, str(directory))
    batches = Batches(store, ScriptedEngine())
    try:
        batches.start()
        source, other = again(upload, store, LINES), again(upload, store, b"other")
        told.files |= {source: LINES, other: b"other"}
        del told.files[other]  # its fate is open while it is being deleted
        again(store.delete, other)
        told.gone.append(other)
        for kind in ("completed", "cancelled", "failed"):
            if kind == "failed":
                source = again(upload, store, b"{")
                told.files[source] = b"{"
            batch = new_batch(source, CHAT, "24h", None)
            again(batches.create, batch)
            told.batches[batch["id"]] = ""
            if kind == "cancelled":
                while batch["request_counts"]["completed"] < 2 and not disk.dead:  # noqa: ASYNC110
                    await asyncio.sleep(0)
                again(batches.cancel, batch["id"])
            await ended(batches, disk)
            told.batches[batch["id"]] = kind
        told.used = store.used
    finally:
        await close(batches)
        store.close()


async def check(directory: Path, told: Acknowledged, mode: str) -> None:
    """Start a server on what is left, and compare it with what was acknowledged."""
    store = Store(str(directory))
    engine = ScriptedEngine()
    batches = Batches(store, engine)
    batches.start()
    try:
        await ended(batches)
    finally:
        await close(batches)
    for name, content in told.files.items():
        assert store.content(name).read_bytes() == content
    for name in told.gone:
        with pytest.raises(RequestError):
            store.load("files", name, "file_id")
    objects = {b["id"]: b for b in store.all("batches")}
    assert told.batches.keys() <= objects.keys()
    for name, batch in objects.items():
        assert batch["status"] == (told.batches.get(name) or batch["status"])
        assert batch["status"] in ENDED
        lines: dict[str, str] = {}
        for kind, key, counted in (("output", "output_file_id", "completed"), ("errors", "error_file_id", "failed")):
            found = {}
            if batch[key] is not None:
                read = [json.loads(line) for line in store.content(batch[key]).read_bytes().splitlines()]
                assert max(Counter(line["custom_id"] for line in read).values()) == 1
                assert {line["response"]["status_code"] for line in read} == {200 if kind == "output" else 400}
                found = {line["custom_id"]: line["id"] for line in read}
            if batch["status"] == "completed":
                assert batch["request_counts"][counted] == len(found)
            kept = told.lines if mode == "process" else told.synced
            assert kept.get(f"{name}.{kind}", {}).items() <= found.items(), "an answer is lost"
            assert not lines.keys() & found.keys()
            lines |= found
        assert set(lines) <= set(NAMES)
        if batch["status"] == "completed":
            assert set(lines) == set(NAMES)
            assert batch["errors"] is None
    left = {p.name for p in (directory / "batches").iterdir()}
    assert left == {f"{name}.json" for name in objects}
    names = {f["id"] for f in store.all("files")}
    assert {p.name for p in (directory / "files").iterdir()} == names | {f"{name}.json" for name in names}
    assert store.used == sum(store.content(n).stat().st_size for n in names) + 4096 * (len(names) + len(objects))
    store.close()


def crash(directory: Path, at: int | None, fault: str | int, times: int = 1) -> tuple[Disk, Acknowledged]:
    """Use the store until it dies, if it does."""
    directory.mkdir(parents=True)
    for room in ("files", "batches"):
        (directory / room).mkdir()
    disk, told = Disk(directory, at, fault, times), Acknowledged()
    with disk.attached(), pytest.MonkeyPatch.context() as m, contextlib.suppress(Died):
        told.watch(m)
        asyncio.run(use(directory, told, disk))
    assert disk.dead or at is None or not isinstance(fault, str) or at >= len(disk.calls)
    return disk, told


def test_whatever_call_is_the_last_the_next_start_finds_what_was_acknowledged_once(tmp_path: Path) -> None:
    calls = crash(tmp_path / "whole", None, "before")[0].calls
    assert {"open", "write", "fsync", "fdatasync", "replace", "unlink"} <= set(calls)
    for at, call in enumerate(calls):
        for fault in ("before", "torn") if call == "write" else ("before",):
            disk, told = crash(tmp_path / f"{at}{fault}", at, fault)
            for mode in MODES if MORE > 12 else (MODES[at % 3],):
                asyncio.run(check(disk.survivors(mode, tmp_path / f"{at}{fault}{mode}"), told, mode))


def test_a_crash_of_the_start_after_a_crash_loses_nothing_either(tmp_path: Path) -> None:
    calls = len(crash(tmp_path / "whole", None, "before")[0].calls)
    for seed in range(2 * MORE):
        rng = random.Random(seed)
        mode = rng.choice(MODES)
        disk, told = crash(tmp_path / f"{seed}", rng.randrange(calls), rng.choice(["before", "after", "torn"]))
        where = disk.survivors(mode, tmp_path / f"{seed}left")
        for n in range(3):
            again = Disk(where, rng.randrange(12), rng.choice(["before", "after", "torn"]))
            with again.attached(), contextlib.suppress(Died):
                asyncio.run(check(where, told, mode))
            where = again.survivors(mode, tmp_path / f"{seed}left{n}")
        asyncio.run(check(where, told, mode))


def test_whatever_call_the_disk_refuses_everything_is_done_once_it_has_room_again(tmp_path: Path) -> None:
    calls = crash(tmp_path / "whole", None, "before")[0].calls
    for at, call in list(enumerate(calls))[:: 1 if MORE > 12 else 2]:
        times = 3 if at % 3 == 1 else 1
        disk, told = crash(tmp_path / f"{at}", at, NO_ROOM[at % len(NO_ROOM)], times)
        assert sorted(filter(None, told.batches.values())) == ["cancelled", "completed", "failed"], (at, call)
        told.lines = {}  # those that could not be synced are asked again
        if "unlink" not in disk.calls[at : at + times]:  # what cannot be removed is counted until the next start removes it
            store = Store(str(tmp_path / f"{at}"))
            assert store.used == told.used, (at, call, store.used - told.used)
            store.close()
        asyncio.run(check(tmp_path / f"{at}", told, "process"))


TAILS = {
    "whole": b"",
    "torn": b'{"id": "2", "custom_id": "q2"',
    "lost": b'{"custom_id": "q2"\0\0}\n',
    "nothing": b"\0" * 99,
    "brace": b"{\n",
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_a_cancelled_batch_keeps_whole_lines_and_no_others(tmp_path: Path, tail: bytes) -> None:
    store = Store(str(tmp_path))
    batch = {**new_batch(upload(store, LINES), CHAT, "24h", None), "status": "cancelling"}
    store.save("batches", batch)
    lines = b"".join(b'{"id": "%d", "custom_id": "q%d", "response": {"status_code": 200}}\n' % (i, i) for i in range(2))
    store.log_path(batch["id"], "output").write_bytes(lines + tail)
    store.close()
    told = Acknowledged()
    told.batches[batch["id"]] = "cancelled"
    asyncio.run(check(tmp_path, told, "process"))
    store = Store(str(tmp_path))
    ended = store.load("batches", batch["id"], "batch_id")
    assert store.content(ended["output_file_id"]).read_bytes() == lines
    assert ended["request_counts"]["completed"] == 2
    store.close()


@pytest.mark.parametrize("times", [1, 2])
def test_what_a_failed_write_has_left_is_no_part_of_the_next_line(tmp_path: Path, times: int) -> None:
    """Also where it could not be cut off at once."""
    store = Store(str(tmp_path))
    log = store.log("batch_x", "output")
    used = store.used
    log.append({"custom_id": "a"})
    log.close()
    with Disk(tmp_path, 0, NO_ROOM[0], times).attached() as disk:
        log = store.log("batch_x", "output")
        with pytest.raises(OSError, match="No space"):
            log.append({"custom_id": "b", "text": "x" * 99})
        assert disk.calls == ["write", "ftruncate"]
        log.append({"custom_id": "c"})
    assert [json.loads(line)["custom_id"] for line in log.path.read_bytes().splitlines()] == ["a", "c"]
    assert store.used == used + log.path.stat().st_size
    log.close()
    store.close()


def test_lines_that_could_not_be_synced_are_not_kept(tmp_path: Path) -> None:
    """The next sync would succeed and say nothing: the kernel has forgotten the pages."""
    store = Store(str(tmp_path))
    log = store.log("batch_x", "output")
    log.append({"custom_id": "a"})
    log.close()
    with Disk(tmp_path, 1, NO_ROOM[2]).attached():
        log = store.log("batch_x", "output")
        log.append({"custom_id": "b"})
        with pytest.raises(OSError, match="Input/output"):
            log.sync()
        log.append({"custom_id": "c"})
    log.close()
    assert [json.loads(line)["custom_id"] for line in log.path.read_bytes().splitlines()] == ["a", "c"]
    assert store.used == log.path.stat().st_size
    store.close()
