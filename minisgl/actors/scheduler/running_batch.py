"""The running batch: the requests that have a slot, and their pages in the pool and in the prefix cache.

The lowest of three layers of one state machine: this file takes and gives back slots and pages, admission.py says who gets
them, step_machine.py what is computed in the next step.  Runs in the scheduler process; pure.
"""

from __future__ import annotations

import numpy as np

from minisgl.actors.scheduler.fair_queue import FairQueue
from minisgl.actors.scheduler.interface import Counters, SchedulerLimits
from minisgl.actors.scheduler.plan_builder import NO_SLOTS
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.slot_table import SlotTable
from minisgl.arrays import I32
from minisgl.cache.kept import KeptPages
from minisgl.cache.pages import PagePool
from minisgl.cache.radix import Match


class RunningBatch:
    """Slots and pages of the running requests.  A page is free, cached, or owned by one request (`check`)."""

    def __init__(self, limits: SchedulerLimits, kept: KeptPages | None = None) -> None:
        """`kept`: what the cache of another scheduler has left, with the same workers, to begin with; None: nothing."""
        self.limits = limits
        self.kept = kept or KeptPages(limits.num_pages, limits.page_size)
        self.cache = limits.cache(limits.page_size)
        self.pool = PagePool(limits.num_pages)
        max_pages = -(-limits.max_context // limits.page_size)
        self.table = SlotTable(limits.slots, max_pages, self.kept.ids, self.cache.root)
        self.pool.claim(self.cache.restore(self.kept))
        self.running: dict[int, tuple[int, Request]] = {}  # uid -> (slot, request)
        self.fair = FairQueue()  # knows how many rows each client has
        self.counters = Counters()
        self._prefilling: list[int] = []  # slots with prompt left to prefill, in order of admission
        self._decoding: I32 = NO_SLOTS  # slots that decode, in order of admission

    def _request(self, slot: int) -> Request:
        return self.running[int(self.table.uid[slot])][1]

    def _match(self, request: Request) -> Match:
        """The cached prefix of a request; empty if it must compute its whole prompt."""
        ids = request.ids[:1] if request.computes_all else request.ids
        return self.cache.match(ids, request.salt)

    def _make_room(self, n: int) -> bool:
        """Have `n` free pages, evicting from the cache if needed.  False if that is not enough."""
        missing = n - self.pool.free
        if missing > 0 and self.cache.evictable >= missing:
            self.pool.release(self.cache.evict(missing))
        return self.pool.free >= n

    def _publish_prefix(self, slot: int, full: int, remap: bool) -> int:
        """Hand the first `full` pages of a slot to the cache; returns how many of them the cache now owns.

        Where another request cached the same tokens first, its pages are canonical and ours are freed.  A row that goes on
        (`remap`) is moved to the canonical pages with the next plan, before the freed ones can be granted to anyone.
        """
        table, shared = self.table, int(self.table.n_shared[slot])
        mine = table.row(slot, shared, full)
        handle, canonical, duplicates = self.cache.extend(table.handle[slot], table.page_ids[mine].reshape(-1), mine)
        if not len(canonical):  # the cache takes nothing in
            return shared
        table.handle[slot] = handle
        table.n_shared[slot] = full
        if len(duplicates):
            self.pool.release(duplicates)
            self._request(slot).borrows = True
            if remap:
                moved = np.flatnonzero(canonical != mine)
                table.grant(slot, shared + moved, canonical[moved])
        return full

    def _release(self, slot: int) -> None:
        """A request leaves.  Pages whose tokens are known *and* planned go to the cache, the others become free."""
        table = self.table
        shared = int(table.n_shared[slot])
        full = min(int(table.planned[slot]), int(table.length[slot])) // self.limits.page_size
        if full > shared:
            shared = self._publish_prefix(slot, full, remap=False)
        self.pool.release(table.row(slot, shared, int(table.n_pages[slot])))
        drew = int(table.length[slot]) > len(self._request(slot).ids)
        self.cache.release(table.handle[slot], sound=full > 0 and drew)
        _, request = self.running.pop(int(table.uid[slot]))
        if slot in self._prefilling:
            self._prefilling.remove(slot)
        else:
            self._decoding = self._decoding[self._decoding != slot]
        self.fair.hold(request, -1)
        table.give(slot)

    def check(self) -> None:
        """Conservation: every page is free, cached or owned by one request, and in one place.  Raises AssertionError."""
        owned = [self.table.row(s, int(self.table.n_shared[s]), int(self.table.n_pages[s])) for s, _ in self.running.values()]
        everything = np.concatenate([self.pool.snapshot(), self.cache.check(), *owned])
        assert len(everything) == self.limits.num_pages, f"{len(everything)} pages accounted for, of {self.limits.num_pages}"
        assert len(np.unique(everything)) == len(everything), "a page is in two places"
        slots = sorted([*self._prefilling, *self._decoding.tolist()])
        assert slots == sorted(s for s, _ in self.running.values()), "the running requests and the lists of slots disagree"
        assert self.table.free_slots + len(self.running) == self.limits.slots, "a slot is lost"
