"""What a seeded attacker does to a server: signals, hostile bytes, clients that leave.  Imported by other scripts.

Every attack is a coroutine function that strikes once, with the random numbers it is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import zmq

from minisgl.actors.messages import BatchPing, BatchPong
from minisgl.actors.wire import encode
from scripts.lib.mixed import Case
from scripts.lib.watched import STARTING, Watched, rss

SEVERAL, DURING = 0.2, 0.2  # shares of the strikes that kill more than one process, and that come during a recovery
MANY = 3  # most processes that are killed at once
PATIENCE = 180.0  # seconds after which a recovery has failed


@dataclass
class Kill:
    """One strike.  `at`: time.time(); `recovered`: seconds until everything ran again, None: the next strike came before."""

    at: float
    names: list[str]
    how: str = "kill"
    recovered: float | None = None


@dataclass
class Killer:
    """SIGKILLs children, and stops some of them for a while.  `who`: names without their numbers; empty: all."""

    server: Watched
    session: aiohttp.ClientSession
    rng: random.Random
    who: frozenset[str] = frozenset()
    between: tuple[float, float] = (0.3, 1.0)
    hang: float | None = None  # --hang-seconds, if the server knows it
    stops: float = 0.15  # how many strikes stop a process first
    log: list[Kill] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # of the api process, after each strike

    def victims(self) -> list[tuple[str, int]]:
        return [
            (n, p) for n, p in self.server.children() if not self.who or n.rstrip("0123456789") in self.who or n == STARTING
        ]

    async def run(self, kills: int, seconds: float = math.inf) -> None:
        """Strike until so many processes were killed, or `seconds` are over.

        A recovery that does not come ends it, too: see `faults`.
        """
        done, end = 0, time.monotonic() + seconds
        while done < kills and time.monotonic() < end and not self.faults:
            await asyncio.sleep(self.rng.uniform(*self.between))
            if self.rng.random() < self.stops:
                await self._stop()
            found = sorted(self.victims())
            if not found:  # all of them are being started
                await asyncio.sleep(0.01)
                continue
            n = self.rng.randrange(2, MANY + 1) if self.rng.random() < SEVERAL else 1
            struck = self.rng.sample(found, min(n, len(found), kills - done))
            strike = Kill(time.time(), [name for name, pid in struck if self.server.send(pid, signal.SIGKILL)])
            done += len(strike.names)
            self.log.append(strike)
            if done < kills and self.rng.random() < DURING:
                await asyncio.sleep(self.rng.uniform(0, 0.5))
            else:
                await self._recovered(strike, {pid for _, pid in struck})

    async def only_stop(self, seconds: float) -> None:
        """Kill nobody for so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.server.process.poll() is None and not self.faults:
            await asyncio.sleep(min(self.rng.uniform(*self.between), max(0.0, end - time.monotonic())))
            if self.stops:
                await self._stop()

    async def _recovered(self, strike: Kill, gone: set[int]) -> None:
        strike.recovered = await self.server.whole(self.session, gone, PATIENCE)
        self.memory.append(rss(self.server.pid))
        if strike.recovered is None:
            ended = self.server.process.poll()
            end = f"the server has ended with {ended}: {self.server.last_words()}" if ended is not None else "it still runs"
            self.faults.append(f"ended: no recovery from the death of {', '.join(strike.names)}: {end}")

    async def _stop(self) -> None:
        """SIGSTOP for less than --hang-seconds, which harms nobody, or for more: then the process must have been replaced."""
        long = self.hang is not None and self.rng.random() < 0.4
        found = sorted((n, p) for n, p in self.victims() if n != STARTING)
        if not found or (self.hang is None and self.rng.random() < 0.4):
            return
        name, pid = self.rng.choice(found)
        strike = Kill(time.time(), [name], "stop" if long else "pause")
        self.server.send(pid, signal.SIGSTOP)
        if long:
            self.log.append(strike)
            await self._recovered(strike, {pid})
        else:
            await asyncio.sleep(self.rng.uniform(0.02, 0.4 * (self.hang or 1)))
            self.log.append(strike)
        self.server.send(pid, signal.SIGCONT)


# ---------------- hostile bytes
async def _spit(reach: Callable[[], Awaitable[Any]], data: bytes, seconds: float) -> None:
    """Open a connection, send bytes, wait a little for what comes back, and go without a word."""
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        reader, writer = await asyncio.wait_for(reach(), 5)
        try:
            writer.write(data)
            await asyncio.wait_for(reader.read(4096), seconds)
        finally:
            writer.transport.abort()


