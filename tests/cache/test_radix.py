"""The prefix cache and the page pool against a naive model that stores every cached prefix in a dictionary."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import numpy as np
import pytest
from conftest import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from minisgl.cache import radix
from minisgl.cache.pages import PagePool
from minisgl.cache.radix import Match, RadixCache

SIZE = 2
tokens = st.lists(st.integers(0, 2), min_size=1, max_size=14)
salts = st.sampled_from(["", "a", "b"])


def i32(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


class CacheAgainstModel(RuleBasedStateMachine):
    """Requests come, read a prefix, add pages, leave; pages are evicted.  The model: salt and prefix (tuple of ids) -> page."""

    handles = Bundle("handles")

    def __init__(self) -> None:
        super().__init__()
        self.cache = RadixCache(SIZE)
        self.pool = PagePool(64)
        self.model: dict[tuple[Any, ...], int] = {}
        self.locked: dict[tuple[Any, ...], int] = {}  # salt and prefix -> how many requests hold it
        self.evicted: set[tuple[Any, ...]] = set()  # salts and their pages

    def _cached(self, salt: str, ids: list[int]) -> list[int]:
        pages = []
        for end in range(SIZE, len(ids), SIZE):  # never the last token
            page = self.model.get((salt, *ids[:end]))
            if page is None:
                break
            pages.append(page)
        return pages

    def _lock(self, salt: str, ids: list[int], upto: int, by: int) -> None:
        for end in range(SIZE, upto + 1, SIZE):
            key = (salt, *ids[:end])
            self.locked[key] = self.locked.get(key, 0) + by
            if not self.locked[key]:
                del self.locked[key]

    @rule(target=handles, ids=tokens, salt=salts)
    def arrive(self, ids: list[int], salt: str):
        before = (self.cache.num_pages, self.cache.evictable, self.cache.num_nodes)
        match = self.cache.match(i32(ids), salt)
        assert (self.cache.num_pages, self.cache.evictable, self.cache.num_nodes) == before, "match changed the tree"
        if self.cache.why_missed(i32(ids), match) == "evicted":
            at = match.num_pages * SIZE
            assert (salt, *ids[at : at + SIZE]) in self.evicted, "a salt learns what another has lost"
        handle, pages = self.cache.acquire(match)
        assert pages.tolist() == self._cached(salt, ids)
        assert match.num_pages == len(pages)
        self._lock(salt, ids, len(pages) * SIZE, 1)
        return (handle, salt, ids, len(pages))

    @rule(target=handles, request=consumes(handles), more=tokens, upto=st.integers(0, 8))
    def extend(self, request, more: list[int], upto: int):
        handle, salt, ids, shared = request
        ids = ids + more
        full = min(len(ids) // SIZE, shared + upto)
        new = full - shared
        if new > self.pool.free:
            return (handle, salt, ids, shared)
        mine = self.pool.alloc(new)
        handle, canonical, duplicates = self.cache.extend(handle, i32(ids[shared * SIZE : full * SIZE]), mine)
        assert len(canonical) == new
        for i, page in enumerate(canonical.tolist()):
            key = (salt, *ids[: (shared + i + 1) * SIZE])
            assert self.model.setdefault(key, int(mine[i])) == page, "the canonical page is the one that was there first"
        assert sorted(duplicates.tolist()) == sorted(set(mine.tolist()) - set(canonical.tolist()))
        self.pool.release(duplicates)
        self._lock(salt, ids, shared * SIZE, -1)
        self._lock(salt, ids, full * SIZE, 1)
        return (handle, salt, ids, full)

    @rule(request=consumes(handles))
    def leave(self, request) -> None:
        handle, salt, ids, shared = request
        self.cache.release(handle)
        self._lock(salt, ids, shared * SIZE, -1)

    @rule(n=st.integers(0, 10))
    def evict(self, n: int) -> None:
        evictable = self.cache.evictable
        freed = self.cache.evict(n)
        assert len(freed) == min(n, evictable)
        gone = set(freed.tolist())
        for key in [k for k, page in self.model.items() if page in gone]:
            assert key not in self.locked, "a page in use was evicted"
            self.evicted.add((key[0], *key[-SIZE:]))
            del self.model[key]
        for key in self.model:  # what is left is still reachable: no hole in a prefix
            assert all(key[:end] in self.model for end in range(SIZE + 1, len(key), SIZE))
        self.pool.release(freed)

    @invariant()
    def agrees_with_the_model(self) -> None:
        pages = self.cache.check()
        assert sorted(pages.tolist()) == sorted(self.model.values())
        assert self.cache.evictable == len(self.model) - len(self.locked)
        assert self.pool.free + len(pages) == 64
        assert not set(self.pool.snapshot().tolist()) & set(pages.tolist())
        kept = {key[0] for key in self.model} | {salt for salt, root in self.cache._salted.items() if root.refs}
        assert set(self.cache._salted) == kept - {""}, "a salt is kept for its pages and its users"


CacheAgainstModel.TestCase.settings = settings(max_examples=cases(75), stateful_step_count=40, deadline=None)
TestCacheAgainstModel = CacheAgainstModel.TestCase


def fill(cache: RadixCache, ids: list[int], first_page: int) -> None:
    """A request that computes all of `ids` and leaves."""
    handle, shared = cache.acquire(cache.match(i32([*ids, 0])))
    n = len(ids) // cache.page_size
    handle, _, _ = cache.extend(
        handle, i32(ids[len(shared) * cache.page_size :]), np.arange(first_page + len(shared), first_page + n, dtype=np.int32)
    )
    cache.release(handle)


def test_the_least_recently_used_leaf_goes_first_and_from_its_tail() -> None:
    cache = RadixCache(1)
    fill(cache, [1, 2, 3, 4], 0)  # pages 0..3
    fill(cache, [1, 2, 9, 8], 10)  # shares 0, 1; adds 12, 13
    handle, _ = cache.acquire(cache.match(i32([1, 2, 3, 4, 0])))  # a recent use of the first
    cache.release(handle)
    assert cache.evict(1).tolist() == [13]
    assert cache.evict(3).tolist() == [12, 2, 3]
    cache.check()


def test_a_held_prefix_is_not_evicted_and_what_lies_beyond_it_is() -> None:
    cache = RadixCache(1)
    fill(cache, [1, 2, 3, 4], 0)
    handle, pages = cache.acquire(cache.match(i32([1, 2, 7])))
    assert pages.tolist() == [0, 1]
    assert sorted(cache.evict(100).tolist()) == [2, 3]
    cache.release(handle)
    assert sorted(cache.evict(100).tolist()) == [0, 1]
    assert cache.num_nodes == 0


def test_the_last_token_is_never_matched() -> None:
    cache = RadixCache(2)
    fill(cache, [1, 2, 3, 4], 0)
    assert cache.match(i32([1, 2, 3, 4])).num_pages == 1
    assert cache.match(i32([1, 2, 3, 4, 5])).num_pages == 2
    assert cache.match(i32([])).num_pages == 0


def test_the_order_of_eviction_takes_no_memory_with_use() -> None:
    cache = RadixCache(1)
    fill(cache, list(range(50)), 0)
    for _ in range(5000):
        handle, _ = cache.acquire(cache.match(i32([*range(50), 0])))
        cache.release(handle)
    assert len(cache._unused) == cache.num_nodes
    assert sorted(cache.evict(50).tolist()) == list(range(50))


def test_a_page_that_comes_back_twice_is_an_error() -> None:
    pool = PagePool(2)
    pages = pool.alloc(2)
    pool.release(pages)
    with pytest.raises(ValueError, match="already free"):
        pool.release(pages[:1])
    with pytest.raises(MemoryError):
        pool.alloc(3)


# ---------------- salts
def test_a_salt_has_a_tree_of_its_own_and_is_forgotten_with_its_last_page() -> None:
    cache, ids = RadixCache(1), i32([1, 2, 3, 4])
    for n, salt in enumerate(("", "a", "b")):
        handle, pages = cache.acquire(cache.match(ids, salt))
        assert len(pages) == 0
        handle, canonical, duplicates = cache.extend(handle, ids, np.arange(10 * n, 10 * n + 4, dtype=np.int32))
        assert canonical.tolist() == [10 * n + i for i in range(4)]
        assert len(duplicates) == 0
        cache.release(handle)
    cache.check()
    for n, salt in enumerate(("", "a", "b")):
        handle, pages = cache.acquire(cache.match(i32([1, 2, 3, 9]), salt))
        assert pages.tolist() == [10 * n + i for i in range(3)]
        cache.release(handle)
    assert cache.match(ids, "c").num_pages == 0
    assert sorted(cache._salted) == ["a", "b"], "a lookup enters nothing"
    assert len(cache.flush()) == 12
    assert not cache._salted
    cache.check()


def test_a_salt_in_use_survives_a_flush_and_a_salt_that_computed_nothing_leaves_no_trace() -> None:
    cache = RadixCache(1)
    first, _ = cache.acquire(cache.match(i32([1, 2]), "a"))
    second, _ = cache.acquire(cache.match(i32([3, 4]), "a"))
    assert first is second
    cache.flush()
    cache.release(first)
    assert "a" in cache._salted
    cache.release(second)
    assert not cache._salted


def test_a_salt_does_not_learn_what_another_has_lost() -> None:
    cache, ids = RadixCache(2), i32([1, 2, 3])
    for salt in ("a", ""):
        handle, _ = cache.acquire(cache.match(ids, salt))
        cache.release(cache.extend(handle, ids[:2], i32([len(salt)]))[0])
        assert cache.why_missed(ids, cache.match(ids, "b")) == "new"
        cache.evict(1)
        assert cache.why_missed(ids, cache.match(ids, salt)) == "evicted"
        assert cache.why_missed(ids, cache.match(ids, "b")) == "new"


# ---------------- why a match is no longer
def test_why_missed_tells_whole_short_new_and_evicted_apart() -> None:
    cache = RadixCache(2)
    why = lambda ids: cache.why_missed(i32(ids), cache.match(i32(ids)))  # noqa: E731
    assert why([1]) == "whole"
    assert why([1, 2]) == "short"
    assert why([1, 2, 3]) == "new"
    fill(cache, [1, 2, 3, 4, 5, 6], 0)
    assert why([1, 2, 3, 4, 5, 6, 7]) == "whole"
    assert why([1, 2, 3, 4, 5, 6, 7, 8]) == "short"
    assert why([1, 2, 3, 4, 9, 9, 9]) == "new"
    cache.evict(1)
    assert why([1, 2, 3, 4, 5, 6, 7]) == "evicted"
    assert why([1, 2, 3, 4, 9, 9, 9]) == "new"
    cache.evict(2)
    assert why([1, 2, 3]) == "evicted"
    fill(cache, [1, 2], 0)
    assert why([1, 2, 3]) == "whole"


def test_a_bounded_number_of_evicted_runs_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radix, "MAX_GHOSTS", 50)
    cache = RadixCache(1)
    for t in range(500):
        fill(cache, [t], t)
    cache.flush()
    assert len(cache._ghosts) == 50
    assert cache.why_missed(i32([499, 0]), cache.match(i32([499, 0]))) == "evicted"
    assert cache.why_missed(i32([3, 0]), cache.match(i32([3, 0]))) == "new"


# ---------------- flush, matching, eviction
def test_a_flush_frees_all_that_is_unused_and_nothing_else() -> None:
    cache = RadixCache(1)
    fill(cache, [1, 2, 3, 4], 0)
    fill(cache, [5, 6], 10)
    handle, pages = cache.acquire(cache.match(i32([1, 2, 9])))
    assert sorted(cache.flush().tolist()) == [2, 3, 10, 11]
    assert cache.check().tolist() == pages.tolist() == [0, 1]
    cache.release(handle)
    assert sorted(cache.flush().tolist()) == [0, 1]
    assert len(cache.flush()) == 0


def test_a_match_knows_how_much_less_could_be_evicted_if_it_were_taken() -> None:
    cache = RadixCache(1)
    fill(cache, [1, 2, 3, 4, 5, 6], 0)
    for held in range(7):
        handle, _ = cache.acquire(cache.match(i32([*range(1, held + 1), 0])))
        for n in range(7):
            match = cache.match(i32([*range(1, n + 1), 0]))
            before = cache.evictable
            said = match.unreferenced
            taken, _ = cache.acquire(match)
            assert before - cache.evictable == said
            cache.release(taken)
        cache.release(handle)


@settings(report_multiple_bugs=False)  # one exception for the planted bug, not a group of them
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=25), st.integers(1, 4))
def test_no_page_is_evicted_before_one_that_was_used_longer_ago(uses: list[list[int]], at_once: int) -> None:
    cache, next_page = RadixCache(1), 0
    last_use: dict[tuple[int, ...], int] = {}
    for now, ids in enumerate(uses):
        fill(cache, ids, next_page)
        next_page += 10
        for n in range(1, len(ids) + 1):
            last_use[tuple(ids[:n])] = now
    where = {}
    for prefix, when in last_use.items():
        match = cache.match(i32([*prefix, 9]))
        where[int(match.node.pages[match.inside - 1])] = when  # the page that holds the last token of the prefix
    order: list[int] = []
    while cache.num_pages:
        order.extend(where[int(p)] for p in sorted(cache.evict(at_once).tolist(), key=lambda p: where[p]))
    assert order == sorted(order)


def lines_executed(call: Any) -> int:
    """Python lines that a call runs: a measure of its cost that no other process disturbs."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def bush(leaves: int) -> RadixCache:
    """A root with so many leaves of one page, all unused."""
    cache = RadixCache(1)
    for t in range(leaves):
        handle, _ = cache.acquire(cache.match(i32([t])))
        handle, _, _ = cache.extend(handle, i32([t]), i32([t]))
        cache.release(handle)
    return cache


