"""Shared fixtures: small oracle configurations, and one deterministic system of real actors around the oracle."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from minisgl.actors.actor import Actor, Context, on
from minisgl.actors.arenas import Arenas, close_arenas, create_arenas
from minisgl.actors.local import LocalSystem
from minisgl.actors.messages import Text, Tokens, Track
from minisgl.actors.scheduler import SchedulerActor
from minisgl.actors.worker import WorkerActor
from minisgl.api.gateway import Gateway
from minisgl.api.requests import Chunk, TokenPrompt
from minisgl.config import Config, EngineConfig, ModelSpec
from minisgl.errors import RequestError
from minisgl.model.oracle import OracleRunner, reference
from minisgl.types import Finish, SamplingParams

VOCAB, EOS = 23, 0


def oracle_spec(max_context: int = 64, vocab: int = VOCAB) -> ModelSpec:
    """A model of nothing, for the oracle."""
    return ModelSpec(
        name="oracle",
        path="",
        format="oracle",
        architecture="Oracle",
        dtype="float32",
        hidden_size=1,
        intermediate_size=1,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=1,
        vocab_size=vocab,
        max_context=max_context,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling="",
        tie_embeddings=True,
        bos_id=None,
        eos_ids=(EOS,),
    )


def oracle_config(**engine: Any) -> Config:
    """Small on purpose: every limit is hit all the time."""
    settings = {"tp": 2, "page_size": 4, "max_running": 4, "step_tokens": 9, "lag": 2, "kv_tokens": 160} | engine
    return Config(oracle_spec(), EngineConfig(**settings))


class PlainDetokenizer(Actor):
    """Stands in for the detokenizer where text does not matter: tokens through, text empty."""

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self.cached: dict[int, int] = {}

    @on(Track)
    def track(self, m: Track) -> None:
        assert m.uid not in self.cached, "a request was announced twice"
        self.cached[m.uid] = m.n_cached

    @on(Tokens)
    def tokens(self, m: Tokens) -> None:
        cached = np.array([self.cached.get(u, 0) for u in m.uids.tolist()], np.int32)
        self.ctx.send("api", Text(m.uids, m.counts, m.tokens, m.finish, cached, ("",) * len(m.uids)))


class World:
    """Gateway, scheduler, workers (oracle) and a plain detokenizer in one LocalSystem."""

    def __init__(
        self,
        seed: int | None,
        config: Config,
        scheduler: Callable[[Context, Config, Arenas], SchedulerActor] = SchedulerActor,
    ) -> None:
        self.config = config
        self.system = LocalSystem(seed)
        self.arenas, self._fds = create_arenas(config)
        spawn, arenas, engine = self.system.spawn, self.arenas, config.engine
        pages = engine.kv_tokens // engine.page_size
        self.gateway = spawn("api", lambda ctx: Gateway(ctx, config, arenas))
        self.scheduler = spawn("scheduler", lambda ctx: scheduler(ctx, config, arenas))
        self.runners = [OracleRunner(config, pages) for _ in range(engine.tp)]
        for rank in range(engine.tp):
            spawn(f"worker{rank}", lambda ctx, r=rank: WorkerActor(ctx, r, arenas, lambda: self.runners[r]))
        spawn("detokenizer", PlainDetokenizer)
        self.gateway._silent.clear()  # nobody says Hello in a LocalSystem
        self.system.run()
        assert self.gateway.state == "ready"
        self.answers: dict[int, list[int]] = {}
        self.ends: dict[int, Finish | RequestError] = {}
        self.cached: dict[int, int] = {}

    @property
    def machine(self) -> Any:
        return self.scheduler.machine

    def submit(self, ids: list[int], max_tokens: int, **params: Any) -> int:
        uid: int = -1
        tokens: list[int] = []

        def deliver(chunk: Chunk | RequestError) -> None:
            assert uid not in self.ends, "something came after the end"
            if isinstance(chunk, RequestError):
                self.ends[uid] = chunk
                return
            tokens.extend(chunk.token_ids)
            self.cached[uid] = chunk.cached_tokens
            if chunk.finish:
                self.ends[uid] = chunk.finish

        uid = self.gateway.open(TokenPrompt(tuple(ids)), SamplingParams(max_tokens=max_tokens, **params), deliver)
        self.answers[uid] = tokens
        return uid

    def close(self) -> None:
        self.machine.check()
        close_arenas(self._fds)


def random_traffic(world: World, seed: int, n: int = 14, abort: float = 0.15) -> dict[int, list[int]]:
    """Shared trunks, second turns, aborts, all interleaved by the system's seed.  Returns what each request must answer."""
    rng = random.Random(seed)
    trunks = [[rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 17))] for _ in range(3)]
    want: dict[int, list[int]] = {}
    said: list[list[int]] = []
    context = world.config.max_context
    for _ in range(n):
        ids = rng.choice(trunks) + [rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 12))]
        if said and rng.random() < 0.5:  # a second turn: an earlier prompt and its answer, and something new
            ids = [*rng.choice(said)[: context - 22], rng.randrange(1, VOCAB)]
        max_tokens = rng.randrange(1, 20)
        uid = world.submit(ids, max_tokens)
        want[uid] = reference(ids, max_tokens, VOCAB, (EOS,))
        said.append(ids + want[uid])
        for _ in range(rng.randrange(0, 40)):
            world.system.step()
        if rng.random() < abort:
            victim = rng.choice(list(want))
            if victim not in world.ends:
                world.gateway.close(victim)
                world.ends[victim] = Finish.ABORT
    world.system.run()
    return want


@pytest.fixture
def world() -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(seed: int | None = None, **engine: Any) -> World:
        made.append(World(seed, oracle_config(**engine)))
        return made[-1]

    yield make
    for w in made:
        w.close()
