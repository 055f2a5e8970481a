"""Requests with every sampling parameter, through scheduler and CPU worker, against transformers and a slow sampler.

The pool is so small that requests are retracted and come back; prompts are computed in chunks, cached, and scored.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Loop
from test_penalties import reference
from test_sampler import reference_distribution, reference_draw
from tiny_models import config_for, save_llama

from minisgl.actors.messages import TokenLogprobs
from minisgl.actors.scheduler import plan_builder, step_machine
from minisgl.actors.scheduler.interface import Add, Output
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.sampling_extras import NOTHING, Extra
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.actors.spawn import make_runner
from minisgl.model.cpu.penalties import Adjustments
from minisgl.model.cpu.sampler import uniform
from minisgl.plan import StepPlan
from minisgl.sampling_params import Finish, SamplingParams

EOS = (2, 5)
CONTEXT = 64


class Model:
    """The transformers model, whose log probabilities are computed once for each context."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._model = save_llama(path)
        self._known: dict[tuple[int, ...], list[float]] = {}

    def logits(self, ids: list[int]) -> list[float]:
        """Of the token after `ids`."""
        key = tuple(ids)
        if key not in self._known:
            with torch.inference_mode():
                self._known[key] = self._model(torch.tensor([ids])).logits[0, -1].tolist()
        return self._known[key]

    def logprobs(self, ids: list[int]) -> list[float]:
        row = self.logits(ids)
        total = math.log(sum(math.exp(x - max(row)) for x in row)) + max(row)
        return [x - total for x in row]

    def answer(self, prompt: list[int], p: SamplingParams, most: int) -> tuple[list[int], Finish]:
        """One token after the other; the words of SamplingParams, taken literally."""
        output: list[int] = []
        while len(output) < most:
            ends = {*p.stop_token_ids, *(() if p.ignore_eos else EOS)}
            bias = dict(p.logit_bias) | (dict.fromkeys(ends, -math.inf) if len(output) < p.min_tokens else {})
            names = {"presence": p.presence_penalty, "frequency": p.frequency_penalty, "repetition": p.repetition_penalty}
            rows = {**names, "bias": [(t, v, 0) for t, v in bias.items()]}
            row = reference(self.logits(prompt + output), rows, prompt, output, len(prompt) + len(output))
            if p.temperature == 0:
                output.append(max(range(len(row)), key=row.__getitem__))
            else:
                at = np.array([len(prompt) + len(output)])
                u = uniform(np.array([p.seed], np.uint64), at)[0]
                output.append(reference_draw(reference_distribution(row, p.temperature, p.top_k, p.top_p, p.min_p), u))
            if output[-1] in ends:
                return output, Finish.STOP
        return output, Finish.LENGTH


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"))


class ModelLoop(Loop):
    """The scheduler's machine with the CPU worker."""

    def __init__(self, model: Model, **limits: Any) -> None:
        super().__init__(**{"slots": 4, "num_pages": 16, "step_tokens": 13, "max_context": CONTEXT, **limits})
        lim = self.limits = replace(self.limits, vocab_size=203, eos_ids=EOS)
        self.machine = StepMachine(lim)
        self.runner: Any = make_runner(
            config_for(model.path, max_running=lim.slots, max_context=CONTEXT, step_tokens=lim.step_tokens), 0, ""
        )
        self.runner.allocate(lim.num_pages)
        self.params: dict[int, SamplingParams] = {}
        self.scores: dict[int, list[TokenLogprobs]] = {}
        self.model = model

    def ask(self, ids: list[int], p: SamplingParams) -> int:
        lim, uid = self.limits, len(self.asked) + 1
        limit = min(len(ids) + (p.max_tokens or 0), lim.max_context)
        self.asked[uid], self.said[uid], self.params[uid] = (list(ids), limit - len(ids)), [], p
        self._events.append(Add(Request(uid, np.array(ids, np.int32), limit, p.seed or 0, p)))
        return uid

    def step(self, deliver: int | None = None) -> Output:
        out = super().step(deliver)
        for rows in out.logprobs:
            ends = np.cumsum(rows.widths)
            for i, uid in enumerate(rows.uids.tolist()):
                tops = slice(int(ends[i]) - int(rows.widths[i]), int(ends[i]))
                one = [getattr(rows, f)[i : i + 1] for f in ("uids", "drawn", "tokens", "logprobs", "widths")]
                row = TokenLogprobs(*one, rows.top_ids[tops], rows.top_logprobs[tops])
                self.scores.setdefault(uid, []).append(row)
        return out

    def wrong(self) -> str:
        """What is wrong with the answers, after all of them."""
        for uid, (prompt, most) in self.asked.items():
            p = self.params[uid]
            want = self.model.answer(prompt, p, most)
            if (self.said[uid], self.ends[uid]) != want:
                return f"request {uid} said {self.said[uid]} instead of {want}: {p}"
            if why := self._wrong_scores(uid, prompt, p):
                return f"request {uid}: {why}"
        return ""

    def _wrong_scores(self, uid: int, prompt: list[int], p: SamplingParams) -> str:
        ids, got = prompt + self.said[uid], self.scores.get(uid, [])
        if p.logprobs is None:
            return "scores that nobody wants" if got else ""
        first = 1 if p.echo else len(prompt)
        if [int(s.tokens[0]) for s in got] != ids[first:]:
            return f"{len(got)} scores for {len(ids) - first} tokens, or others"
        if [int(s.drawn[0]) for s in got] != [0] * (len(prompt) - first) + [1] * len(self.said[uid]):
            return "tokens of the prompt and of the answer are mixed up"
        for at, s in enumerate(got, first):
            row = self.model.logprobs(ids[:at])
            best = sorted(row, reverse=True)[: p.logprobs]
            if abs(s.logprobs[0] - row[ids[at]]) > 1e-4 or int(s.widths[0]) != p.logprobs:
                return f"the log probability of token {at}"
            if p.logprobs and max(abs(s.top_logprobs - best)) > 1e-4:
                return f"the alternatives to token {at}"
        return ""


