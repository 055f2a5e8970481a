"""A disk that fails on command: it counts the calls that change a directory, and ends the process or refuses at one of them.

It stands between `os` and what is below one directory.  Nothing is really synced (so it is fast); what is synced is noted, so
that a machine's loss of power can be played: `survivors` builds what a disk may hold afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CALLS = ("open", "write", "fsync", "fdatasync", "replace", "unlink", "ftruncate")
MODES = ("process", "strict", "metadata")


class Died(BaseException):
    """The process has been killed: it does nothing more."""


class Disk:
    """What happens below `root`.

    at:    the number of the call (from 0) that meets the fault, or None.
    fault: "before", "after", "torn" (half of a write is done): the process dies there; a number: that errno, `times` times in
           a row, where a write has done its half.
    """

    def __init__(self, root: Path, at: int | None = None, fault: str | int = "before", times: int = 1) -> None:
        self.root, self.at, self.fault, self.times = root, at, fault, times
        self.calls: list[str] = []
        self.dead = False
        self._n = 0
        self._names: dict[str, dict[str, int]] = {}  # directory: name: file
        self._kept: dict[str, dict[str, int]] = {}  # the same as of the last sync of the directory
        self._content: dict[int, bytes] = {}  # by file, as of its last sync
        self._fds: dict[int, int] = {}  # descriptor: file
        self._real = {name: getattr(os, name) for name in (*CALLS, "close")}
        self._adopt()

    def _adopt(self) -> None:
        for path in self.root.rglob("*"):
            if path.is_file():
                self._n += 1
                self._names.setdefault(str(path.parent), {})[path.name] = self._n
                self._content[self._n] = path.read_bytes()
        self._kept = {name: dict(files) for name, files in self._names.items()}

    @contextlib.contextmanager
    def attached(self) -> Iterator[Disk]:
        with pytest.MonkeyPatch.context() as m:
            for name in (*CALLS, "close"):
                m.setattr(os, name, getattr(self, f"_{name}"))
            yield self

    # ---------------- faults
    def _meet(self, name: str, *args: Any, half: Any = None) -> Any:
        if self.dead:
            raise Died
        number, real = len(self.calls), self._real[name]
        self.calls.append(name)
        if self.at is None or not self.at <= number < self.at + self.times:
            return real(*args)
        if isinstance(self.fault, int):
            if half is not None:
                half()
            raise OSError(self.fault, os.strerror(self.fault))
        self.dead = True
        if self.fault == "after":
            real(*args)
            self._after(name, args)
        elif self.fault == "torn" and half is not None:
            half()
        raise Died

    def _ours(self, path: Any) -> bool:
        return isinstance(path, str | Path) and os.path.abspath(path).startswith(str(self.root)) and Path(path).name != "lock"

    def _after(self, name: str, args: Any) -> None:
        if name == "open":
            directory, base = os.path.split(os.path.abspath(args[0]))
            self._names.setdefault(directory, {}).setdefault(base, self._new())
        elif name == "replace":
            (a, b), (c, d) = (os.path.split(os.path.abspath(p)) for p in args)
            self._names.setdefault(c, {})[d] = self._names[a].pop(b)
        elif name == "unlink":
            a, b = os.path.split(os.path.abspath(args[0]))
            self._names[a].pop(b)
        elif name in ("fsync", "fdatasync"):
            self._note(args[0])

    def _new(self) -> int:
        self._n += 1
        return self._n

    def _note(self, fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if os.path.isdir(path):
            self._kept[path] = dict(self._names.get(path, {}))
        elif fd in self._fds:
            with open(f"/proc/self/fd/{fd}", "rb") as f:
                self._content[self._fds[fd]] = f.read()

    # ---------------- instead of os
    def _open(self, path: Any, flags: int, *args: Any) -> int:
        if not self._ours(path):
            return int(self._real["open"](path, flags, *args))
        new = flags & os.O_CREAT and not os.path.exists(path)
        fd = int(self._meet("open", path, flags, *args) if new else self._real["open"](path, flags, *args))
        if new:
            self._after("open", (path,))
        directory, base = os.path.split(os.path.abspath(path))
        if base in (names := self._names.get(directory, {})):
            self._fds[fd] = names[base]
        return fd

    def _close(self, fd: int) -> None:
        self._fds.pop(fd, None)
        self._real["close"](fd)

    def _write(self, fd: int, data: Any) -> int:
        if fd not in self._fds:
            return int(self._real["write"](fd, data))
        return int(self._meet("write", fd, data, half=lambda: self._real["write"](fd, bytes(data)[: len(data) // 2])))

    def _ftruncate(self, fd: int, size: int) -> None:
        self._meet("ftruncate", fd, size)

    def _sync(self, name: str, fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path.startswith(str(self.root)):
            real, self._real[name] = self._real[name], lambda _: None  # the time of a real one
            try:
                self._meet(name, fd)
            finally:
                self._real[name] = real
            self._note(fd)

    def _fsync(self, fd: int) -> None:
        self._sync("fsync", fd)

    def _fdatasync(self, fd: int) -> None:
        self._sync("fdatasync", fd)

    def _replace(self, a: Any, b: Any) -> None:
        self._meet("replace", a, b)
        self._after("replace", (a, b))

    def _unlink(self, path: Any, **more: Any) -> None:
        if not self._ours(path) or not os.path.exists(path):
            return self._real["unlink"](path, **more)  # type: ignore[no-any-return]
        self._meet("unlink", path)
        self._after("unlink", (path,))
        return None

    # ---------------- afterwards
    def survivors(self, mode: str, where: Path) -> Path:
        """What the disk holds after the process has died ("process"), or the machine: only what was synced ("strict"), or all
        names with what was synced of their content ("metadata")."""
        if mode == "process":
            shutil.copytree(self.root, where)
            return where
        names = self._kept if mode == "strict" else self._names
        for directory in (path for path in (self.root, *self.root.rglob("*")) if path.is_dir()):
            (there := where / directory.relative_to(self.root)).mkdir(parents=True)
            for name, file in names.get(str(directory), {}).items():
                (there / name).write_bytes(self._content.get(file, b""))
        return where


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
