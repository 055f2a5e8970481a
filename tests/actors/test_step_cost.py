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


def test_a_chunk_is_at_most_twice_as_long_as_any_before_so_the_first_is_no_surprise() -> None:
    costs = StepCosts()
    assert costs.prefill_beside(1, 100, 0.0) == costs.prefill_within(0.01, 1, 100) == 64
    for i in range(100):
        costs.observe(features(0, 1, 100 + i), planted(0, 1, 100 + i))
    for _ in range(4):  # a step of a second has room for thousands of these
        before = costs.longest
        assert costs.prefill_within(1.0, 1, 200) == 2 * before
        costs.observe(features(2 * before, 1, 200), planted(2 * before, 1, 200))
    assert costs.longest == 32 << 4


def test_prompts_get_their_share_of_the_time_beside_decodes_and_pay_for_what_they_took_too_much() -> None:
    for slow in (1, 50):  # tokens of 60 us, of which a share holds many, and of 3 ms, of which it holds one
        costs = StepCosts()
        rng = np.random.default_rng(0)
        for _ in range(400):
            n = int(rng.integers(0, 2) * rng.integers(1, 400))
            costs.observe(features(n, 8, 800), C[0] + 8 * C[2] + slow * C[1] * n)
        alone, prompts, steps = costs.seconds(0, 8, 800), 0.0, []
        for _ in range(300):
            n = costs.prefill_beside(8, 800, 0.0)
            costs.spend(n)
            prompts += slow * C[1] * n
            steps.append(n)
        assert prompts == pytest.approx(0.75 * 300 * alone, rel=0.15)
        assert all(n == 0 or n >= 8 for n in steps)
        if slow == 1:
            assert min(steps) > 8, "without need a step had no prompt"
        else:
            assert sorted(steps)[150] == 0, "half of the steps are as if nobody else were there"


def test_a_chunk_of_any_length_is_paid_for_after_eight_steps() -> None:
    costs = StepCosts()
    feed(costs, 400)
    costs.spend(100_000)
    assert 7 <= [costs.prefill_beside(8, 800, 0.0) > 0 for _ in range(9)].index(True) <= 8


def test_no_prompt_waits_long_for_what_a_chunk_took_too_much() -> None:
    """Steps of 60 ms and more pause once at most."""
    costs = StepCosts()
    rng = np.random.default_rng(0)
    for _ in range(400):
        costs.observe(features(n := int(rng.integers(0, 30)), 8, 800), 0.07 + 2e-3 * n)
    costs.spend(100_000)
    assert [costs.prefill_beside(8, 800, 0.0) > 0 for _ in range(3)].index(True) <= 1


def test_a_second_in_which_the_machine_was_slow_is_forgotten_after_a_few_prompts() -> None:
    def steps(slow: int) -> list[float]:
        """The expected time of a prompt token after each of twenty steps that follow 60, which took so many times too long."""
        costs, found = StepCosts(), []
        for i in range(400):
            costs.observe(features(8 * (i % 2), 8, 800), 0.02 + 2e-3 * 8 * (i % 2))
        for i in range(80):
            times = slow if i < 60 else 1
            costs.observe(features(8 * (i % 2), 8, 800), times * (0.02 + 2e-3 * 8 * (i % 2)))
            found.append(costs.per_token)
        return found[60:]

    assert max(steps(1)) < 2.2e-3
    assert steps(5)[0] > 2 * 2e-3, "there is something to forget"
    assert steps(5)[-1] < 1.4 * 2e-3


def test_prompts_get_the_least_time_that_is_set() -> None:
    costs = StepCosts()
    feed(costs, 400)
    assert costs.prefill_beside(8, 800, 0.02) == pytest.approx(0.02 / C[1], rel=0.1)


def test_a_fit_without_sense_never_stops_prompts() -> None:
    costs = StepCosts()
    for _ in range(100):
        costs.observe(features(10, 0, 0), 1.0)
        costs.observe(features(0, 8, 800), 0.0)
    total = 0
    for _ in range(5000):
        n = costs.prefill_beside(8, 800, 0.0)
        costs.spend(n)
        total += n
    assert total > 0
