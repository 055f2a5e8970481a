"""The state of a machine in a replay, as a value for JSON and as lines for people."""

from __future__ import annotations

from typing import Any

from minisgl.actors.scheduler.request import Request
from minisgl.cache.radix import Node
from minisgl.journal.recorder import outline
from minisgl.journal.replay import Replay
from minisgl.journal.requests import unpack


def state_of(replay: Replay) -> dict[str, Any]:
    """What runs, what waits, slots, pages and the radix tree, after the last call."""
    machine = replay.machine
    if machine is None:
        raise ValueError("the replay has not begun")
    table, pool, cache = machine.table, machine.pool, machine.cache
    depths: dict[Node, int] = {}
    for node in cache.nodes():  # parents come before their children
        depths[node] = 1 + depths.get(node.parent, 0) if node.parent is not None else 1
    plan = replay.output.plan
    return {
        "step": machine.counters.steps - 1,
        "time": replay.now,
        "plan": None if plan is None else _plan(outline(plan)),
        "running": [
            {
                **_about(request, replay.now),
                "slot": slot,
                "known": int(table.length[slot]),
                "planned": int(table.planned[slot]),
                "pages": int(table.n_pages[slot]),
                "shared_pages": int(table.n_shared[slot]),
                "prefilling": slot in machine._prefilling,
            }
            for slot, request in machine.running.values()
        ],
        "waiting": [_about(request, replay.now) | {"resumed": request.resumed} for _, request in machine.waiting._sorted],
        "slots": {"total": machine.limits.slots, "free": table.free_slots},
        "pages": {
            "total": machine.limits.num_pages,
            "free": pool.free,
            "cached": cache.num_pages,
            "evictable": cache.evictable,
            "owned": machine.limits.num_pages - pool.free - cache.num_pages,
        },
        "tree": {
            "nodes": cache.num_nodes,
            "pages": cache.num_pages,
            "depth": max(depths.values(), default=0),
            "held": sum(node.refs > 0 for node in depths),
            "salts": len(cache._salted),
        },
        "in_flight": [{"step": sent.step, "rows": len(sent.slots)} for sent in machine.inflight],
        "counters": machine.stats(),
    }


def _about(request: Request, now: float) -> dict[str, Any]:
    options = request.options
    return {
        "uid": request.uid,
        "prompt": request.n_prompt,
        "limit": request.limit,
        "client": options.client,
        "priority": options.priority,
        "salted": bool(options.cache_salt),
        "seconds": round(now - request.arrived, 6),
    }


def _plan(row: list[Any]) -> dict[str, Any]:
    step, joins, chunks, decode, grants = row
    rows = "as in the plan before" if decode is None else unpack(decode).tolist()
    return {
        "step": step,
        "joins": [{"slot": slot, "cached_tokens": cached} for slot, cached in joins],
        "prefill": [{"slot": slot, "tokens": n} for slot, _, n in chunks],
        "decode": rows,
        "page_grants": len(grants) // 12,
    }


def lines(state: dict[str, Any]) -> list[str]:
    """The state in words."""
    pages, tree, slots = state["pages"], state["tree"], state["slots"]
    out = [
        f"step {state['step']}, time {state['time']:.6f} s",
        f"slots   {slots['total'] - slots['free']} of {slots['total']} taken",
        f"pages   {pages['total']}: {pages['free']} free, {pages['cached']} cached ({pages['evictable']} of them can be "
        f"evicted), {pages['owned']} owned by requests",
        f"tree    {tree['nodes']} nodes, {tree['held']} held by requests, depth {tree['depth']}, {tree['salts']} salts",
    ]
    if plan := state["plan"]:
        decode = plan["decode"] if isinstance(plan["decode"], str) else f"{len(plan['decode'])} slots"
        chunks = ", ".join(f"slot {c['slot']}: {c['tokens']}" for c in plan["prefill"]) or "none"
        out.append(f"plan    prompt tokens: {chunks}; decodes: {decode}; {plan['page_grants']} page grants")
    out += [
        f"runs    request {r['uid']} in slot {r['slot']}: {r['known']} of at most {r['limit']} tokens known "
        f"(prompt {r['prompt']}), {r['planned']} planned, {r['pages']} pages ({r['shared_pages']} shared)"
        + (", in its prompt" if r["prefilling"] else "")
        for r in state["running"]
    ]
    out += [
        f"waits   request {r['uid']}: prompt {r['prompt']}, for {r['seconds']:.3f} s, priority {r['priority']}"
        + (", retracted" if r["resumed"] else "")
        for r in state["waiting"]
    ]
    return out
