"""The simulation loop: sends a trace through one or more replicas behind a router, on one virtual clock.

Deterministic: nothing here reads a real clock or draws a random number.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from minisgl.actors.scheduler.interface import SchedulerLimits
from minisgl.actors.scheduler.request import Request
from minisgl.arrays import I64
from minisgl.sampling_params import RequestOptions, SamplingParams
from minisgl.simulation.gpu import CostModel
from minisgl.simulation.replica import Log, Replica
from minisgl.simulation.router import PrefixRouter, RoundRobin
from minisgl.simulation.trace import TraceRequest, ideal_hits

LATENCY = 100e-6  # seconds that a call of the scheduler takes


@dataclass(frozen=True, slots=True)
class Run:
    """The outcome of a simulation.  Rows of `log`, `inputs` and `ideal` belong to the requests of the trace, in order."""

    limits: SchedulerLimits
    replicas: list[Replica]
    log: Log
    inputs: I64  # prompt tokens
    ideal: I64  # of these, tokens that an unbounded cache would have found
    refused: I64  # uids of requests that fit into no replica


def simulate(
    requests: list[TraceRequest],
    limits: SchedulerLimits,
    costs: CostModel,
    *,
    replicas: int = 1,
    router: str = "prefix",
    latency: float = LATENCY,
) -> Run:
    """Run a trace to its end.  Requests that could never fit are refused, as the scheduler does.

    Raises RuntimeError if a request never ends, AssertionError if a page or slot is lost: bugs of scheduler or cache.
    """
    room = min(limits.max_context, limits.kv_tokens)
    inputs = np.array([r.input for r in requests], np.int64)
    fits = inputs + np.array([r.output for r in requests], np.int64) <= room
    log = Log(len(requests))
    log.arrival[:] = [r.arrival for r in requests]
    fleet = [Replica(limits, costs, latency, log) for _ in range(replicas)]
    route: PrefixRouter | RoundRobin = RoundRobin(replicas)
    if router == "prefix" and replicas > 1:
        route = PrefixRouter(replicas, limits.kv_tokens)
    params = SamplingParams(temperature=0, ignore_eos=True)
    coming = deque((uid, r) for uid, r in enumerate(requests) if fits[uid])
    while True:
        due = min(fleet, key=lambda replica: replica.wake)
        if coming and coming[0][1].arrival <= due.wake:
            uid, request = coming.popleft()
            ids = request.ids()
            limit = len(ids) + request.output
            options = RequestOptions(call=uid)
            fleet[route.route(uid, ids)].submit(Request(uid, ids, limit, uid, params, options), request.arrival)
        elif due.wake == np.inf:
            break
        else:
            for first, ended in due.call():
                for uid in first:
                    route.started(uid)
                for uid in ended:
                    route.finished(uid)
    for machine in (replica.machine for replica in fleet):
        machine.check()
        if not machine.idle:
            raise RuntimeError(f"{len(machine.waiting)} requests never start and {len(machine.running)} never end")
    return Run(limits, fleet, log, inputs, ideal_hits(requests, limits.page_size), np.flatnonzero(~fits))
