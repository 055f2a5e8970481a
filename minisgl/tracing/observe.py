"""Makes the Probe of an actor, with what is noted of its kind beyond messages."""

from __future__ import annotations

from typing import Any

from minisgl.actors.messages import Trace
from minisgl.actors.runtime.actor import Actor, Context
from minisgl.tracing.probe import Probe


def observe(ctx: Context, actor: Actor, **settings: Any) -> Probe:
    """The observer of an actor.  Imports what its process has already.  `settings`: of Probe."""
    return Probe(ctx, actor, {"scheduler": _scheduler, "worker": _worker}.get(ctx.name.rstrip("0123456789")), **settings)


def _scheduler(probe: Probe, actor: Actor, m: Trace) -> None:
    from minisgl.tracing.scheduler import probe_scheduler

    probe_scheduler(probe, actor, m.steps)


def _worker(probe: Probe, actor: Actor, m: Trace) -> None:
    from minisgl.tracing.worker import probe_worker

    probe_worker(probe, actor, m.kernels)
