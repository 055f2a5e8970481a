"""The files of a journal: FILE, then FILE.part1, FILE.part2 and so on, the oldest of which go when all are too large.

A thread writes them, so that no disk holds a step up; what it has not written yet is bounded.  A disk that is full, broken or
too slow ends the journal and nothing else: `error` says why.  Runs in the scheduler process.
"""

from __future__ import annotations

import math
import os
import queue
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

PARTS = 4  # that a journal of its full size has
MIN_PART = 1 << 16  # bytes
MAX_QUEUED = 64 << 20  # bytes that wait for the disk
_CLOSE_SECONDS = 2.0  # for the disk, at the end


def parts_of(path: str) -> list[str]:
    """The files of a journal that exist, in order."""
    pattern = re.compile(re.escape(Path(path).name) + r"\.part(\d+)")
    folder = Path(path).parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    numbered = sorted((int(m[1]), str(folder / m[0])) for m in map(pattern.fullmatch, names) if m)
    return [path] * Path(path).is_file() + [name for _, name in numbered]


class Files:
    """Where the parts of a journal go.  Raises OSError if the first file cannot be made."""

    def __init__(self, path: str, megabytes: float) -> None:
        self.path = path
        self.error = ""
        self._limit = int(megabytes * (1 << 20))
        self._size = 0  # of the part
        self._given = self._taken = 0  # bytes, by the scheduler and by the thread
        self._tasks: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._fd = self._open()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    @property
    def due(self) -> bool:
        """Whether the part is large enough for another one to begin."""
        return self._size >= max(MIN_PART, self._limit // PARTS)

    def begin(self, data: bytes) -> None:
        """Begin a part with these bytes."""
        if self._size:
            self._tasks.put(partial(os.close, self._fd))
            try:
                self._fd = self._open()
            except OSError as e:
                self._fail(e)
            self._tasks.put(self._trim)
        self._size = 0
        self.write(data)

    def write(self, data: bytes) -> None:
        """Have the thread append to the part."""
        if self._given - self._taken > MAX_QUEUED:
            self.error = self.error or "the disk is too slow"
        if not self.error:
            self._size += len(data)
            self._given += len(data)
            self._tasks.put(partial(self._append, self._fd, data))

    def flush(self, now: float) -> float:
        """Nothing waits here."""
        return math.inf

    def close(self) -> None:
        """Wait for the disk, for a while."""
        self._tasks.put(partial(os.close, self._fd))
        self._tasks.put(None)
        self._thread.join(_CLOSE_SECONDS)

    def _open(self) -> int:
        known = parts_of(self.path)
        last = known[-1].rpartition(".part")[2] if known and known[-1] != self.path else "0"
        name = f"{self.path}.part{int(last) + 1}" if known else self.path
        return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _fail(self, e: OSError) -> None:
        self.error = self.error or e.strerror or str(e)

    # ---------------- in the thread
    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except OSError as e:
                self._fail(e)

    def _append(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view and not self.error:
            view = view[os.write(fd, view) :]
        self._taken += len(data)

    def _trim(self) -> None:
        """Remove the oldest parts, so that all together, with one more, keep to the limit."""
        *old, _ = parts_of(self.path)
        sizes = [os.stat(name).st_size for name in old]
        room = self._limit - self._limit // PARTS
        while sizes and sum(sizes) > room:
            os.unlink(old.pop(0))
            sizes.pop(0)
