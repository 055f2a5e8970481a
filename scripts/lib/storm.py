"""The run of the chaos harness against one server: record answers, attack under load, compare.  Imported by other scripts."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from minisgl.config import EngineConfig, ServerConfig
from scripts.lib import attacks
from scripts.lib.answers import Answer, complete, faults, pool_faults, slope
from scripts.lib.askers import Asker
from scripts.lib.mixed import COMPLETE, Case, cases
from scripts.lib.recoveries import notices, restarts, summary
from scripts.lib.watched import Watched, descriptors, rss

ATTACKS = ("kill", "stop", "leave", "slow", "http", "sockets", "disk")
SETTINGS: dict[str, dict[str, Any]] = {  # of the engines; "model": any other
    "fake": {"cases": 68, "tokens": 240, "hang": 8.0, "flags": ["--model", "fake", "--tp", "2", "--max-context", "2048"]},
    "cpu": {"cases": 34, "tokens": 48, "hang": 10.0, "flags": ["--device", "cpu", "--max-context", "2048"]},
    "model": {"cases": 51, "tokens": 200, "hang": 20.0, "flags": ["--device", "cuda"]},
}
COMMON = ["--tool-call-parser", "hermes"]
WITH_KILLS = {"--max-restarts": "1000000", "--restart-window": "60"}  # the bound is not what is tried here
GROWTH = 48.0  # megabytes that the api process may grow while it warms up
SHOWN = 20  # faults that are printed


@dataclass
class Options:
    """What to do; see the command's flags."""

    engine: str = "fake"
    kills: int = 40
    seed: int = 0
    between: tuple[float, float] = (0.3, 1.0)
    who: frozenset[str] = frozenset()
    attacks: frozenset[str] = frozenset(ATTACKS)
    seconds: float = 20.0  # of a run without kills
    clients: int = 8
    cases: int = 0
    tokens: int = 0
    wait: float = 180.0
    logit_limit: float = 0.5
    hang: float = 0.0  # --hang-seconds
    limit: float = math.inf  # seconds after which nobody is killed
    flags: list[str] = field(default_factory=list)
    echo: bool = False

    def setting(self, name: str) -> Any:
        usual = SETTINGS.get(self.engine, SETTINGS["model"])[name]
        if name == "flags":  # of the engine; those of the user follow them
            return usual if self.engine in SETTINGS else [*usual, "--model", self.engine]
        return getattr(self, name, 0) or usual

    def reproducer(self) -> str:
        low, high = self.between
        parts = f"--engine {self.engine} --kills {self.kills} --seed {self.seed} --seconds-between {low} {high}"
        parts += f" --clients {self.clients} --cases {self.setting('cases')} --tokens {self.setting('tokens')}"
        parts += f" --hang {self.setting('hang'):g} --attacks {','.join(sorted(self.attacks))}" + (
            f" --who {','.join(sorted(self.who))}" if self.who else ""
        )
        parts += "" if self.kills else f" --seconds {self.seconds:g}"
        return f"scripts/check/chaos.py {parts}" + (f" -- {' '.join(self.flags)}" if self.flags else "")


def knows(setting: str) -> bool:
    """Whether the server has a setting of that name."""
    return any(f.name == setting for config in (EngineConfig, ServerConfig) for f in dataclasses.fields(config))


