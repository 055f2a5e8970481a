"""The simulation loop: sends a trace through one or more replicas behind a router, on one virtual clock.

Deterministic: nothing here reads a real clock or draws a random number.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, replace

import numpy as np

from minisgl.actors.scheduler.interface import SchedulerLimits
from minisgl.actors.scheduler.request import Request
from minisgl.arrays import I64
from minisgl.sampling_params import RequestOptions, SamplingParams
from minisgl.simulation.gpu import CostModel
from minisgl.simulation.prefix_index import announcing
from minisgl.simulation.replica import Log, Replica
from minisgl.simulation.request_level import RequestLevelReplica
from minisgl.simulation.router import ROUTERS, Fleet
from minisgl.simulation.trace import TraceRequest, ideal_hits

LATENCY = 100e-6  # seconds that a call of the scheduler takes
EXACT = ("exact", "longest")  # routers that know the caches


@dataclass(frozen=True, slots=True)
class Run:
    """The outcome of a simulation.  Rows of `log`, `inputs` and `ideal` belong to the requests of the trace, in order."""

    limits: SchedulerLimits
    replicas: list[Replica]  # empty if they were request-level ones
    log: Log
    inputs: I64  # prompt tokens
    ideal: I64  # of these, tokens that an unbounded cache would have found
    refused: I64  # uids of requests that fit into no replica
    busy: float = 0.0  # share of the time from the first arrival to the last token that the GPUs work
    routed: tuple[int, ...] = ()  # requests for each replica


def simulate(
    requests: list[TraceRequest],
    limits: SchedulerLimits,
    costs: CostModel,
    *,
    replicas: int = 1,
    router: str = "prefix",
    latency: float = LATENCY,
    request_level: bool = False,
) -> Run:
    """Run a trace to its end.  Requests that could never fit are refused, as the scheduler does.

    `request_level`: replicas of request_level.py instead of the real step machine.
    Raises RuntimeError if a request never ends, AssertionError if a page or slot is lost: bugs of scheduler or cache.
    """
    room = min(limits.max_context, limits.kv_tokens)
    inputs = np.array([r.input for r in requests], np.int64)
    fits = inputs + np.array([r.output for r in requests], np.int64) <= room
    log = Log(len(requests))
    log.arrival[:] = [r.arrival for r in requests]
    route = Fleet(ROUTERS[router], replicas, limits.kv_tokens, limits.page_size)
    each = [limits] * replicas
    if replicas > 1 and router in EXACT:
        each = [replace(limits, cache=announcing(limits.cache, route.index, i)) for i in range(replicas)]
    make = RequestLevelReplica if request_level else Replica
    fleet = [make(own, costs, latency, log) for own in each]
    params = SamplingParams(temperature=0, ignore_eos=True)
    coming = deque((uid, r) for uid, r in enumerate(requests) if fits[uid])
    wakes: list[tuple[float, int]] = []  # a heap; an entry is void if its replica now wakes at another time
    while True:
        while wakes and wakes[0][0] != fleet[wakes[0][1]].wake:
            heapq.heappop(wakes)
        if coming and (not wakes or coming[0][1].arrival <= wakes[0][0]):
            uid, request = coming.popleft()
            ids = request.ids()
            at = route.route(uid, ids) if replicas > 1 else 0
            fleet[at].submit(
                Request(uid, ids, len(ids) + request.output, uid, params, RequestOptions(call=uid)), request.arrival
            )
        elif not wakes:
            break
        else:
            at = heapq.heappop(wakes)[1]
            for first, ended in fleet[at].call():
                for uid in first if replicas > 1 else ():
                    route.started(uid)
                for uid in ended if replicas > 1 else ():
                    route.finished(uid)
        if fleet[at].wake < np.inf:
            heapq.heappush(wakes, (fleet[at].wake, at))
    for replica in fleet:
        replica.check()
    whole = [r for r in fleet if isinstance(r, Replica)]
    seconds = float(np.nanmax(log.last) - log.arrival.min()) if (log.tokens > 0).any() else 0.0
    busy = sum(r.busy for r in fleet) / (seconds * replicas) if seconds else 0.0
    ideal, refused = ideal_hits(requests, limits.page_size), np.flatnonzero(~fits)
    return Run(limits, whole, log, inputs, ideal, refused, busy, tuple(r.requests for r in fleet))
