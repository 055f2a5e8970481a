"""A request that kills the process that runs it is refused, alone; all others are answered as if it had never come."""

from __future__ import annotations

import random
from typing import Any

import crash_scenario
import pytest
from conftest import cases
from crash_cluster import Cluster, Crashed
from crash_model import Runner
from crash_scenario import ACTORS, REQUESTS, Client, Open, Run, config
from test_tokenizer_pool import Front

from minisgl.actors.messages import EngineReady, Started, Tokenize
from minisgl.actors.runtime.ring import RingWriter
from minisgl.actors.tokenizer import TokenizerActor
from minisgl.actors.worker import WorkerActor
from minisgl.api.engine import TextPrompt, TokenPrompt
from minisgl.errors import RequestError
from minisgl.sampling_params import RequestOptions, SamplingParams

DEADLY = 200  # a token


class DeadlyRunner(Runner):
    """Its process ends when it computes a context with a certain token in it, and of a certain length."""

    def _append(self, slot: int, token: int) -> None:
        super()._append(slot, token)
        context = self._context(slot)
        if DEADLY in context and len(context) == context[0]:
            raise Crashed


class DeadlyTokenizer(TokenizerActor):
    """Its process ends when it reads a certain text."""

    def _encode(self, m: Tokenize) -> Any:
        if "deadly" in (m.text or ""):
            raise Crashed
        return super()._encode(m)


def _poison(length: int, **options: Any) -> Open:
    prompt = TokenPrompt((length, DEADLY, 97, 98, 99, 97))
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    return lambda gateway, took: gateway.open(prompt, params, took, RequestOptions(**options))


POISONS: dict[str, Open] = {
    "poison, at once": _poison(2),
    "poison, with its last token": _poison(6),
    "poison, behind tokens that it has said": _poison(15),
    "poison, mean": _poison(4, pooling="mean"),
    "poison, last": _poison(6, pooling="last"),
    "poison, text": lambda gateway, took: gateway.open(TextPrompt("a deadly one"), SamplingParams(), took),
    "poison, question": lambda gateway, took: gateway.tokenize(TextPrompt("deadly, too"), took),
}
DEADLY_ACTORS = ACTORS | {
    "tokenizer": lambda ctx, config, arenas, _: DeadlyTokenizer(
        ctx, config, RingWriter(arenas.prompts[crash_scenario._index(ctx)])
    ),
    "worker": lambda ctx, config, arenas, _: WorkerActor(
        ctx, crash_scenario._index(ctx), arenas, lambda: DeadlyRunner(config, 40)
    ),
}


def scenario(seed: int, poisons: list[str], tp: int, *, patient: bool = True) -> Run:
    rng = random.Random(seed)
    cluster = Cluster(config(tp), seed, DEADLY_ACTORS, narrow=seed % 4 == 3)
    kinds = [*rng.sample(sorted(REQUESTS), 8), *poisons]
    rng.shuffle(kinds)
    run = Run(cluster, [Client(kind, nth) for nth, kind in enumerate(kinds)], REQUESTS | POISONS)
    for client in () if patient else rng.sample(run.clients, 5):
        client.leaves_after = rng.choice((0, 0, 1, 2, 4))
    try:
        run.go()
        for client in run.clients:
            if client.kind in POISONS:
                assert client.poison or client.left, f"{client.kind}: {client.heard}"
            else:
                client.check(crash_scenario.reference(client.kind, client.nth))
        crash_scenario.check_books(cluster)
    finally:
        cluster.close()
    return run


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("tp", [1, 2])
def test_poison_is_refused_and_all_others_are_answered(poison: str, tp: int) -> None:
    for seed in range(cases(4)):
        run = scenario(seed, [poison], tp)
        assert len(run.clients[[c.kind for c in run.clients].index(poison)].heard) < 15


def test_several_poisons_are_refused_together() -> None:
    for seed in range(cases(6)):
        scenario(seed, random.Random(seed).sample(sorted(POISONS), 3), 1 + seed % 2)


def test_the_same_prompt_is_refused_whether_it_comes_before_or_after_the_verdict() -> None:
    for seed in range(cases(4)):
        poison = sorted(POISONS)[seed % 5]
        run = scenario(seed, [poison] * 4, 1)
        died = sum(run.cluster.deaths.values())
        assert died < 9, "each was tried"


def test_clients_may_leave_before_and_during_trials() -> None:
    for seed in range(cases(12)):
        scenario(seed, random.Random(seed).sample(sorted(POISONS), 2), 1, patient=False)


def test_who_ends_the_engine_alone_is_poison_even_if_nobody_has_heard_that_it_started() -> None:
    front = Front(1, 0)
    gateway, ring = front.gateway, front.memory.arenas.requests
    gateway.open(TokenPrompt((1, 2, 3)), SamplingParams(), front.news.append)
    for _ in range(2):
        gateway.receive(Started(next(iter(gateway._sent)), 0.0))
        gateway.lost(["scheduler"], ring, {"scheduler"})
        gateway.receive(EngineReady(100, 0))
    assert gateway.on_trial
    assert not front.news
    gateway.lost(["scheduler"], ring, {"scheduler"})
    assert [n.code for n in front.news if isinstance(n, RequestError)] == ["poison_request"]
    assert not gateway.open_requests
    front.memory.close()
