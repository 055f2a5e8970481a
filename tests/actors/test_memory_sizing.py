"""How memory is sized and accounted for: by the smallest rank, by pages, and without copying free lists."""

from __future__ import annotations

import numpy as np
from conftest import World, fake_config

from minisgl.actors.messages import Capacity
from minisgl.actors.scheduler.slot_table import SlotTable
from minisgl.cache.kept import KeptPages
from minisgl.cache.pages import PagePool
from minisgl.cache.radix import RadixCache
from minisgl.model.fake_runner import FakeRunner


def test_the_rank_with_the_least_memory_decides_how_many_pages_all_have(monkeypatch) -> None:
    sizes = iter([40, 25])
    monkeypatch.setattr(FakeRunner, "max_pages", lambda self: next(sizes))
    told: list[int] = []
    monkeypatch.setattr(FakeRunner, "allocate", _recording(told))
    world = World(0, fake_config(tp=2))
    assert world.machine.limits.num_pages == 25
    assert told == [25, 25]
    assert world.gateway.num_pages == 25
    world.close()


def _recording(told: list[int]):
    allocate = FakeRunner.allocate

    def record(self: FakeRunner, num_pages: int) -> None:
        told.append(num_pages)
        allocate(self, num_pages)

    return record


def test_capacity_is_told_once_every_rank_has_reported() -> None:
    world = World(0, fake_config(tp=2))
    capacity = [edge for edge in world.system.edges if edge[0] == Capacity.__name__]
    assert sorted(capacity) == [("Capacity", "scheduler", "worker0"), ("Capacity", "scheduler", "worker1")]
    world.close()


def test_no_table_grows_with_slots_times_context() -> None:
    slots, context, page, pool_tokens = 256, 131_072, 16, 300_000
    table = SlotTable(slots, context // page, KeptPages(pool_tokens // page, page).ids, RadixCache(page).root)
    arrays = [v for v in vars(table).values() if isinstance(v, np.ndarray)]
    dense = 4 * slots * context  # one int32 per slot and position: what such tables cost elsewhere, three times over
    assert sum(a.nbytes for a in arrays) < dense / 12
    assert table.page_ids.nbytes == 4 * (pool_tokens // page) * page  # the ids of tokens that have a page, and of no others


def test_pages_come_and_go_without_copying_the_free_list() -> None:
    pool = PagePool(100_000)
    stack = pool._stack
    held = [pool.alloc(n) for n in (1, 500, 3)]
    for pages in held:
        pool.release(pages)
    for _ in range(1000):
        pool.release(pool.alloc(7))
    assert pool._stack is stack
    assert pool.free == 100_000
    assert np.array_equal(np.sort(pool.snapshot()), np.arange(100_000))
