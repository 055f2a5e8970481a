"""Index of cached prefixes: one radix tree for all replicas, as a router builds it from the KV events of the engines.

A node holds a run of whole pages and a bit mask of the replicas that have all of them, so that one walk down a prompt finds how
much of it each of a thousand replicas has.  `announcing` derives a cache that says what it stores and what it evicts, which are
the BlockStored and BlockRemoved of vLLM's KV events, here without delay or loss.
"""

from __future__ import annotations

import numpy as np

from minisgl.arrays import I32, I64
from minisgl.cache.radix import NO_PAGES, Node, RadixCache


class Run:
    """A node of the index: token ids of whole pages as bytes, and who has all of them."""

    __slots__ = ("children", "key", "mask")

    def __init__(self, key: bytes, mask: int) -> None:
        self.key, self.mask = key, mask
        self.children: dict[bytes, Run] = {}


class PrefixIndex:
    """Which replica has which prefixes.  Prefixes are bytes of i32 token ids, in whole pages; each call is O(their pages)."""

    def __init__(self, page_size: int, replicas: int) -> None:
        self.page_size = page_size
        self._page = 4 * page_size
        self._root = Run(b"", -1)
        self._replicas = replicas

    def store(self, data: bytes, replica: int) -> None:
        """A replica has this prefix, with all of its beginning.  Storing it twice changes nothing."""
        node, at, bit = self._root, 0, 1 << replica
        while at < len(data):
            child = node.children.get(data[at : at + self._page])
            if child is None:
                node.children[data[at : at + self._page]] = Run(data[at:], bit)
                return
            self._cut(child, self._common(child.key, data, at))
            child.mask |= bit
            node, at = child, at + len(child.key)

    def remove(self, data: bytes, kept: int, replica: int) -> None:
        """A replica has no longer the end of this prefix, behind its first `kept` bytes."""
        node, at, bit = self._root, 0, 1 << replica
        while at < len(data):
            first = data[at : at + self._page]
            child = node.children.get(first)
            if child is None:
                return
            if at < kept:
                self._cut(child, min(kept - at, len(child.key)))
            else:
                child.mask &= ~bit
                if not child.mask:  # nobody has what is below, either
                    del node.children[first]
                    return
            node, at = child, at + len(child.key)

    def found(self, ids: I32) -> I64:
        """How many tokens of a prompt each replica has, i64[replicas]; the last token is always computed."""
        data = ids[: max(0, len(ids) - 1) * 4 // self._page * self._page // 4].tobytes()
        node, at, holders, levels = self._root, 0, -1, []
        while at < len(data):
            child = node.children.get(data[at : at + self._page])
            if child is None or not holders & child.mask:
                break
            holders &= child.mask
            common = self._common(child.key, data, at)
            at += common
            levels.append((holders, at // 4))
            if common < len(child.key):
                break
            node = child
        out = np.zeros(self._replicas, np.int64)
        for mask, tokens in levels:  # later ones are deeper, and fewer have them
            bits = np.frombuffer(mask.to_bytes(-(-self._replicas // 8), "little"), np.uint8)
            out[np.unpackbits(bits, bitorder="little")[: self._replicas] > 0] = tokens
        return out

    def _common(self, key: bytes, data: bytes, at: int) -> int:
        """Bytes of the whole pages that `key` and `data` from `at` on have in common; at least the first page is equal."""
        if data.startswith(key, at):
            return len(key)
        n = min(len(key), len(data) - at) // 4
        same = np.frombuffer(key, np.int32, n) == np.frombuffer(data, np.int32, n, at)
        return (n if same.all() else int(same.argmin())) * 4 // self._page * self._page

    def _cut(self, node: Run, at: int) -> None:
        """Let a node end after `at` bytes; a new one below it has the rest."""
        if at < len(node.key):
            rest = Run(node.key[at:], node.mask)
            rest.children, node.children = node.children, {}
            node.key, node.children[rest.key[: self._page]] = node.key[:at], rest


class _Announcing(RadixCache):
    """A cache that enters what it stores and evicts into an index."""

    index: PrefixIndex
    replica: int

    def _add(self, parent: Node, key: bytes, pages: I32) -> Node:
        self.index.store(_prefix(parent) + key, self.replica)
        return super()._add(parent, key, pages)

    def next_victim(self) -> Node:
        return self._victim

    def evict(self, n: int) -> I32:
        """Evict leaf by leaf, so that each one is announced."""
        freed = [NO_PAGES]
        while n > 0 and self._unused:
            self._victim = super().next_victim()
            pages, prefix = min(n, len(self._victim.pages)), _prefix(self._victim)
            self.index.remove(prefix, len(prefix) - pages * self._page_bytes, self.replica)
            freed.append(super().evict(pages))
            n -= pages
        return np.concatenate(freed)


def _prefix(node: Node) -> bytes:
    keys = [node.key]
    while node.parent is not None:
        node = node.parent
        keys.append(node.key)
    return b"".join(reversed(keys))


def announcing(base: type[RadixCache], index: PrefixIndex, replica: int) -> type[RadixCache]:
    """A cache like `base` whose contents `index` knows, as those of `replica`."""
    made: type[RadixCache] = type(base.__name__, (_Announcing, base), {"index": index, "replica": replica})
    return made
