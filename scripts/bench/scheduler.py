"""CPU time of the scheduler and its prefix cache, without workers.

    .venv/bin/python scripts/bench/scheduler.py [--journal]

One JSON line per measure: measure, value, unit, must (the bound we hold ourselves to), config.  Times are CPU time of one
core (median over steps or calls, where the collector of garbage runs as it does in service); results of steps are made up
outside the measured time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from minisgl import LLM
from minisgl.actors.scheduler.interface import Add, Event, SchedulerLimits
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.cache.radix import RadixCache
from minisgl.journal.recorder import Recorder, Writer
from minisgl.plan import StepResult
from minisgl.sampling_params import SamplingParams
from scripts.lib.reference import provenance

VOCAB = 150_000
PAGE = 16
CALLS = 16  # that a journal writes together where a step takes 4 ms
RNG = np.random.default_rng(0)


def report(measure: str, value: float, unit: str, must: str, **config: object) -> None:
    print(json.dumps({"measure": measure, "value": round(value, 4), "unit": unit, "must": must, "config": config}), flush=True)


def random_ids(n: int) -> np.ndarray:
    return RNG.integers(3, VOCAB, n, dtype=np.int32)


class Driver:
    """A machine whose results come back at once, as those of an infinitely fast worker at the machine's lag."""

    def __init__(self, **limits: Any) -> None:
        settings: dict[str, Any] = {
            "page_size": PAGE,
            "max_context": 40_000,
            "max_steps_in_flight": 2,
            "vocab_size": VOCAB,
            "eos_ids": (2,),
        } | limits
        self.machine = StepMachine(SchedulerLimits(**settings))
        self.now = 0.0
        self.uid = 0
        self.watcher: Recorder | None = None

    def request(self, prompt: int, answer: int, limit: int | None = None) -> Add:
        self.uid += 1
        params = SamplingParams(ignore_eos=True)
        return Add(Request(self.uid, random_ids(prompt), prompt + (limit or answer), 1, params))

    def step(self, adds: list[Add]) -> float:
        """One step; returns its CPU milliseconds, publishing included."""
        inflight = self.machine.inflight
        events: list[Event] = list(adds)
        if len(inflight) >= self.machine.limits.max_steps_in_flight:
            sent = inflight[0]
            events.append(StepResult(sent.step, RNG.integers(3, VOCAB, len(sent.slots), dtype=np.int32), 3000))
        self.now += 0.003
        start = time.process_time_ns()
        out = self.machine.step(events, self.now)
        if out.plan is not None:
            out.plan.pack()
        if self.watcher is not None:
            self.watcher.saw(events, self.now, out)
        return (time.process_time_ns() - start) / 1e6


def steady(slots: int, waiting: int = 0) -> float:
    """Median milliseconds of a decode step with all slots running."""
    driver = Driver(slots=slots, num_pages=slots * 60 + 4096, step_tokens=slots + 8192)
    driver.step([driver.request(100, 30_000) for _ in range(slots)])
    while len(driver.machine.running) < slots or driver.machine._prefilling:
        driver.step([])
    driver.step([driver.request(100, 10) for _ in range(waiting)])
    for _ in range(50):
        driver.step([])
    assert len(driver.machine.running) == slots
    return statistics.median(driver.step([]) for _ in range(400))


class Nowhere:
    """A sink that counts bytes."""

    error, due, size = "", False, 0

    def begin(self, data: bytes) -> None: ...
    def write(self, data: bytes) -> None:
        self.size += len(data)

    def flush(self, now: float) -> float:
        return 0.0

    def close(self) -> None: ...


def journal(slots: int) -> None:
    """What a journal adds to a decode step, and what it takes beside the steps: alternating, on one machine."""
    driver = Driver(slots=slots, num_pages=slots * 360 + 4096, step_tokens=slots + 8192)
    driver.step([driver.request(100, 30_000) for _ in range(slots)])
    while len(driver.machine.running) < slots or driver.machine._prefilling:
        driver.step([])
    added = []
    for _ in range(100):  # without writers: what the step pays for
        driver.watcher = None
        without = statistics.median(driver.step([]) for _ in range(CALLS))
        driver.watcher = recorder = Recorder(driver.machine)
        added.append((statistics.median(driver.step([]) for _ in range(CALLS)) - without) * 1e3)
        recorder.close()
    report("journal", statistics.median(added), "us", "<= 5", rows=slots, of="a step")
    for name, tokens in (("hashes", False), ("tokens", True)):
        sink, beside = Nowhere(), []
        driver.watcher = recorder = Recorder(driver.machine)
        recorder.add(Writer(sink, {}, tokens))
        for _ in range(60):
            for _ in range(CALLS):
                driver.step([])
            start = time.process_time_ns()
            recorder.rest(driver.now)
            beside.append((time.process_time_ns() - start) / 1e3 / CALLS)
        recorder.close()
        report(f"journal_{name}_beside", statistics.median(beside), "us", "<= 60", rows=slots, of="time beside a step")
        report(f"journal_{name}_bytes", sink.size / len(beside) / CALLS, "bytes", "<= 2048", rows=slots, of="a step")


