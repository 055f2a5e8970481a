"""Another eviction policy: one overridden method, run by the command next to LRU on the same trace."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from minisgl.actors.scheduler.interface import SchedulerLimits
from minisgl.cache.radix import RadixCache
from minisgl.commands.simulate import run
from minisgl.errors import UserError
from minisgl.simulation.fleet import simulate
from minisgl.simulation.gpu import FittedCosts
from minisgl.simulation.trace import FIRST_PROMPT_TOKEN, load

LFU = '''
"""Least frequently used, a policy that keeps prompts which many requests share."""

from minisgl.cache.radix import RadixCache


class LFU(RadixCache):
    """Evicts the leaf that the fewest requests have used; among equals, the least recently used."""

    def acquire(self, match):
        handle, pages = super().acquire(match)
        node = handle
        while node.parent is not None:
            node.score += 1
            node = node.parent
        return handle, pages

    def next_victim(self):
        return min(self.unused_leaves(), key=lambda leaf: leaf.score)


class Root(RadixCache):
    def next_victim(self):
        return self.root


class Inner(RadixCache):
    def next_victim(self):
        return next(reversed(self._unused))


class NotACache:
    pass
'''
# Six popular beginnings of 512 tokens, each met now and then, and a stream of prompts that never come back.
TRACE = "synthetic:rate=30,input=200-400,output=4-8,shared=512,groups=6,n=400,seed=2"
FLAGS = ["--kv-tokens", "6000", "--max-running", "8", "--step-tokens", "1024", "--json"]


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with the policies above, on the path of Python."""
    (tmp_path / "my_policy.py").write_text(LFU)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_policy", raising=False)
    return "my_policy"


def test_a_policy_of_thirty_lines_runs_next_to_lru_and_finds_more(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([TRACE, *FLAGS, "--cache", f"{policy}:LFU", "--compare", "as given,cache=radix,cache=none"]) == 0
    lfu, lru, none = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert lfu["requests"] == lru["requests"] == 400
    assert lfu["evicted_pages"] > 0
    assert lru["evicted_pages"] > 0
    assert none["hit_rate"] == 0
    assert lfu["hit_rate"] > lru["hit_rate"] + 0.05


def run_checked(name: str) -> tuple[RadixCache, float]:
    """The cache after a run that checks it after every eviction, and its hit rate."""
    module = importlib.import_module(name)

    class Checked(module.LFU):  # type: ignore[misc, name-defined]
        def evict(self, n: int) -> np.ndarray:
            pages = super().evict(n)
            assert len(pages) == n
            self.check()
            return pages

    sizes = {"slots": 8, "num_pages": 375, "page_size": 16, "max_context": 2048, "step_tokens": 1024}
    limits = SchedulerLimits(**sizes, max_steps_in_flight=2, vocab_size=FIRST_PROMPT_TOKEN, cache=Checked)
    done = simulate(load(TRACE, limit=150), limits, FittedCosts(1e-3, 1e-5, 1e-5, 1e-8))
    machine = done.replicas[0].machine
    return machine.cache, machine.counters.cached_tokens / machine.counters.prompt_tokens


def test_the_tree_is_whole_after_every_eviction_of_another_policy(policy: str) -> None:
    cache, hit_rate = run_checked(policy)
    assert cache.evicted_pages > 100
    assert hit_rate > 0.1
    before = sorted(cache.check().tolist())
    assert sorted(cache.flush().tolist()) == before
    assert cache.num_pages == cache.num_nodes == cache.evictable == 0


def test_a_split_keeps_the_score_and_eviction_goes_on_from_the_tail() -> None:
    cache = RadixCache(1)
    handle, _ = cache.acquire(cache.match(np.array([1], np.int32)))
    handle, _, _ = cache.extend(handle, np.arange(1, 7, dtype=np.int32), np.arange(6, dtype=np.int32))
    handle.score = 7.0
    cache.release(handle)
    front, _ = cache.acquire(cache.match(np.array([1, 2, 3, 9, 9], np.int32)))
    assert front.score == handle.score == 7.0
    assert [leaf.pages.tolist() for leaf in cache.unused_leaves()] == [[3, 4, 5]]
    assert cache.evict(2).tolist() == [4, 5]
    cache.check()


@pytest.mark.parametrize("name", ["Root", "Inner"])
def test_a_policy_that_names_a_node_in_use_or_with_children_is_stopped(policy: str, name: str) -> None:
    with pytest.raises((AssertionError, KeyError)):
        run([TRACE, *FLAGS, "--cache", f"{policy}:{name}"])


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("lfu", "--cache must be radix, none or MODULE:CLASS, got 'lfu'"),
        (":LFU", "--cache must be"),
        ("my_policy:", "--cache must be"),
        (".my_policy:LFU", "--cache must be"),
        ("nowhere_to_be_found:LFU", "--cache nowhere_to_be_found:LFU: .*cannot be imported"),
        ("my_policy:MRU", "--cache my_policy:MRU: MRU of my_policy is not a subclass"),
        ("my_policy:NotACache", "--cache my_policy:NotACache: NotACache of my_policy is not a subclass"),
    ],
)
def test_a_bad_cache_is_a_sentence_that_names_the_flag(policy: str, value: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        run([TRACE, "--cache", value])
    assert "\n" not in str(caught.value)
