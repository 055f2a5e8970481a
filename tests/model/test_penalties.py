"""Penalties, biases and log probabilities: the CPU worker against a slow reference, the GPU's against the CPU worker."""

from __future__ import annotations

import importlib.util
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
import test_cuda_steps as gpu
from tiny_models import Driver, save_llama

from minisgl.model.cpu.runner import Runner
from minisgl.model.cpu.sampler import score
from minisgl.model.cuda import step as steps_module
from minisgl.model.cuda.device_state import DeviceState
from minisgl.model.kernels import logprobs as score_kernel
from minisgl.model.kernels import penalties as kernels
from minisgl.model.kernels import sampling
from minisgl.model.kernels.logprobs import SCORE_WORDS
from minisgl.plan import DRAW, SCORE, StepLogprobs, StepPlan

VOCAB = 203
Logits = list[float]


def reference(logits: Logits, p: dict[str, Any], prompt: list[int], output: list[int], position: int) -> Logits:
    """What the parameters make of one row, a token after the other, in double precision."""
    said, out = Counter(output), list(logits)
    for token, value, until in p.get("bias", ()):
        out[token] = -math.inf if position < until else out[token] + value
    for token in {*prompt, *output} if p.get("repetition", 1) != 1 else ():
        out[token] = out[token] / p["repetition"] if out[token] > 0 else out[token] * p["repetition"]
    for token, n in said.items():
        out[token] -= n * p.get("frequency", 0) + p.get("presence", 0)
    return out


def random_extra(rng: random.Random) -> dict[str, Any]:
    """Any of the parameters that a slot may have, most of the time none."""
    p: dict[str, Any] = {}
    if rng.random() < 0.4:
        p |= {"presence": rng.choice([0.0, 1.5, -0.7]), "frequency": rng.choice([0.0, 0.9, -0.4])}
    if rng.random() < 0.4:
        p |= {"repetition": rng.choice([1.7, 0.6])}
    if rng.random() < 0.4:
        tokens = rng.sample(range(VOCAB), rng.choice([1, 3, 90]))
        p |= {"bias": [(t, rng.uniform(-4, 4), rng.choice([0, 0, 20])) for t in tokens]}
    if rng.random() < 0.5:
        p |= {"logprobs": rng.choice([0, 1, 5])}
    return p


class Traffic:
    """Plans as a scheduler makes them, of requests whose parameters and tokens are known, so that each row has a reference.

    Requests stop and come back in other slots with what they have said (a retraction), beside plain ones in reused slots.
    """

    def __init__(self, seed: int, *, draws: bool = False) -> None:
        self.rng, self.draws = random.Random(seed), draws
        self.driver = Driver(gpu.PAGES, 4, seed)
        self.running: dict[int, tuple[dict[str, Any], list[int], list[int]]] = {}  # slot -> (parameters, prompt, output)
        self.stopped: list[tuple[dict[str, Any], list[int], list[int]]] = []
        self.last: list[int] | None = None

    def plan(self) -> tuple[StepPlan, list[int], list[tuple[int, list[int]]]]:
        """The next plan, the slots whose rows sample, and (slot, targets) of the prompts that are scored."""
        rng, driver = self.rng, self.driver
        decode = list(self.running)
        for slot in [s for s in decode if rng.random() < 0.15 or driver.kv_len[s] > 60]:
            decode.remove(slot)
            self.stopped.append(self.running.pop(slot))
            driver.free.extend(driver.pages[slot])
        prefill, targets, scored = [], [], []
        for slot in [s for s in range(6) if s not in self.running]:
            if rng.random() < 0.5 and len(driver.free) > 20:
                again = self.stopped and rng.random() < 0.6
                request = self.stopped.pop() if again else (self._parameters(), self._words(), [])
                p, prompt, output = request
                known = (
                    {"prompt": prompt if p.get("repetition", 1) != 1 else [], "output": output} if p.keys() - {"bias"} else {}
                )
                driver.join(slot, **p, **(known if p else {}))
                flags = DRAW
                if "logprobs" in p and not output:
                    flags |= SCORE
                    targets += prompt[1:]
                    scored.append((slot, prompt[1:]))
                prefill.append((slot, prompt + output, flags))
                self.running[slot] = request
        same = decode == self.last
        self.last = decode
        plan = driver.plan(prefill, None if same else decode, decode, targets)
        return plan, [s for s, _, _ in prefill] + decode, scored

    def _parameters(self) -> dict[str, Any]:
        p = random_extra(self.rng)
        if self.draws and self.rng.random() < 0.5:
            p |= {"temperature": 0.8, "seed": self.rng.randrange(1 << 40), "top_k": self.rng.choice([0, 40])}
        return p

    def _words(self) -> list[int]:
        return [self.rng.randrange(VOCAB) for _ in range(self.rng.randrange(2, 12))]

    def drawn(self, slots: list[int], tokens: list[int]) -> None:
        for slot, token in zip(slots, tokens, strict=True):
            self.running[slot][2].append(token)


