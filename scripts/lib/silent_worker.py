"""A worker whose ranks do not add up their parts: what a step takes without its sums.  Its text means nothing."""

from __future__ import annotations

from typing import Any

from minisgl.actors import spawn
from minisgl.actors.runtime.actor import Actor, Context
from minisgl.actors.runtime.shared_memory import Arenas
from minisgl.config import Config


def _as_it_is(_: Any, x: Any) -> Any:
    return x


def make_worker(ctx: Context, config: Config, arenas: Arenas, rank: int, run_dir: str) -> Actor:
    """Runs in the worker process.  Gathers of logits stay, so the ranks draw the same tokens and keep pace."""
    actor = spawn.make_worker(ctx, config, arenas, rank, run_dir)  # prepares the environment for torch
    from minisgl.model.cuda.parallel import CudaParallel

    CudaParallel.all_reduce_ = CudaParallel.sum_over_ranks = _as_it_is  # type: ignore[method-assign, assignment]
    return actor
