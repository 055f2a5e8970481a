"""The soak (scripts/check/soak.py): it notices what grows, and nothing does in a short one.

MINISGL_SOAK_MINUTES=2 makes that one long enough to see a leak of a megabyte a minute.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import pytest

from scripts.check.soak import Sample, judge, soak
from scripts.lib.storm import Options

MINUTES = float(os.environ.get("MINISGL_SOAK_MINUTES", "0.1"))


def samples(
    megabytes: Callable[[float], float] = lambda at: 100.0,
    pid: Callable[[float], int] = lambda at: 7,
    files: Callable[[float], int] = lambda at: 50,
    p99: Callable[[float], float] = lambda at: 0.01,
) -> list[Sample]:
    """Half an hour, a sample a minute; what is given says how a process changes with time, in seconds."""
    return [
        Sample(at, {"api": (pid(at), megabytes(at), files(at), 9)}, p99(at), 1000) for at in map(float, range(60, 1860, 60))
    ]


def test_a_process_that_keeps_its_size_is_good_whatever_it_took_to_warm_up() -> None:
    figures, found = judge(samples(lambda at: 80 + min(at, 400) / 10 + at % 7), 10.0)
    assert found == []
    assert abs(figures["rss_mb_h"]["api"]) < 5
    assert figures["p99_s"]["stable"]


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (samples(megabytes=lambda at: 100 + at / 60), "leaked: api grows by 60.0 MB/h"),
        (samples(files=lambda at: 50 + int(at // 60)), "leaked: api has 80 descriptors"),
        (samples(pid=lambda at: 7 + (at > 1000)), "ended: the process api is not the one that it was"),
        (samples(p99=lambda at: 0.01 if at < 1200 else 0.05), "99th percentile"),
        (samples()[:2], "short"),
    ],
)
def test_what_grows_or_ends_is_noticed(run: list[Sample], said: str) -> None:
    _, found = judge(run, 10.0)
    assert len(found) == 1
    assert said in found[0]


def test_a_short_soak_leaves_the_pool_whole_and_every_process_as_it_was() -> None:
    options = Options("fake", 0, 1, attacks=frozenset(), seconds=MINUTES * 60, clients=4, cases=17, tokens=60)
    figures, found = asyncio.run(soak(options, max(0.5, MINUTES), 60.0))
    assert found == []
    assert figures["requests"] > 17
    assert {"api", "worker0", "worker1", "scheduler", "tokenizer", "detokenizer", "checker"} <= figures["rss_mb"].keys()
