"""A server whose processes, memory, descriptors and log lines are watched from outside.  Imported by other scripts.

The server runs in a runtime directory of its own, so that what it leaves behind can be seen.  Linux only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import minisgl

STARTING = "starting"  # a child that has no title yet
SOURCE = str(Path(minisgl.__file__).parents[1])  # the server is of the same source tree as its user
_PAGE = os.sysconf("SC_PAGE_SIZE")


def children_of(parent: int) -> Iterator[tuple[str, int]]:
    """(name, pid) of the actors among the children of a process; a name may come twice while one replaces the other."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, ppid = path.joinpath("stat").read_text().rpartition(")")[2].split()[:2]
            if int(ppid) != parent or state == "Z":
                continue
            line = path.joinpath("cmdline").read_bytes()
            if line.startswith(b"minisgl::"):
                yield line.split(b"\0")[0].strip(b"\0 ").decode().removeprefix("minisgl::"), int(path.name)
            elif b"spawn_main" in line:
                yield STARTING, int(path.name)


def rss(pid: int) -> float:
    """Resident megabytes; 0 for a process that has ended."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE / 1e6
    return 0.0


def descriptors(pid: int) -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


class Watched:
    """`minisgl FLAGS` on a free port; it ends with the thread that made it.  Raises RuntimeError if it ends before it is up."""

    def __init__(self, *flags: str, echo: bool = False) -> None:
        self._dir = tempfile.TemporaryDirectory(prefix="chaos-")
        self.runtime = Path(self._dir.name)
        self.lines: list[dict[str, Any]] = []  # what it logs
        self.seen: dict[int, str] = {}  # all processes that ever were its children: pid -> name
        code = f"import sys; from minisgl.lifeline import die_with_parent; die_with_parent({os.getpid()})\n"
        code += "from minisgl.__main__ import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "--port", "0", "--log-format", "json", *flags]
        source = os.pathsep.join(filter(None, (SOURCE, os.environ.get("PYTHONPATH"))))
        environ = os.environ | {"XDG_RUNTIME_DIR": str(self.runtime), "PYTHONPATH": source}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ, errors="replace", cwd="/")
        self.pid, self.url = self.process.pid, ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(echo,), daemon=True)
        self._reader.start()
        self._ready.wait()
        if not self.url:
            self.process.wait()
            raise RuntimeError(f"the server ended before it was ready: {self.lines[-3:]}")
        self.names = sorted({name for name, _ in self.children()})

    def _read(self, echo: bool) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if echo:
                sys.stderr.write(line)
            try:
                entry = dict(json.loads(line))
            except (ValueError, TypeError):  # a traceback, or stacks
                entry = {"event": "", "level": "raw", "message": line.rstrip()}
            self.lines.append(entry)
            if entry.get("event") == "ready":
                self.url = self.url or entry["url"].removesuffix("/v1")
                self._ready.set()
        self._ready.set()

    def children(self) -> list[tuple[str, int]]:
        """(name, pid) of its actors."""
        found = list(children_of(self.pid))
        self.seen.update((pid, name) for name, pid in found)
        return found

    def send(self, pid: int, number: signal.Signals) -> bool:
        """Signal a child, and nothing that has got its number meanwhile.  False: it has ended."""
        with contextlib.suppress(OSError):
            fd = os.pidfd_open(pid)
            try:
                if any(p == pid for _, p in children_of(self.pid)):
                    signal.pidfd_send_signal(fd, number)
                    return True
            finally:
                os.close(fd)
        return False

    async def whole(self, session: Any, gone: set[int], seconds: float) -> float | None:
        """Wait until all actors run, none of `gone` among them, and /ready is 200; returns how long it took, None: too long."""
        began = time.monotonic()
        while time.monotonic() - began < seconds and self.process.poll() is None:
            children = self.children()
            if set(self.names) <= {name for name, pid in children if pid not in gone}:
                with contextlib.suppress(Exception):
                    async with session.get("/ready") as response:
                        if response.status == 200:
                            return time.monotonic() - began
            await asyncio.sleep(0.02)
        return None

    def end(self, seconds: float = 60.0) -> list[str]:
        """SIGTERM.  Returns what is wrong: its exit code, and what it has left behind."""
        self.children()
        found = []
        if self.process.poll() is None:
            self.process.terminate()
            try:
                if code := self.process.wait(seconds):
                    found.append(f"left: exit code {code} at SIGTERM")
            except subprocess.TimeoutExpired:
                found.append(f"left: the server runs {seconds:.0f} s after SIGTERM")
                self.process.kill()
                self.process.wait()
        else:
            found.append(f"ended: by itself, with exit code {self.process.returncode}: {self.last_words()}")
        found += self._left()
        self._reader.join(5)
        self._dir.cleanup()
        return found

    def _left(self) -> list[str]:
        end = time.monotonic() + 5
        while (
            left := [pid for pid in self.seen if self._is_ours(pid)] + list(self.runtime.iterdir())
        ) and time.monotonic() < end:
            time.sleep(0.02)
        shared = [p.name for p in Path("/dev/shm").glob("*") if any(str(pid) in p.name for pid in (*self.seen, self.pid))]
        return [f"left: {self.seen.get(one, 'file') if isinstance(one, int) else 'file'} {one}" for one in (*left, *shared)]

    @staticmethod
    def _is_ours(pid: int) -> bool:
        with contextlib.suppress(OSError):
            path = Path(f"/proc/{pid}")
            return b"minisgl" in path.joinpath("cmdline").read_bytes()
        return False

    def failures(self) -> list[str]:
        """What it has logged as an error, but for what was done to it: a process that fails and is replaced hides a mistake."""
        bad = [e for e in self.lines if e.get("level") in ("error", "critical") and e.get("event") != "hang"]
        lines = [f"failed: {e.get('message')} {str(e.get('traceback', ''))[-400:]}" for e in bad]
        return [line for line in lines if "No space left" not in line]

    def last_words(self) -> str:
        return " | ".join(str(e.get("message", ""))[-300:] for e in self.lines[-4:])
