"""The prefix cache and the page pool against a naive model that stores every cached prefix in a dictionary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from minisgl.cache.pages import PagePool
from minisgl.cache.radix import RadixCache

SIZE = 2
tokens = st.lists(st.integers(0, 2), min_size=1, max_size=14)


def i32(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


class CacheAgainstModel(RuleBasedStateMachine):
    """Requests come, read a prefix, add pages, leave; pages are evicted.  The model: prefix (tuple of ids) -> page."""

    handles = Bundle("handles")

    def __init__(self) -> None:
        super().__init__()
        self.cache = RadixCache(SIZE)
        self.pool = PagePool(64)
        self.model: dict[tuple[int, ...], int] = {}
        self.locked: dict[tuple[int, ...], int] = {}  # prefix -> how many requests hold it

    def _cached(self, ids: list[int]) -> list[int]:
        pages = []
        for end in range(SIZE, len(ids), SIZE):  # never the last token
            page = self.model.get(tuple(ids[:end]))
            if page is None:
                break
            pages.append(page)
        return pages

    def _lock(self, ids: list[int], upto: int, by: int) -> None:
        for end in range(SIZE, upto + 1, SIZE):
            key = tuple(ids[:end])
            self.locked[key] = self.locked.get(key, 0) + by
            if not self.locked[key]:
                del self.locked[key]

    @rule(target=handles, ids=tokens)
    def arrive(self, ids: list[int]):
        before = (self.cache.num_pages, self.cache.evictable, self.cache.num_nodes)
        match = self.cache.match(i32(ids))
        assert (self.cache.num_pages, self.cache.evictable, self.cache.num_nodes) == before, "match changed the tree"
        handle, pages = self.cache.acquire(match)
        assert pages.tolist() == self._cached(ids)
        assert match.num_pages == len(pages)
        self._lock(ids, len(pages) * SIZE, 1)
        return (handle, ids, len(pages))

    @rule(target=handles, request=consumes(handles), more=tokens, upto=st.integers(0, 8))
    def extend(self, request, more: list[int], upto: int):
        handle, ids, shared = request
        ids = ids + more
        full = min(len(ids) // SIZE, shared + upto)
        new = full - shared
        if new > self.pool.free:
            return (handle, ids, shared)
        mine = self.pool.alloc(new)
        handle, canonical, duplicates = self.cache.extend(handle, i32(ids[shared * SIZE : full * SIZE]), mine)
        assert len(canonical) == new
        for i, page in enumerate(canonical.tolist()):
            key = tuple(ids[: (shared + i + 1) * SIZE])
            assert self.model.setdefault(key, int(mine[i])) == page, "the canonical page is the one that was there first"
        assert sorted(duplicates.tolist()) == sorted(set(mine.tolist()) - set(canonical.tolist()))
        self.pool.release(duplicates)
        self._lock(ids, shared * SIZE, -1)
        self._lock(ids, full * SIZE, 1)
        return (handle, ids, full)

    @rule(request=consumes(handles))
    def leave(self, request) -> None:
        handle, ids, shared = request
        self.cache.release(handle)
        self._lock(ids, shared * SIZE, -1)

    @rule(n=st.integers(0, 10))
    def evict(self, n: int) -> None:
        evictable = self.cache.evictable
        freed = self.cache.evict(n)
        assert len(freed) == min(n, evictable)
        gone = set(freed.tolist())
        for key in [k for k, page in self.model.items() if page in gone]:
            assert key not in self.locked, "a page in use was evicted"
            del self.model[key]
        for key in self.model:  # what is left is still reachable: no hole in a prefix
            assert all(key[:end] in self.model for end in range(SIZE, len(key), SIZE))
        self.pool.release(freed)

    @invariant()
    def agrees_with_the_model(self) -> None:
        pages = self.cache.check()
        assert sorted(pages.tolist()) == sorted(self.model.values())
        assert self.cache.evictable == len(self.model) - len(self.locked)
        assert self.pool.free + len(pages) == 64
        assert not set(self.pool.snapshot().tolist()) & set(pages.tolist())


CacheAgainstModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
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
