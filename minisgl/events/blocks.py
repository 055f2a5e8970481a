"""Notes what enters and leaves the radix tree, as events.  A block is a page of the KV cache.

The tree writes every change into its KeptPages (cache/kept.py); methods of these living objects are shadowed by others that
note what they were called with, as a trace does it (tracing/probe.py), and the core knows nothing of it.  Splits of nodes
change no page, so they are no event.

A block's hash is a chain: a mix of its parent's and of its tokens, by CPython's hash of a tuple of numbers (xxHash), which is
the same in every process.  Routers make hashes of their own from the tokens; this one only has to tell blocks apart.  Runs in
the scheduler process, in its thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np

from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.arrays import I32
from minisgl.cache.kept import NONE
from minisgl.cache.radix import Node
from minisgl.events.wire import Event, MapForm

_BITS = (1 << 64) - 1
EVICTED, FLUSHED, NAN = "evicted", "flushed", "nan"  # reasons of removals


class Blocks:
    """The published blocks of one machine.  `changes`: the events since they were last taken."""

    def __init__(self, machine: StepMachine, form: MapForm, salted: bool = False) -> None:
        """From now on changes are noted.  `salted`: also those of requests with a salt."""
        self._cache, self._kept, self._form, self._salted = machine.cache, machine.kept, form, salted
        self._size = machine.limits.page_size
        self._hash = [0] * machine.limits.num_pages  # by page; 0: it is not published
        self._reason = EVICTED
        self.count = 0  # published blocks
        self.changes: list[Event] = []
        for node in self._cache.nodes():  # what another scheduler has left
            if node.parent is not None:
                before = int(node.parent.pages[-1]) if len(node.parent.pages) else NONE
                self._stored(node.pages, before, node.salt)
        self.changes.clear()
        for owner, name, shadow in (
            (self._kept, "add", self._adding),
            (self._kept, "drop", self._dropping),
            (self._cache, "flush", self._flushing),
            (self._cache, "forget", self._forgetting),
        ):
            setattr(owner, name, shadow(getattr(owner, name)))

    def all(self) -> list[Event]:
        """The present tree, whatever was there before: AllBlocksCleared, and every block behind its parent."""
        events, hashes = [self._form.cleared()], self._hash
        for node in self._cache.nodes():
            if node.parent is not None and hashes[node.pages[0]]:
                root = not len(node.parent.pages)
                parent = None if root else hashes[node.parent.pages[-1]]
                of = [hashes[page] for page in node.pages.tolist()]
                events.append(
                    self._form.stored(of, parent, np.frombuffer(node.key, np.int32).tolist(), node.salt if root else "")
                )
        return events

    def take(self) -> list[Event]:
        """The events since the last call."""
        changes, self.changes = self.changes, []
        return changes

    # ---------------- what the tree does
    def _stored(self, pages: I32, before: int, salt: str) -> None:
        if salt and not self._salted:
            return
        hashes, size, root = self._hash, self._size, before == NONE
        parent = chained = _root(salt) if root else hashes[before]
        if not parent and not root:
            return  # below what no match finds any more
        tokens, found, at = tuple(self._kept.ids.take(pages, 0).ravel().tolist()), [], 0
        for page in pages.tolist():
            chained = hash((chained, tokens[at : at + size])) & _BITS or 1
            hashes[page] = chained
            found.append(chained)
            at += size
        self.count += len(found)
        self.changes.append(self._form.stored(found, None if root else parent, tokens, salt if root else ""))

    def _removed(self, pages: list[int]) -> None:
        hashes = self._hash
        found = [hashes[page] for page in pages if hashes[page]]
        for page in pages:
            hashes[page] = 0
        if found:
            self.count -= len(found)
            self.changes.append(self._form.removed(found, self._reason))

    def _adding(self, original: Callable[..., None]) -> Callable[..., None]:
        def add(pages: I32, before: int, salt: str = "") -> None:
            original(pages, before, salt)
            self._stored(pages, before, salt)

        return add

    def _dropping(self, original: Callable[[I32], None]) -> Callable[[I32], None]:
        def drop(pages: I32) -> None:
            original(pages)
            self._removed(pages.tolist())

        return drop

    def _flushing(self, original: Callable[[], I32]) -> Callable[[], I32]:
        def flush() -> I32:
            self._reason, before = FLUSHED, len(self.changes)
            try:
                pages = original()
            finally:
                self._reason = EVICTED
            if not self.count:  # no request holds any
                self.changes[before:] = [self._form.cleared()]
            return pages

        return flush

    def _forgetting(self, original: Callable[[Node], None]) -> Callable[[Node], None]:
        def forget(handle: Node) -> None:
            self._reason = NAN
            try:
                original(handle)
                self._removed(_unreachable(handle, self._hash))
            finally:
                self._reason = EVICTED

        return forget


def _unreachable(handle: Node, hashes: list[int]) -> list[int]:
    """Pages behind a block that was removed: below the nodes at the end of a path that have been forgotten."""
    top, node = None, handle
    while node.parent is not None:
        if not hashes[node.pages[0]]:
            top = node
        node = node.parent
    stack, pages = [top] if top is not None else [], []
    while stack:
        node = stack.pop()
        pages += node.pages.tolist()
        stack += (node.children or {}).values()
    return pages


def _root(salt: str) -> int:
    """What the chain of a prompt begins with."""
    return int.from_bytes(blake2b(salt.encode(), digest_size=8).digest(), "big") if salt else 0


def chain(tokens: Sequence[int], size: int, salt: str = "") -> list[int]:
    """The hashes of all whole blocks of a prompt, for tests and checks."""
    found, chained = [], _root(salt)
    for at in range(0, len(tokens) - size + 1, size):
        chained = hash((chained, tuple(tokens[at : at + size]))) & _BITS or 1
        found.append(chained)
    return found
