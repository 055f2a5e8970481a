"""CPU threads of a worker.  No torch: `prepare_environment` must run before the first `import torch` of its process."""

from __future__ import annotations

import os

from minisgl.config import EngineConfig

SPIN_COUNT = 1000  # about a microsecond or two of spinning at a barrier, then sleep


def threads_per_rank(engine: EngineConfig) -> int:
    """`threads` (0 = the cores that this process may run on) divided over the ranks, at least 1."""
    return max(1, (engine.threads or len(os.sched_getaffinity(0))) // engine.tp)


def prepare_environment(n_threads: int) -> None:
    """Set the OpenMP variables that are read once, when torch is loaded.

    By default libgomp's threads spin for a long while at every barrier.  On a machine whose cores are shared with the
    scheduler, the api process or another rank, a spinning thread keeps off the one it is waiting for and an operation takes
    ten times as long; going to sleep at once costs a wake-up per parallel region instead.  A short spin gets both right.
    Variables that the user has set are left alone.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(n_threads))
    os.environ.setdefault("MKL_NUM_THREADS", str(n_threads))
    os.environ.setdefault("OMP_DYNAMIC", "FALSE")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    os.environ.setdefault("KMP_BLOCKTIME", "0")  # the same for a torch built with Intel's OpenMP
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
