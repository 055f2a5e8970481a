"""A journal replays to the same plans: random loads through the real machine, with and without token ids."""

from __future__ import annotations

import pytest
from conftest import cases
from journal.loads import random_load, replayed

from minisgl.journal import recorder


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
