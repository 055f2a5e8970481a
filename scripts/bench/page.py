"""What an open page costs: throughput, CPU time of each process and bytes a second, with one page and without, in turns.

    .venv/bin/python scripts/bench/page.py [--turns 3] [--seconds 5] [--clients 128]

One server with the fake engine, all processes real.  Clients in this process keep it busy in a closed loop: each sends its next
request when it has its answer.  The page is a reader of GET /debug/live, as the real one is.  A turn is a window without a
page, one with it, and one without: the page is compared with the mean of the windows around it, so that a machine that grows
slower meanwhile does not count.

On a machine with other work throughput says little.  CPU time for each generated token does: what api, scheduler and the others
pay is what the engine loses where processors are short.  Both are only comparable at the same load: where throughput falls for
another reason batches are smaller, and every process takes more for a token, worker0 too, which knows nothing of a page.  The
viewer process is beside them: it has the lowest priority (nice 19) and a processor of its own where there is one.
One JSON line per measure.
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
        self.begun = asyncio.Event()  # the engine is shown
        self._task = asyncio.create_task(self._read(session, url))

    async def _read(self, session: aiohttp.ClientSession, url: str) -> None:
        async with session.get(f"{url}/debug/live", timeout=aiohttp.ClientTimeout(None)) as stream:
            async for piece in stream.content.iter_any():
                self.size += len(piece)
                self.updates += piece.count(b"\n\n")
                if b'{"change":' in piece:
                    self.begun.set()

    async def shows(self, seconds: float) -> bool:
        """Whether the engine is shown within so many seconds."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.begun.wait(), seconds)
        return self.begun.is_set()

    async def close(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task


async def window(s: Server, load: Load, seconds: float, page: Page | None) -> dict[str, Any]:
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


async def measure(s: Server, args: argparse.Namespace) -> None:
    url = "http://{}:{}".format(*s.address)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=_HOST) as session:
        load = Load(session, url, args.clients)
        await asyncio.sleep(2.0)
        pages: list[dict[str, Any]] = []
        windows = [await window(s, load, args.seconds, None)]
        for _ in range(args.turns):
            page = Page(session, url)
            shown = await page.shows(10)  # where processors are short the viewer may never come to that: the others pay as much
            pages.append(await window(s, load, args.seconds, page) | {"shown": shown})
            await page.close()
            while "viewer" in Server(s.address[1], s.pids["api"]).pids:  # it lingers  # noqa: ASYNC110
                await asyncio.sleep(0.5)
            windows.append(await window(s, load, args.seconds, None))
        await load.close()

    def ratios(name: str) -> list[float]:
        around = [(a[name] + b[name]) / 2 for a, b in itertools.pairwise(windows)]
        return [page[name] / base if base else 1.0 for page, base in zip(pages, around, strict=True)]

    def middle(rows: list[dict[str, Any]], name: str) -> float:
        return float(statistics.median(row.get(name, 0.0) for row in rows))

    config = {"clients": args.clients, "turns": args.turns, "seconds": args.seconds}
    rate = round(middle(windows, "rate"))
    each = [round(r, 3) for r in ratios("rate")]
    report("page_throughput", round(statistics.median(each), 4), "x", ">= 0.98", each=each, tokens_per_s=rate, **config)
    each = [round(r, 3) for r in ratios("engine")]
    text = "x of the engine's CPU time a token"
    report("page_cpu_engine", round(statistics.median(each), 4), text, "<= 1.02", each=each)
    for name in (*_OURS, "viewer"):
        without, with_ = round(middle(windows, name), 2), round(middle(pages, name), 2)
        report(f"page_cpu_{name}", round(with_ - without, 2), "us of CPU time a token", "", without=without, with_page=with_)
    report(
        "page_bytes",
        round(middle(pages, "bytes")),
        "bytes/s",
        "<= 1000000",
        updates_per_s=round(middle(pages, "updates"), 1),
        shown=all(page["shown"] for page in pages),
    )


async def served(args: argparse.Namespace) -> int:
    flags = ["--model", "fake", "--port", "0", "--max-running", str(args.clients), "--step-tokens", "2048"]
    flags += ["--kv-tokens", str(1 << 18), "--max-open-requests", str(4 * args.clients)]
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "minisgl", "serve", *flags]
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        try:
            port = await _port(process, log)
            ready = Server(port, process.pid)
            while b"200" not in ready.get("/ready").split(b"\r\n", 1)[0]:  # noqa: ASYNC110 - a process, not an event
                await asyncio.sleep(0.1)
            await measure(Server(port, process.pid), args)
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
    p = argparse.ArgumentParser(description="What an open page costs.", allow_abbrev=False)
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--seconds", type=float, default=5.0, help="of a window")
    p.add_argument("--clients", type=int, default=128)
    args = p.parse_args()
    print(json.dumps({"provenance": provenance()}), flush=True)
    return asyncio.run(served(args))


if __name__ == "__main__":
    sys.exit(main())
