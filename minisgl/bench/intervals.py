"""Confidence intervals of differences between runs, from runs by turns: base, variant, base, variant, ..., base.  Pure.

A figure of a run (tokens a second, a mean latency) is compared by its logarithm, so a difference is a factor and noise is a
share.  Requests of one run share its machine's mood, so they are no independent samples: what counts are runs.

    noise        sigma^2 from the differences of neighbouring base runs, halved (von Neumann 1941): a machine that slowly warms
                 up or fills adds nothing to it; pooled with the spread of the variant's own repeats
    difference   mean over the repeats of: variant minus the mean of the two base runs around it
    interval     Student's t, with the variance that these weights give to independent runs of that noise

With few runs the interval is wide, as it should be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
_GRID = 20_001  # points of the integral


class Difference(NamedTuple):
    """A variant against its base as factors, 1.0 for no difference; `low` and `high` bound the interval."""

    factor: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """Whether no difference at all lies in the interval."""
        return self.low <= 1.0 <= self.high


def t_quantile(p: float, dof: float) -> float:
    """Student's t: with probability `p` a value lies within plus or minus this.  `dof` from 1 on, not necessarily whole.

    With t = sqrt(dof) * tan(a) the density is cos(a) ** (dof - 1), whose integral is computed.
    """
    angles = np.linspace(0.0, math.pi / 2, _GRID)
    density = np.cos(angles) ** (dof - 1)
    area = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(dof) * math.tan(float(np.interp(p * area[-1], area, angles)))


def noise(bases: Sequence[float]) -> tuple[float, float]:
    """(variance of the logarithm of one run, degrees of freedom) from base runs in the order in which they ran, two or more."""
    n = len(bases)
    steps = np.diff(np.log(np.asarray(bases, float)))
    return float((steps**2).mean() / 2), 2 * (n - 1) ** 2 / (3 * n - 4)


def base_to_base(bases: Sequence[float]) -> float:
    """The largest factor between two neighbouring base runs: what no change at all looked like."""
    return math.exp(float(np.abs(np.diff(np.log(np.asarray(bases, float)))).max()))


def difference(bases: Sequence[float], variant: Sequence[float], before: Sequence[int], p: float = CONFIDENCE) -> Difference:
    """The difference of a variant.  `before[k]`: which base run came before its run k; the next one came after it."""
    b, v, at = np.log(np.asarray(bases, float)), np.log(np.asarray(variant, float)), np.asarray(before)
    repeats = len(v)
    each = v - (b[at] + b[at + 1]) / 2
    weights = np.zeros(len(b))  # of the base runs in the mean of `each`
    np.add.at(weights, at, 0.5 / repeats)
    np.add.at(weights, at + 1, 0.5 / repeats)
    mean, share = float(each.mean()), 1 / repeats + float((weights**2).sum())  # variance of the mean, in sigma^2
    variance, dof = noise(bases)
    if repeats > 1:
        expected = repeats * (1.5 - share)  # of the sum of squares, in sigma^2
        own, more = float(((each - mean) ** 2).sum()) / expected, repeats - 1
        variance, dof = (dof * variance + more * own) / (dof + more), dof + more
    half = t_quantile(p, dof) * math.sqrt(variance * share)
    return Difference(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def means(groups: Sequence[Sequence[float]], p: float = CONFIDENCE) -> list[tuple[float, float, float]]:
    """(geometric mean, low, high) of each group of equally many runs, with the spread within all groups as noise.

    Without repeats nothing is known of the noise: low and high are not numbers.
    """
    logs = np.log(np.asarray(groups, float))
    mean, (count, repeats) = logs.mean(axis=1), logs.shape
    half = math.nan
    if repeats > 1:
        dof = count * (repeats - 1)
        half = t_quantile(p, dof) * math.sqrt(float(((logs - mean[:, None]) ** 2).sum()) / dof / repeats)
    return [(math.exp(m), math.exp(m - half), math.exp(m + half)) for m in mean.tolist()]