_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
_HOSTILE = (
    lambda r: r.randbytes(r.randrange(1, 4000)),
    lambda r: b"GET / HTTP/1.1\r\nHost: " + b"a" * r.randrange(1, 30_000) + b"\r\n\r\n",
    lambda r: _HEAD + b"Content-Length: 100\r\n\r\n{",
    lambda r: _HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n",
    lambda r: _HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + r.randbytes(40),
    lambda r: b"\r\n\r\n" * r.randrange(1, 9),
    lambda r: b"GET /../../etc/passwd HTTP/1.1\r\n\r\n" * r.randrange(1, 20),
    lambda r: _HEAD + b"Content-Length: 2000\r\n\r\n" + b"[" * 2000,
    lambda r: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + r.randbytes(99),
)


async def http_bytes(server: Watched, rng: random.Random, counts: Counter[str]) -> None:
    """Bytes on the HTTP port that are no request, or half of one."""
    at = urlsplit(server.url)
    data = rng.choice(_HOSTILE)(rng)
    counts["hostile on http"] += 1
    await _spit(lambda: asyncio.open_connection(at.hostname, at.port), data, rng.uniform(0.01, 0.5))


async def socket_bytes(server: Watched, rng: random.Random, counts: Counter[str]) -> None:
    """Bytes, or frames that are no message for it, on a socket of the run directory."""
    sockets = sorted(p for p in server.runtime.glob("*/*") if p.is_socket())
    if not sockets:
        return
    path = rng.choice(sockets)
    counts["hostile on sockets"] += 1
    if rng.random() < 0.5:
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48) if rng.random() < 0.5 else b""
        await _spit(lambda: asyncio.open_unix_connection(str(path)), greeting + rng.randbytes(rng.randrange(1, 2000)), 0.05)
    else:
        await asyncio.to_thread(_frames, path, [_frame(rng) for _ in range(rng.randrange(1, 20))])


def _frame(rng: random.Random) -> list[bytes]:
    message = encode(rng.choice((BatchPing(), BatchPong(rng.randrange(9)))))
    cut = message[: rng.randrange(len(message))]
    return rng.choice(([rng.randbytes(rng.randrange(200))], [cut], [cut, message + b"x", b""], [b"\x01" + rng.randbytes(30)]))


def _frames(path: Path, frames: list[list[bytes]]) -> None:
    context = zmq.Context()
    sock = context.socket(zmq.DEALER if path.name == "batch" else zmq.PUSH)
    sock.linger, sock.sndtimeo, sock.immediate = 0, 200, 1
    sock.connect(f"ipc://{path}")
    with contextlib.suppress(zmq.ZMQError):
        for frame in frames:
            sock.send_multipart(frame)
    sock.close(50)
    context.term()


# ---------------- clients that leave, and disks
async def leave(session: aiohttp.ClientSession, rng: random.Random, cases: list[Case], counts: Counter[str]) -> None:
    """A client that goes away: from a stream after some bytes, from a plain request without having read anything."""
    case = rng.choice([c for c in cases if c.path not in ("socket", "/v1/batches")])
    if "max_tokens" in case.body:
        case = replace(case, body={**case.body, "max_tokens": case.body["max_tokens"] * 2})
    with contextlib.suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError):
        timeout = aiohttp.ClientTimeout(total=None if case.stream else rng.uniform(0.001, 1.0))
        async with session.post(case.path, json=case.body, timeout=timeout, headers={"Connection": "close"}) as response:
            most = rng.randrange(1, 20_000)
            async for piece in response.content.iter_any():
                most -= len(piece)
                if most < 0:
                    counts["left a stream"] += 1
                    response.close()
                    return
            return
    counts["left before an answer"] += 1


async def full_disk(directory: Path, rng: random.Random, counts: Counter[str]) -> None:
    """Fill the disk of a directory for a while.  It must be one of its own, as `small_disk` makes it."""
    path = directory / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    counts["disk full"] += 1
    try:
        await asyncio.sleep(rng.uniform(0.2, 2.0))
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(directory: Path, megabytes: int = 16) -> Any:
    """Mount a small disk (tmpfs) there; yields False where that is not allowed."""
    mounted = os.geteuid() == 0 and not os.system(f"mount -t tmpfs -o size={megabytes}m tmpfs {directory} 2>/dev/null")
    try:
        yield mounted
    finally:
        if mounted:
            os.system(f"umount -l {directory}")
