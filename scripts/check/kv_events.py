"""Whether a router's index knows the prefix cache: random inserts, evictions and flushes are published, and queries compared.

    .venv/bin/python scripts/check/kv_events.py --indexer dynamo --python VENV/bin/python [--changes 10000] [--format array]

`--python`: an interpreter with `pip install ai-dynamo-runtime==1.6.1`, whose `dynamo.indexer` is started here.  The tree is the
real one, over pages that outlive it, and its events go through the real publisher.  Every 50 changes some prompts are looked up
on both sides.  A third of the way the indexer is killed and another one started, which comes late; at two thirds the scheduler:
another one takes over its pages, with a publisher of its own.  Exit code 1 names the first difference.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import zmq

from minisgl.actors.scheduler.interface import Output, SchedulerLimits
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.cache.kept import KeptPages
from minisgl.config import ServerConfig
from minisgl.deploy.program import free_port
from minisgl.events.publisher import Publisher

PAGE, PAGES, EVERY, SECONDS = 16, 600, 50, 1.0


class Sockets:
    """Makes sockets as the context of an actor does."""

    def __init__(self) -> None:
        self.zmq = zmq.Context()

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        return self.zmq.socket(kind)


class Server:
    """A scheduler's tree and its publisher, driven from here.  `memory`: of its pages."""

    def __init__(self, server: ServerConfig, memory: bytearray) -> None:
        self.sockets = Sockets()
        self.kept = KeptPages(PAGES, PAGE, memoryview(memory))
        sizes: dict[str, Any] = {"slots": 4, "num_pages": PAGES, "page_size": PAGE, "max_context": 4096, "step_tokens": 512}
        self.machine = StepMachine(SchedulerLimits(**sizes, max_steps_in_flight=2, vocab_size=50_000), self.kept)
        self.publisher = Publisher(self.sockets, server)  # type: ignore[arg-type]
        self.publisher.begin(self.machine)

    def tell(self) -> None:
        """As the scheduler after a step: all that was planned is in the ring."""
        self.kept.planned += 1
        self.kept.published[0] = self.kept.planned
        self.publisher.saw([], time.monotonic(), Output())

    def insert(self, ids: np.ndarray) -> None:
        cache, pool = self.machine.cache, self.machine.pool
        match = cache.match(ids)
        handle, found = cache.acquire(match)
        want = len(ids) // PAGE - len(found)
        if want > pool.free:
            pool.release(cache.evict(want - pool.free))
        pages = pool.alloc(min(want, pool.free))
        rest = ids[len(found) * PAGE : (len(found) + len(pages)) * PAGE]
        self.kept.ids[pages] = rest.reshape(-1, PAGE)
        handle, _, duplicates = cache.extend(handle, rest, pages)
        pool.release(duplicates)
        cache.release(handle)

    def cached(self, ids: np.ndarray) -> int:
        """Whole blocks of a prompt that are there, the last token included."""
        return self.machine.cache.match(np.append(ids, np.int32(0))).num_pages

    def close(self) -> None:
        self.sockets.zmq.destroy(linger=0)


class Dynamo:
    """`dynamo.indexer` as a process."""

    def __init__(self, python: str, server: ServerConfig) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([python, "-m", "dynamo.indexer", "--port", str(port)], **quiet)  # type: ignore[call-overload]
        facts = {"instance_id": 1, "endpoint": server.kv_events, "replay_endpoint": server.kv_events_replay}
        body = {**facts, "model_name": "m", "block_size": PAGE}
        for _ in range(300):
            try:
                self.ask("/register", body)
                return
            except urllib.error.URLError:
                time.sleep(0.1)
        raise SystemExit("the indexer has not started")

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def cached(self, ids: np.ndarray) -> int:
        """Whole blocks of a prompt that it believes to be there."""
        got = self.ask("/query", {"token_ids": ids.tolist(), "model_name": "m"})
        return int(got["scores"].get("1", {}).get("0", 0)) // PAGE

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)


class Traffic:
    """Prompts with common beginnings."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.past: list[np.ndarray] = []

    def prompt(self) -> np.ndarray:
        new = np.array([self.rng.randrange(50_000) for _ in range(PAGE * self.rng.randrange(1, 12))], np.int32)
        if self.past and self.rng.random() < 0.7:
            old = self.rng.choice(self.past[-200:])
            new = np.concatenate([old[: PAGE * self.rng.randrange(1, len(old) // PAGE + 1)], new])[: PAGE * 40]
        self.past.append(new)
        return new


def difference(server: Server, indexer: Dynamo, prompts: list[np.ndarray]) -> str:
    """What the indexer does not know after SECONDS; "" if it agrees."""
    end, found = time.monotonic() + SECONDS, ""
    while True:
        wrong = [
            (len(p) // PAGE, server.cached(p), theirs) for p in prompts if server.cached(p) != (theirs := indexer.cached(p))
        ]
        if not wrong:
            return ""
        found = "; ".join(
            f"a prompt of {n} blocks: {ours} in the tree, {theirs} by the indexer" for n, ours, theirs in wrong[:3]
        )
        if time.monotonic() > end:
            return found
        server.publisher.saw([], time.monotonic(), Output())
        time.sleep(0.02)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--indexer", choices=("dynamo",), default="dynamo")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--changes", type=int, default=10_000)
    parser.add_argument("--format", choices=("map", "array"), default="map")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    addresses: dict[str, Any] = {name: f"tcp://127.0.0.1:{free_port()}" for name in ("kv_events", "kv_events_replay")}
    config, memory = ServerConfig(**addresses, kv_events_format=args.format), bytearray(KeptPages.size(PAGES, PAGE))
    server, traffic, fault, looked = Server(config, memory), Traffic(args.seed), "", 0
    done = dict.fromkeys(("insert", "evict", "flush"), 0)
    indexer, late = Dynamo(args.python, config), dict[str, Any]()
    try:
        for i in range(1, args.changes + 1):
            draw = traffic.rng.random()
            kind = "insert" if draw < 0.8 else "evict" if draw < 0.998 else "flush"
            done[kind] += 1
            if kind == "insert":
                server.insert(traffic.prompt())
            else:
                cache = server.machine.cache
                server.machine.pool.release(cache.flush() if kind == "flush" else cache.evict(traffic.rng.randrange(1, 60)))
            server.tell()
            if i == args.changes // 3:
                indexer.close()
                indexer = Dynamo(args.python, config)
            if i == args.changes * 2 // 3:
                server.close()
                server = Server(config, memory)
            if i in (args.changes // 3, args.changes * 2 // 3):
                start = time.monotonic()
                fault = difference(server, indexer, traffic.past[-100:])
                late["indexer" if len(late) == 0 else "scheduler"] = round(time.monotonic() - start, 2)
            elif i % EVERY == 0 or i == args.changes:
                fault = difference(server, indexer, traffic.rng.sample(traffic.past[-200:], min(10, len(traffic.past))))
            looked += 10 * (i % EVERY == 0)
            if fault:
                print(f"after change {i} ({kind}): {fault}")
                return 1
        every = traffic.past[-200:]
        fault = difference(server, indexer, every)
        facts = {**done, "queries": looked + len(every) + 200, "pages": server.machine.cache.num_pages, "right_again_s": late}
        print(json.dumps({"check": "kv_events", "indexer": args.indexer, "format": args.format, **facts, "fault": fault}))
        return 1 if fault else 0
    finally:
        indexer.close()
        server.close()


if __name__ == "__main__":
    sys.exit(main())
