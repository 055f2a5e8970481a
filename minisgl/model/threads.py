"""CPU threads of a worker.  No torch: `prepare_environment` must run before the first `import torch` of its process."""

from __future__ import annotations

import os

from minisgl.config import EngineConfig


def threads_per_rank(engine: EngineConfig) -> int:
    """`threads` (0 = the cores that this process may run on) divided over the ranks, at least 1."""
    return max(1, (engine.threads or len(os.sched_getaffinity(0))) // engine.tp)


def prepare_environment(n_threads: int) -> None:
    """Set the OpenMP variables that are read once, when torch is loaded.

    By default libgomp's threads spin for a long while at every barrier.  On cores shared with the scheduler, the api process
    or another rank, a spinning thread keeps off the very thread that it waits for, and a step takes ten times as long.
    PASSIVE puts them to sleep at once; a short spin (GOMP_SPINCOUNT) was no faster when measured.
    Variables that the user has set are left alone.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(n_threads))
    os.environ.setdefault("MKL_NUM_THREADS", str(n_threads))
    os.environ.setdefault("OMP_DYNAMIC", "FALSE")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a GOMP_SPINCOUNT of the user's still wins
    os.environ.setdefault("KMP_BLOCKTIME", "0")  # the same for a torch built with Intel's OpenMP
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
