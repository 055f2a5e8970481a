"""CUDA graphs on a machine that may have no GPU: a stand-in for torch.cuda, with room for so many graphs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
if not torch.cuda.is_available():
    import interpreter  # noqa: F401  before the kernels

from minisgl.model.cuda.graphs import Graphs
from minisgl.model.kernels.sampling import SamplingState

CPU = torch.device("cpu")


class FakeCuda:
    """What Graphs uses of torch.cuda, with room for so many graphs."""

    def __init__(self, room: int) -> None:
        self.room = room

    class CUDAGraph:
        def pool(self) -> object:
            return self

        def replay(self) -> None:
            raise AssertionError("not recorded")

    @contextmanager
    def graph(self, graph: Any, pool: object, capture_error_mode: str) -> Iterator[None]:
        if self.room == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.room -= 1
        yield
        graph.replay = lambda: None

    def synchronize(self, device: torch.device) -> None:
        pass


def test_a_step_that_finds_no_memory_for_its_graph_stays_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisgl.model.cuda.graphs.torch.cuda", FakeCuda(room=1))
    said: list[str] = []
    state = SamplingState(2, CPU)
    graphs = Graphs(state, CPU, said.append)
    runs: list[str] = []

    def step(name: str) -> None:
        runs.append(name)
        state.kv_len.add_(1)

    for key in "abab":
        graphs.replay(key, partial(step, key))
    assert runs == ["a", "a", "b", "b", "b"]  # a: eagerly, while recorded; b: eagerly to try, and at each of its replays
    assert state.kv_len.tolist() == [3, 3]  # the fake graph does nothing; recording a counts once, as it runs here
    assert "a" in graphs
    assert "b" in graphs  # or `prepare` would try it again and again
    assert len(said) == 1
    assert "--memory-fraction" in said[0]
