"""Mixed requests over an engine whose processes die, and what must hold whenever they do.

`run(seed)` is one scenario; every answer is compared, chunk by chunk, with the one of an engine that nothing disturbs.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from crash_cluster import Cluster, MakeActor
from crash_model import Checker, Runner, spec

from minisgl import grammar
from minisgl.actors import detokenizer, tokenizer
from minisgl.actors.detokenizer import DetokenizerActor
from minisgl.actors.runtime.ring import RingWriter
from minisgl.actors.scheduler.actor import SchedulerActor
from minisgl.actors.tokenizer import TokenizerActor
from minisgl.actors.worker import WorkerActor
from minisgl.api.engine import ChatPrompt, Chunk, Prompt, TextPrompt, TokenPrompt
from minisgl.api.gateway import Gateway
from minisgl.config import Config, EngineConfig, ServerConfig
from minisgl.errors import RequestError
from minisgl.model.text.tokenizer import load_tokenizer
from minisgl.sampling_params import DEFAULT_OPTIONS, Finish, RequestOptions, SamplingParams

MOST_EVENTS = 60_000
P = SamplingParams
Open = Callable[[Gateway, Callable[[Any], None]], int]


def _chat(thinks: bool, said: str = "say abc") -> ChatPrompt:
    return ChatPrompt(json.dumps({"messages": [{"role": "user", "content": said}], "kwargs": {"thinks": thinks}}).encode())


def _request(prompt: Prompt, params: SamplingParams, options: RequestOptions = DEFAULT_OPTIONS) -> Open:
    return lambda gateway, took: gateway.open(prompt, params, took, options)


_TRUNK = tuple(range(97, 110))
_LONG = TokenPrompt(tuple(97 + i % 7 for i in range(40)))
_PENALTIES: dict[str, Any] = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.5}
REQUESTS: dict[str, Open] = {
    "text": _request(TextPrompt("once upon a time"), P(max_tokens=14)),
    "text, seed": _request(TextPrompt("once upon a time"), P(max_tokens=12, seed=5)),
    "no text": _request(TextPrompt(""), P(max_tokens=3)),
    "chat": _request(_chat(False), P(max_tokens=12)),
    "no chat": _request(ChatPrompt(b'{"messages": 5, "kwargs": {}}'), P(max_tokens=3)),
    "n, 1": _request(TokenPrompt(_TRUNK), P(max_tokens=12, seed=1, ignore_eos=True)),
    "n, 2": _request(TokenPrompt(_TRUNK), P(max_tokens=12, seed=2, ignore_eos=True)),
    "n, 3": _request(TokenPrompt(_TRUNK), P(max_tokens=12, temperature=0.5)),
    "long": _request(_LONG, P(max_tokens=30, ignore_eos=True)),
    "to the end": _request(TokenPrompt(_TRUNK * 6), P(ignore_eos=True)),
    "too long": _request(TokenPrompt(_TRUNK * 9), P()),
    "log probabilities": _request(TokenPrompt(_TRUNK[:7]), P(max_tokens=12, logprobs=2, ignore_eos=True)),
    "echo": _request(TextPrompt("caf\u00e9 \u20ac " * 3), P(max_tokens=9, echo=True)),
    "echo, log probabilities": _request(TokenPrompt(_TRUNK * 2), P(max_tokens=10, echo=True, logprobs=1)),
    "echo alone": _request(TokenPrompt(_TRUNK * 2), P(max_tokens=0, echo=True, logprobs=3)),
    "stop": _request(TextPrompt("a b c"), P(max_tokens=25, stop=("aa", "b c", "\u00e9\u20ac"), ignore_eos=True)),
    "stop, late": _request(TextPrompt("a b c d"), P(max_tokens=25, stop=("a",), min_tokens=9, ignore_eos=True)),
    "stop token": _request(TextPrompt("x"), P(max_tokens=20, stop_token_ids=(98,), min_tokens=7)),
    "thought": _request(_chat(True), P(max_tokens=20, reasoning="qwen3", ignore_eos=True)),
    "thought, stop": _request(_chat(True, "why"), P(max_tokens=25, reasoning="qwen3", stop=("a", "bc"), ignore_eos=True)),
    "assumed thought": _request(_chat(False, "so"), P(max_tokens=18, reasoning="deepseek_r1", ignore_eos=True)),
    "calls, stop": _request(_chat(False, "call"), P(max_tokens=25, tools="hermes", stop=("b",), ignore_eos=True)),
    "grammar": _request(TextPrompt("g"), P(max_tokens=20, grammar=grammar.regex("[ab]{4,9}c"))),
    "grammar, thought": _request(_chat(True, "g"), P(max_tokens=30, reasoning="qwen3", grammar=grammar.regex("[ab]{4,9}c"))),
    "penalties": _request(TextPrompt("penal"), P(max_tokens=14, ignore_eos=True, **_PENALTIES)),
    "penalties, bias": _request(TextPrompt("pe"), P(max_tokens=14, min_tokens=8, logit_bias=((97, -5.0),), **_PENALTIES)),
    "mean": _request(TokenPrompt(_TRUNK * 2), P(max_tokens=1), RequestOptions(pooling="mean")),
    "last": _request(TextPrompt("embed me"), P(max_tokens=1), RequestOptions(pooling="last")),
    "first": _request(TextPrompt("first of all"), P(max_tokens=8), RequestOptions(priority=5, cache_salt="a", client=3)),
    "salted, a": _request(TokenPrompt(_TRUNK), P(max_tokens=9), RequestOptions(cache_salt="a")),
    "salted, b": _request(TokenPrompt(_TRUNK), P(max_tokens=9), RequestOptions(cache_salt="b" * 99)),
    "tokenize": lambda gateway, took: gateway.tokenize(TextPrompt("tokenize <think> me"), took),
    "tokenize, chat": lambda gateway, took: gateway.tokenize(_chat(True), took),
    "tokenize, not": lambda gateway, took: gateway.tokenize(ChatPrompt(b"5"), took),
    "detokenize": lambda gateway, took: gateway.detokenize((99, 0xC3, 0xA9, 257, 256), False, took),
    "check": lambda gateway, took: gateway.check_grammar("root: x", "regex", took),
    "check, not": lambda gateway, took: gateway.check_grammar("root: (", "json_schema", took),
}


def config(tp: int = 1, tokenizers: int = 1, **engine: Any) -> Config:
    settings = {"page_size": 4, "max_running": 4, "step_tokens": 9, "lag": 2, "kv_tokens": 160, "sample_seed": 7} | engine
    server = ServerConfig(num_tokenizers=tokenizers, max_restarts=1 << 20, hang_seconds=0.0)
    return Config(spec(), EngineConfig(tp=tp, **settings), server)


def _index(ctx: Any) -> int:
    return int(ctx.name.lstrip("abcdefghijklmnopqrstuvwxyz") or 0)


ACTORS: dict[str, MakeActor] = {
    "tokenizer": lambda ctx, config, arenas, _: TokenizerActor(ctx, config, RingWriter(arenas.prompts[_index(ctx)])),
    "detokenizer": lambda ctx, config, arenas, _: DetokenizerActor(ctx, config),
    "checker": lambda ctx, config, arenas, _: Checker(ctx),
    "scheduler": lambda ctx, config, arenas, takes_over: SchedulerActor(ctx, config, arenas, takes_over),
    "worker": lambda ctx, config, arenas, _: WorkerActor(ctx, _index(ctx), arenas, lambda: Runner(config, 40)),
}


@functools.cache
def _load(*args: Any) -> Any:
    return load_tokenizer(*args)


@dataclass
class Client:
    """Who has opened one request, and what was heard of it."""

    kind: str
    nth: int  # of the requests of its run, which decides on the seeds that are drawn
    leaves_after: int = 1 << 30  # chunks, or at once
    uid: int = -1
    heard: list[Any] = field(default_factory=list)
    ended: bool = False
    left: bool = False

    def open(self, gateway: Gateway, requests: dict[str, Open]) -> None:
        gateway._opened = self.nth
        try:
            self.uid = requests[self.kind](gateway, self._hear)
        except RequestError as e:
            self._hear(e)

    def _hear(self, news: Any) -> None:
        assert not self.ended, f"{self.kind}: something came after the end"
        assert not self.left, f"{self.kind}: its client had left"
        if isinstance(news, RequestError):
            self.heard.append((news.status, news.code, news.param, news.message))
        elif isinstance(news, Chunk):
            assert news.cached_tokens <= news.prompt_tokens
            vector = None if news.vector is None else news.vector.tolist()
            self.heard.append(news._replace(cached_tokens=0, queued=0.0, waited=0.0, vector=vector))
        else:
            self.heard.append(news)
        self.ended = not isinstance(news, Chunk) or news.finish is not Finish.NONE

    @property
    def poison(self) -> bool:
        """Whether it was refused because the engine died three times while it ran."""
        return bool(self.heard) and self.heard[-1][1:2] == ("poison_request",)

    def check(self, right: list[Any]) -> None:
        """Compare with what an undisturbed engine says, or with its beginning if the client has left."""
        assert self.ended or self.left, f"{self.kind}: never answered, {len(self.heard)} of {len(right)} chunks"
        if self.poison:
            self.left = bool(self.heard.pop())
        for name, got, wanted in zip(("chunks", "log probabilities", "end"), _parts(self.heard), _parts(right), strict=True):
            if self.left:
                wanted = wanted[: len(got)] if name != "end" else got
            at = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
            difference = f"{name} {at} of {len(wanted)}: {got[at : at + 1]} instead of {wanted[at : at + 1]}"
            assert got == wanted, f"{self.kind}{', left' * self.left}: {difference}"


def _parts(heard: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """(what comes in every chunk, log probabilities, the rest of the last chunk).

    If an engine takes two results at once, log probabilities and lengths of thoughts come a chunk earlier.
    """
    chunks = [c for c in heard if isinstance(c, Chunk)]
    news = [c._replace(logprobs=(), thought_tokens=0) if isinstance(c, Chunk) else c for c in heard]
    return news, [x for c in chunks for x in c.logprobs], [c.thought_tokens for c in chunks[-1:]]


class Run:
    """A cluster with clients, who come one after the other as soon as the engine takes requests."""

    def __init__(self, cluster: Cluster, clients: list[Client], requests: dict[str, Open] = REQUESTS) -> None:
        self.cluster, self.clients, self._requests = cluster, clients, requests
        self.kills: list[tuple[int, list[str]]] = []  # at these events, counted from the first request, these actors die
        self._comers = list(clients)
        self.drains = False  # the server is about to stop, once all have come
        self.poison = 0  # requests that were refused after three deaths

    def admit_one_by_one(self) -> None:
        """Let each come when the scheduler has taken the one before, without waiting for answers."""
        with self._watched():
            while self.cluster.gateway.state != "ready":
                self.cluster.step()
            machine = self.cluster.actors["scheduler"].machine
            for client in self._comers:
                client.open(self.cluster.gateway, self._requests)
                while client.uid not in machine.running and client.uid not in machine.waiting:
                    assert self.cluster.step()
        self._comers = []

    def go(self) -> None:
        """Until nothing can happen."""
        with self._watched():
            self._go()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        read_once = [mock.patch.object(module, "load_tokenizer", _load) for module in (tokenizer, detokenizer)]
        with self.cluster.watched(), read_once[0], read_once[1]:
            yield

    def _go(self) -> None:
        cluster, gateway, began = self.cluster, self.cluster.gateway, 0
        while True:
            happened = cluster.step()
            if not happened and not self._comers and not self.kills:
                return
            assert cluster.events < MOST_EVENTS, f"no end: {[c.kind for c in self.clients if not c.ended and not c.left]}"
            if gateway.state not in ("ready", "recovering", "draining"):
                assert happened, f"nothing happens, and the engine is {gateway.state}"
                continue
            began = began or cluster.events
            if self._comers and (not happened or cluster.rng.random() < 0.05):
                self._comers.pop(0).open(gateway, self._requests)
            if self.kills and (not happened or cluster.events - began >= self.kills[0][0]):
                for name in self.kills.pop(0)[1]:
                    cluster.kill(name)
            for client in self.clients:
                if client.uid >= 0 and not client.ended and not client.left and len(client.heard) >= client.leaves_after:
                    gateway.close(client.uid)
                    client.left = True
            chance = cluster.rng.random()
            if chance < 0.02:
                cluster.recovery.tick()
            elif chance < 0.022:
                gateway.flush_cache()
            elif chance > 0.99 and self.drains and not self._comers:
                gateway.drain()

    def check(self) -> None:
        """All answers are right, and nothing is left of them."""
        self.poison = sum(client.poison for client in self.clients)
        assert not self.poison or sum(self.cluster.deaths.values()) > 2, "refused as poison"
        for client in self.clients:
            client.check(reference(client.kind, client.nth))
        check_books(self.cluster)


def check_books(cluster: Cluster) -> None:
    """Nothing is left of requests that have ended, in any process, and no page is lost."""
    gateway, actors = cluster.gateway, cluster.actors
    assert gateway.state in ("ready", "draining")
    assert not gateway.silent
    for name in ("_ledger", "_sent", "_questions", "_grammars"):
        assert not getattr(gateway, name), f"left in the gateway's {name}"
    assert not gateway._dispatcher.waiting
    assert not gateway._dispatcher._trials.open
    assert not len(gateway._tokenizers)
    assert not any(gateway._tokenizers.loads)
    scheduler = actors["scheduler"]
    machine = scheduler.machine
    machine.check()
    assert machine.idle
    assert not scheduler._inbox
    assert not scheduler._compiling
    assert not scheduler.requests.pending()
    assert machine.pool.free + machine.cache.num_pages == machine.limits.num_pages == 40
    assert not actors["detokenizer"]._streams, "left in the detokenizer"
    for name, actor in actors.items():
        if name.startswith("tokenizer"):
            assert not actor._backlog
        if name.startswith("worker"):
            assert not actor._running
            assert actor._compiling is None
            assert not actor.plans.pending()


@functools.cache
def reference(kind: str, nth: int) -> list[Any]:
    """The answer of an engine that nothing disturbs."""
    cluster = Cluster(config(), 0, ACTORS)
    client = Client(kind, nth)
    Run(cluster, [client]).go()
    assert client.ended
    cluster.close()
    return client.heard


def make(seed: int, doom: dict[str, tuple[int, int]] | None = None, kinds: str = "") -> Run:
    """A scenario by its seed: nine requests, of which some lose patience.

    `kinds`: how their names begin.  `doom`: see Cluster.
    """
    rng = random.Random(seed)
    engine = {"lag": rng.choice((1, 2, 2, 3)), "max_running": rng.choice((2, 4, 4))}
    cluster = Cluster(config(rng.choice((1, 2)), rng.choice((1, 1, 2)), **engine), seed, ACTORS, doom, rng.random() < 0.2)
    usual = sorted(kind for kind in REQUESTS if kind.startswith(kinds))
    chosen = rng.sample(usual, 9) if not kinds else rng.choices(usual, k=9)
    clients = [
        Client(kind, nth, rng.choice((0, 1, 3, 6)) if rng.random() < 0.15 else 1 << 30) for nth, kind in enumerate(chosen)
    ]
    return Run(cluster, clients)


def disturbed(seed: int, kinds: str = "", victims: str = "") -> Run:
    """The same with deaths at random events, or in the middle of them, of several at once among them.

    Every third time they come in quick succession, so that recovery itself is disturbed.  `victims`: how their names begin.
    """
    run, rng = make(seed, None, kinds), random.Random(~seed)
    names = sorted(name for name in run.cluster.gateway.pids if name.startswith(tuple(victims.split() or [""])))
    at = rng.choice((rng.randrange(600), rng.randrange(60)))
    for _ in range(rng.choice((1, 2, 2, 3, 4))):
        run.kills.append((at, rng.sample(names, min(len(names), rng.choice((1, 1, 1, 2, 3))))))
        at = rng.randrange(600) if seed % 3 else at + rng.choice((10, 40, 100))
    run.kills.sort()
    run.drains = rng.random() < 0.1
    for _ in range(rng.choice((0, 1, 1, 2))):
        run.cluster.doom[rng.choice(names)] = rng.choice((1, 1, 2, 3)), rng.randrange(1, rng.choice((20, 400)))
    return run


def finish(run: Run) -> Run:
    """Run a scenario to its end and check it."""
    try:
        run.go()
        run.check()
    finally:
        run.cluster.close()
    return run