def cpu_seconds(pids: dict[str, int]) -> dict[str, float]:
    """CPU time of whole processes so far, by the clock that Linux keeps for each (clock_getcpuclockid)."""
    return {name: time.clock_gettime(~pid << 3 | 2) for name, pid in pids.items()}


def throughput(folder: str, turns: int = 9) -> None:
    """What a journal costs all processes, with the fake engine and 256 rows: without, with hashes, with ids, and again.

    The CPU time that a journal adds to the scheduler process, for each step, is the difference of runs next to each other: a
    machine that has other work stretches the wall time, and hardly this. The hashes of 256 prompts of 100 tokens are in it.
    If nothing of it ran beside the process that has most to do for a step, a step would take so much longer: the ratio is the
    worst that can become of the throughput.
    """
    prompts = [p.tolist() for p in (random_ids(100) % 250 for _ in range(256))]
    kinds = ("none", "hashes", "tokens")
    runs: dict[str, list[tuple[dict[str, float], float]]] = {kind: [] for kind in kinds}
    with LLM("fake", kv_tokens=1 << 18, max_running=256, step_tokens=1024) as llm:
        gateway, journals = llm.system.gateway, llm.system.gateway.journals
        for turn in range(turns):
            for kind in kinds:
                gateway.flush_cache()  # a part begins with a copy of the tree, which is not what a step costs
                if kind != "none":
                    journals.begin(f"{folder}/{kind}{turn}", kind == "tokens", 64.0, lambda on, error: None)
                llm.generate(prompts[:1], SamplingParams(max_tokens=64, ignore_eos=True), use_tqdm=False)  # it has begun
                pids, steps = {**gateway.pids, "api": os.getpid()}, gateway.stats["steps"]
                before, start = cpu_seconds(pids), time.perf_counter()
                llm.generate(prompts, SamplingParams(max_tokens=128, ignore_eos=True), use_tqdm=False)
                wall = time.perf_counter() - start
                if kind != "none":
                    journals.end(lambda on, error: None)
                    while journals.file is not None:
                        llm.system.pump(0.1)
                llm.system.pump(0.01)
                made = gateway.stats["steps"] - steps
                used = {name: (now - before[name]) / made * 1e6 for name, now in cpu_seconds(pids).items()}
                if turn:  # the first is the warm-up
                    runs[kind].append((used, wall))
    base = {name: statistics.median(used[name] for used, _ in runs["none"]) for name in pids}
    busiest = max(base, key=lambda name: base[name])
    for kind in kinds[1:]:
        pairs = list(zip(runs["none"], runs[kind], strict=True))
        added = statistics.median(used["scheduler"] - without["scheduler"] for (without, _), (used, _) in pairs)
        scheduler = f"{base['scheduler']:.0f} us"
        report(f"journal_{kind}_added", added, "us", "<= 75", of="CPU time of the scheduler process a step", without=scheduler)
        longest = {"of": busiest, "us": round(base[busiest])}
        report(
            "journal_throughput_ratio", base[busiest] / (base[busiest] + added), "x", ">= 0.99", ids=kind, cpu_a_step=longest
        )
        ratio = statistics.median(without / wall for (_, without), (_, wall) in pairs)
        report("journal_wall_ratio", ratio, "x", ">= 0.99", ids=kind, seconds_without=round(min(w for _, w in runs["none"]), 3))


