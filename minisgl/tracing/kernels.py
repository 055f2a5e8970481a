"""Kernels of a GPU, or operators of a CPU, through torch's profiler.  Runs in the worker processes, where asked for."""

from __future__ import annotations

import time

import torch
from torch.profiler import ProfilerActivity, profile

from minisgl.tracing.probe import Probe


class Kernels:
    """Profiles from its construction to `stop`, which adds the events to the probe, one track for each stream."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._kind = "stream" if self._gpu else "operators of thread"
        self._profile = profile(activities=[ProfilerActivity.CUDA if self._gpu else ProfilerActivity.CPU])
        self._profile.start()

    def stop(self) -> None:
        """End the profile.  The profiler's clock is that of the day."""
        self._profile.stop()
        behind = time.time_ns() - time.monotonic_ns()
        results = self._profile.profiler.kineto_results if self._profile.profiler is not None else None
        for e in results.events() if results is not None else ():
            if self._gpu and e.device_type().name != "CUDA":  # a launch
                continue
            began = e.start_ns() - behind
            self._probe.add(began, began + e.duration_ns(), e.name(), track=f"{self._kind} {e.device_resource_id()}")
