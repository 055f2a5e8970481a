"""What one client's requests cost its neighbours: time to first token, gaps in a running stream, memory.

    .venv/bin/python scripts/check/neighbours.py [LOAD ...] [--seconds 15] [--same] [-- flags of the server]

Starts the server as it comes (embedded model, CPU) and measures it alone, then under one load after another (loads.py), which
another client puts on it from another address (--same: from the same).  Meanwhile a neighbour reads a stream and asks one-line
questions, one after another.  One JSON line a load:

first_token_s      the longest time to the first token of a one-line question; `alone` without load
gap_ms, itl_ms     the longest and the median time between two pieces of the neighbour's stream; `alone` without load
rss_mb             most memory of the api process and of the worker
answers            what the load was answered, by status
ok                 first token within a second more than alone, and no gap more than 100 ms longer than the longest alone

The last line says whether all were.  The time of this machine is measured, so nothing else should run on it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from scripts.lib.live_server import live_server
from scripts.lib.loads import LOADS
from scripts.lib.reference import provenance

WAIT = 60.0  # seconds after which a question counts as not answered
QUESTIONS = 5
STORY = "Write a very long story about a dragon and a river."
_numbers = itertools.count(1)


async def chunks(session: aiohttp.ClientSession, prompt: str, max_tokens: int) -> AsyncIterator[float]:
    """The times at which pieces of a streamed answer arrive."""
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    async with session.post("/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if b'"content":"' in line and b'"content":""' not in line:
                yield time.monotonic()


async def first_token(session: aiohttp.ClientSession) -> float:
    """Seconds to the first token of a one-line question that nobody has asked before."""
    start = time.monotonic()

    async def ask() -> float:
        async for at in chunks(session, f"What is {next(_numbers)} plus {next(_numbers)}?", 1):
            return at - start
        return WAIT

    try:
        return await asyncio.wait_for(ask(), WAIT)
    except asyncio.TimeoutError:
        return WAIT


async def read_stream(session: aiohttp.ClientSession, times: list[float]) -> None:
    """Read one long answer after another; NaN stands between two of them."""
    while True:
        async for at in chunks(session, f"{STORY} ({next(_numbers)})", 4000):
            times.append(at)
        times.append(float("nan"))


def gaps(times: list[float]) -> list[float]:
    """Milliseconds between the pieces of an answer."""
    return [1000 * (b - a) for a, b in itertools.pairwise(times) if b - a == b - a] or [float("inf")]


def rss(pid: int) -> float:
    """Resident megabytes of a process."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return 0.0


def worker_of(api: int) -> int:
    """The process of the first worker, a child of the api process."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int(path.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            if parent == api and b"worker0" in path.joinpath("cmdline").read_bytes():
                return int(path.name)
    raise RuntimeError("the server has no worker")


class Neighbour:
    """A client with a stream and questions, and an eye on the server's memory."""

    def __init__(self, session: aiohttp.ClientSession, api: int) -> None:
        self._session = session
        self._pids = {"api": api, "worker": worker_of(api)}

    async def live(self, seconds: float) -> dict[str, Any]:
        """Read the stream and ask for so many seconds, and at least QUESTIONS unless they take more than WAIT together."""
        times: list[float] = []
        stream = asyncio.create_task(read_stream(self._session, times))
        memory = asyncio.create_task(self._watch())
        end = time.monotonic() + seconds
        firsts: list[float] = []
        try:
            while time.monotonic() < end or (len(firsts) < QUESTIONS and sum(firsts) < WAIT):
                firsts.append(await first_token(self._session))
                await asyncio.sleep(0.2)
        finally:
            stream.cancel()
            memory.cancel()
            ends = await asyncio.gather(stream, memory, return_exceptions=True)
        for e in ends:
            if isinstance(e, Exception):
                raise e
        if time.monotonic() - times[-1] > 1:
            times.append(time.monotonic())  # a gap that has no end yet
        found = gaps(times)
        return {
            "first_token_s": round(max(firsts), 3),
            "gap_ms": round(max(found), 1),
            "itl_ms": round(statistics.median(found), 1),
            "questions": len(firsts),
            "rss_mb": {name: round(value) for name, value in self._rss.items()},
        }

    async def _watch(self) -> None:
        self._rss = dict.fromkeys(self._pids, 0.0)
        while True:
            for name, pid in self._pids.items():
                self._rss[name] = max(self._rss[name], rss(pid))
            await asyncio.sleep(0.1)

    async def until_quiet(self) -> None:
        """Wait until the server has nothing to do, and empty its cache."""
        for _ in range(600):
            async with self._session.get("/server_info") as response:
                if not (await response.json())["open_requests"]:
                    break
            await asyncio.sleep(0.2)
        await (await self._session.post("/flush_cache", json={})).release()


@contextlib.asynccontextmanager
async def load(url: str, name: str, same: bool) -> AsyncIterator[dict[str, Any]]:
    """The load, while the body runs; afterwards the answers that it got."""
    answers: dict[str, Any] = {}
    address = "127.0.0.1" if same else "127.0.0.2"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "scripts.lib.loads", url, name, address, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield answers
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            out, _ = await asyncio.wait_for(process.communicate(), 30)
            answers.update(json.loads(out or b"{}"))
        except asyncio.TimeoutError:
            process.kill()
            await process.wait()


async def measure(url: str, names: list[str], seconds: float, same: bool) -> bool:
    """Print a line for each load; returns whether all are within the limits."""
    failed = []
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=None)) as session:
        async with session.get("/server_info") as response:
            neighbour = Neighbour(session, (await response.json())["pid"])
        await neighbour.live(3)  # pages are touched, the cost model has seen some steps
        await neighbour.until_quiet()
        alone = await neighbour.live(seconds)
        print(json.dumps({"check": "neighbours", "load": "none", **alone, **provenance()}), flush=True)
        for name in names:
            await neighbour.until_quiet()
            async with load(url, name, same) as answers:
                await asyncio.sleep(2)  # it starts
                found = await neighbour.live(seconds)
            limits = {"first_token_s": alone["first_token_s"] + 1, "gap_ms": alone["gap_ms"] + 100}
            ok = all(found[key] <= most for key, most in limits.items())
            failed += [] if ok else [name]
            more = {"alone": {key: alone[key] for key in ("first_token_s", "gap_ms", "itl_ms")}, "answers": answers, "ok": ok}
            print(json.dumps({"check": "neighbours", "load": name, **found, **more, **provenance()}), flush=True)
    print(json.dumps({"check": "neighbours", "ok": not failed, "failed": failed}), flush=True)
    return not failed


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("loads", nargs="*", default=list(LOADS), metavar="LOAD", help=f"of {', '.join(LOADS)}")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--same", action="store_true", help="the load comes from the neighbour's address")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:at])
    if unknown := [name for name in args.loads if name not in LOADS]:
        parser.error(f"no load is called {unknown[0]!r}; there are {', '.join(LOADS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server ends with us
    with tempfile.TemporaryDirectory() as data, live_server("--device", "cpu", "--data-dir", data, *sys.argv[at + 1 :]) as url:
        return 0 if asyncio.run(measure(url, args.loads, args.seconds, args.same)) else 1


if __name__ == "__main__":
    sys.exit(main())
