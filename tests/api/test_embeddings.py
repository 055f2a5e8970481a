"""Vectors of prompts: through scheduler, workers and the HTTP facade, against transformers and the fake runner."""

from __future__ import annotations

import base64
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCAB, World, fake_config
from test_endpoints import VectorEngine
from test_requests import ModelLoop
from test_server import Server, ask, check_error, client, play
from tiny_models import Driver, save_architecture, save_llama

from minisgl.actors.scheduler import plan_builder
from minisgl.actors.scheduler.interface import Add, Output
from minisgl.actors.scheduler.request import Request
from minisgl.api.engine import TextPrompt, TokenPrompt
from minisgl.errors import RequestError
from minisgl.model.common.pooling import Pooling
from minisgl.model.fake_runner import expected_tokens, state
from minisgl.plan import POOL, SUM, StepPlan, StepResult
from minisgl.sampling_params import Finish, RequestOptions, SamplingParams

PATH = "/v1/embeddings"


# ---------------- against transformers
class PoolLoop(ModelLoop):
    """The scheduler's machine with the CPU worker; requests for vectors beside requests for text."""

    def __init__(self, model: Any, **limits: Any) -> None:
        super().__init__(model, **limits)
        self.vectors: dict[int, Any] = {}

    def embed(self, ids: list[int], pooling: str) -> int:
        uid = 1000 + len(self.vectors)
        self.vectors[uid], self.said[uid] = (ids, pooling), []
        options = RequestOptions(pooling=pooling)
        greedy = SamplingParams(max_tokens=1, temperature=0)
        self._events.append(Add(Request(uid, np.array(ids, np.int32), len(ids) + 1, 0, greedy, options)))
        return uid

    def step(self, deliver: int | None = None) -> Output:
        out = super().step(deliver)
        for uid, vector in out.vectors:
            ids, pooling, *before = self.vectors[uid]
            self.vectors[uid] = (ids, pooling, *before, vector)
            assert uid not in self.machine.running
        return out


