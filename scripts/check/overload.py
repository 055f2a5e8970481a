"""What a crowd costs: how fast requests are refused, and what those notice who are served already.

    .venv/bin/python scripts/check/overload.py [--requests 10000] [--floods 3] [--model fake] [-- flags of the server]

Starts the server (the fake engine: what is measured is the api process), reads four streams, and opens REQUESTS requests at
once from another process and another address, FLOODS times, each time another one.  Meanwhile a third client asks short
questions, one after another.  One JSON line a flood:

refused_p50_ms, refused_p99_ms   from the last byte sent to the first byte of a refusal, the ways through the kernel included
last_refusal_s                   from the flood's first connection to its last refusal; `opened_s`: to its last connection
pause_ms                         the longest time between two pieces of one of the four streams; `alone_ms` before the floods
cpu_s, refusal_us                CPU time of the api process until the last refusal; for each refusal, without the streams'
third                            the answers to the third client by status, and the longest time that one took
rss_mb                           memory of the api process after the flood
ok                               refusals are 429, the last within 3 s, and no pause was 100 ms longer than the longest alone

The last line says whether all were, and whether memory grew by less than GROWTH_MB from the first flood to the last.  The time
of this machine is measured, so nothing else should run on it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import signal
import sys
import time
from collections import Counter
from typing import Any

import aiohttp

from scripts.check.neighbours import gaps, read_stream, rss
from scripts.lib.flood import REFUSED, cpu_seconds
from scripts.lib.live_server import live_server
from scripts.lib.reference import provenance

STREAMS, ALONE_SECONDS, REST_SECONDS = 4, 5.0, 2.0
LAST_SECONDS, PAUSE_MS, GROWTH_MB = 3.0, 100.0, 20.0
FLAGS = ("--max-running", "16", "--max-queue", "64")
SHORT = {"prompt": "Hello", "max_tokens": 1}


def session(url: str, address: str) -> aiohttp.ClientSession:
    """A client that sits at an address of its own."""
    connector = aiohttp.TCPConnector(limit=0, local_addr=(address, 0))
    return aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=None), connector=connector)


async def ask(third: aiohttp.ClientSession, answers: Counter[str], slowest: list[float]) -> None:
    """Short questions, one after another, until it is cancelled."""
    while True:
        start = time.monotonic()
        async with third.post("/v1/completions", json=SHORT) as response:
            await response.read()
            answers[str(response.status)] += 1
        slowest[0] = max(slowest[0], time.monotonic() - start)
        await asyncio.sleep(0.05)


async def flood(url: str, requests: int, address: str, pid: int) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scripts.lib.flood", url, str(requests), address, str(pid)), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    found: dict[str, Any] = json.loads(out)
    return found


def begin(times: list[list[float]]) -> None:
    """Look at what the streams do from now on."""
    for stream in times:
        del stream[:-1]


def pieces(times: list[list[float]], until: float = float("inf")) -> int:
    """How many the streams have got since `begin`."""
    return sum(t <= until for stream in times for t in stream[1:])


def longest(times: list[list[float]]) -> float:
    """Milliseconds of the longest gap in any of the streams since `begin`, one that has no end yet included."""
    return max(max(gaps([*stream, time.monotonic()])) for stream in times)


async def measure(url: str, requests: int, floods: int, flags: list[str]) -> bool:
    """Print a line for each flood; returns whether all are within the limits."""
    made = {"requests": requests, "flags": flags, **provenance()}
    async with session(url, "127.0.0.1") as first, session(url, "127.0.0.3") as third:
        async with first.get("/server_info") as response:
            api = (await response.json())["pid"]
        times: list[list[float]] = [[] for _ in range(STREAMS)]
        tasks = [asyncio.create_task(read_stream(first, t)) for t in times]
        while not all(times):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        begin(times)
        cpu = cpu_seconds(api)
        await asyncio.sleep(ALONE_SECONDS)
        piece = (cpu_seconds(api) - cpu) / pieces(times)  # seconds of a core
        alone, oks, memory = longest(times), list[bool](), [rss(api)]
        for i in range(floods):
            answers, slowest = Counter[str](), [0.0]
            asking = asyncio.create_task(ask(third, answers, slowest))
            begin(times)
            found = await flood(url, requests, f"127.0.{i + 1}.2", api)
            pause = longest(times)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await asyncio.sleep(REST_SECONDS)
            memory.append(rss(api))
            served = "429" in found["answers"] and set(found["answers"]) <= {"200", "429", "admitted"}
            of_streams = piece * pieces(times, found.pop("until"))
            refused = sum(found["answers"].get(status, 0) for status in REFUSED)
            ok = served and found["last_refusal_s"] <= LAST_SECONDS and pause <= alone + PAUSE_MS
            oks.append(ok)
            more = {
                "refusal_us": round(1e6 * (found["cpu_s"] - of_streams) / max(1, refused)),
                "pause_ms": round(pause, 1),
                "alone_ms": round(alone, 1),
                "third": {"answers": dict(answers), "slowest_s": round(slowest[0], 3)},
                "rss_mb": round(memory[-1], 1),
                "ok": ok,
            }
            print(json.dumps({"check": "overload", **found, **more, **made}), flush=True)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    flat = memory[-1] - memory[min(1, len(memory) - 1)] < GROWTH_MB
    print(json.dumps({"check": "overload", "ok": all(oks) and flat, "rss_mb": [round(m, 1) for m in memory]}), flush=True)
    return all(oks) and flat


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--floods", type=int, default=3)
    parser.add_argument("--model", default="fake")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:at])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server ends with us
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the server's, too
    flags = ["--model", args.model, *FLAGS, *sys.argv[at + 1 :]]
    with live_server(*flags) as url:
        return 0 if asyncio.run(measure(url, args.requests, args.floods, flags)) else 1


if __name__ == "__main__":
    sys.exit(main())
