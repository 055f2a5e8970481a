"""What the scheduler keeps of requests that have ended, however they ended: nothing."""

from __future__ import annotations

import gc
import random
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
from conftest import VOCAB, World

from minisgl.actors.messages import Wake
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.cache import radix
from minisgl.cache.radix import RadixCache
from minisgl.sampling_params import RequestOptions

Setup = Callable[..., World]
CODE = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
SECONDS = 1000.0


def kept(world: World) -> tuple[int, int]:
    """(objects, bytes) within reach of the scheduler; its mailbox and code are not counted."""
    seen: dict[int, Any] = {}
    found = [value for name, value in vars(world.scheduler).items() if name != "ctx"]
    while found:
        thing = found.pop()
        if id(thing) not in seen and not isinstance(thing, CODE):
            seen[id(thing)] = thing
            found += gc.get_referents(thing)
    return len(seen), sum(map(sys.getsizeof, seen.values()))


def traffic(world: World, n: int, seed: int) -> None:
    """`n` requests that wait, are retracted, cancelled, or end by themselves; then deadlines pass and the cache is flushed."""
    rng = random.Random(seed)
    for i in range(n):
        ids = [1 + i % 3] * 8 + [rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 16))]
        salt = rng.choice(("", f"{seed} {i}"))
        options = RequestOptions(priority=rng.randrange(3), timeout=rng.choice((0.0, SECONDS)), cache_salt=salt)
        params = rng.choice(
            (
                {},
                {"ignore_eos": True},
                {"stop_token_ids": (3, 7, 11)},
                {"presence_penalty": 0.5},
                {"logit_bias": ((3, 1.0),)},
                {"temperature": 0.7, "seed": i},
            )
        )
        uid = world.submit(ids, rng.randrange(1, 24), options, **params)
        for _ in range(rng.randrange(40)):
            world.system.step()
        if rng.random() < 0.2:
            world.gateway.close(uid)
    world.system.run()
    world.system.clock += SECONDS
    world.scheduler.ctx.send("scheduler", Wake())
    world.scheduler.flush_cache(None)
    world.system.run()
    assert world.machine.idle


def growth(world: World) -> tuple[int, int]:
    """(objects, bytes) that 200 requests leave behind in a scheduler that has had as many before."""
    traffic(world, 200, 1)
    before = kept(world)
    traffic(world, 200, 2)
    after = kept(world)
    assert world.machine.counters.retractions > 20, "nobody had to give way"
    return after[0] - before[0], after[1] - before[1]


@pytest.fixture
def crowded(world: Setup, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(radix, "MAX_GHOSTS", 16)  # full before anything is counted
    return world(kv_tokens=80)


def test_nothing_is_kept_of_requests_that_have_ended(crowded: World) -> None:
    objects, size = growth(crowded)
    assert abs(objects) < 20
    assert abs(size) < 4096


def _remember_stops(self: StepMachine, slot: int) -> None:
    self.table.stop_ids[int(self.table.uid[slot]) + 1_000_000] = frozenset()
    RELEASE(self, slot)


RELEASE = StepMachine._release
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "an entry of a request stays": (StepMachine, "_release", _remember_stops),
    "the trees of salts stay": (RadixCache, "_forget_root", lambda *_: None),
    "whatever was evicted is remembered": (radix, "MAX_GHOSTS", 1 << 30),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_test_notices_when(name: str, crowded: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert growth(crowded)[0] >= 20