class Chaos:
    """One run against one server."""

    def __init__(
        self, options: Options, server: Watched, session: aiohttp.ClientSession, disk: Path | None, hang: float | None
    ):
        self.options, self.server, self.session, self.disk = options, server, session, disk
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.kinds: Counter[str] = Counter()  # of faults
        self.asked = 0
        self._stop = asyncio.Event()
        self._rng = random.Random(f"chaos {options.seed}")
        self._greedy: list[tuple[Case, list[int]]] = []  # answers to be scored
        rng = random.Random(f"killer {options.seed}")
        self.killer = attacks.Killer(server, session, rng, options.who, options.between, hang)
        self.killer.stops *= "stop" in options.attacks

    def fault(self, text: str, case: Case | None = None) -> None:
        kind = next(
            (
                k
                for k in ("missing", "twice", "lost", "repeated", "torn", "leaked", "left", "ended", "failed")
                if f"{k}:" in text
            ),
            "changed",
        )
        self.kinds[kind] += 1
        self.faults.append(f"request {case.number} ({case.kind}{', streamed' * case.stream}): {text}" if case else text)

    async def info(self) -> dict[str, Any]:
        async with self.session.get("/server_info") as response:
            return dict(await response.json())

    # ---------------- the run
    async def run(self) -> dict[str, Any]:
        options, info = self.options, await self.info()
        self.asker = Asker(self.session, info["batch_socket"], options.wait)
        self.cases = cases(options.seed, options.setting("cases"), options.setting("tokens"), info["max_context"])
        began = time.monotonic()
        self.want = await self._record()
        undisturbed = time.monotonic() - began
        await self._quiet()
        before = {"descriptors": descriptors(self.server.pid), "rss_mb": rss(self.server.pid)}
        began = time.monotonic()
        try:
            await self._storm()
            if not self.killer.faults:
                await self._all_once()  # after the last blow
                if options.engine not in ("fake", "cpu"):
                    await self._score()
                await self._quiet(check=True)
        finally:
            self.asker.close()
        return self._figures(before, {"undisturbed_s": undisturbed, "storm_s": time.monotonic() - began})

    async def _record(self) -> dict[int, Answer]:
        gate, want = asyncio.Semaphore(4), {}

        async def record(case: Case) -> None:
            async with gate:
                answer = await self.asker.ask(case)
            if answer is None or complete(answer) or answer.status != (400 if case.kind == "too long" else 200):
                self.fault(f"undisturbed: {answer and (answer.status, answer.error[:300], complete(answer))}", case)
            want[case.number] = answer or Answer()

        await asyncio.gather(*map(record, self.cases))
        return want

    async def _storm(self) -> None:
        options, loops = self.options, []
        for name, pause, strike in (
            ("leave", 0.3, lambda r: attacks.leave(self.session, r, self.cases, self.counts)),
            ("http", 0.2, lambda r: attacks.http_bytes(self.server, r, self.counts)),
            ("sockets", 0.2, lambda r: attacks.socket_bytes(self.server, r, self.counts)),
            ("disk", 5.0, lambda r: attacks.full_disk(self.disk, r, self.counts) if self.disk else asyncio.sleep(1)),
        ):
            if name in options.attacks:
                loops.append(asyncio.create_task(self._again(name, pause, strike)))
        order = self._orders()
        clients = [
            asyncio.create_task(self._client(order, random.Random(f"client {options.seed} {i}")))
            for i in range(options.clients)
        ]
        tasks = [*loops, *clients]
        try:
            if options.kills and "kill" in options.attacks:
                strikes = asyncio.create_task(self.killer.run(options.kills, options.limit))
            else:
                strikes = asyncio.create_task(self.killer.only_stop(options.seconds))
            await asyncio.wait([strikes, *tasks], return_when=asyncio.FIRST_COMPLETED)  # clients end early if they fail
            await strikes
            self._stop.set()
            for end in await asyncio.wait_for(asyncio.gather(*clients, return_exceptions=True), options.wait + 30):
                if isinstance(end, Exception):
                    raise end
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for text in self.killer.faults:
            self.fault(text)

    async def _again(self, name: str, pause: float, strike: Any) -> None:
        rng = random.Random(f"{name} {self.options.seed}")
        while not self._stop.is_set():
            await strike(rng)
            await asyncio.sleep(rng.uniform(0.3, 1.7) * pause)

    def _orders(self) -> Iterator[Case]:
        """All requests, again and again, in another order each time."""
        while True:
            yield from self._rng.sample(self.cases, len(self.cases))

    async def _client(self, order: Iterator[Case], rng: random.Random) -> None:
        while not self._stop.is_set() and not self.killer.faults:
            slow = rng.uniform(0.005, 0.05) if "slow" in self.options.attacks and rng.random() < 0.1 else 0.0
            await self._ask(next(order), slow)

    async def _all_once(self) -> None:
        gate = asyncio.Semaphore(4)

        async def ask(case: Case) -> None:
            async with gate:
                await self._ask(case)

        await asyncio.gather(*map(ask, self.cases))

    async def _ask(self, case: Case, slow: float = 0.0) -> None:
        began = time.time()
        got, want = await self.asker.ask(case, slow), self.want[case.number]
        if got is not None and got.status == 0 and self.server.process.poll() is not None:
            return  # the server has ended, which is told once
        self.asked += 1
        if self.options.engine in ("fake", "cpu") or got is None or got.status != 200:
            found = faults(want, got)
        else:
            found = complete(got)
            if case.body.get("ignore_eos") and not case.body.get("stop") and want.usage != got.usage:
                found.append(f"lost: {got.usage} instead of {want.usage}")
            if case.greedy:
                self._greedy.append((case, got.parts["0"].ids))
        struck = [f"{k.how} {'+'.join(k.names)} {k.at - began:.2f} s" for k in self.killer.log if k.at >= began - 5]
        for line in found:
            self.fault(f"{line} [{time.time() - began:.2f} s long; {', '.join(struck) or 'no kill'} after it began]", case)

    async def _score(self) -> None:
        """Score the greedy answers: no token is much worse than the best one in its place."""
        for case, ids in self._greedy:
            prompt = case.body["input_ids"]
            body = {"prompt": prompt + ids, "echo": True, "logprobs": 1, "max_tokens": 0}
            async with self.session.post(COMPLETE, json=body) as response:
                logprobs = (await response.json())["choices"][0]["logprobs"]
            rows = list(zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))[len(prompt) :]
            below = [max(tops.values()) - lp for lp, tops in rows]
            self.counts["tokens scored"] += len(below)
            if max(below) > self.options.logit_limit:
                at = below.index(max(below))
                self.fault(f"changed: token {at} of {len(ids)} is {below[at]:.2f} below the best", case)

    async def _quiet(self, check: bool = False) -> None:
        """Wait until the server has nothing to do and its cache is empty; with `check` that is a must."""
        found: list[str] = []
        for _ in range(400):
            info = await self.info()
            if not (found := pool_faults(info["stats"], info["open_requests"])):
                return
            if not info["open_requests"]:
                (await self.session.post("/flush_cache", json={})).close()
            await asyncio.sleep(0.05)
        for text in found if check else ():
            self.fault(text)

    # ---------------- figures
    def _figures(self, before: dict[str, float], times: dict[str, float]) -> dict[str, Any]:
        killer, memory = self.killer, self.killer.memory
        after = {"descriptors": descriptors(self.server.pid), "rss_mb": rss(self.server.pid)}
        warm = memory[len(memory) // 4 :]
        per_kill = slope(list(range(len(warm))), warm)
        if self.server.process.poll() is None:
            if after["descriptors"] > before["descriptors"] + 16:
                self.fault(f"leaked: {after['descriptors'] - before['descriptors']:.0f} descriptors")
            if (grown := after["rss_mb"] - before["rss_mb"]) > GROWTH and per_kill * len(warm) > GROWTH / 2:
                self.fault(f"leaked: the api process has grown by {grown:.0f} MB, {per_kill:.2f} MB with each kill")
        recovered = [k.recovered for k in killer.log if k.recovered is not None and k.how == "kill"]
        kills: Counter[str] = Counter(name for k in killer.log if k.how == "kill" for name in k.names)
        return {
            "kills": kills.total(),
            "kills_by_process": dict(sorted(kills.items())),
            "at_once": sum(len(k.names) > 1 for k in killer.log),
            "stopped": Counter(k.how for k in killer.log if k.how != "kill"),
            "requests": self.asked,
            "faults": dict(self.kinds),
            "lost": self.kinds["missing"],
            "attacks": dict(self.counts),
            "refused": dict(self.asker.counts),
            "recovery_s": summary(recovered),
            "notice_s": summary(notices(killer.log, self.server.lines)),
            "restarts": restarts(self.server.lines),
            "stream_gap_s": summary(self.asker.gaps),
            "api_process": {"before": before, "after": after, "mb_per_kill": round(per_kill, 3)},
            **{name: round(seconds, 1) for name, seconds in times.items()},
        }