class Spied:
    """The CPU worker, with the logits of every step."""

    def __init__(self, path: Path) -> None:
        self.runner: Runner = gpu.cpu_runner(path)
        self.logits = torch.zeros(0)
        model = self.runner._model

        def call(*args: Any) -> torch.Tensor:
            self.logits = model(*args)
            return self.logits

        self.runner._model = call  # type: ignore[assignment]


def check_scores(scores: StepLogprobs | None, logits: list[Logits], tokens: list[int], widths: list[int]) -> None:
    """The log probabilities of `tokens`, each after its row of `logits`, against log-softmax with sorted lists."""
    if not tokens:
        assert scores is None
        return
    assert scores is not None
    assert scores.top_ids.shape == (len(tokens), max(widths))
    for i, (row, token, width) in enumerate(zip(logits, tokens, widths, strict=True)):
        total = math.log(sum(math.exp(x - max(row)) for x in row)) + max(row)
        best = sorted(range(len(row)), key=lambda t: (-row[t], t))[:width]
        assert scores.logprobs[i] == pytest.approx(row[token] - total, abs=2e-5)
        assert scores.top_ids[i, :width].tolist() == best
        assert scores.top_logprobs[i, :width] == pytest.approx([row[t] - total for t in best], abs=2e-5)
        for token_of, value in zip(scores.top_ids[i, :width], scores.top_logprobs[i, :width], strict=True):
            assert token_of != token or value == scores.logprobs[i], "the same number to the last bit"


def wrong_step(traffic: Traffic, worker: Spied) -> str:
    """Runs one step of traffic on the CPU worker; says what is wrong with it, by the reference."""
    plan, slots, scored = traffic.plan()
    result = worker.runner.launch(plan).result()
    rows = worker.logits.tolist()
    for slot, row, token in zip(slots, rows, result.tokens.tolist(), strict=False):
        p, prompt, output = traffic.running[slot]
        want = reference(row, p, prompt, output, len(prompt) + len(output))
        if want[token] < max(want) - 1e-4:
            return f"slot {slot} drew {token} with {p}"
    traffic.drawn(slots, result.tokens.tolist())
    asked = [i for i, s in enumerate(slots) if "logprobs" in traffic.running[s][0]]
    tokens = [int(result.tokens[i]) for i in asked] + [t for _, targets in scored for t in targets]
    widths = [traffic.running[slots[i]][0]["logprobs"] for i in asked]
    widths += [traffic.running[s][0]["logprobs"] for s, targets in scored for _ in targets]
    check_scores(result.scores, [rows[i] for i in asked] + rows[len(slots) :], tokens, widths)
    return ""


def steps(traffic: Traffic, worker: Spied) -> None:
    for _ in range(40):
        assert not wrong_step(traffic, worker)


@pytest.mark.parametrize("seed", range(4))
def test_the_cpu_worker_draws_what_the_reference_prefers_and_scores_what_was_asked(tmp_path: Path, seed: int) -> None:
    save_llama(tmp_path)
    steps(Traffic(seed), Spied(tmp_path))


# ---------------- the GPU's worker and kernels
@pytest.mark.parametrize("graphs", [True, False])
def test_the_gpu_worker_draws_and_scores_what_the_cpu_worker_does(
    tmp_path: Path, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps_module, "SHORT_STEPS", (8, 32))
    monkeypatch.setattr(steps_module, "FEW_ROWS", 4)
    save_llama(tmp_path, layers=1, **gpu.SMALL)
    traffic, ours, theirs = Traffic(7 + graphs, draws=True), gpu.Interpreted(tmp_path, graphs=graphs), gpu.cpu_runner(tmp_path)
    kinds: Counter[object] = Counter()
    for _ in range(8 if graphs else 4):
        plan, slots, _ = traffic.plan()
        want = theirs.launch(plan).result()
        assert ours.run(plan) == want.tokens.tolist()
        traffic.drawn(slots, want.tokens.tolist())
        scored = ours.steps.scored
        assert (scored is None) == (want.scores is None)
        if scored is not None and want.scores is not None:
            got = scored.read(ours.steps.scores.numpy())
            assert got.logprobs == pytest.approx(want.scores.logprobs, abs=1e-4)
            assert got.top_ids.shape == want.scores.top_ids.shape
            kinds["targets"] += scored.targets
        kinds[ours.steps._kind(np.array(slots, np.int64))] += 1
    assert kinds[steps_module.COUNTED] > 1
    assert kinds["targets"] > 5


