"""Appends JSON lines to a file so that an interruption at any point leaves whole lines only.

A line reaches the kernel before it counts, and the disk as part of a group: a process that is killed loses nothing, a machine
that loses its power at most the lines since the last group.  What a failed write has left is cut off before the next line.
Everything here changes the disk through functions of `os`, where tests have it fail.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from minisgl.api.rendering import json_pieces

_SYNC_LINES = 128
_SYNC_SECONDS = 1.0
_CUSTOM_ID = b'"custom_id": '


class Quota(Protocol):
    """What all files of a place may take."""

    def take(self, n: int) -> None: ...
    def give(self, n: int) -> None: ...


class Log:
    """An append-only file of JSON lines.  Raises OSError if it cannot be opened; a new one is in its directory for good."""

    def __init__(self, path: Path, quota: Quota | None = None) -> None:
        self.path, self._quota = path, quota
        new = not path.exists()
        self._file: IO[bytes] = open(path, "a+b", 0, opener=_open)  # noqa: SIM115  closed by `close`
        self._size = self._end = self._safe = path.stat().st_size  # bytes: counted, in whole lines, and of them on disk
        self._unsynced, self._synced = 0, time.monotonic()
        try:
            if new:
                sync_file(path.parent)
        except BaseException:
            self._file.close()
            raise

    def lines(self) -> Iterator[bytes]:
        """All lines from the beginning, the last one possibly torn."""
        with open(os.dup(self._file.fileno()), "rb") as file:
            file.seek(0)
            yield from file

    def recover(self) -> Iterator[str]:
        """Read the custom_id of every line, and bring them to the disk.

        What begins with a torn line is cut off, or with one that a machine has lost a part of: no later line was synced.
        """
        end = 0
        for line in self.lines():
            if not line.endswith(b"}\n") or b"\0" in line or (custom_id := _custom_id(line)) is None:
                break
            end += len(line)
            yield custom_id
        self.cut(end)
        self.sync()

    def append(self, value: dict[str, Any]) -> None:
        """Raises OSError when the disk is full, and what the quota raises; the line is not in the file then."""
        line = b"".join(json_pieces(value)) + b"\n"
        self.cut(self._end)  # what a failed write has left
        if self._quota is not None:
            self._quota.take(len(line))
        self._size += len(line)
        try:
            write_all(self._file.fileno(), line)
        except BaseException:
            with contextlib.suppress(OSError):
                self.cut(self._end)
            raise
        self._end = self._size
        self._unsynced += 1
        if self._unsynced >= _SYNC_LINES or time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def cut(self, end: int) -> None:
        """Remove what is behind `end`, the end of a line."""
        if end == self._size:
            return
        try:
            os.ftruncate(self._file.fileno(), end)
        finally:
            size = self._file.seek(0, os.SEEK_END)
            if self._quota is not None:
                self._quota.give(self._size - size)
            self._size, self._end, self._safe = size, min(end, size), min(end, self._safe)

    def sync(self) -> None:
        """Wait until all lines are on disk.  Raises OSError; the lines since the last time are not kept then.

        The kernel reports a failure once and takes the pages for written: later calls would succeed and say nothing.
        """
        try:
            os.fdatasync(self._file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self.cut(self._safe)
            raise
        self._unsynced, self._synced, self._safe = 0, time.monotonic(), self._end

    def close(self) -> None:
        """Sync and close.  Idempotent."""
        if not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()


def _custom_id(line: bytes) -> str | None:
    """The custom_id of a line, which stands before the answer: that may be megabytes.  None: the line is damaged."""
    try:
        if (at := line.find(_CUSTOM_ID, 0, 200)) < 0:
            return str(json.loads(line)["custom_id"])
        start = line[at + len(_CUSTOM_ID) : at + (1 << 16)].decode("utf-8", "replace")
        return str(json.JSONDecoder().raw_decode(start)[0])
    except (ValueError, KeyError, TypeError):
        return None


def _open(path: str | Path, flags: int, mode: int = 0o666) -> int:
    return os.open(path, flags, mode)


@contextlib.contextmanager
def opened(path: Path, flags: int, mode: int = 0o666) -> Iterator[int]:
    """A file's descriptor; `mode` of a new one."""
    fd = _open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes) -> None:
    """Raises OSError; a part may have been written then."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def write_new(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file and wait until its content, though not its name, is on disk."""
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode) as fd:
        write_all(fd, data)
        os.fsync(fd)


def sync_file(path: Path) -> None:
    """Wait until a file is on disk; of a directory, the names in it, where that can be had."""
    try:
        with opened(path, os.O_RDONLY) as fd:
            os.fsync(fd)
    except OSError as e:  # a file system without that, a directory that may not be read
        if e.errno not in (errno.EINVAL, errno.EACCES) or not path.is_dir():
            raise
