"""What the next scheduler is told of the KV pages is true wherever the one before was killed, and nothing is forgotten."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import crash_scenario
import numpy as np
import pytest
from conftest import Loop, cases
from crash_cluster import Cluster, Torn, prefix, torn
from crash_faults import Edit, edited

from minisgl.api.engine import Chunk, TokenPrompt
from minisgl.cache.kept import KeptPages
from minisgl.cache.pages import PagePool
from minisgl.cache.radix import Node, RadixCache
from minisgl.plan import NOT_A_NUMBER
from minisgl.sampling_params import DEFAULT_OPTIONS, RequestOptions, SamplingParams

PAGES, SIZE = 24, 2
Place = tuple[str, bytes]  # a salt and all tokens up to the end of a page


class Killed(BaseException):
    """In the middle of a write."""


class Life:
    """A scheduler's cache over memory that outlives it: requests come, add pages, leave; plans are published, sometimes late.

    `dies_after`: so many words or bytes are written of the columns.
    """

    def __init__(self, memory: bytearray, rng: random.Random, dies_after: int) -> None:
        self.rng, self.left = rng, dies_after
        self.kept = KeptPages(PAGES, SIZE, memoryview(memory))
        torn(self.kept, self._write)
        self.cache, self.pool = RadixCache(SIZE), PagePool(PAGES)
        self.left, left = 1 << 30, self.left
        self.pool.claim(self.cache.restore(self.kept))
        self.taken_over = places(self.cache)
        self.published = self.kept.planned
        self.kept.planned += 2  # the lag
        self.cache.check()
        self.left = left
        self.handles: list[tuple[Node, int]] = []
        self.written: dict[int, int] = {}  # page -> the number of plans that write it
        self.hidden: set[int] = set()  # no match finds them any more
        self.entering: dict[int, Place] = {}

    def _write(self, store: Callable[[int], None], n: int) -> None:
        for i in self.rng.sample(range(n), n):
            if self.left == 0:
                raise Killed
            self.left -= 1
            store(i)

    def now(self) -> dict[int, Place]:
        """What the next scheduler may find."""
        published = int(self.kept.published[0])
        found = {}
        for page, place in {**places(self.cache), **self.entering}.items():
            if page not in self.hidden and self.written.get(page, 0) <= published:
                found[page] = place
        return found

    def act(self) -> None:
        rng, kept, cache = self.rng, self.kept, self.cache
        what = rng.random()
        if what < 0.35:
            self._arrive()
        elif what < 0.6 and self.handles:
            self._extend()
        elif what < 0.8 and self.handles:
            cache.release(self.handles.pop(rng.randrange(len(self.handles)))[0], sound=rng.random() < 0.5)
        elif what < 0.85 and self.handles:
            handle = rng.choice(self.handles)[0]
            self.hidden |= {p for n in unsound(handle) for p in below(n)}
            cache.forget(handle)
        elif what < 0.9:
            self.pool.release(cache.evict(rng.choice((1, 2, 5, PAGES))))
        elif kept.planned > kept.published[0]:
            kept.published[0] = kept.planned
        else:
            kept.planned += 1

    def _arrive(self) -> None:
        ids = np.array([self.rng.randrange(3) for _ in range(self.rng.randrange(1, 9))], np.int32)
        match = self.cache.match(ids, self.rng.choice(("", "", "a", "\u00e9" * 9)))
        self.handles.append((self.cache.acquire(match)[0], 0))

    def _extend(self) -> None:
        at = self.rng.randrange(len(self.handles))
        handle = self.handles[at][0]
        n = min(self.rng.choice((1, 2, 3, 20)), self.pool.free)
        pages = self.pool.alloc(n)
        ids = np.array([self.rng.randrange(3) for _ in range(n * SIZE)], np.int32)
        self.kept.ids[pages] = ids.reshape(n, SIZE)
        root = handle
        while root.parent is not None:
            root = root.parent
        begun = prefix(handle)
        self.entering = {p: (root.salt, begun + ids[: i * SIZE].tobytes()) for i, p in enumerate(pages.tolist(), 1)}
        self.written.update(dict.fromkeys(pages.tolist(), self.kept.planned))
        self.hidden.difference_update(pages.tolist())
        if any(p in self.hidden for p in handle.pages.tolist()):
            self.hidden.update(pages.tolist())
        handle, _, duplicates = self.cache.extend(handle, ids, pages)
        self.entering = {}
        self.handles[at] = handle, 0
        self.pool.release(duplicates)


def below(node: Node) -> list[int]:
    return [*node.pages.tolist(), *(p for child in (node.children or {}).values() for p in below(child))]


def unsound(node: Node) -> list[Node]:
    return [] if node.parent is None or node.sound else [node, *unsound(node.parent)]


def places(cache: RadixCache) -> dict[int, Place]:
    found = {}
    for node in cache.nodes():
        before, size = prefix(node)[: -len(node.key)], len(node.key) // len(node.pages)
        for i, page in enumerate(node.pages.tolist(), 1):
            found[page] = node.salt, before + node.key[: i * size]
    return found


def lives(seed: int) -> int:
    """Schedulers take over from each other, each killed at some byte; returns how many pages were handed on."""
    rng, memory, handed = random.Random(seed), bytearray(KeptPages.size(PAGES, SIZE)), 0
    life = Life(memory, rng, rng.choice((rng.randrange(60), rng.randrange(2000))))
    for _ in range(12):
        stable, certain = life.now(), life.now()
        try:
            for _ in range(rng.randrange(60)):
                stable = life.now()
                life.act()
            stable = certain = life.now()
        except Killed:
            after = life.now()
            stable, certain = {**stable, **after}, {p: s for p, s in after.items() if stable.get(p) == s}
        published = int(life.kept.published[0])
        life.left = 1 << 30
        life = Life(memory, rng, rng.choice((rng.randrange(60), rng.randrange(2000))))
        found = life.taken_over
        assert found.items() <= stable.items(), "it is told of pages that hold something else"
        assert certain.items() <= found.items(), "it is not told of all"
        assert np.flatnonzero(life.kept.mark).tolist() == sorted(found)
        assert life.published == published
        handed += len(found)
    return handed


@pytest.mark.parametrize("block", range(4))
def test_what_was_cached_is_found_again_whenever_its_scheduler_is_killed(block: int) -> None:
    assert sum(lives(1000 * block + seed) for seed in range(cases(40))) > 100


MUTANTS: dict[str, Edit] = {
    "evicted pages are kept": (RadixCache, "evict", "self._kept.drop(found)", "pass"),
    "forgotten pages are kept": (RadixCache, "forget", "self._kept.drop(node.pages)", "pass"),
    "pages are not kept": (RadixCache, "_add", "self._kept.add(", "print("),
    "salts are not kept": (KeptPages, "add", "before = SALTED", "pass"),
    "a place comes after its mark": (KeptPages, "add", "for page in p", "self.mark[pages] = self.planned\n    for page in p"),
    "plans that were not published count": (KeptPages, "runs", "& (mark <= self.published[0])", ""),
    "what was not taken over stays": (
        *(RadixCache, "restore", "kept.mark[np.setdiff1d(np.flatnonzero(kept.mark), found)] = 0"),
        "pass",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_this_notices_when(name: str) -> None:
    with edited([MUTANTS[name]]):
        for seed in range(300):
            try:
                lives(seed)
            except (AssertionError, ValueError):
                return
    pytest.fail("nothing was noticed")


def test_memory_that_says_nonsense_is_taken_for_what_it_still_says_of_a_tree() -> None:
    for seed in range(cases(100)):
        rng, memory = random.Random(seed), bytearray(KeptPages.size(PAGES, SIZE))
        life = Life(memory, rng, 1 << 30)
        for _ in range(60):
            life.act()
        columns = KeptPages(PAGES, SIZE, memoryview(memory))
        for name in rng.sample(("mark", "before", "ids"), 2):
            column = getattr(columns, name).reshape(-1)
            column[rng.randrange(len(column))] = rng.choice((-3, -1, 0, 1, PAGES, 1 << 30))
        cache, pool = RadixCache(SIZE), PagePool(PAGES)
        pool.claim(cache.restore(columns))
        cache.check()
        assert pool.free + cache.num_pages == PAGES


# ---------------- with the actors
class Served:
    """The engine of the crash tests, asked for one thing after the other."""

    def __init__(self, seed: int = 0, **engine: Any) -> None:
        self.cluster = Cluster(crash_scenario.config(**engine), seed, crash_scenario.ACTORS)
        self._watched = crash_scenario.Run(self.cluster, [])._watched
        with self._watched():
            while self.cluster.gateway.state != "ready":
                self.cluster.step()

    def ask(self, n: int, salt: str = "", **options: Any) -> tuple[list[int], int]:
        """(answer, cached tokens) of the prompt of the first `n` of some tokens."""
        told: list[Any] = []
        asked = RequestOptions(cache_salt=salt, **options) if salt or options else DEFAULT_OPTIONS
        params = SamplingParams(max_tokens=1 if options else 8, ignore_eos=not options)
        self.cluster.gateway._opened = 0  # so that all draw the same seed
        with self._watched():
            self.cluster.gateway.open(TokenPrompt(tuple(97 + i % 7 for i in range(n))), params, told.append, asked)
            while not (told and isinstance(told[-1], Chunk) and told[-1].finish):
                assert self.cluster.step(), told
            while self.cluster.step():
                pass
        return [t for chunk in told for t in chunk.token_ids], told[-1].cached_tokens

    def kill(self, *names: str, later: int = 0) -> None:
        with self._watched():
            for _ in range(later):
                self.cluster.step()
            for name in names:
                self.cluster.kill(name)

    def published(self) -> int:
        return int(self.cluster.actors["scheduler"].machine.kept.published[0])

    def flush(self) -> None:
        with self._watched():
            self.cluster.gateway.flush_cache()
            while self.cluster.step():
                pass

    def close(self) -> None:
        crash_scenario.check_books(self.cluster)
        self.cluster.close()


@pytest.mark.parametrize("seed", range(4))
def test_a_conversation_goes_on_with_its_prefix_after_the_scheduler_has_died(seed: int) -> None:
    served = Served(seed, tp=1 + seed % 2)
    said, cached = served.ask(41)
    assert cached == 0
    for _ in range(3):
        served.kill("scheduler")
        assert served.ask(41) == (said, 40)
    assert served.ask(61)[1] == 40
    served.kill("scheduler")
    assert served.ask(61)[1] == 60
    served.close()


def test_after_the_death_of_a_worker_the_cache_is_empty() -> None:
    for names in (["worker0"], ["worker0", "scheduler"]):
        served = Served()
        said, _ = served.ask(41)
        served.kill(*names)
        assert served.ask(41) == (said, 0)
        served.close()


def test_tenants_find_their_own_prefixes_and_no_others_after_the_scheduler_has_died() -> None:
    served = Served()
    salts = ("a", "b" * 200, "\u00e9")
    for salt in salts:
        assert served.ask(21, salt)[1] == 0
    served.kill("scheduler")
    assert served.ask(21)[1] == served.ask(21, "c")[1] == served.ask(21, "b" * 199)[1] == 0
    assert [served.ask(21, salt)[1] for salt in salts] == [20, 20, 20]
    served.close()


def test_what_was_flushed_is_not_found_after_the_scheduler_has_died() -> None:
    served = Served()
    served.ask(41)
    served.flush()
    served.kill("scheduler")
    assert served.ask(41)[1] == 0
    served.close()


def test_a_vector_that_needs_all_of_its_prompt_reads_none_of_it_from_what_was_kept() -> None:
    served = Served()
    served.ask(41)
    served.kill("scheduler")
    assert served.ask(41, pooling="mean") == ([], 0)
    served.close()


def test_a_scheduler_that_dies_before_its_first_plan_has_a_successor_with_the_same_cache() -> None:
    for later in range(0, 120, 6):
        served = Served(later)
        said, _ = served.ask(41)
        served.kill("scheduler")
        served.kill("scheduler", later=later)
        assert served.ask(41) == (said, 40), later
        served.close()


def test_a_takeover_does_not_count_as_a_plan_that_writes_pages() -> None:
    served = Served()
    served.ask(41)
    before = served.published()
    served.kill("scheduler")
    served.flush()
    assert served.published() == before > 0
    served.close()


def test_a_scheduler_may_die_before_anything_was_asked() -> None:
    served = Served()
    served.kill("scheduler")
    served.kill("scheduler", later=40)
    said, cached = served.ask(41)
    assert cached == 0
    assert served.ask(41) == (said, 40)
    served.close()


def test_pages_without_numbers_are_found_no_more_by_the_next_machine() -> None:
    loop = Loop()
    loop.add(list(range(3, 30)), 4)
    loop.step()
    loop.step()
    while loop.pending:
        for result in loop.pending:
            result.tokens[:] = NOT_A_NUMBER
        loop.step(1)
    kept = loop.machine.kept
    kept.published[0] = kept.planned
    assert loop.machine.cache.num_pages > 0
    assert not len(RadixCache(4).restore(kept))


def test_a_decode_step_within_a_page_writes_nothing_but_its_tokens() -> None:
    loop, written = Loop(page_size=16), list[str]()
    loop.add(list(range(3, 8)), 10, ignore_eos=True)
    loop.step()
    kept = loop.machine.kept
    for name in ("mark", "before", "salt"):
        setattr(kept, name, getattr(kept, name).view(Torn))
        getattr(kept, name).write = lambda store, n, name=name: written.append(name)
    for _ in range(8):
        loop.step()
    assert loop.said[1]
    assert not written
