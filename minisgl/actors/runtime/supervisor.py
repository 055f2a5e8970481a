"""Supervises the processes of a run: spawns the actors, learns of their deaths at once, and ends them.

Runs in the api process, on its main thread: PR_SET_PDEATHSIG fires when the *thread* that spawned a child ends.
"""

from __future__ import annotations

import atexit
import multiprocessing as mp
import multiprocessing.util
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from typing import Any

from minisgl.actors.messages import ActorDied
from minisgl.actors.runtime.actor import Actor
from minisgl.actors.runtime.process import main
from minisgl.errors import UserError


def make_run_dir() -> str:
    """A private directory (0700) for the sockets of one run.  Raises UserError if none can be made.

    An XDG_RUNTIME_DIR in which another user could exchange it, as it may come through sudo or su, is not used.
    """
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    parent = base if base and os.access(base, os.W_OK) and _ours(base) else tempfile.gettempdir()
    try:
        path = tempfile.mkdtemp(prefix="minisgl-", dir=parent)
        private = os.lstat(path).st_mode & 0o077 == 0 and _ours(path)
    except OSError as e:
        raise UserError(f"cannot create a run directory in {parent}: {e.strerror}") from e
    if not private:
        os.rmdir(path)
        raise UserError(f"the file system of {parent} keeps no directory private: set XDG_RUNTIME_DIR or TMPDIR to another one")
    return path


def _ours(path: str) -> bool:
    """Whether no other user but root may exchange what is in a directory."""
    found = os.stat(path)
    return found.st_uid in (0, os.geteuid()) and (not found.st_mode & stat.S_IWOTH or bool(found.st_mode & stat.S_ISVTX))


_END_SECONDS = 10.0  # for a process to end that was killed

# No process can act on SIGKILL, neither the root nor the actors that the kernel ends with it, so another one tidies up.  It
# reads from a pipe that ends when the root does, and is in a session of its own, out of reach of signals to the group.
_GUARDS = 100  # of one run, in case they cannot live
_GUARD = """
import os, sys
sys.stdin.read()
if os.path.exists(sys.argv[1]):
    import shutil
    shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


def _start_guard(run_dir: str) -> subprocess.Popen[bytes]:
    """A small process that removes `run_dir` as soon as this one has ended, however that happens, or closes its input.

    Its output, which stays empty, ends with it.
    """
    command, pipe = [sys.executable, "-I", "-S", "-c", _GUARD, os.path.abspath(run_dir)], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, cwd="/", start_new_session=True)


@contextmanager
def quiet_spawn() -> Iterator[None]:
    """Keep two things of this process from a child that is being spawned.

    SIGINT is ignored around the spawn (and that survives exec), so ^C during a child's imports prints no traceback.  And
    `__main__` is hidden: multiprocessing would import the caller's script again in every child, which runs an unguarded
    script twice and fails in a REPL; our children only need importable modules.
    """
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    caller = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = caller
        signal.signal(signal.SIGINT, old)


class Supervisor:
    """Owns the children of one run, and the run's directory.  Not an actor: it only spawns, reaps and kills."""

    def __init__(self, run_dir: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise UserError("minisgl must be started from the main thread: its processes die with the thread that spawned them")
        self.run_dir = run_dir
        self._mp = mp.get_context("spawn")
        self._procs: dict[str, BaseProcess] = {}
        self.spawned = 0  # children so far, guards included: with another one, a descriptor may be another's
        self._guard = _start_guard(run_dir)
        self._guards = _GUARDS  # successors that may be started
        self._pid = os.getpid()
        # If the root ended by an exception, the exit handler of multiprocessing would wait for the children without end.
        # Handlers run in reverse order of registration, and that one is registered by importing multiprocessing.util above.
        atexit.register(self.kill)

    def spawn(self, name: str, make: Callable[..., Actor], *args: Any) -> int:
        """Start an actor process; returns its pid.  `make` must be a module-level function."""
        with quiet_spawn():
            proc = self._mp.Process(target=main, args=(self.run_dir, name, make, args, os.getpid()), name=name)
            proc.start()
        self._procs[name] = proc
        self.spawned += 1
        return proc.pid or 0

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the children that have not been reaped."""
        return {name: p.pid or 0 for name, p in self._procs.items()}

    def sentinels(self) -> list[int]:
        """Descriptors that become readable when a child or the guard ends: watch them, then call `reap`."""
        guard = self._guard.stdout
        return [p.sentinel for p in self._procs.values()] + ([guard.fileno()] if guard is not None and not guard.closed else [])

    def reap(self) -> list[ActorDied]:
        """The children that have ended since the last call.  If the guard has, another takes its place."""
        if self._guards >= 0 and self._guard.poll() is not None:
            self._guards, old = self._guards - 1, self._guard
            with suppress(OSError):  # for want of memory or descriptors; the next call tries again
                if self._guards >= 0:
                    self._guard = _start_guard(self.run_dir)
                    self.spawned += 1
            old.communicate()  # which frees its descriptor, after another one has been found for the new guard
        gone = [(name, p) for name, p in self._procs.items() if p.exitcode is not None]
        for name, proc in gone:
            del self._procs[name]
            proc.join()
        return [ActorDied(name, p.exitcode or 0) for name, p in gone]

    def end(self, names: Iterable[str]) -> None:
        """SIGKILL these children, if they live, and wait until nothing of them is left.  Raises OSError if one does not end."""
        procs = {name: proc for name in names if (proc := self._procs.get(name)) is not None}
        for proc in procs.values():
            proc.kill()
        for name, proc in procs.items():
            proc.join(_END_SECONDS)
            if proc.exitcode is None:  # it is in the kernel, perhaps in the driver of a GPU
                raise OSError(f"the process {name} does not end")
            del self._procs[name]

    def join(self, seconds: float, pump: Callable[[float], object]) -> bool:
        """Wait until all children have ended; `pump(timeout)` keeps the mailbox drained meanwhile.  False: time is up."""
        end = time.monotonic() + seconds
        while self._procs and (left := end - time.monotonic()) > 0:
            pump(min(left, 0.05))
            self.reap()
        return not self._procs

    def kill(self) -> None:
        """SIGKILL the children that are left (by pid, never a tree or a group), and remove the run directory."""
        if os.getpid() != self._pid:  # a fork of the root is ending
            return
        for proc in self._procs.values():
            proc.kill()
        for proc in self._procs.values():
            proc.join()
        self._procs.clear()
        self._guard.communicate()
        atexit.unregister(self.kill)  # nothing is left to do: a program may make many engines, one after the other
