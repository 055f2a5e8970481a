"""The journal among real actors: what the scheduler is told to keep, where it lands, and how it ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import World, fake_config, random_traffic
from journal.loads import replayed

from minisgl.actors.scheduler.actor import SchedulerActor
from minisgl.api.journals import Journals
from minisgl.config import ServerConfig
from minisgl.journal import files
from minisgl.journal.desk import Desk
from minisgl.journal.files import parts_of
from minisgl.journal.format import Kind
from minisgl.journal.replay import Replay, records


def journaled_world(seed: int, **engine: Any) -> World:
    config = fake_config(**engine)
    return World(seed, config, lambda ctx, config, arenas: SchedulerActor(ctx, config, arenas, 0, Desk(ctx, config)))


def read(path: Path) -> list[bytearray]:
    return [bytearray(Path(name).read_bytes()) for name in parts_of(str(path))]


@pytest.mark.parametrize("tokens", [True, False])
def test_a_journal_of_real_actors_begins_and_ends_when_it_is_told_to_and_replays(tmp_path: Path, tokens: bool) -> None:
    world = journaled_world(3)
    random_traffic(world, 1)
    told: list[tuple[bool, str]] = []
    journals = world.gateway.journals
    journals.begin(str(tmp_path / "j"), tokens, 8.0, lambda on, error: told.append((on, error)))
    random_traffic(world, 2)
    journals.end(lambda on, error: told.append((on, error)))
    world.system.run()
    assert told == [(True, ""), (False, "")]
    assert world.scheduler.watcher is None
    assert type(world.machine.costs).__name__ == "StepCosts"
    random_traffic(world, 3)
    replay = replayed(read(tmp_path / "j"))
    assert replay.requests > 5
    assert replay.machine is not None
    assert replay.machine.idle
    world.close()


def test_the_parts_of_a_journal_are_bounded_and_the_last_ones_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MIN_PART", 1000)
    world = journaled_world(4)
    world.gateway.journals.begin(str(tmp_path / "j"), False, 20_000 / (1 << 20), lambda on, error: None)
    for seed in range(12):
        random_traffic(world, seed)
    world.gateway.journals.end(lambda on, error: None)
    world.system.run()
    parts = read(tmp_path / "j")
    assert 2 <= len(parts) <= 8
    assert not (tmp_path / "j").exists()
    assert sum(map(len, parts)) <= 20_000
    assert replayed(parts).steps > 20
    world.close()


def test_a_full_disk_ends_the_journal_and_not_the_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    world = journaled_world(5)
    monkeypatch.setattr(files.os, "write", full)
    world.gateway.journals.begin(str(tmp_path / "j"), False, 8.0, lambda on, error: None)
    world.system.run()
    files_of = [w.sink for w in world.scheduler.watcher._open.values()]
    files_of[0]._tasks.put(None)
    files_of[0]._thread.join()
    random_traffic(world, 1)
    assert world.scheduler.watcher is None or not world.scheduler.watcher._open
    assert world.gateway.journals.file is None
    assert world.gateway.stats["journal_failures"] == 1
    world.close()


def test_a_scheduler_that_takes_over_is_told_again_and_ends_what_was_to_end() -> None:
    sent: list[Any] = []
    config = ServerConfig(journal="/x/j", journal_mb=3.0)
    journals = Journals(SimpleNamespace(send=lambda to, m: sent.append((to, m.path, m.on, m.megabytes))), config)
    journals.watch(lambda data, begins: None)
    sent.clear()
    journals.engine_ready()
    assert sent == [("scheduler", "/x/j", True, 3.0), ("scheduler", "", True, 1.0)]
    told: list[Any] = []
    journals.end(lambda on, error: told.append((on, error)))
    sent.clear()
    journals.engine_ready()  # the one that was told to end it has died
    assert told == [(False, "")]
    assert journals.file is None
    assert sent == [("scheduler", "", True, 1.0)]


def test_a_file_that_cannot_be_made_is_said_at_once(tmp_path: Path) -> None:
    world = journaled_world(6)
    told: list[tuple[bool, str]] = []
    world.gateway.journals.begin(str(tmp_path / "nowhere" / "j"), False, 8.0, lambda on, error: told.append((on, error)))
    world.system.run()
    assert told[0][0] is False
    assert "nowhere" in told[0][1]
    assert world.gateway.journals.file is None
    random_traffic(world, 1)
    world.close()


def test_the_stream_is_a_journal_whose_replay_follows_the_machine(tmp_path: Path) -> None:
    world = journaled_world(7)
    random_traffic(world, 1)
    replay, begun = Replay(), []

    def came(data: bytes, begins: bool) -> None:
        if begins:
            begun.append(len(data))
            replay.next_part()
        replay.feed(data)
        while replay.advance():
            pass

    world.gateway.journals.watch(came)
    random_traffic(world, 2)
    world.system.clock += 1
    world.system.run()
    assert len(begun) == 1
    assert replay.machine is not None
    assert replay.machine.counters.steps == world.machine.counters.steps
    assert replay.machine.cache.num_pages == world.machine.cache.num_pages
    world.gateway.journals.unwatch()
    random_traffic(world, 3)
    assert world.scheduler.watcher is None
    world.close()


def test_a_journal_without_tokens_has_none(tmp_path: Path) -> None:
    world = journaled_world(8)
    world.gateway.journals.begin(str(tmp_path / "j"), False, 8.0, lambda on, error: None)
    random_traffic(world, 2)
    world.gateway.journals.end(lambda on, error: None)
    world.system.run()
    with (tmp_path / "j").open("rb") as file:
        for record in records(file):
            for kind, *values in record.values[1] if record.kind == Kind.STEP else ():
                if kind in ("add", "result"):
                    ids = memoryview(values[1]).cast("i").tolist()
                    assert all(i < 0 or i >= 1 << 30 or (kind == "result" and i == 0) for i in ids)
    world.close()
