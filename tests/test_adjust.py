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

from minisgl.model.cuda import steps as steps_module
from minisgl.model.runner import Runner
from minisgl.plan import DRAW, SCORE, Scores, StepPlan

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

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
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
                request = self.stopped.pop() if again else (random_extra(rng), self._words(), [])
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


def check_scores(scores: Scores | None, logits: list[Logits], tokens: list[int], widths: list[int]) -> None:
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


@pytest.mark.parametrize("seed", range(4))
def test_the_cpu_worker_draws_what_the_reference_prefers_and_scores_what_was_asked(tmp_path: Path, seed: int) -> None:
    save_llama(tmp_path)
    traffic, worker = Traffic(seed), Spied(tmp_path)
    for _ in range(40):
        assert not wrong_step(traffic, worker)


@pytest.mark.parametrize("graphs", [True, False])
def test_the_gpu_worker_draws_and_scores_what_the_cpu_worker_does(tmp_path: Path, graphs: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(steps_module, "SHORT_STEPS", (8, 32))
    monkeypatch.setattr(steps_module, "FEW_ROWS", 4)
    save_llama(tmp_path)
    traffic, ours, theirs = Traffic(7 + graphs), gpu.Interpreted(tmp_path, graphs=graphs), gpu.cpu_runner(tmp_path)
    kinds: Counter[object] = Counter()
    for _ in range(16):
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
    assert kinds[steps_module.COUNTED] > 2
    assert kinds["targets"] > 5