class Slots:
    """The state of a GPU worker's slots, entered as plans bring it, and what it must be."""

    def __init__(self, seed: int, slots: int = 5) -> None:
        self.rng, self.n = random.Random(seed), slots
        self.driver = Driver(60, 4, seed)
        self.state = DeviceState(slots, 64, 4, 2, gpu.CPU, vocab=VOCAB)
        self.params: list[tuple[dict[str, Any], list[int], list[int]]] = []
        torch.manual_seed(seed)
        self.logits = torch.randn(slots, VOCAB) * 3
        self.logits[:, 50:60] = 4.0  # ties
        self.order = torch.tensor(self.rng.sample(range(slots), slots), dtype=torch.int32)

    def join(self) -> None:
        """New owners for all slots, in one plan."""
        self.params = []
        for slot in range(self.n):
            p = random_extra(self.rng)
            words = [[self.rng.randrange(VOCAB) for _ in range(n)] for n in (self.rng.choice([0, 9, 300]), 40)]
            prompt, output = words if {"presence", "repetition"} & p.keys() else ([], [])
            prompt = prompt if "repetition" in p else []
            self.params.append((p, prompt, output))
            self.driver.join(slot, **p, **({"prompt": prompt, "output": output} if p else {}))
        self.state.apply(self.driver.plan())

    def adjusted(self, position: int) -> torch.Tensor:
        lens = torch.full((self.n,), position, dtype=torch.int32)
        return kernels.adjust(self.logits, self.order, lens, self.state, counted=True)

    def wrong(self) -> bool:
        """After three rounds of owners, and tokens drawn in each: whether any logit is not as it should be."""
        tokens = torch.zeros(self.n, dtype=torch.int32)
        places = torch.arange(self.n, dtype=torch.int32)
        for _ in range(3):
            self.join()
            for position in (19, 20):
                got = self.adjusted(position)
                for row, slot in enumerate(self.order.tolist()):
                    p, prompt, output = self.params[slot]
                    want = reference(self.logits[row].tolist(), p, prompt, output, position)
                    if not np.allclose(got[row].numpy(), want, atol=1e-4):
                        return True
                sampling.sample(
                    got, self.order, torch.full_like(places, position), places, self.state, tokens, advance=False, counted=True
                )
                for row, slot in enumerate(self.order.tolist()):
                    if "presence" in self.params[slot][0] or "repetition" in self.params[slot][0]:
                        self.params[slot][2].append(int(tokens[row]))
        return False


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a vocabulary, a list of biases and a history have several."""
    monkeypatch.setattr(kernels, "_BLOCK", 64)
    monkeypatch.setattr(kernels, "_ENTRIES", 32)
    monkeypatch.setattr(score_kernel, "_BLOCK", 64)


@pytest.mark.parametrize("seed", range(3))
def test_adjusted_logits_are_those_of_the_reference_through_several_owners_of_a_slot(seed: int) -> None:
    assert not Slots(seed).wrong()


def test_a_row_is_adjusted_and_scored_alike_alone_and_in_a_batch() -> None:
    slots = Slots(4)
    slots.join()
    together = slots.adjusted(20)
    lines = torch.zeros(5, SCORE_WORDS, dtype=torch.int32)
    tokens = torch.arange(5, dtype=torch.int32)
    score_kernel.score(slots.logits, slots.order, tokens, tokens, slots.state, lines)
    for i in range(5):
        one, lens = slots.order[i : i + 1], torch.tensor([20], dtype=torch.int32)
        alone = kernels.adjust(slots.logits[i : i + 1], one, lens, slots.state, counted=True)
        assert torch.equal(alone[0], together[i])
        line = torch.zeros(5, SCORE_WORDS, dtype=torch.int32)
        score_kernel.score(slots.logits[i : i + 1], one, tokens, tokens[i : i + 1], slots.state, line)
        assert torch.equal(line[i], lines[i])


def test_the_gpu_scores_as_the_cpu_does_ties_and_impossible_tokens_included() -> None:
    torch.manual_seed(1)
    logits = torch.randn(4, 300) * 2
    logits[:, 100:130] = 3.5
    logits[1, 7:] = -torch.inf
    logits[2] = 0.25
    tokens, widths = np.array([100, 3, 299, 0], np.int32), np.array([20, 20, 0, 5], np.int32)
    state = sampling.SamplingState(4, gpu.CPU)
    state.logprobs.copy_(torch.from_numpy(widths))
    lines = torch.zeros(4, SCORE_WORDS, dtype=torch.int32)
    rows = torch.arange(4, dtype=torch.int32)
    score_kernel.score(logits, rows, torch.from_numpy(tokens), rows, state, lines)
    want = score(logits, tokens, widths)
    got = score_kernel.DeviceLogprobs(np.arange(4), 4, 0, 20).read(lines.numpy())
    assert got.logprobs == pytest.approx(want.logprobs, abs=1e-5)
    for i, width in enumerate(widths):
        assert got.top_ids[i, :width].tolist() == want.top_ids[i, :width].tolist()
        assert got.top_logprobs[i, :width] == pytest.approx(want.top_logprobs[i, :width], abs=1e-5)
    state.logprobs.fill_(-1)
    before = lines.clone()
    score_kernel.score(logits, rows, torch.from_numpy(tokens), rows, state, lines)
    assert torch.equal(lines, before)


def test_half_precision_logits_are_adjusted_in_single_precision() -> None:
    slots = Slots(5)
    slots.join()
    slots.logits = slots.logits.bfloat16()
    out = slots.adjusted(30)
    assert out.dtype == torch.float32
    for row, slot in enumerate(slots.order.tolist()):
        want = reference(slots.logits[row].tolist(), *slots.params[slot], 30)
        assert np.allclose(out[row].numpy(), want, atol=1e-4)


def test_a_step_without_special_rows_is_the_plain_graph_whoever_else_runs(tmp_path: Path) -> None:
    save_llama(tmp_path, layers=1, **gpu.SMALL)
    worker, driver = gpu.Interpreted(tmp_path), Driver(gpu.PAGES, 4)
    driver.join(0, presence=1.0)
    driver.join(1)
    driver.join(2, logprobs=0)
    worker.run(driver.plan([(s, [1], 1) for s in range(3)]))
    worker.graphs.keys.clear()
    for slots, kind in (([1], None), ([2], steps_module.EXTRAS), ([0], steps_module.COUNTED)):
        worker.run(driver.plan([], slots))
        (key,) = worker.graphs.keys
        assert key[2:] == (() if kind is None else (kind,))  # type: ignore[index]
        worker.graphs.keys.clear()
    driver.join(0)
    driver.join(2)
    worker.run(driver.plan([(0, [1], 1), (2, [1], 1)]))  # graphs of short steps say their kind, too
    assert not any(isinstance(key, tuple) for key in worker.graphs.keys)


# ---------------- planted bugs
def _kernel_forgets_nothing(plant: Any) -> None:
    class Nothing:
        def __getitem__(self, grid: object) -> Any:
            return lambda *a, **k: None

    plant.setattr(kernels, "_forget_seen", Nothing())


def _history_is_not_entered(plant: Any) -> None:
    real = kernels._enter_extras

    class Uncounted:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *a, **k: real[grid](*a, **{**k, "COUNTED": False})

    plant.setattr(kernels, "_enter_extras", Uncounted())


def _biases_come_last(plant: Any) -> None:
    real = kernels._add_bias

    class Uncounted:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *a, **k: real[grid](*a, **{**k, "COUNTED": False})

    plant.setattr(kernels, "_add_bias", Uncounted())


def _draws_are_not_counted(plant: Any) -> None:
    real = sampling.sample
    plant.setattr(sampling, "sample", lambda *a, counted, **k: real(*a, counted=False, **k))


def _biases_begin_at_the_wrong_place(plant: Any) -> None:
    real = DeviceState._lay_out

    def lay_out(self: DeviceState, plan: StepPlan) -> list[Any]:
        extras, starts, *rest = real(self, plan)
        return [extras, np.repeat(starts.reshape(-1, 2)[:1], len(plan.extras), 0).ravel(), *rest]

    plant.setattr(DeviceState, "_lay_out", lay_out)


@pytest.mark.parametrize(
    "plant",
    [
        _kernel_forgets_nothing,
        _history_is_not_entered,
        _biases_come_last,
        _draws_are_not_counted,
        _biases_begin_at_the_wrong_place,
    ],
)
def test_planted_bugs_are_noticed(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert any(Slots(seed).wrong() for seed in range(4))


def _by_alternatives_of_others(plant: Any) -> None:
    plant.setattr(
        "minisgl.model.cpu.runner.score", lambda logits, tokens, widths: score(logits, np.roll(tokens, 1), np.roll(widths, 1))
    )


def _after_the_penalties(plant: Any) -> None:
    def adjusted_scores(self: Runner, logits: torch.Tensor, batch: Any, tokens: Any) -> Any:
        rows = np.flatnonzero(self._state.logprobs[batch.sample_slots] >= 0)
        positions = batch.sampling.positions
        mine = self._adjustments.apply(logits[: len(positions)], batch.sample_slots, positions)
        return score(mine[rows], tokens[rows], self._state.logprobs[batch.sample_slots[rows]]) if len(rows) else None

    plant.setattr(Runner, "_score", adjusted_scores)


@pytest.mark.parametrize("plant", [_by_alternatives_of_others, _after_the_penalties])
def test_planted_bugs_of_scores_are_noticed(plant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path)
    plant(monkeypatch)
    traffic, worker = Traffic(0), Spied(tmp_path)
    with pytest.raises(AssertionError):
        steps(traffic, worker)
