"""What it costs to look: throughput, CPU time of each process and bytes a second, with an observer and without, in turns.

    .venv/bin/python scripts/bench/observers.py [page trace journal] [--model fake] [--turns 3] [--seconds 5] [--clients 128]

page      a reader of GET /debug/live, as the page is one
trace     POST /debug/trace
journal   POST /debug/journal/start, with hashes

One server, all processes real.  Clients in this process keep it busy in a closed loop: each sends its next request when it has
its answer.  A turn is a window without the observer, one with it, and one without: it is compared with the mean of the windows
around it, so that a machine that grows slower meanwhile does not count.  `apart`: the largest step from one window without an
observer to the next, which is what no change at all looks like.

On a machine with other work throughput says little.  CPU time for each generated token does: what api, scheduler and the others
pay is what the engine loses where processors are short.  The viewer process of the page is beside them: it has the lowest
priority (nice 19) and a processor of its own where there is one.  The fake engine computes nothing, so a share of its time is
many times that of a model's.  One JSON line per measure.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from typing import Any

import aiohttp

from scripts.bench.api import Server, report
from scripts.lib.reference import provenance

_HOST = {"Host": "localhost"}
_WARM = 1.5  # seconds before a window counts: requests spread out, a viewer starts
_OURS = ("api", "tokenizer", "detokenizer", "scheduler", "worker0")


class Load:
    """Clients in a closed loop.  `tokens`: generated so far."""

    def __init__(self, session: aiohttp.ClientSession, url: str, clients: int) -> None:
        self.tokens = self.answers = 0
        self._session, self._url = session, url
        self._tasks = [asyncio.create_task(self._client(i)) for i in range(clients)]

    async def _client(self, i: int) -> None:
        """Prompts with a common beginning of 64 tokens, and answers of 40 to 103 tokens."""
        common, n = [5 + k % 190 for k in range(64)], 0
        while True:
            n += 1
            body = {"prompt": common + [5 + (i * 31 + n * 7 + k) % 190 for k in range(32)], "ignore_eos": True}
            body["max_tokens"] = 40 + (i * 13 + n * 29) % 64
            async with self._session.post(f"{self._url}/v1/completions", json=body) as answer:
                if answer.status != 200:
                    raise RuntimeError(await answer.text())
                self.tokens += (await answer.json())["usage"]["completion_tokens"]
                self.answers += 1

    def check(self) -> None:
        """Raises what a client has raised."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Page:
    """A reader of the stream.  `size`: bytes, `updates`: events so far."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.size = self.updates = 0
        self._begun = asyncio.Event()  # the engine is shown
        self._task = asyncio.create_task(self._read(session, url))

    async def _read(self, session: aiohttp.ClientSession, url: str) -> None:
        async with session.get(f"{url}/debug/live", timeout=aiohttp.ClientTimeout(None)) as stream:
            async for piece in stream.content.iter_any():
                self.size += len(piece)
                self.updates += piece.count(b"\n\n")
                if b'{"change":' in piece:
                    self._begun.set()

    async def begun(self, seconds: float) -> bool:
        """Whether the engine is shown within so many seconds."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._begun.wait(), seconds)
        return self._begun.is_set()

    async def close(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task


class Posted:
    """What is begun by one POST, and ended by another, or by itself."""

    size = updates = 0

    def __init__(self, session: aiohttp.ClientSession, begin: tuple[str, Any], end: tuple[str, Any] | None) -> None:
        self._session, self._end = session, end
        self._task = asyncio.create_task(self._post(*begin))

    async def _post(self, url: str, body: Any) -> None:
        async with self._session.post(url, json=body) as answer:
            said = await answer.read()
            if answer.status != 200:
                raise RuntimeError(said.decode(errors="replace"))
            self.size += len(said)

    async def begun(self, seconds: float) -> bool:
        if self._end is None:
            await asyncio.sleep(0.5)
            return not self._task.done()
        await self._task
        return True

    async def close(self) -> None:
        await self._task
        if self._end is not None:
            await self._post(*self._end)


def observer(kind: str, session: aiohttp.ClientSession, url: str, turn: int, seconds: float) -> Page | Posted:
    if kind == "page":
        return Page(session, url)
    if kind == "trace":
        return Posted(session, (f"{url}/debug/trace?seconds={seconds + _WARM + 2:g}", None), None)
    begin = f"{url}/debug/journal/start", {"name": f"bench{turn}"}
    return Posted(session, begin, (f"{url}/debug/journal/stop", {}))


async def window(s: Server, load: Load, seconds: float, page: Page | Posted | None) -> dict[str, Any]:
    """What was generated in so many seconds, and what it took."""
    await asyncio.sleep(_WARM)
    load.check()
    s = Server(s.address[1], s.pids["api"])  # with the viewer, if it is there
    cpu, tokens, start = s.cpu(), load.tokens, time.perf_counter()
    size, updates = (page.size, page.updates) if page is not None else (0, 0)
    await asyncio.sleep(seconds)
    load.check()
    wall, after, said = time.perf_counter() - start, s.cpu(), load.tokens - tokens
    found: dict[str, Any] = {name: 1e6 * (after[name] - cpu[name]) / said for name in cpu}
    found["engine"] = sum(found[name] for name in _OURS)
    found["rate"] = said / wall
    if page is not None:
        found |= {"bytes": (page.size - size) / wall, "updates": (page.updates - updates) / wall}
    return found


async def measure(s: Server, kind: str, args: argparse.Namespace) -> None:
    url = "http://{}:{}".format(*s.address)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=_HOST) as session:
        load = Load(session, url, args.clients)
        await asyncio.sleep(2.0)
        looked: list[dict[str, Any]] = []
        windows = [await window(s, load, args.seconds, None)]
        for turn in range(args.turns):
            looking = observer(kind, session, url, turn, args.seconds)
            begun = await looking.begun(
                10
            )  # where processors are short a viewer may never come to that: the others pay as much
            looked.append(await window(s, load, args.seconds, looking) | {"begun": begun})
            await looking.close()
            while "viewer" in Server(s.address[1], s.pids["api"]).pids:  # it lingers  # noqa: ASYNC110
                await asyncio.sleep(0.5)
            windows.append(await window(s, load, args.seconds, None))
        await load.close()

    def ratios(name: str) -> list[float]:
        around = [(a[name] + b[name]) / 2 for a, b in itertools.pairwise(windows)]
        return [round(one[name] / base, 3) if base else 1.0 for one, base in zip(looked, around, strict=True)]

    def apart(name: str) -> float:
        return float(max(round(max(a[name], b[name]) / min(a[name], b[name]), 3) for a, b in itertools.pairwise(windows)))

    def middle(rows: list[dict[str, Any]], name: str) -> float:
        return float(statistics.median(row.get(name, 0.0) for row in rows))

    config = {"model": args.model, "clients": args.clients, "turns": args.turns, "seconds": args.seconds}
    each = ratios("rate")
    config |= {"each": each, "apart": apart("rate"), "tokens_per_s": round(middle(windows, "rate"))}
    report(f"{kind}_throughput", round(statistics.median(each), 4), "x", ">= 0.98", **config)
    each, text = ratios("engine"), "x of the engine's CPU time a token"
    report(f"{kind}_cpu_engine", round(statistics.median(each), 4), text, "<= 1.02", each=each, apart=apart("engine"))
    for name in (*_OURS, *(["viewer"] if kind == "page" else [])):
        without, with_ = round(middle(windows, name), 2), round(middle(looked, name), 2)
        report(f"{kind}_cpu_{name}", round(with_ - without, 2), "us of CPU time a token", "", without=without, with_it=with_)
    if kind == "page":
        updates = round(middle(looked, "updates"), 1)
        size, shown = round(middle(looked, "bytes")), all(one["begun"] for one in looked)
        report("page_bytes", size, "bytes/s", "<= 1000000", updates_per_s=updates, shown=shown)


