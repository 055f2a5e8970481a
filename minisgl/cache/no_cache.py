"""The cache that caches nothing: for ablation, and for measurements that must not share prefixes."""

from __future__ import annotations

from minisgl.arrays import I32
from minisgl.cache.radix import NO_PAGES, Match, Node, RadixCache


class NoCache(RadixCache):
    """Every lookup misses and no page is taken in, so a request's pages stay its own."""

    def match(self, ids: I32, salt: str = "") -> Match:
        return Match(self.root, 0, 0)

    def why_missed(self, ids: I32, match: Match) -> str:
        return "off"

    def extend(self, handle: Node, ids: I32, pages: I32) -> tuple[Node, I32, I32]:
        """Refuse the pages: an empty canonical array means that the caller keeps them."""
        return handle, NO_PAGES, NO_PAGES


CACHES: dict[str, type[RadixCache]] = {"radix": RadixCache, "none": NoCache}  # as `--cache` names them