class Model:
    """A checkpoint on disk, and transformers' final hidden states of prompts."""

    def __init__(self, path: Path, save: Any) -> None:
        self.path, self._model = path, save(path)

    def states(self, ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            out = self._model(torch.tensor([ids]), output_hidden_states=True)
        return out.hidden_states[-1][0].float().numpy()

    def vector(self, ids: list[int], pooling: str) -> np.ndarray:
        states = self.states(ids)
        return states.mean(0) if pooling == "mean" else states[-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"), save_llama)


def run_vectors(model: Model, seed: int, **limits: Any) -> PoolLoop:
    """Vectors and texts with shared beginnings, in a pool so small that requests are retracted."""
    rng, loop = random.Random(seed), PoolLoop(model, **limits)
    trunk = [rng.randrange(6, 203) for _ in range(24)]
    for _ in range(14):
        ids = trunk[: rng.randrange(24)] + [rng.randrange(6, 203) for _ in range(rng.randrange(1, 20))]
        left = None
        if rng.random() < 0.7:
            left = loop.embed(ids, rng.choice(["mean", "last"]))
        else:
            loop.ask(ids, SamplingParams(max_tokens=rng.randrange(4, 20), temperature=0, ignore_eos=True))
        for _ in range(rng.randrange(3)):
            loop.step()
        if left is not None and len(loop.vectors[left]) == 2 and rng.random() < 0.3:  # a client leaves, perhaps half-way
            loop.drop(left)
            loop.vectors[left] = (*loop.vectors[left], None)
            loop.step()
    loop.run()
    return loop


def wrong_vectors(model: Model, loop: PoolLoop) -> str:
    for uid, (ids, pooling, *got) in loop.vectors.items():
        if len(got) != 1:
            return f"request {uid} has {len(got)} vectors"
        if got[0] is None:
            continue
        error = float(np.abs(got[0] - model.vector(ids, pooling)).max())
        if not error < 2e-5 * np.abs(got[0]).max() + 1e-5:
            return f"the {pooling} vector of request {uid} is off by {error}"
    return ""


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_vectors_are_those_of_transformers_in_chunks_from_the_cache_and_through_retractions(model: Model, seed: int) -> None:
    loop = run_vectors(model, seed, max_steps_in_flight=1 + seed % 3)
    assert wrong_vectors(model, loop) == ""
    left = {uid for uid, (_, _, vector) in loop.vectors.items() if vector is None}
    assert loop.ends == {**dict.fromkeys(loop.asked, Finish.LENGTH), **dict.fromkeys(left, Finish.ABORT)}
    for uid, (ids, most) in loop.asked.items():  # the texts beside them are as ever
        said = loop.said[uid]
        assert len(said) == most
        assert int(np.argmax(model._model(torch.tensor([ids])).logits[0, -1].detach().numpy())) == said[0]
    assert loop.machine.counters.cached_tokens > 0
    assert loop.machine.counters.retractions > 0 or seed


def _reads_the_cache(self: Request) -> bool:
    return self.scores_prompt


def _never_begins_anew(self: Pooling, plan: StepPlan, batch: Any, states: Any) -> Any:
    batch.positions[:] += 1  # nobody reads them any more
    return _take(self, plan, batch, states)


def _forgets_earlier_chunks(self: Pooling, plan: StepPlan, batch: Any, states: Any) -> Any:
    self._sums.clear()
    return _take(self, plan, batch, states)


_take = Pooling.take
MUTANTS = {
    "the mean is taken of what the cache does not have": (Request, "computes_all", property(_reads_the_cache)),
    "a sum goes on with that of the slot's former owner": (Pooling, "take", _never_begins_anew),
    "a sum forgets the chunks before": (Pooling, "take", _forgets_earlier_chunks),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_test_notices_when(name: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, broken = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, broken)
    caught = 0
    for seed in range(6):
        try:
            loop = run_vectors(model, seed)
            caught += wrong_vectors(model, loop) != ""
        except Exception:
            caught += 1
        if caught:
            return
    raise AssertionError("nothing was noticed")


def test_no_result_has_more_vectors_than_its_ring_has_room_for(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_builder, "POOLED_ROWS", 2)
    loop = PoolLoop(model, slots=6, num_pages=40, step_tokens=40)
    for i in range(8):
        loop.embed([7 + i, 8, 9], "mean" if i % 2 else "last")
    loop.run()
    assert wrong_vectors(model, loop) == ""
    most = max(int(((plan.prefill["sample"] & POOL) > 0).sum()) for plan in loop.plans)
    assert most == 2


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU scripts/check/gpu.py runs the kernels")
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_gpu_workers_steps_give_the_same_vectors(tmp_path: Path, name: str) -> None:
    import test_cuda_steps as cuda

    model = Model(tmp_path, save_llama if name == "llama" else lambda path: save_architecture(path, name))
    worker = cuda.Interpreted(tmp_path, graphs=True)
    worker.steps._model = cuda_model(worker)
    driver = Driver(cuda.PAGES, 4)
    ids = [int(t) for t in np.random.default_rng(1).integers(6, 203, 17)]
    driver.join(0)
    driver.join(1)
    first = driver.plan([(0, ids[:9], False), (1, ids[:5], True)], [])
    flag(first, SUM, POOL)
    second = driver.plan([(0, ids[9:], True)], [1])
    flag(second, SUM | POOL)
    third = driver.plan([], [1])
    got = []
    for plan in (first, second, third):
        worker.run(plan)
        got.append(worker.steps.vectors)
    assert got[2] is None
    for vector, want in ((got[0], model.vector(ids[:5], "last")), (got[1], model.vector(ids, "mean"))):
        assert vector is not None
        assert vector.shape == (1, len(want))
        assert np.abs(vector[0].numpy() - want).max() < 1e-4 * np.abs(want).max()


def flag(plan: StepPlan, *flags: int) -> None:
    plan.prefill = plan.prefill.copy()
    plan.prefill["sample"] |= np.array(flags, np.uint32)


def cuda_model(worker: Any) -> Any:
    """The model itself instead of the spy on its logits."""
    return worker.steps._model.__closure__[0].cell_contents


# ---------------- through the actors
@pytest.mark.parametrize("seed", range(4))
def test_every_interleaving_of_the_actors_gives_the_fake_runners_vectors(seed: int) -> None:
    rng, world = random.Random(seed), World(seed, fake_config(tp=2, kv_tokens=96, lag=1 + seed % 3))
    got: dict[int, list[Any]] = {}
    want: dict[int, tuple[list[int], str]] = {}
    texts: dict[int, list[int]] = {}
    for _ in range(16):
        ids = [1 + i % 5 for i in range(rng.randrange(9))] + [rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 9))]
        if rng.random() < 0.6:
            pooling, news = rng.choice(["mean", "last"]), []
            greedy, options = SamplingParams(max_tokens=1), RequestOptions(pooling=pooling)
            uid = world.gateway.open(TokenPrompt(tuple(ids)), greedy, news.append, options)
            got[uid], want[uid] = news, (ids, pooling)
        else:
            texts[world.submit(ids, 6)] = expected_tokens(ids, 6, VOCAB, (0,))
        for _ in range(rng.randrange(20)):
            world.system.step()
    victim = next(iter(got))
    world.gateway.close(victim)
    world.system.run()
    for uid, (ids, pooling) in want.items():
        if uid == victim and not got[uid]:
            continue
        (chunk,) = got[uid]
        states = [state(np.array(ids[: i + 1], np.int32)) for i in range(len(ids))]
        assert chunk.vector.tolist() == pytest.approx([np.mean(states) if pooling == "mean" else states[-1]], abs=1e-4)
        assert (chunk.text, chunk.token_ids, chunk.prompt_tokens, chunk.finish) == ("", (), len(ids), Finish.STOP)
    assert {uid: world.answers[uid] for uid in texts} == texts
    assert world.machine.idle
    assert world.gateway.open_requests == 0
    world.close()


def test_vectors_survive_the_ring_and_a_result_without_them_is_refused() -> None:
    vectors = np.random.default_rng(0).random((3, 5), np.float32)
    raw = StepResult(7, np.array([5, 9], np.int32), vectors=vectors).pack()
    got = StepResult.unpack(raw)
    assert got.vectors is not None
    assert got.vectors.tolist() == vectors.tolist()
    assert got.tokens.tolist() == [5, 9]
    with pytest.raises(ValueError, match="header says"):
        StepResult.unpack(raw[:-4])
    w = World(None, fake_config(tp=1))
    w.gateway.open(TokenPrompt((1, 2)), SamplingParams(max_tokens=1), lambda _: None, RequestOptions(pooling="last"))
    while not w.machine.inflight:
        w.system.step()
    with pytest.raises(RuntimeError, match="lacks vectors"):
        w.machine.step([StepResult(w.machine.inflight[0].step, np.zeros(1, np.int32))], 0.0)


def test_a_prompt_that_does_not_fit_is_refused_under_the_name_of_its_field() -> None:
    w = World(None, fake_config(tp=1))
    for ids in ((), tuple([1] * 65)):
        with pytest.raises(RequestError) as caught:
            w.gateway.open(TokenPrompt(ids), SamplingParams(max_tokens=1), lambda _: None, RequestOptions(pooling="mean"))
        assert caught.value.param == "input"
    w.close()


# ---------------- through HTTP
def serve(scene: Any) -> VectorEngine:
    return play(scene, VectorEngine)  # type: ignore[return-value]


def test_the_sdk_gets_unit_vectors_in_both_encodings_and_of_fewer_dimensions() -> None:
    async def scene(engine: VectorEngine, http: Server) -> None:
        async with client(http) as sdk:
            plain = await sdk.embeddings.create(model="tiny", input="a")  # base64 on the wire
            floats = await sdk.embeddings.create(model="tiny", input=["a", "b"], encoding_format="float")
            short = await sdk.embeddings.create(model="tiny", input=[[1, 2], [3]], dimensions=2)
            raw = await sdk.embeddings.create(model="tiny", input=[5, 6], extra_body={"normalize": False, "pooling": "mean"})
        unit = np.array([2, 3, 6]) / 7
        assert plain.data[0].embedding == pytest.approx(unit.tolist(), abs=1e-6)
        assert (plain.usage.prompt_tokens, plain.usage.total_tokens, plain.model) == (4, 4, "tiny")
        assert [(d.index, d.object) for d in floats.data] == [(0, "embedding"), (1, "embedding")]
        assert floats.data[1].embedding == pytest.approx(unit.tolist(), abs=1e-6)
        assert floats.usage.total_tokens == 8
        assert short.data[0].embedding == pytest.approx((np.array([2, 3]) / 13**0.5).tolist(), abs=1e-6)
        assert raw.data[0].embedding == [12, 18, 36]
        assert engine.options.pooling == "mean"
        status, headers, body = await ask(http, PATH, {"input": "x", "encoding_format": "base64", "what": 1})
        assert (status, headers["X-Ignored-Params"]) == (200, "what")
        vector = np.frombuffer(base64.b64decode(json.loads(body)["data"][0]["embedding"]), "<f4")
        assert vector.tolist() == pytest.approx(unit.tolist(), abs=1e-6)

    engine = serve(scene)
    assert engine.opened[0] == (TextPrompt("a"), SamplingParams(max_tokens=1, temperature=0))
    assert [p for p, _ in engine.opened[3:6]] == [TokenPrompt((1, 2)), TokenPrompt((3,)), TokenPrompt((5, 6))]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "input", "missing_required_parameter"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": {"a": 1}}, "input", "invalid_type"),
        ({"input": ["a", [1]]}, "input", "invalid_type"),
        ({"input": [1, "a"]}, "input", "invalid_type"),
        ({"input": "a", "dimensions": 4}, "dimensions", "invalid_value"),
        ({"input": "a", "dimensions": 0}, "dimensions", "invalid_value"),
        ({"input": "a", "dimensions": "2"}, "dimensions", "invalid_type"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"input": "a", "pooling": "cls"}, "pooling", "invalid_value"),
        ({"input": "a", "normalize": 1}, "normalize", "invalid_type"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "invalid_value"),
        ({"input": "a", "messages": [{"role": "user", "content": "a"}]}, "input", "missing_required_parameter"),
        ({"input": ["a"] * 9}, "input", "invalid_value"),
        ({"input": "a", "model": "text-embedding-3-small"}, "model", "model_not_found"),
    ],
)
def test_what_is_wrong_with_a_request_for_vectors_is_said(body: dict[str, Any], param: str, code: str) -> None:
    async def scene(engine: VectorEngine, http: Server) -> None:
        status, headers, raw = await ask(http, PATH, body)
        error = check_error(status, headers, raw)
        assert (error["param"], error["code"]) == (param, code)

    assert not play(scene, VectorEngine, max_open_requests=8).opened