async def served(args: argparse.Namespace, folder: str) -> int:
    flags = [
        *(["--model", args.model] if args.model else []),
        "--data-dir",
        folder,
        "--port",
        "0",
        "--max-running",
        str(args.clients),
        "--step-tokens",
        "2048",
    ]
    flags += ["--kv-tokens", str(1 << 18), "--max-open-requests", str(4 * args.clients)]
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "minisgl", "serve", *flags]
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        try:
            port = await _port(process, log)
            ready = Server(port, process.pid)
            while b"200" not in ready.get("/ready").split(b"\r\n", 1)[0]:  # noqa: ASYNC110 - a process, not an event
                await asyncio.sleep(0.1)
            for kind in args.observers:
                await measure(Server(port, process.pid), kind, args)
            return 0
        except Exception:
            log.seek(0)
            sys.stderr.write(log.read()[-4000:])
            raise
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()


async def _port(process: asyncio.subprocess.Process, log: Any) -> int:
    """Where the server listens, which it says when it does.  Raises RuntimeError if it ends."""
    while process.returncode is None:
        log.seek(0)
        found = [line.split("http://127.0.0.1:")[1] for line in log.read().splitlines() if "http://127.0.0.1:" in line]
        if found:
            return int("".join(c for c in found[0].split("/")[0].split()[0] if c.isdigit()))
        await asyncio.sleep(0.1)
    raise RuntimeError("the server has ended")


def main() -> int:
    p = argparse.ArgumentParser(description="What it costs to look.", allow_abbrev=False)
    p.add_argument("observers", nargs="*", default=["page", "trace", "journal"], help="page, trace, journal; default: all")
    p.add_argument("--model", default="fake", help="what the server serves; an empty word: the embedded model")
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--seconds", type=float, default=5.0, help="of a window")
    p.add_argument("--clients", type=int, default=128)
    args = p.parse_args()
    print(json.dumps({"provenance": provenance()}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(served(args, folder))


if __name__ == "__main__":
    sys.exit(main())
