"""The prefix cache: a radix tree over pages of token ids.  Runs in the scheduler process; numpy and the standard library only.

A node owns a run of whole pages: `key` is their token ids as bytes (so that comparing is one memcmp), `pages` the KV pages
that hold them.  Children are found by the bytes of their first page.  A path from the root spells a prefix; only whole pages
are shared, so nothing is ever copied on write.

    root --[system prompt: 12 pages]--+--[question A: 3 pages]--[answer A: 5 pages]
                                      +--[question B: 2 pages]

Requests hold *handles*: the node at whose end their cached prefix ends.  A handle keeps every node up to the root referenced.
The end of a node never moves while it lives (a split gives the front part to a new parent, longer prefixes become children),
so a handle stays valid whatever other requests insert.

Each `cache_salt` has its own root: tenants with different salts never share a page, and a hit never reveals that another
tenant has sent the same prompt.

Eviction is strictly by least recent use and never walks the tree: all unreferenced nodes are in one ordered dictionary.  When a
request leaves, its nodes are appended from the leaf up to the root, so that a node always comes after everything below it, and
the first one is a leaf.  From that leaf pages are taken off the tail.  Another policy is a subclass with another `next_victim`;
docs/simulator.md shows one, and how to run it next to this one.

The radix tree as a prefix cache is due to SGLang (Zheng et al., "SGLang: Efficient Execution of Structured Language Model
Programs", 2023); the page-granular keys, the handles and the eviction order are this implementation's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minisgl.arrays import I32
from minisgl.cache.kept import NONE, KeptPages

MAX_GHOSTS = 1 << 15  # evicted runs that are remembered, for statistics
NO_PAGES = np.zeros(0, np.int32)


class Node:
    """A node of the radix tree: a run of cached pages.  Only RadixCache writes its fields, but for `score`."""

    __slots__ = ("children", "key", "pages", "parent", "refs", "salt", "score", "sound")

    def __init__(self, key: bytes, pages: I32, parent: Node | None, salt: str = "") -> None:
        self.key = key
        self.salt: str = salt if parent is None else parent.salt
        self.pages = pages
        self.parent = parent  # None for a root, and for a node that has been evicted
        self.children: dict[bytes, Node] | None = None
        self.refs = 0  # requests whose prefix runs through this node
        self.score = 0.0  # free for eviction policies; a split copies it
        self.sound = False  # a request that has read these pages drew a token, so they hold numbers


@dataclass(frozen=True, slots=True)
class Match:
    """The longest prefix of some tokens in the radix tree: `num_pages` pages, the last `inside` of them from `node`."""

    node: Node
    inside: int
    num_pages: int
    salt: str = ""

    @property
    def unreferenced(self) -> int:
        """Pages of the match that no request holds: acquiring it makes this many fewer evictable."""
        node, pages, total = self.node, self.inside, 0
        while node.parent is not None and node.refs == 0:
            total += pages
            node = node.parent
            pages = len(node.pages)
        return total


class RadixCache:
    """The radix tree.  `evictable` counts the pages that `evict` could free now, `num_pages` all pages that the tree owns."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.root = Node(b"", NO_PAGES, None)
        self.evictable = 0
        self.num_pages = 0
        self.num_nodes = 0
        self.evicted_pages = 0
        self._kept: KeptPages | None = None
        self.now = 0.0  # on the clock of the machine
        self._salted: dict[str, Node] = {}  # cache_salt -> root, for salts that have pages or users
        self._page_bytes = 4 * page_size
        self._forgotten = 0  # nodes that no match finds any more
        self._ghosts: OrderedDict[bytes, float] = OrderedDict()  # when they were evicted
        self._unused: OrderedDict[Node, None] = OrderedDict()  # nodes without references, least recently used first

    # ---------------- lookup (read-only)
    def match(self, ids: I32, salt: str = "") -> Match:
        """The longest cached prefix of `ids` under `salt`, in whole pages.  Changes nothing; valid until the tree changes.

        The last token is never part of the match: at least one token must be computed, for logits to sample from.
        """
        step = self._page_bytes
        end = (len(ids) - 1) // self.page_size * step
        data = ids[: max(end, 0) // 4].tobytes()
        node, at = self._root(salt), 0
        while at < end and node.children is not None:
            child = node.children.get(data[at : at + step])
            if child is None:
                break
            if data.startswith(child.key, at):
                node, at = child, at + len(child.key)
                continue
            inside = self._common_pages(child.key, data, at)
            return Match(child, inside, at // step + inside, salt)
        return Match(node, len(node.pages), at // step, salt)

    def _root(self, salt: str) -> Node:
        """The root of a salt.  A new one becomes part of the cache when a request acquires a place in it."""
        return (self._salted.get(salt) or Node(b"", NO_PAGES, None, salt)) if salt else self.root

    def why_missed(self, ids: I32, match: Match) -> str:
        """Why a match is no longer: "whole" (it is not), "short" (no whole page is left), "evicted" (it was here), or "new"."""
        at = match.num_pages * self.page_size
        if at >= len(ids) - 1:
            return "whole"
        if at + self.page_size > len(ids) - 1:
            return "short"
        return "evicted" if self._ghost(ids, match) in self._ghosts else "new"

    def since_evicted(self, ids: I32, match: Match) -> float:
        """How many seconds ago the page was evicted that a match lacks; only after `why_missed` has said so."""
        return self.now - self._ghosts[self._ghost(ids, match)]

    def _ghost(self, ids: I32, match: Match) -> bytes:
        at = match.num_pages * self.page_size
        return match.salt.encode() + ids[at : at + self.page_size].tobytes()

    def _common_pages(self, key: bytes, data: bytes, at: int) -> int:
        """How many whole pages of `key` equal `data` from `at` on (at least the first is known to)."""
        n = min(len(key), len(data) - at)
        same = np.frombuffer(key, np.int32, n // 4) == np.frombuffer(data, np.int32, n // 4, at)
        return (n // 4 if same.all() else int(same.argmin())) // self.page_size

    # ---------------- handles
    def acquire(self, match: Match) -> tuple[Node, I32]:
        """Reference a match: returns its handle and its pages, in order.

        Splits the node that the match ends in, so that what lies beyond stays evictable.
        """
        node = match.node
        if match.inside < len(node.pages):
            node = self._split(node, match.inside)
        if match.salt and node.parent is None:
            node = self._salted.setdefault(match.salt, node)
        runs: list[I32] = []
        walk = node
        while walk.parent is not None:
            self._hold(walk)
            runs.append(walk.pages)
            walk = walk.parent
        walk.refs += 1
        return node, np.concatenate(runs[::-1]) if runs else NO_PAGES

    def release(self, handle: Node, *, sound: bool = False) -> None:
        """Give a handle back.  Nodes without any other reference become evictable.  sound: see `Node`."""
        walk = handle
        while walk.parent is not None:  # from the leaf up, as eviction expects it
            walk.refs -= 1
            walk.sound |= sound
            if walk.refs == 0:
                self.evictable += len(walk.pages)
                self._unused[walk] = None
            walk = walk.parent
        walk.refs -= 1
        self._forget_root(walk)

    def forget(self, handle: Node) -> None:
        """Let no match find the nodes at the end of a path that are not `sound`, because their pages may hold NaN.

        They and what is below them stay until they are evicted, under a key of tokens that do not exist.
        """
        node = handle
        while node.parent is not None and not node.sound:
            assert node.parent.children is not None
            self._forgotten += 1
            del node.parent.children[node.key[: self._page_bytes]]
            if self._kept is not None:
                self._kept.drop(node.pages)
            node.key = (-self._forgotten).to_bytes(4, "little", signed=True) * (len(node.key) // 4)
            node.parent.children[node.key[: self._page_bytes]] = node
            node = node.parent

    def _hold(self, node: Node) -> None:
        if node.refs == 0:
            self.evictable -= len(node.pages)
            self._unused.pop(node, None)  # absent if it is the front of a split
        node.refs += 1

    def _forget_root(self, root: Node) -> None:
        if root.salt and not root.refs and not root.children:
            self._salted.pop(root.salt, None)

    def extend(self, handle: Node, ids: I32, pages: I32) -> tuple[Node, I32, I32]:
        """Add whole pages after `handle` to the tree, and move the handle to their end.

        `ids` i32[k * page_size], `pages` i32[k], owned by the caller.  Where the tree already holds the same tokens, its
        pages are the canonical ones and the caller's are duplicates.  Returns (new handle, canonical pages i32[k],
        duplicates): the tree now owns the canonical pages, the caller must use them from now on and may free the duplicates.
        """
        step, data, node, at = self._page_bytes, ids.tobytes(), handle, 0
        canonical: list[I32] = []
        while at < len(data):
            child = node.children.get(data[at : at + step]) if node.children else None
            if child is None:
                node = self._add(node, data[at:], pages[at // step :].copy())
                canonical.append(node.pages)
                break
            inside = self._common_pages(child.key, data, at)
            if inside < len(child.pages):
                child = self._split(child, inside)
            self._hold(child)
            canonical.append(child.pages)
            node, at = child, at + len(child.key)
        found = np.concatenate(canonical) if canonical else NO_PAGES
        return node, found, pages[found != pages]

    def _add(self, parent: Node, key: bytes, pages: I32) -> Node:
        """A new leaf, referenced once."""
        node = Node(key, pages, parent)
        node.refs = 1
        if parent.children is None:
            parent.children = {}
        parent.children[key[: self._page_bytes]] = node
        self.num_pages += len(pages)
        self.num_nodes += 1
        if self._kept is not None:
            self._kept.add(pages, int(parent.pages[-1]) if len(parent.pages) else NONE, node.salt)
        return node

    def _split(self, node: Node, k: int) -> Node:
        """Cut `node` after `k` pages (0 < k < all).  Returns the new front node; `node` keeps its end and its handles.

        The caller references the front at once, so it does not enter `_unused`.
        """
        parent, cut = node.parent, k * self._page_bytes
        if parent is None:
            raise ValueError("the root cannot be split")
        front = Node(node.key[:cut], node.pages[:k].copy(), parent)
        front.refs, front.score, front.sound = node.refs, node.score, node.sound
        assert parent.children is not None
        parent.children[front.key[: self._page_bytes]] = front
        front.children = {node.key[cut : cut + self._page_bytes]: node}
        node.key, node.pages, node.parent = node.key[cut:], node.pages[k:].copy(), front
        self.num_nodes += 1
        return front

    def restore(self, kept: KeptPages) -> I32:
        """Enter what the scheduler before this one has kept into the tree, which is empty; returns its pages.

        From now on the tree is kept there.  Eviction begins with what is oldest, as there is no record of its last use.
        """
        ends: dict[int, Node] = {}  # by last page
        newest: dict[Node, int] = {}
        for before, salt, pages in kept.runs():
            parent, key = self._root(salt) if before == NONE else ends.get(before), kept.ids[pages].tobytes()
            if parent is None or key[: self._page_bytes] in (parent.children or ()):
                continue  # damaged: no tree writes one prefix twice
            if parent.salt and parent.parent is None:
                self._salted[salt] = parent
            node = ends[int(pages[-1])] = self._add(parent, key, pages)
            node.refs, newest[node] = 0, int(kept.mark[pages].max())
        order = list(newest)[::-1]  # from the leaves up
        for node in order:  # each is as new as what is below it
            if node.parent in newest:
                newest[node.parent] = max(newest[node.parent], newest[node])
        self._unused.update(dict.fromkeys(sorted(order, key=newest.__getitem__)))
        self.evictable, self._kept = self.num_pages, kept
        found = np.concatenate([NO_PAGES, *(node.pages for node in newest)])
        kept.mark[np.setdiff1d(np.flatnonzero(kept.mark), found)] = 0  # before a plan makes them look written
        return found

    # ---------------- eviction
    def next_victim(self) -> Node:
        """The leaf to evict from: the least recently used.  Override this to try another policy.

        Must return one of `unused_leaves`.  Called while at least one exists, once for each leaf that loses pages.
        """
        return next(iter(self._unused))

    def unused_leaves(self) -> Iterator[Node]:
        """Nodes that no request references and that have no children, least recently used first.  O(unused nodes)."""
        return (node for node in self._unused if not node.children)

    def evict(self, n: int) -> I32:
        """Free `n` pages, or all that are evictable if those are fewer; returns them.  The last leaf loses only its tail."""
        freed: list[I32] = []
        missing = n
        while missing > 0 and self._unused:
            leaf = self.next_victim()
            kept = len(leaf.pages) - missing
            if kept > 0:
                cut = kept * self._page_bytes
                self._remember(leaf.salt.encode() + leaf.key[cut : cut + self._page_bytes])
                freed.append(leaf.pages[kept:])
                leaf.key, leaf.pages, missing = leaf.key[:cut], leaf.pages[:kept].copy(), 0
            else:
                del self._unused[leaf]
                freed.append(leaf.pages)
                self._remove(leaf)
                missing = -kept
        done = n - missing
        self.num_pages -= done
        self.evictable -= done
        self.evicted_pages += done
        found = np.concatenate(freed) if freed else NO_PAGES
        if self._kept is not None:
            self._kept.drop(found)
        return found

    def flush(self) -> I32:
        """Free every page that no request is using."""
        return self.evict(self.evictable)

    def _remember(self, first_page: bytes) -> None:
        """Remember how an evicted run began, after its salt: statistics tell a lost prefix from one that never was here."""
        self._ghosts[first_page] = self.now
        self._ghosts.move_to_end(first_page)
        if len(self._ghosts) > MAX_GHOSTS:
            self._ghosts.popitem(last=False)

    def _remove(self, leaf: Node) -> None:
        parent = leaf.parent
        assert parent is not None
        assert parent.children is not None
        assert not leaf.children, "only a leaf can be evicted"
        first = leaf.key[: self._page_bytes]
        del parent.children[first]
        self._remember(leaf.salt.encode() + first)
        leaf.parent = None
        self.num_nodes -= 1
        if not parent.children:
            parent.children = None
            if parent.parent is None:
                self._forget_root(parent)

    # ---------------- checks
    def nodes(self) -> Iterator[Node]:
        """Every node of the radix tree except the roots.  For checks and statistics; O(tree)."""
        stack = [self.root, *self._salted.values()]
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack.extend((node.children or {}).values())

    def check(self) -> I32:
        """Verify the invariants of the radix tree; returns all its pages.  Raises AssertionError with what is wrong."""
        pages = [NO_PAGES]
        evictable = 0
        nodes = list(self.nodes())
        for node in nodes:
            assert len(node.key) == len(node.pages) * self._page_bytes > 0, "key and pages disagree"
            assert node.parent is not None
            assert node.parent.children is not None
            assert node.parent.children[node.key[: self._page_bytes]] is node, "a node is not where its key says"
            below = sum(c.refs for c in (node.children or {}).values())
            assert node.refs >= below, f"{node.refs} references above {below} below"
            evictable += len(node.pages) if node.refs == 0 else 0
            assert (node.refs == 0) == (node in self._unused), "the unused nodes and the references disagree"
            pages.append(node.pages)
        place = {node: i for i, node in enumerate(self._unused)}
        for node, i in place.items():
            assert all(place[child] < i for child in (node.children or {}).values()), "a node comes before its child"
        assert evictable == self.evictable, f"{evictable} evictable pages, counted {self.evictable}"
        assert len(nodes) == self.num_nodes, f"{len(nodes)} nodes, counted {self.num_nodes}"
        everything = np.concatenate(pages)
        assert len(everything) == self.num_pages, f"{len(everything)} pages, counted {self.num_pages}"
        assert len(np.unique(everything)) == len(everything), "a page is in the tree twice"
        return everything
