"""The fit of step times: it finds planted coefficients, follows a change, and is not thrown off by a stopped process."""

from __future__ import annotations

import numpy as np
import pytest

from minisgl.actors.scheduler.step_cost import StepCosts, features

C = (4e-3, 6e-5, 2e-4, 3e-8)  # seconds: per step, per prefill token, per decode row, per token of context


def planted(prefill: int, rows: int, context: int, slow: float = 1.0) -> float:
    return slow * (C[0] + C[1] * prefill + C[2] * rows + C[3] * context)


def feed(costs: StepCosts, n: int, seed: int = 0, slow: float = 1.0, noise: float = 0.05) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(n):
        prefill, rows = int(rng.integers(0, 2) * rng.integers(1, 512)), int(rng.integers(0, 64))
        context = rows * int(rng.integers(1, 2000))
        costs.observe(features(prefill, rows, context), planted(prefill, rows, context, slow) * rng.normal(1, noise))


def test_planted_coefficients_are_found() -> None:
    costs = StepCosts()
    feed(costs, 400)
    for x in ((0, 1, 100), (256, 0, 0), (100, 40, 40_000), (512, 64, 100_000)):
        assert costs.seconds(*x) == pytest.approx(planted(*x), rel=0.08, abs=5e-4)
    assert costs.prefill_within(0.03, 32, 32_000) == pytest.approx((0.03 - planted(0, 32, 32_000)) / C[1], rel=0.1)


def test_a_target_that_the_decodes_alone_exceed_leaves_nothing_for_prompts() -> None:
    costs = StepCosts()
    feed(costs, 200)
    assert costs.prefill_within(0.002, 32, 32_000) < 0


def test_nothing_is_claimed_before_enough_was_seen() -> None:
    costs = StepCosts()
    feed(costs, 15)
    assert not costs.known
    feed(costs, 1)
    assert costs.known


def test_a_machine_that_becomes_twenty_times_slower_is_followed() -> None:
    costs = StepCosts()
    feed(costs, 200)
    feed(costs, 1500, seed=1, slow=20)
    assert costs.seconds(256, 32, 32_000) == pytest.approx(planted(256, 32, 32_000, 20), rel=0.15)


def test_a_long_chunk_after_many_decodes_is_learned_although_it_is_unlike_all_before() -> None:
    costs = StepCosts()
    for i in range(300):
        costs.observe(features(0, 1, 10 + i), planted(0, 1, 10 + i))
    for i in range(10):
        costs.observe(features(4096, 1, 310 + i), planted(4096, 1, 310 + i))  # 60 times a decode step
    assert costs.seconds(4096, 1, 320) == pytest.approx(planted(4096, 1, 320), rel=0.1)


def test_one_stopped_second_does_not_spoil_the_fit() -> None:
    costs = StepCosts()
    feed(costs, 400)
    costs.observe(features(0, 32, 32_000), 5.0)
    feed(costs, 5, seed=2)
    assert costs.seconds(256, 32, 32_000) == pytest.approx(planted(256, 32, 32_000), rel=0.35)


def test_a_day_of_equal_steps_does_not_wind_the_fit_up() -> None:
    costs, rng = StepCosts(), np.random.default_rng(0)
    feed(costs, 200)
    for _ in range(20_000):
        costs.observe(features(0, 32, 32_000), planted(0, 32, 32_000) * rng.normal(1, 0.05))
    assert costs.seconds(0, 32, 32_000) == pytest.approx(planted(0, 32, 32_000), rel=0.1)
    feed(costs, 60, seed=3)
    assert costs.seconds(256, 32, 32_000) == pytest.approx(planted(256, 32, 32_000), rel=0.2)