def test_eviction_costs_the_same_in_a_large_tree_as_in_a_small_one() -> None:
    small, large = bush(1000), bush(64_000)
    costs = [lines_executed(lambda c=c: c.evict(100)) for c in (small, large)]
    assert costs[0] > 100, "nothing was measured"
    assert costs[1] == costs[0]
    costs = [lines_executed(lambda c=c: c.match(i32([500, 7]))) for c in (small, large)]
    assert costs[1] == costs[0]


# ---------------- the tests notice
def _evict_the_newest_first(self: RadixCache, n: int) -> np.ndarray:
    for node in list(self._unused)[::-1]:
        if not node.children:
            self._unused.move_to_end(node)
    for node in list(self._unused):
        if not node.children:
            self._unused.move_to_end(node, last=False)
            break
    return EVICT(self, n)


def _evict_by_walking(self: RadixCache, n: int) -> np.ndarray:
    min((node for node in self.nodes() if not node.children), key=id)
    return EVICT(self, n)


def _ignore_salts(self: RadixCache, ids: np.ndarray, salt: str = "") -> Match:
    return MATCH(self, ids)


def _never_remember(self: RadixCache, first_page: bytes) -> None:
    return None


EVICT, MATCH, REMEMBER = RadixCache.evict, RadixCache.match, RadixCache._remember
MUTANTS = {
    "eviction takes recent pages": (
        "evict",
        _evict_the_newest_first,
        test_no_page_is_evicted_before_one_that_was_used_longer_ago,
    ),
    "eviction walks the tree": ("evict", _evict_by_walking, test_eviction_costs_the_same_in_a_large_tree_as_in_a_small_one),
    "salts are ignored": ("match", _ignore_salts, test_a_salt_has_a_tree_of_its_own_and_is_forgotten_with_its_last_page),
    "salts learn of each other's evictions": (
        "_remember",
        lambda self, first_page: REMEMBER(self, first_page[-self._page_bytes :]),
        test_a_salt_does_not_learn_what_another_has_lost,
    ),
    "nobody remembers evictions": ("_remember", _never_remember, test_why_missed_tells_whole_short_new_and_evicted_apart),
    "a salt is never forgotten": (
        "_forget_root",
        lambda *_: None,
        test_a_salt_in_use_survives_a_flush_and_a_salt_that_computed_nothing_leaves_no_trace,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_test_notices_when(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, broken, check = MUTANTS[name]
    monkeypatch.setattr(RadixCache, method, broken)
    with pytest.raises(AssertionError):
        check()
