"""What KV events cost: CPU time of a step that stores 16 pages and of one that changes nothing, and of all processes.

    .venv/bin/python scripts/bench/kv_events.py [--turns 5]

One JSON line per measure: measure, value, unit, must (the bound we hold ourselves to), config.  Steps are of the scheduler's
thread, median over calls, with a subscriber that reads; the throughput is that of the fake engine per CPU second of all its
processes, with events and without by turns, both engines alive.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from minisgl.actors.scheduler.interface import Output, SchedulerLimits
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.api.engine import TokenPrompt
from minisgl.api.system import System
from minisgl.cache.kept import NONE
from minisgl.config import Config, EngineConfig, ServerConfig
from minisgl.events.publisher import Publisher
from minisgl.events.wire import FORMS
from minisgl.model.checkpoint.resolve import resolve
from minisgl.sampling_params import SamplingParams
from scripts.lib.reference import provenance

PAGE, PAGES, VOCAB, CALLS = 16, 4096, 150_000, 4000
RNG = np.random.default_rng(0)


def report(measure: str, value: float, unit: str, must: str, **config: object) -> None:
    print(json.dumps({"measure": measure, "value": round(value, 4), "unit": unit, "must": must, "config": config}), flush=True)


def address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"tcp://127.0.0.1:{sock.getsockname()[1]}"


class Sockets:
    """Makes sockets as the context of an actor does."""

    def __init__(self) -> None:
        self.zmq = zmq.Context()

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        return self.zmq.socket(kind)


DRAIN = """
import sys, zmq
sub = zmq.Context().socket(zmq.SUB)
sub.setsockopt(zmq.SUBSCRIBE, b"")
sub.connect(sys.argv[1])
while True:
    sub.recv_multipart()
"""


def subscriber(where: str) -> subprocess.Popen[bytes]:
    """A process that reads all that is published there."""
    return subprocess.Popen([sys.executable, "-c", DRAIN, where])


def machine() -> StepMachine:
    return StepMachine(
        SchedulerLimits(
            slots=4, num_pages=PAGES, page_size=PAGE, max_context=4096, step_tokens=512, max_steps_in_flight=2, vocab_size=VOCAB
        )
    )


def steps(form: str) -> None:
    """A step that stores 16 pages: what notes them, beyond what the cache does anyway, and what sends them."""
    sockets, where = Sockets(), address()
    watched, plain = machine(), machine()
    publisher = Publisher(sockets, ServerConfig(kv_events=where, kv_events_format=form))  # type: ignore[arg-type]
    publisher.begin(watched)
    reader = subscriber(where)
    time.sleep(1.0)
    for m in (watched, plain):
        m.kept.ids[:] = RNG.integers(3, VOCAB, m.kept.ids.shape)
    out, quiet, storing, bare, now = Output(), [], [], [], 1e6
    publisher.saw([], now, out)  # looks for subscribers
    for i in range(CALLS):
        pages = np.arange(i * 16 % PAGES, i * 16 % PAGES + 16, dtype=np.int32)
        start = time.thread_time_ns()
        watched.kept.add(pages, NONE, "")
        publisher.saw([], now, out)
        storing.append(time.thread_time_ns() - start)
        start = time.thread_time_ns()
        plain.kept.add(pages, NONE, "")
        bare.append(time.thread_time_ns() - start)
        start = time.thread_time_ns()
        for _ in range(10):
            publisher.saw([], now, out)
        quiet.append((time.thread_time_ns() - start) / 10)
    medians = [statistics.median(times) / 1e3 for times in (storing, bare, quiet)]
    report("store_16_pages", medians[0] - medians[1], "us", "<= 20", form=form, page=PAGE)
    report("no_change", medians[2], "us", "<= 1", form=form)
    reader.kill()
    reader.wait()
    sockets.zmq.destroy(linger=0)


def tree(leaves: int, depth: int) -> None:
    """How long the whole tree takes, for a router that comes late."""
    m = StepMachine(
        SchedulerLimits(
            slots=4,
            num_pages=leaves * depth,
            page_size=PAGE,
            max_context=4096,
            step_tokens=512,
            max_steps_in_flight=2,
            vocab_size=VOCAB,
        )
    )
    sockets = Sockets()
    publisher = Publisher(sockets, ServerConfig(kv_events=address()))  # type: ignore[arg-type]
    publisher.begin(m)
    for _ in range(leaves):
        ids = RNG.integers(3, VOCAB, depth * PAGE, dtype=np.int32)
        pages = m.pool.alloc(depth)
        m.kept.ids[pages] = ids.reshape(depth, PAGE)
        handle, _ = m.cache.acquire(m.cache.match(ids[:1]))
        m.cache.release(m.cache.extend(handle, ids, pages)[0])
    start = time.thread_time_ns()
    payload = publisher._feed._everything()
    took = (time.thread_time_ns() - start) / 1e6
    report("whole_tree", took, "ms", "", pages=leaves * depth, branches=leaves, megabytes=round(len(payload) / 1e6, 1))
    sockets.zmq.destroy(linger=0)


class Engine:
    """The fake engine in processes of its own."""

    def __init__(self, **server: Any) -> None:
        engine = EngineConfig(device="cpu", kv_tokens=1 << 16, max_running=128, step_tokens=1024)
        self.system = System(Config(resolve("fake"), engine, ServerConfig(**server)))
        self.system.wait_ready()
        self.system.pump(0.1)

    def cpu(self) -> float:
        """CPU seconds of all processes, and of this one's part of the work."""
        ticks = os.sysconf("SC_CLK_TCK")
        total = time.process_time()
        for pid in self.system.supervisor.pids.values():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / ticks
        return total

    def run(self, prompts: list[tuple[int, ...]], tokens: int) -> float:
        """CPU seconds of these requests."""
        ended = 0

        def take(chunk: Any) -> None:
            nonlocal ended
            ended += bool(getattr(chunk, "finish", True))

        before = self.cpu()
        for ids in prompts:
            self.system.gateway.open(TokenPrompt(ids), SamplingParams(max_tokens=tokens, ignore_eos=True), take)
        while ended < len(prompts):
            self.system.pump(0.05)
        return self.cpu() - before


def throughput(turns: int) -> None:
    where = address()
    reader = subscriber(where)
    engines = {"off": Engine(), "on": Engine(kv_events=where, kv_events_replay=address())}
    ratios, vocab = [], resolve("fake").vocab_size
    prompts = [tuple(int(t) for t in RNG.integers(1, min(vocab, 250), 200)) for _ in range(256)]
    for engine in engines.values():
        engine.run(prompts, 20)
    for turn in range(turns):
        order = list(engines) if turn % 2 == 0 else list(engines)[::-1]
        fresh = [tuple(int(t) for t in RNG.integers(1, min(vocab, 250), 200)) for _ in range(256)]
        took = {kind: engines[kind].run(fresh, 100) for kind in order}
        ratios.append(took["off"] / took["on"])
    report("throughput", statistics.median(ratios), "x", ">= 0.99", turns=turns, each=[round(r, 4) for r in ratios])
    for engine in engines.values():
        engine.system.close()
    reader.kill()
    reader.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    print(json.dumps({"bench": "kv_events", **provenance()}))
    for form in FORMS:
        steps(form)
    tree(64, 2048)
    throughput(turns)


if __name__ == "__main__":
    main()
