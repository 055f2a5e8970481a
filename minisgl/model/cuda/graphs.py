"""Records steps as CUDA graphs and replays them, by key.  Runs in the workers.

A CUDA graph is a recorded sequence of kernels that one call launches: a decode step of 0.6B has 230 of them, which take 15 ms
to launch one by one and less than 1 ms to run.  A graph is fixed in its kernels, shapes and addresses, so a step is recorded
for every bucket of row counts, and rows of padding fill the bucket.  Recording takes tens of milliseconds, or a second where a
kernel must be compiled first.  It is done while the device has nothing to do (`Steps.capture_ahead`), and otherwise when a
step first needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from minisgl.model.kernels.sampling import SamplingState


class Graphs:
    """Graphs by key.  What a step reads and writes must keep its address; its temporaries live in a pool of the graphs."""

    def __init__(self, state: SamplingState, device: torch.device, say: Callable[[str], None]) -> None:
        """`say` prints a line for the user."""
        self._state, self._device, self._say = state, device, say
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._eager: set[Hashable] = set()  # keys for whose graph there was no memory
        self.captures = 0
        self._pool: Any = None  # of memory, shared by all graphs: they run one after another and leave nothing for the next

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs or key in self._eager

    def replay(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run `step`, captured under `key` when it is first needed."""
        if key not in self:
            self.capture(key, step)
        if key in self._eager:
            step()
        else:
            self._graphs[key].replay()

    def capture(self, key: Hashable, step: Callable[[], None]) -> None:
        """Record a graph.

        The step runs eagerly first, so that kernels are compiled and libraries initialised; what it did to the slots is undone.
        Where the device has no memory left for a graph, the step stays eager.
        """
        state = self._state
        changed = [state.last_token, state.kv_len]
        if state.extras is not None and state.extras.seen is not None:
            changed.append(state.extras.seen)
        kept = [t.clone() for t in changed]
        step()
        for tensor, before in zip(changed, kept, strict=True):
            tensor.copy_(before)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            # The watchdog thread of a group of ranks queries events at any time, which must not end the capture.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step()
        except torch.OutOfMemoryError:
            if not self._eager:
                self._say("no memory is left for some CUDA graphs: their steps run without. Use a smaller --memory-fraction.")
            self._eager.add(key)
            return
        self._pool = self._pool or graph.pool()
        self._graphs[key] = graph
        self.captures += 1

    def clear(self) -> None:
        """Drop all graphs, and their pool with them: it is gone when the last of them is."""
        self._graphs.clear()
        self._pool = None