def random_params(rng: random.Random) -> SamplingParams:
    def maybe(share: float, value: Any, otherwise: Any) -> Any:
        return value if rng.random() < share else otherwise

    most = rng.randrange(8, 32)
    return SamplingParams(
        max_tokens=most,
        temperature=maybe(0.5, 0.9, 0.0),
        top_p=maybe(0.3, 0.9, 1.0),
        seed=rng.randrange(1 << 40),
        presence_penalty=maybe(0.3, rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(0.3, rng.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(0.4, rng.choice([0.7, 1.4]), 1.0),
        logit_bias={t: rng.uniform(-9, 9) for t in rng.sample(range(203), rng.choice([0, 0, 1, 30]))},
        min_tokens=maybe(0.4, rng.randrange(most), 0),
        stop_token_ids=maybe(0.4, tuple(rng.sample(range(203), 40)), ()),
        ignore_eos=rng.random() < 0.3,
        logprobs=maybe(0.5, rng.choice([0, 1, 4]), None),
        echo=rng.random() < 0.4,
    )


def run(model: Model, seed: int, **limits: Any) -> ModelLoop:
    rng, loop = random.Random(seed), ModelLoop(model, **limits)
    trunks = [[rng.randrange(6, 203) for _ in range(20)] for _ in range(2)]
    for _ in range(14):
        trunk = rng.choice(trunks)[: rng.randrange(20)]
        loop.ask(trunk + [rng.randrange(6, 203) for _ in range(rng.randrange(1, 8))], random_params(rng))
        for _ in range(rng.randrange(4)):
            loop.step()
    loop.run()
    return loop


@pytest.mark.parametrize("lag", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_parameter_has_its_effect_whatever_runs_beside_it_and_through_retractions(
    model: Model, seed: int, lag: int
) -> None:
    loop = run(model, seed, max_steps_in_flight=lag)
    assert not loop.wrong()
    assert loop.machine.counters.retractions > 0
    assert loop.machine.counters.cached_tokens > 0
    assert not loop.machine.table.with_logprobs


@pytest.mark.parametrize("after", [1, 5])
def test_a_request_that_is_replayed_after_a_restart_goes_on_where_it_was(model: Model, after: int) -> None:
    """Its prompt and what was delivered, in a new scheduler and worker: the rest of the answer is the same."""
    rng, first = random.Random(5), ModelLoop(model, num_pages=60)
    params = [replace(random_params(rng), echo=False, min_tokens=8, logprobs=None) for _ in range(8)]
    for i, p in enumerate(params):
        first.ask([9 + i, 40, 41, 9 + i], p)
    first.run()
    second = ModelLoop(model, num_pages=60)
    for uid, (prompt, most) in first.asked.items():
        ids = np.array(prompt + first.said[uid][:after], np.int32)
        second.asked[uid], second.said[uid] = (prompt, most), first.said[uid][:after]
        p = second.params[uid] = params[uid - 1]
        request = Request(uid, ids, len(prompt) + most, p.seed or 0, p, n_prompt=len(prompt))
        second._events.append(Add(request))
    second.run()
    assert not second.wrong()
    assert second.said == first.said


def test_a_plan_and_a_result_of_plain_requests_carry_nothing_for_the_others(model: Model) -> None:
    loop = ModelLoop(model)
    for _ in range(3):
        loop.ask([7, 8, 9], SamplingParams(max_tokens=6, temperature=0))
    loop.run()
    for plan in loop.plans:
        decode = 0 if plan.decode is None else 4 * len(plan.decode)
        parts = (plan.new_slots, plan.page_grants, plan.prefill, plan.ids)
        assert len(plan.pack()) == 64 + decode + sum(part.nbytes for part in parts)
    assert not loop.scores


def test_a_prompt_is_scored_in_bounded_chunks_beside_others(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_builder, "SCORED_TOKENS", 5)
    loop = ModelLoop(model, num_pages=60)
    p = SamplingParams(max_tokens=3, temperature=0, echo=True, logprobs=2)
    for i in range(3):
        loop.ask([9 + i, *range(30, 50)], p)
    loop.ask(list(range(60, 80)), SamplingParams(max_tokens=5, temperature=0))
    loop.run()
    assert not loop.wrong()
    assert max(len(plan.targets) for plan in loop.plans) == 5


def test_a_plan_never_has_more_biases_and_histories_than_its_ring_has_room_for(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_builder, "EXTRA_BYTES", 400)
    loop = ModelLoop(model, num_pages=60)
    for i in range(6):
        bias = dict.fromkeys(range(12 + 4 * (i % 2)), 1.0)
        loop.ask([9 + i, 30, 31], SamplingParams(max_tokens=4, temperature=0, logit_bias=bias, presence_penalty=0.5))
    loop.ask([7] * 20, SamplingParams(max_tokens=4, temperature=0, logit_bias=dict.fromkeys(range(40), 1.0)))
    loop.run()
    assert not loop.wrong()
    sizes = [plan.bias.nbytes + plan.history.nbytes for plan in loop.plans if len(plan.extras)]
    assert len(sizes) == 4  # by twos, and the last alone although it is larger
    assert [size <= 400 for size in sizes] == [True, True, True, False]


# ---------------- planted bugs
def _forget_what_was_said(plant: Callable[..., None]) -> None:
    real = plan_builder.extra_of

    def forget(request: Request, eos: tuple[int, ...]) -> Extra:
        return real(replace(request, ids=request.ids[: request.n_prompt]), eos)

    plant(plan_builder, "extra_of", forget)


def _take_what_was_said_for_the_prompt(plant: Callable[..., None]) -> None:
    real = plan_builder.extra_of
    plant(plan_builder, "extra_of", lambda request, eos: real(replace(request, n_prompt=len(request.ids)), eos))


def _leave_the_former_owners_extras(plant: Callable[..., None]) -> None:
    real = plan_builder.PlanBuilder

    class Builder(real):  # type: ignore[misc, valid-type]
        def __setattr__(self, name: str, value: object) -> None:
            object.__setattr__(self, name, _Plain() if name == "_extras" else value)

    class _Plain(list):  # type: ignore[type-arg]
        def append(self, item: tuple[int, Extra]) -> None:
            if item[1] is not NOTHING:
                super().append(item)

    plant(step_machine, "PlanBuilder", Builder)


def _pass_on_scores_twice(plant: Callable[..., None]) -> None:
    real = StepMachine._retract

    def retract(self: StepMachine) -> None:
        waiting = {r.uid for r in self.waiting.front(99)}
        real(self)
        for request in self.waiting.front(99):
            if request.uid not in waiting:
                request.scored = 1

    plant(StepMachine, "_retract", retract)


def _score_what_the_cache_has(plant: Callable[..., None]) -> None:
    plant(StepMachine, "_match", lambda self, request: self.cache.match(request.ids, request.options.cache_salt))


def _count_nothing(plant: Callable[..., None]) -> None:
    plant(Adjustments, "count", lambda self, slots, tokens: None)


def _keep_former_counts(plant: Callable[..., None]) -> None:
    real = Adjustments._set_seen

    def add(self: Adjustments, slot: int, prompt: Any, output: Any) -> None:
        before = self._seen[slot].clone() if len(self._seen) else 0
        real(self, slot, prompt, output)
        self._seen[slot] += before

    plant(Adjustments, "_set_seen", add)


def _without(name: str) -> Callable[[Callable[..., None]], None]:
    def planter(plant: Callable[..., None]) -> None:
        real = Adjustments.join

        def join(self: Adjustments, plan: StepPlan) -> None:
            extras, bias, history = plan.extras.copy(), plan.bias.copy(), plan.history
            if name in ("presence", "frequency", "repetition"):
                extras[name] = 1 + 1e-6 if name == "repetition" else 0
            elif name == "bias":
                bias["value"] = 0
            elif name == "until":
                bias["until"] = 0
            real(self, StepPlan(0, extras=extras, bias=bias, history=history))

        plant(Adjustments, "join", join)

    return planter


PLANTED = {
    "a retracted request forgets what it said": _forget_what_was_said,
    "what was said becomes part of the prompt": _take_what_was_said_for_the_prompt,
    "a slot keeps the extras of its former owner": _leave_the_former_owners_extras,
    "scores are passed on twice": _pass_on_scores_twice,
    "a prompt to be scored is taken from the cache": _score_what_the_cache_has,
    "drawn tokens are not counted": _count_nothing,
    "counts of a former owner stay": _keep_former_counts,
    "there is no presence penalty": _without("presence"),
    "there is no frequency penalty": _without("frequency"),
    "there is no repetition penalty": _without("repetition"),
    "there is no bias": _without("bias"),
    "an answer may end too early": _without("until"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_test_notices_when(name: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[name](monkeypatch.setattr)
    assert any(run(model, seed).wrong() for seed in range(6))
