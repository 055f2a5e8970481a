"""CUDA graphs by key: a step is recorded the first time it is needed, or while there is nothing else to do.  In the workers."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from minisgl.model.kernels.sampling import SamplingState


class Graphs:
    """Replays steps.  What a step reads and writes must keep its address: everything else lives in a pool of the graphs'."""

    def __init__(self, state: SamplingState, device: torch.device, say: Callable[[str], None]) -> None:
        """`say`: a line for the user."""
        self._state, self._device, self._say = state, device, say
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._eager: set[Hashable] = set()  # what found no memory to be captured with
        self.captures = 0
        self._pool: Any = None  # of memory, shared by all graphs: they run one after another, and keep nothing for the next

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
        """Record a graph.  The step runs eagerly first (libraries and kernels tune themselves), and what that did to the slots
        is undone, for the replay does it again.  Where the device has no memory left for a graph, the step stays eager."""
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
        self._graphs.clear()
