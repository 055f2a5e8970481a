"""The arithmetic of minisgl.bench.intervals, against slow and plain computations of the same."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from minisgl.bench.intervals import Difference, base_to_base, difference, means, noise, t_quantile


@pytest.mark.parametrize(
    ("dof", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (30, 2.0423), (1e5, 1.9600)]
)
def test_the_quantiles_are_those_of_the_printed_tables(dof: float, quantile: float) -> None:
    assert t_quantile(0.95, dof) == pytest.approx(quantile, rel=1e-4)


def test_a_quantile_between_whole_degrees_is_what_random_draws_say() -> None:
    rng, dof = np.random.default_rng(0), 2.6
    draws = rng.standard_normal(400_000) / np.sqrt(rng.chisquare(dof, 400_000) / dof)
    assert np.quantile(np.abs(draws), 0.9) == pytest.approx(t_quantile(0.9, dof), rel=0.01)


def plain(bases: list[float], variant: list[float], before: list[int]) -> tuple[float, float, float]:
    """(mean logarithm, its variance, degrees of freedom), by loops, and with the covariance of each pair of repeats."""
    b, v = [math.log(x) for x in bases], [math.log(x) for x in variant]
    each = [v[k] - (b[at] + b[at + 1]) / 2 for k, at in enumerate(before)]
    mean, n = statistics.fmean(each), len(each)

    def shared(i: int, j: int) -> float:
        mine, theirs = {before[i]: 0.5, before[i] + 1: 0.5}, {before[j]: 0.5, before[j] + 1: 0.5}
        return (i == j) + sum(mine[k] * theirs[k] for k in mine if k in theirs)

    of_mean = sum(shared(i, j) for i in range(n) for j in range(n)) / n**2
    base = sum((x - y) ** 2 for x, y in zip(b[1:], b, strict=False)) / (2 * (len(b) - 1))
    dof = 2 * (len(b) - 1) ** 2 / (3 * len(b) - 4)
    if n == 1:
        return mean, base * of_mean, dof
    expected = sum(shared(i, i) for i in range(n)) - n * of_mean
    own = sum((x - mean) ** 2 for x in each) / expected
    return mean, (dof * base + (n - 1) * own) / (dof + n - 1) * of_mean, dof + n - 1


@pytest.mark.parametrize("others", [1, 2, 5])
@pytest.mark.parametrize("repeats", [1, 2, 4])
def test_a_difference_is_that_of_a_plain_computation(others: int, repeats: int) -> None:
    rng = np.random.default_rng(others * 10 + repeats)
    bases = rng.uniform(90, 110, repeats * others + 1).tolist()
    variant, before = rng.uniform(50, 70, repeats).tolist(), [k * others for k in range(repeats)]
    found, (mean, variance, dof) = difference(bases, variant, before), plain(bases, variant, before)
    half = t_quantile(0.95, dof) * math.sqrt(variance)
    assert found == pytest.approx((math.exp(mean), math.exp(mean - half), math.exp(mean + half)), rel=1e-9)


@pytest.mark.parametrize(("others", "repeats"), [(1, 1), (1, 3), (4, 1), (3, 2)])
def test_the_interval_holds_the_truth_nineteen_times_in_twenty(others: int, repeats: int) -> None:
    """On a machine that becomes a tenth slower meanwhile, too: what is compared ran side by side."""
    rng, hits, trials, n = np.random.default_rng(7), 0, 1200, repeats * others + 1
    for drift in (0.0, 0.1):
        for _ in range(trials // 2):
            bases = np.exp(rng.normal(0, 0.05, n) - np.linspace(0, drift, n))
            at = np.arange(repeats) * others
            variant = 1.3 * np.exp(rng.normal(0, 0.05, repeats) - drift * (at + 0.5) / (n - 1))
            found = difference(bases.tolist(), variant.tolist(), at.tolist())
            hits += found.low <= 1.3 <= found.high
    assert 0.93 <= hits / trials <= 0.985


def test_noise_is_known_from_steps_not_from_drift() -> None:
    assert noise([math.exp(x) for x in (0.0, 0.1, 0.2, 0.3)])[0] == pytest.approx(0.01 / 2)
    assert base_to_base([100, 110, 99, 101]) == pytest.approx(110 / 99)
    assert Difference(1.1, 0.9, 1.3).is_noise
    assert not Difference(1.1, 1.01, 1.3).is_noise


def test_means_pool_the_spread_of_all_points() -> None:
    groups = [[100.0, 110.0, 90.0], [10.0, 10.1, 10.2]]
    logs = [[math.log(x) for x in group] for group in groups]
    pooled = sum((x - statistics.fmean(group)) ** 2 for group in logs for x in group) / 4
    for (mean, low, high), group in zip(means(groups), logs, strict=True):
        assert mean == pytest.approx(math.exp(statistics.fmean(group)))
        assert math.log(high / mean) == pytest.approx(t_quantile(0.95, 4) * math.sqrt(pooled / 3))
        assert math.log(mean / low) == pytest.approx(math.log(high / mean))
    assert math.isnan(means([[5.0], [6.0]])[0][1])
