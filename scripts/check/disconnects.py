"""How long the pages of a client that leaves are taken: from its close to /server_info showing that nothing of it is left.

    .venv/bin/python scripts/check/disconnects.py [--engine fake cpu] [--times 20]

Starts a server that runs one request at a time (fake engine; embedded model on the CPU).  For streamed and plain requests,
closes the connection of one that is decoding, of one whose prompt is being computed, and of one that is queued behind another,
which leaves with it, so many times each.  One JSON line a case: p50_ms and max_ms, which include the way of the statistics to
the api process, and that of the question.  The steps in flight that use the pages need not end for it: workers run plans in
order, so a new owner writes later.  The last line says whether all were below the limit (100 ms).  The time of this machine is
measured, so nothing else should run on it.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from scripts.lib.live_server import live_server
from scripts.lib.reference import provenance

LIMIT_MS = 100.0
WAIT = 60.0  # seconds for anything to happen
FLAGS = {
    "fake": ("--model", "fake", "--max-running", "1", "--step-tokens", "16"),
    "cpu": ("--max-running", "1"),
}
PROMPT = {"fake": 7000, "cpu": 6000}  # tokens of a prompt that takes a while
PAUSE = {"fake": 0.02, "cpu": 0.4}  # seconds in which a request comes to its phase; whether it has is looked at afterwards
PHASES = ("decoding", "prefilling", "queued")
Stats = dict[str, int]


class Server:
    """Asks the server for its statistics, over one connection, and opens requests, each over its own."""

    def __init__(self, url: str) -> None:
        self._host = url.partition("://")[2]
        self._asked = http.client.HTTPConnection(self._host, timeout=WAIT)

    def stats(self) -> Stats:
        found: Stats = self._info()["stats"]
        return found

    def _info(self) -> Any:
        self._asked.request("GET", "/server_info")
        return json.loads(self._asked.getresponse().read())

    def until_open(self, requests: int) -> None:
        """Ask until so many requests have been taken."""
        end = time.monotonic() + WAIT
        while self._info()["open_requests"] < requests:
            if time.monotonic() > end:
                raise TimeoutError("a request has not been taken")

    def until(self, fact: Callable[[Stats], bool]) -> Stats:
        """Ask again and again until the statistics are so.  Raises TimeoutError."""
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            if fact(stats := self.stats()):
                return stats
            time.sleep(0.0005)
        raise TimeoutError(f"it never happened: {stats}")

    def ask(self, stream: bool, prompt: int) -> http.client.HTTPConnection:
        """Send a request with a prompt of so many tokens that nobody has sent before."""
        ids = [random.randrange(100, 8000) for _ in range(prompt)]
        body = {"prompt": ids, "max_tokens": 1000, "ignore_eos": True, "stream": stream}
        connection = http.client.HTTPConnection(self._host, timeout=WAIT)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection


def quiet(stats: Stats) -> bool:
    """Whether no request is there, and every page is free or only cached."""
    left = stats["running_requests"] + stats["waiting_requests"]
    return not left and stats["free_pages"] + stats["cached_pages"] == stats["total_pages"]


def leave(server: Server, engine: str, phase: str, stream: bool) -> float | None:
    """Milliseconds from the close of a request in a phase until nothing of it is left; None: it was not in that phase."""
    before = server.until(quiet)
    opened = [server.ask(stream, 8 if phase == "decoding" else PROMPT[engine])]
    if phase == "queued":  # what is queued behind it has the same prompt, and would run for as long
        opened.insert(0, server.ask(stream, PROMPT[engine]))
    server.until_open(len(opened))
    time.sleep(PAUSE[engine])
    start = time.monotonic()
    for connection in opened:
        connection.close()
    # Statistics of before look the same.  A request that was never admitted had no pages, and is not counted.
    after = server.until(lambda s: quiet(s) and (s["admitted"] > before["admitted"] or time.monotonic() > start + 2))
    took = 1000 * (time.monotonic() - start)
    said, read = (after[name] - before[name] for name in ("decode_tokens", "prefill_tokens"))
    was = 0 < said < 900 if phase == "decoding" else read > 0 and said == 0
    return took if was else None


def measure(url: str, engine: str, times: int) -> bool:
    """Print a line for each case; returns whether all are below the limit."""
    server, ok = Server(url), True
    for stream, phase in itertools.product((True, False), PHASES):
        found: list[float] = []
        missed = 0
        while len(found) < times:
            took = leave(server, engine, phase, stream)
            if took is None:
                missed += 1
                if missed > 20 * times:
                    raise RuntimeError(f"requests are hardly ever {phase} when they should be")
            else:
                found.append(took)
        case: dict[str, Any] = {"check": "disconnects", "engine": engine, "stream": stream, "phase": phase, "times": times}
        case |= {"p50_ms": round(statistics.median(found), 1), "max_ms": round(max(found), 1)}
        ok &= max(found) < LIMIT_MS
        print(json.dumps(case | {"load": os.getloadavg()[0], **provenance()}), flush=True)
    return ok


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", nargs="+", default=list(FLAGS), choices=FLAGS)
    parser.add_argument("--times", type=int, default=20, metavar="N", help="of each case (%(default)s)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server ends with us
    results = {}
    for engine in args.engine:
        with live_server("--device", "cpu", *FLAGS[engine]) as url:
            results[engine] = measure(url, engine, args.times)
    ok = all(results.values())
    print(json.dumps({"check": "disconnects", "ok": ok, "limit_ms": LIMIT_MS}), flush=True)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
