"""The same interface as RadixCache, caching nothing: for ablation, and for measurements that must not share prefixes."""

from __future__ import annotations

from minisgl.arrays import I32
from minisgl.cache.radix import NO_PAGES, Match, Node


class NoCache:
    """Every lookup misses and nothing is taken in, so a request's pages stay its own."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.root = Node(b"", NO_PAGES, None)
        self.evictable = 0
        self.num_pages = 0
        self.evicted_pages = 0

    def match(self, ids: I32, salt: str = "") -> Match:
        return Match(self.root, 0, 0)

    def why_missed(self, ids: I32, match: Match) -> str:
        return "off"

    def acquire(self, match: Match) -> tuple[Node, I32]:
        return self.root, NO_PAGES

    def release(self, handle: Node) -> None:
        """Nothing is held."""

    def extend(self, handle: Node, ids: I32, pages: I32) -> tuple[Node, I32, I32]:
        """Refuse the pages: an empty canonical array means that the caller keeps them."""
        return handle, NO_PAGES, NO_PAGES

    def evict(self, n: int) -> I32:
        return NO_PAGES

    def flush(self) -> I32:
        return NO_PAGES

    def check(self) -> I32:
        return NO_PAGES
