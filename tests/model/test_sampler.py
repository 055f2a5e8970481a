"""The sampler against a slow reference that filters one row with sorted lists."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.model.common.slots import SamplingRows
from minisgl.model.cpu.sampler import CANDIDATES, philox, sample, uniform


def rows(n: int, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0) -> SamplingRows:
    def column(value, dtype):
        return np.array(np.broadcast_to(value, n), dtype)

    return SamplingRows(
        temperature=column(temperature, np.float32),
        top_k=column(top_k, np.int32),
        top_p=column(top_p, np.float32),
        min_p=column(min_p, np.float32),
        seed=column(seed, np.uint64),
        positions=column(position, np.int64),
    )


def row(r: SamplingRows, i: int) -> SamplingRows:
    return SamplingRows(*(getattr(r, f)[i : i + 1] for f in SamplingRows.__dataclass_fields__))


def reference_distribution(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """Temperature, then top-k, top-p and min-p one after the other, ties kept, renormalised after each."""
    peak = max(logits)
    probs = [math.exp((x - peak) / temperature) for x in logits]

    def renormalise(keep):
        total = sum(p for p, k in zip(probs, keep, strict=True) if k)
        return [p / total if k else 0.0 for p, k in zip(probs, keep, strict=True)]

    probs = renormalise([True] * len(probs))
    if 0 < top_k < len(probs):
        kth = sorted(probs, reverse=True)[top_k - 1]
        probs = renormalise([p >= kth for p in probs])
    if top_p < 1:
        before = 0.0
        for p in sorted(probs, reverse=True):
            if before >= top_p:
                break
            last, before = p, before + p
        probs = renormalise([p >= last for p in probs])
    return renormalise([p >= min_p * max(probs) for p in probs])


def reference_draw(probs: list[float], u: float) -> int:
    total = 0.0
    for i, p in enumerate(probs):
        total += p
        if total > u:
            return i
    return max(i for i, p in enumerate(probs) if p > 0)


def test_philox_gives_the_published_words():
    # Known answers that come with the authors' Random123 library: philox 4x32, 10 rounds.
    zero = np.zeros(1, np.uint64)
    assert [int(w[0]) for w in philox(zero, zero)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_uniform_numbers_are_uniform_and_differ_by_seed_and_position():
    u = uniform(np.repeat(np.arange(100, dtype=np.uint64), 100), np.tile(np.arange(100), 100))
    assert len(set(u.tolist())) == 10_000
    assert 0 <= u.min() < u.max() < 1
    counts = np.histogram(u, 20, (0, 1))[0]
    assert np.abs(counts - 500).max() < 110  # five standard deviations


def test_large_and_wrapped_seeds_are_accepted():
    seeds = np.array([0, 2**63, 2**64 - 1], np.uint64)
    assert len(set(uniform(seeds, np.zeros(3, np.int64)).tolist())) == 3


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    logits=st.lists(st.integers(-40, 40).map(lambda x: x / 8), min_size=1, max_size=40),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([0.05, 0.31, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.11, 0.53, 1.0]),
)
def test_draws_follow_the_reference(seed, logits, **filters):
    r = rows(1, seed=seed, position=11, **filters)
    token = int(sample(torch.tensor([logits]), r)[0])
    temperature, top_p, min_p = (float(getattr(r, f)[0]) for f in ("temperature", "top_p", "min_p"))  # as float32
    probs = reference_distribution(logits, temperature, filters["top_k"], top_p, min_p)
    u = float(uniform(r.seed, r.positions)[0])
    # Float32 probabilities may tip a draw that lies on the very edge between two tokens.
    assert token in {reference_draw(probs, max(0.0, min(u + e, 1 - 1e-9))) for e in (-1e-6, 0.0, 1e-6)}


def test_frequencies_match_the_filtered_distribution():
    logits, n = [2.0, 1.0, 0.5, 0.0, -1.0, 1.5], 4000
    r = rows(n, temperature=0.8, top_k=5, top_p=0.9, min_p=0.1, seed=np.arange(n), position=5)
    counts = np.bincount(sample(torch.tensor(logits).repeat(n, 1), r), minlength=6)
    for count, p in zip(counts, reference_distribution(logits, 0.8, 5, 0.9, 0.1), strict=True):
        assert abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p))


def test_greedy_rows_take_the_largest_logit_beside_sampled_ones():
    torch.manual_seed(0)
    logits = torch.randn(6, 1000) * 5
    r = rows(6, temperature=[0, 1, 0, 0.5, 0, 2])
    tokens = sample(logits, r)
    assert tokens.dtype == np.int32
    assert tokens[::2].tolist() == logits.argmax(-1)[::2].tolist()


@pytest.mark.parametrize("vocab", [50, 300, 5000])
def test_a_token_never_depends_on_the_other_rows_of_its_batch(vocab):
    rng, n = np.random.default_rng(2), 24
    torch.manual_seed(2)
    logits = torch.randn(n, vocab) * torch.tensor(rng.choice([0.01, 1.0, 6.0], n), dtype=torch.float32)[:, None]
    r = rows(
        n,
        temperature=rng.choice([0.0, 0.3, 1.0, 5.0], n),
        top_k=rng.choice([0, 1, 40, CANDIDATES, CANDIDATES + 3], n),
        top_p=rng.choice([0.2, 0.95, 1.0], n),
        min_p=rng.choice([0.0, 0.05], n),
        seed=rng.integers(0, 2**63, n),
        position=rng.integers(0, 99, n),
    )
    together = sample(logits, r)
    alone = [int(sample(logits[i : i + 1], row(r, i))[0]) for i in range(n)]
    assert together.tolist() == alone


def test_filters_that_need_more_than_the_candidates_see_the_whole_vocabulary():
    vocab, n = 4 * CANDIDATES, 300
    logits = torch.linspace(0, 1, vocab).flip(0).repeat(n, 1)  # nearly flat: nothing is decided early
    half = sample(logits, rows(n, top_p=0.5, seed=np.arange(n)))
    k = 3 * CANDIDATES
    most = sample(logits, rows(n, top_k=k, seed=np.arange(n)))
    assert CANDIDATES < half.max() < vocab // 2
    assert 0.9 * k < most.max() < k


def test_ties_at_the_cut_are_all_kept():
    logits = torch.zeros(400, 7)
    assert set(sample(logits, rows(400, top_k=2, seed=np.arange(400))).tolist()) == set(range(7))


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-6, 100.0])
def test_extreme_temperatures_stay_finite(temperature):
    logits = torch.tensor([[3e38, -3e38, 1.0, 2.9e38]])
    token = int(sample(logits, rows(1, temperature=temperature, top_p=0.9))[0])
    assert token == 0


def test_masked_tokens_are_never_drawn():
    logits = torch.full((200, 9), -torch.inf)
    logits[:, 4] = 0.0
    assert set(sample(logits, rows(200, seed=np.arange(200))).tolist()) == {4}


def test_no_rows_give_no_tokens():
    assert sample(torch.empty(0, 5), rows(0)).shape == (0,)
