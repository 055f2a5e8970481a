"""Reads large JSON in a process of its own: Python's parser holds the interpreter for as long as a text lasts, in any thread.

The process is started for the first large body.  It is no actor: it gets functions with their arguments and answers with what
they return, one job after the other, and ends with the api process.  A job that takes too much time or memory ends it, and the
next one starts it again.  Runs in the api process, on its event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import multiprocessing as mp
import os
import pickle
import resource
import signal
import traceback
from collections.abc import AsyncIterator, Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from minisgl.actors.runtime.supervisor import quiet_spawn
from minisgl.errors import RequestError
from minisgl.lifeline import die_with_parent

SMALL = 1 << 16  # bytes that are read on the event loop, in a millisecond or two
ROOM = 16 << 20  # bytes of larger bodies that are in memory at a time; the others wait before they are received
WAIT_SECONDS = 30.0  # for that room
MAX_SECONDS = 10.0  # of one core, for a job
MAX_BYTES = 1 << 30  # of address space, for a job
WALL_SECONDS = 60.0  # for a job, on a machine whose cores are all busy

_TRIES = 3  # of a job whose process is killed
_LIMITED = (1, -signal.SIGPROF)  # exit codes of a process that a job has ended by its limits
_LEAVE_SECONDS = 0.2

T = TypeVar("T")


class Reader:
    """The process, and the room for what it is to read."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._connection: Connection[Any, Any] | None = None
        self._one = asyncio.Lock()
        self._room = asyncio.Condition()
        self._free = ROOM
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the process, if it runs."""
        return self._process.pid if self._process is not None else None

    @contextlib.asynccontextmanager
    async def room(self, size: int) -> AsyncIterator[None]:
        """Wait until so many bytes may be received.  Raises RequestError (503) if that takes too long."""
        size = min(size, ROOM)
        try:
            await asyncio.wait_for(self._take(size), WAIT_SECONDS)
        except asyncio.TimeoutError:
            text = "The server is reading other large requests; try again in a moment."
            raise RequestError(text, status=503, code="server_overloaded", retry_after=2) from None
        try:
            yield
        finally:
            self._free += size
            async with self._room:
                self._room.notify_all()

    async def _take(self, size: int) -> None:
        async with self._room:
            await self._room.wait_for(lambda: self._free >= size)
            self._free -= size

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """What a function of a module returns for arguments that can be pickled.  Raises RequestError."""
        # A caller that leaves does not end the job: the next one must not get its answer.
        kind, value = await asyncio.shield(asyncio.ensure_future(self._run((function, args))))
        if kind == "refused":
            raise RequestError(value[0], **value[1])
        if kind == "failed":
            raise RuntimeError(value)
        result: T = value
        return result

    async def _run(self, job: Any) -> tuple[str, Any]:
        async with self._one:
            if self._closed:
                return "refused", ("The server is shutting down.", {"status": 503, "code": "server_draining", "retry_after": 5})
            for _ in range(_TRIES):
                if self._process is None or not self._process.is_alive():
                    self._start()
                assert self._process is not None
                asked = asyncio.ensure_future(asyncio.to_thread(_ask, self._connection, job))
                if not (await asyncio.wait({asked}, timeout=WALL_SECONDS))[0]:
                    self._process.kill()  # it stands still, and `asked` ends with it
                try:
                    return await asked
                except (EOFError, OSError):
                    if self._end() in _LIMITED:  # otherwise somebody else has ended it
                        break
            text = f"The request takes more than {MAX_SECONDS:g} s or {MAX_BYTES >> 30} GiB to be read."
            return "refused", (text, {"status": 413, "code": "body_too_complex"})

    def _start(self) -> None:
        """Start the process; on the main thread, with which it ends."""
        self._end()
        context = mp.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, os.getpid()), name="reader", daemon=True)
        with quiet_spawn():
            self._process.start()
        theirs.close()

    def _end(self) -> int | None:
        """End the process if it runs; returns its exit code, None if there was none."""
        process, self._process = self._process, None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if process is None:
            return None
        process.join(_LEAVE_SECONDS if process.exitcode is None and not self._closed else 0)  # it may be ending
        process.kill()
        process.join()
        return process.exitcode

    def close(self) -> None:
        """End the process.  Idempotent."""
        self._closed = True
        self._end()


def _ask(connection: Connection[Any, Any] | None, job: Any) -> tuple[str, Any]:
    """Runs in a thread, and blocks without the interpreter's lock."""
    if connection is None:
        raise EOFError
    connection.send_bytes(pickle.dumps(job, pickle.HIGHEST_PROTOCOL))
    answer: tuple[str, Any] = _Answers(io.BytesIO(connection.recv_bytes())).load()
    return answer


_ARRAYS = ("ndarray", "dtype", "_reconstruct", "_frombuffer")


class _Answers(pickle.Unpickler):
    """Admits values of this package and arrays: what a job has read came from a client."""

    def find_class(self, module: str, name: str) -> Any:
        kind = super().find_class(module, name)
        if (module.startswith("numpy") and name in _ARRAYS) or (module.startswith("minisgl.") and isinstance(kind, type)):
            return kind
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an answer")


# ---------------- in the process
def _main(connection: Connection[Any, Any], parent: int) -> None:
    import setproctitle

    die_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    setproctitle.setproctitle("minisgl::reader")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limited = False
    with contextlib.suppress(EOFError, OSError):
        while True:
            raw = connection.recv_bytes()
            function, args = pickle.loads(raw)  # noqa: S301  from our parent; imports the function's module
            del raw
            if not limited:
                limited = True
                _, hard = resource.getrlimit(resource.RLIMIT_AS)
                most = _mapped() + MAX_BYTES
                resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))
            signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
            answer = pickle.dumps(_answer(function, args), pickle.HIGHEST_PROTOCOL)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send_bytes(answer)
            del args, answer
    os._exit(0)


def _answer(function: Callable[..., Any], args: Any) -> tuple[str, Any]:
    try:
        return "done", function(*args)
    except RequestError as e:
        about = {"status": e.status, "param": e.param, "code": e.code, "retry_after": e.retry_after}
        return "refused", (e.message, about)
    except MemoryError:
        os._exit(1)
    except Exception:
        return "failed", traceback.format_exc()


def _mapped() -> int:
    """Bytes of this process's address space."""
    with open("/proc/self/statm", "rb") as f:
        return int(f.read().split()[0]) * resource.getpagesize()