def concurrency() -> int:
    """Most requests running at once: a pool of 300k tokens, prompts of 1k, answers of 200, max_tokens of 32,768."""
    driver = Driver(slots=1024, num_pages=300_000 // PAGE, step_tokens=9216, max_context=40_000)
    machine, most = driver.machine, 0
    driver.step([driver.request(1000, 200, limit=32_768) for _ in range(600)])
    started: dict[int, int] = {}
    for _ in range(600):
        driver.step([])
        for uid, (slot, request) in list(machine.running.items()):
            started.setdefault(uid, len(request.ids))
            if machine.table.length[slot] >= started[uid] + 200:  # what an EOS would do
                machine._release(slot)
        most = max(most, len(machine.running) - len(machine._prefilling))
    return most


def starvation() -> int:
    """Longest run of steps in which a running decode got nothing, while prompts of 16k keep arriving."""
    driver = Driver(slots=64, num_pages=40_000, step_tokens=8192)
    driver.step([driver.request(100, 30_000) for _ in range(4)])
    for _ in range(4):
        driver.step([])
    machine, worst, current = driver.machine, 0, 0
    decoding = set(machine._decoding.tolist())
    assert len(decoding) == 4
    for i in range(400):
        driver.step([driver.request(16_000, 1)] if i % 2 == 0 else [])
        got = set(machine.inflight[-1].slots.tolist()) if machine.inflight else set()
        current = 0 if decoding <= got else current + 1
        worst = max(worst, current)
    return worst


def fill(cache: RadixCache, ids: np.ndarray, first_page: int, chunk: int = 512) -> None:
    """A request that prefills `ids` in chunks and leaves."""
    handle, _ = cache.acquire(cache.match(ids[:1]))
    for at in range(0, len(ids), chunk):
        part = ids[at : at + chunk]
        pages = np.arange(first_page + at // PAGE, first_page + (at + len(part)) // PAGE, dtype=np.int32)
        handle, _, _ = cache.extend(handle, part, pages)
    cache.release(handle)


def microseconds(call: Callable[[int], object], n: int) -> float:
    """Median CPU microseconds of call(i)."""
    times = []
    for i in range(n):
        start = time.process_time_ns()
        call(i)
        times.append((time.process_time_ns() - start) / 1e3)
    return statistics.median(times)


def tree() -> None:
    cache, sequences = RadixCache(PAGE), []
    gc.collect()
    tracemalloc.start()
    for _ in range(1_000_000 // 2048):
        sequences.append(random_ids(2048))
    before = tracemalloc.get_traced_memory()[0]
    for i, ids in enumerate(sequences):
        fill(cache, ids, i * 128)
    megabytes = (tracemalloc.get_traced_memory()[0] - before) / 1e6
    tracemalloc.stop()
    report("tree_1m", megabytes, "MB", "<= 60", tokens=len(sequences) * 2048, page=PAGE, nodes=cache.num_nodes)
    queries = [np.append(s, np.int32(1)) for s in sequences]
    value = microseconds(lambda i: cache.match(queries[i * 7 % len(queries)]), 400)
    report("match_2048", value, "us", "<= 30", tree_tokens=cache.num_pages * PAGE, nodes_on_the_path=4)
    fresh = [random_ids(2048) for _ in range(400)]
    pages = np.arange(128, dtype=np.int32)
    handle, _ = cache.acquire(cache.match(fresh[0][:1]))
    value = microseconds(lambda i: cache.extend(handle, fresh[i], pages), 400)
    report("insert_2048", value, "us", "<= 60", tree_tokens=cache.num_pages * PAGE)


def eviction(leaves: int) -> float:
    """Microseconds to free one page, one page a call, from a tree of that many leaves."""
    cache = RadixCache(PAGE)
    for i in range(leaves):
        fill(cache, random_ids(2 * PAGE), 2 * i)
    calls = min(1000, leaves)
    start = time.process_time_ns()
    for _ in range(calls):
        cache.evict(1)
    return (time.process_time_ns() - start) / 1e3 / calls


def main() -> None:
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--journal", action="store_true", help="measure only what a journal costs: less than a minute")
    only = p.parse_args().journal
    print(json.dumps({"bench": "scheduler", **provenance()}))
    journal(256)
    with tempfile.TemporaryDirectory() as folder:
        throughput(folder)
    if only:
        return
    few, many = steady(256), steady(4096)
    report("step_256", few, "ms", "<= 0.25", running=256, max_steps_in_flight=2)
    report("step_4096", many, "ms", "<= 1.5", running=4096, max_steps_in_flight=2)
    crowded = steady(256, waiting=100_000)
    report("waiting_ratio", crowded / steady(256), "x", "<= 1.1", running=256, waiting=100_000)
    tree()
    report("evict_1k", eviction(1000), "us", "<= 3", leaves=1000)
    report("evict_64k", eviction(65_536), "us", "<= 3", leaves=65_536)
    report(
        "concurrency_300k", concurrency(), "running", ">= 200", pool_tokens=300_000, prompt=1000, answer=200, max_tokens=32_768
    )
    report("decode_gap", starvation(), "steps", "0", prompts="16k, one every second step", decodes=4)


if __name__ == "__main__":
    main()
