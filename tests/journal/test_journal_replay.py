"""A journal replays to the same plans: random loads through the real machine, with and without token ids."""

from __future__ import annotations

import pytest
from conftest import cases
from journal.loads import random_load, replayed

from minisgl.journal import recorder
from minisgl.journal.identity import HashedIds


@pytest.mark.parametrize("seed", range(100, 104))
def test_the_machine_goes_on_while_a_part_begins(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "SLICE_SECONDS", 0.0)
    loop = random_load(seed, rotations=0.5)
    for parts in loop.parts.values():
        assert len(parts) > 1
        assert replayed(parts[1:]).machine.counters.steps == loop.machine.counters.steps
        assert replayed(parts).requests == len(loop.asked)


@pytest.mark.parametrize("seed", range(cases(8)))
def test_a_random_load_replays_to_the_same_plans_from_every_part(seed: int) -> None:
    loop = random_load(seed)
    ids = loop.writers[False]._ids
    assert isinstance(ids, HashedIds)
    ids.settle()  # of the last batch
    assert len(ids._free) == len(ids._uids) > 0, "a place for a request that has left"
    for parts in loop.parts.values():
        for first in {0, len(parts) // 2, len(parts) - 1}:
            replay = replayed(parts[first:])
            assert replay.machine is not None
            replay.machine.check()
            assert replay.machine.idle
            assert replay.machine.counters.steps == loop.machine.counters.steps
            if first == 0:
                assert replay.requests == len(loop.asked)
                assert replay.machine.counters.cached_tokens == loop.machine.counters.cached_tokens


def test_steps_are_written_together_and_the_scheduler_is_woken_for_it_only_where_no_step_comes() -> None:
    loop = random_load(1)
    recorder, sink = loop.recorder, loop.writers[True].sink
    written, write = [], sink.write
    sink.write = lambda data: (written.append(len(data)), write(data))  # type: ignore[method-assign]
    loop.add([5, 6, 7], 30)
    begun = loop.now
    loop.step(0)
    due = recorder.rest(loop.now)
    assert 0.07 < due - begun < 0.1, "bytes reach the kernel at most 0.1 s after their step"
    for _ in range(5):
        loop.step()
        assert recorder.rest(loop.now) == due
    assert not written
    assert recorder.rest(due - 0.001) == float("inf"), "an actor that comes a millisecond too early would look all the time"
    assert len(written) == 1
