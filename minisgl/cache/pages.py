"""The page allocator of the paged KV cache: knows which pages are free.  Runs in the scheduler process; numpy only."""

from __future__ import annotations

import numpy as np

from minisgl.arrays import I32


class PagePool:
    """A stack of free page numbers.

    The last freed pages are handed out first: on a CPU they are still in the processor's caches, and memory that was never
    needed stays untouched.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._stack: I32 = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._n = num_pages

    @property
    def free(self) -> int:
        """Number of free pages."""
        return self._n

    def alloc(self, n: int) -> I32:
        """Take `n` pages.  Raises MemoryError if fewer are free (the caller must evict or retract first)."""
        if n > self._n:
            raise MemoryError(f"{n} pages requested, {self._n} free")
        self._n -= n
        return np.copy(self._stack[self._n : self._n + n])

    def claim(self, pages: I32) -> None:
        """Take these, which are free, while no others are taken."""
        rest = np.setdiff1d(self._stack, pages)[::-1]
        self._n = len(rest)
        self._stack[: self._n] = rest

    def release(self, pages: I32) -> None:
        """Give pages back.  Raises ValueError if that makes more free pages than exist: a page came back twice."""
        n = len(pages)
        if self._n + n > self.num_pages:
            raise ValueError(f"{n} pages released with {self._n} of {self.num_pages} already free")
        self._stack[self._n : self._n + n] = pages
        self._n += n

    def snapshot(self) -> I32:
        """The free page numbers (a copy), for checks."""
        return np.copy(self._stack[: self._n])
