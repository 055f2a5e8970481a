"""Keeps what every cached KV page holds, in memory that outlives the scheduler, so that the next one starts with its cache.

    published  i64                     plans that are in the ring for the workers
    mark       i64[pages]              0: the page is not in the radix tree; n > 0: it is, and the first n plans write it
    before     i32[pages]              the page that holds the tokens before it; NONE or SALTED where a prompt begins
    salt       u8[pages, SALT_BYTES]   of a SALTED page
    ids        i32[pages, page_size]   its tokens; also of pages that requests own, for the slot table

A page has one place in the tree, so this is the whole tree, whatever its history: there is no log that grows.  The tree writes
it while it changes.  A process that is killed leaves its memory as its instructions were in order, thus no state in between
tells a lie:

    the mark of a page is stored last when the page enters the tree, and first (as 0) when it leaves: the rest of a page
    changes only while its mark is 0, and a mark is one aligned store;
    a page whose plan has not reached the ring has a mark above `published`; a plan in the ring does run before those of the
    next scheduler;
    a page without the pages before it is in no prefix.

Runs in the scheduler process; numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minisgl.arrays import I32, I64, U8

SALT_BYTES = 32  # pages under longer salts are not kept
NONE, SALTED = -1, -2
_FEW = 16  # with fewer pages a loop is faster than an array operation


class KeptPages:
    """The columns above.  Only RadixCache writes them, but for `ids` (the slot table) and `published` (the actor)."""

    def __init__(self, num_pages: int, page_size: int, memory: memoryview | None = None) -> None:
        """`memory`: `size` bytes, all 0 or left by another scheduler; None: of this process alone."""
        raw: U8 = np.zeros(self.size(num_pages, page_size), np.uint8) if memory is None else np.frombuffer(memory, np.uint8)
        ends = np.cumsum([8, 8 * num_pages, 4 * num_pages, SALT_BYTES * num_pages])
        head, mark, before, salt, ids = np.split(raw, ends)
        self.published: I64 = head.view(np.int64)
        self.mark: I64 = mark.view(np.int64)
        self.before: I32 = before.view(np.int32)
        self.salt: U8 = salt.reshape(num_pages, SALT_BYTES)
        self.ids: I32 = ids.view(np.int32).reshape(num_pages, page_size)
        self.planned = int(self.published[0])  # plans that have been made: they write whatever enters the tree now

    @staticmethod
    def size(num_pages: int, page_size: int) -> int:
        """Bytes of all columns."""
        return 8 + num_pages * (8 + 4 + SALT_BYTES + 4 * page_size)

    def add(self, pages: I32, before: int, salt: str = "") -> None:
        """These pages, in order, have entered the tree behind the page `before`, NONE where a prompt begins."""
        if before == NONE and salt:
            if len(name := salt.encode()) > SALT_BYTES:
                return
            self.salt[pages[0]] = np.frombuffer(name.ljust(SALT_BYTES, b"\0"), np.uint8)
            before = SALTED
        if len(pages) > _FEW:
            self.before[pages[1:]] = pages[:-1]
            self.before[pages[0]] = before
            self.mark[pages] = self.planned
            return
        for page in pages.tolist():
            self.before[page] = before
            self.mark[page] = self.planned
            before = page

    def drop(self, pages: I32) -> None:
        """These pages have left the tree, or are found in it no more."""
        if len(pages) > _FEW:
            self.mark[pages] = 0
            return
        for page in pages.tolist():
            self.mark[page] = 0

    def runs(self) -> Iterator[tuple[int, str, I32]]:
        """The prefixes that are kept, cut where they branch, each after the one before it.

        A run is (its parent's last page or NONE, the salt, pages).
        """
        mark = np.asarray(self.mark)
        after: dict[int, list[int]] = {}
        for page in np.flatnonzero((mark > 0) & (mark <= self.published[0])).tolist():
            after.setdefault(int(self.before[page]), []).append(page)
        stack = [(NONE, page) for start in (NONE, SALTED) for page in after.get(start, ())]
        while stack:
            parent, page = stack.pop()
            run = [page]
            while len(below := after.get(run[-1], ())) == 1:
                run += below
            stack += [(run[-1], page) for page in below]
            salt = self.salt[page].tobytes().rstrip(b"\0") if self.before[page] == SALTED else b""
            yield parent, salt.decode("utf-8", "replace"), np.array(run, np.int32)
