"""Views of a machine for pages: plain values, sections of rows, each row by its key.  Pure functions; nothing is changed.

    view = {section: {key: row}}       delta(before, now) has the rows that differ, and None for those that are gone

`Sight` says how much somebody may see: everything, or the requests of one client alone, with or without token ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minisgl.actors.scheduler.admission import WINDOW
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.arrays import I32
from minisgl.sampling_params import Finish
from minisgl.view.history import History, Life, Second, Step

View = dict[str, dict[str, Any]]
SLOTS = 256  # rows of a view
QUEUE = 64
ENDED = 40
CURVE = 120


@dataclass(frozen=True, slots=True)
class Sight:
    """What somebody may see.  `client`: the requests of this client alone, None: all; `text`: tokens, and what they say."""

    client: int | None = None
    text: bool = False

    def of(self, life: Life | None) -> bool:
        """Whether a request may be seen."""
        return self.client is None or (life is not None and life.client == self.client)

    def may(self, request: Request) -> bool:
        return self.client is None or request.options.client == self.client


def delta(before: View, now: View) -> View:
    """What turns one view into the other: rows that are new or different, and None for those that are gone."""
    out: View = {}
    for name, rows in now.items():
        old = before.get(name, {})
        if rows is old:
            continue
        changed = {key: row for key, row in rows.items() if key not in old or old[key] != row}
        changed.update((key, None) for key in old if key not in rows)
        if changed:
            out[name] = changed
    return out


def merge(view: View, change: View) -> View:
    """The view after a delta; the page does the same."""
    out = {name: dict(rows) for name, rows in view.items()}
    for name, rows in change.items():
        for key, row in rows.items():
            if row is None:
                out[name].pop(key, None)
            else:
                out.setdefault(name, {})[key] = row
    return out


# ---------------- the sections
def totals(machine: StepMachine, history: History) -> dict[str, Any]:
    """Numbers of the whole machine, by name."""
    cache = machine.cache
    return {
        **machine.stats(),
        "now": round(history.now, 3),
        "known_from": round(history.began, 3),
        "in_flight": len(machine.inflight),
        "tree_nodes": cache.num_nodes,
        "evictable_pages": cache.evictable,
        "private_pages": machine.limits.num_pages - machine.pool.free - cache.num_pages,
        "salts": len(cache._salted),
        "prefilling": len(machine._prefilling),
    }


def limits(machine: StepMachine) -> dict[str, Any]:
    """The sizes of the machine."""
    names = ("slots", "num_pages", "page_size", "max_context", "step_tokens", "max_steps_in_flight", "order")
    return {name: getattr(machine.limits, name) for name in names}


def slots(machine: StepMachine, sight: Sight) -> dict[str, Any]:
    """By slot: [uid, 1 while its prompt is computed, prompt tokens, known and planned tokens, limit, pages, shared pages]."""
    table, prefilling = machine.table, set(machine._prefilling)
    rows = [(slot, r) for slot, r in machine.running.values() if sight.may(r)][:SLOTS]
    at = [slot for slot, _ in rows]
    columns = (table.length, table.planned, table.limit, table.n_pages, table.n_shared)
    values = zip(*(column[at].tolist() for column in columns), strict=True)
    return {str(slot): [r.uid, int(slot in prefilling), len(r.ids), *v] for (slot, r), v in zip(rows, values, strict=True)}


def reason(machine: StepMachine, request: Request) -> tuple[str, str]:
    """Why a waiting request waits at this moment: a word, and a sentence."""
    pool, cache, table = machine.pool, machine.cache, machine.table
    front = machine.waiting.front(WINDOW)
    for other in front:
        if other is request:
            break
        if machine._blocks(other):
            return "behind", f"request {other.uid} was overtaken too often: nobody behind it starts before it"
    if not table.free_slots:
        return "slot", f"all {machine.limits.slots} slots are taken (--max-running)"
    match = machine._match(request)
    if machine._is_being_computed(request, match):
        return "prefix", "another request computes the next page of the same beginning: this one will read it"
    kept = request.missing_pages
    fits, needs = machine._has_pages_for(request, match), request.missing_pages
    request.missing_pages = kept
    if not fits:
        room = pool.free + cache.evictable - match.unreferenced
        text = f"needs {needs} pages beside those that running requests may still need; {room} are free or can be evicted"
        return "pages", text
    if request not in front:
        return "queue", f"{WINDOW} requests stand before it"
    return "turn", "finds room; the token budget of the steps is spent on those before it"


def reasons(machine: StepMachine, most: int = WINDOW) -> dict[int, str]:
    """The words of `reason` for the first waiting requests."""
    return {request.uid: reason(machine, request)[0] for request in machine.waiting.front(most)}


def waiting(machine: StepMachine, history: History, sight: Sight) -> dict[str, Any]:
    """By uid, in the order of the queue: place, tokens, since when, why as a word and a sentence, tokens in the cache."""
    out = {}
    for place, request in enumerate(machine.waiting.front(QUEUE)):
        if sight.may(request):
            word, text = reason(machine, request)
            cached = machine._match(request).num_pages * machine.limits.page_size
            out[str(request.uid)] = [
                place,
                len(request.ids),
                round(request.arrived, 3),
                word,
                text,
                cached,
                int(request.resumed),
            ]
    return out


def ranges(values: I32) -> list[list[int]]:
    """Numbers as ascending [first, last] ranges."""
    if not len(values):
        return []
    ordered = np.unique(values)
    cuts = np.flatnonzero(np.diff(ordered) > 1)
    firsts, lasts = ordered[np.append(0, cuts + 1)], ordered[np.append(cuts, len(ordered) - 1)]
    return [[int(a), int(b)] for a, b in zip(firsts, lasts, strict=True)]


def step_row(step: Step, history: History, sight: Sight) -> dict[str, Any]:
    """A step: when it was published and done, its device times in microseconds, its rows by slot."""
    chunks, joins, decode = step.chunks, step.joins, step.decode
    if sight.client is not None:
        mine = {uid for uid, life in [*history.lives.items(), *history.ended.items()] if life.client == sight.client}
        chunks = [c for c in chunks if c[1] in mine]
        joins = [j for j in joins if j[1] in mine]
        decode = decode[np.isin(step.uids, list(mine))]
    return {
        "at": _ms(step.at, history),
        "done": _ms(step.done, history),
        "end": _ms(step.end, history),
        "us": [step.busy_us, step.idle_us, step.launch_us],
        "ahead": step.ahead,
        "rows": len(step.decode),
        "tokens": sum(c[3] for c in step.chunks),
        "joins": [list(j) for j in joins],
        "chunks": [list(c) for c in chunks],
        "decode": ranges(decode),
    }


def _ms(at: float | None, history: History) -> float | None:
    """Milliseconds since the history began."""
    return None if at is None else round((at - history.began) * 1000, 3)


def steps(history: History, sight: Sight) -> dict[str, Any]:
    """The last steps, by number."""
    return {str(step.number): step_row(step, history, sight) for step in history.steps}


def requests(machine: StepMachine, history: History, sight: Sight) -> dict[str, Any]:
    """Requests that run or have ended lately, by uid: state, arrival, prompt, cached, said, TTFT, end and why."""
    ended = list(history.ended.values())[-ENDED * (1 if sight.client is None else 5) :]
    lives = [life for life in [*history.lives.values(), *ended] if sight.of(life)]
    return {str(life.uid): summary(machine, life) for life in lives[-SLOTS:]}


def state_of(machine: StepMachine, life: Life) -> str:
    """What a request does: waits, prefill, decode, or how it ended."""
    if life.ended is not None:
        return Finish(life.finish).name.lower()
    if life.uid in machine.running:
        return "prefill" if machine.running[life.uid][0] in machine._prefilling else "decode"
    return "waits"


def summary(machine: StepMachine, life: Life) -> list[Any]:
    """[state, arrived, prompt tokens, cached tokens, tokens said, TTFT ms, ended, retractions, limit]."""
    seen = life.known_from is None and life.times
    ttft = round((life.times[0] - life.arrived) * 1000, 2) if seen else None
    ended = None if life.ended is None else round(life.ended, 3)
    retracted, n = len(life.retracted), len(life.prompt)
    return [state_of(machine, life), round(life.arrived, 3), n, life.cached, len(life.said), ttft, ended, retracted, life.limit]


def life_of(machine: StepMachine, history: History, life: Life) -> dict[str, Any]:
    """All that is known of a request, but for its text."""
    gaps = np.diff(np.array(life.times)) * 1000 if len(life.times) > 1 else np.zeros(0)
    out: dict[str, Any] = {
        "uid": life.uid,
        "state": state_of(machine, life),
        "known_from": life.known_from,
        "arrived": life.arrived,
        "now": history.now,
        "priority": life.priority,
        "salted": life.salted,
        "prompt": len(life.prompt),
        "cached": life.cached,
        "started": life.started,
        "slot": life.slot,
        "chunks": [list(chunk) for chunk in life.chunks],
        "retracted": life.retracted,
        "waited": {why: round(s, 4) for why, s in life.waited.items()},
        "said": len(life.said),
        "first": life.times[0] if life.times else None,
        "gaps_ms": [round(float(g), 2) for g in gaps],
        "ended": life.ended,
        "limit": life.limit,
    }
    if life.uid in machine.waiting:
        request = machine.waiting._sorted[[r.uid for _, r in machine.waiting._sorted].index(life.uid)][1]
        out["why"] = reason(machine, request)[1]
    return out


def curves(history: History) -> dict[str, Any]:
    """By second of the machine's clock: see `curve_row`.  The last second is not over yet."""
    keys = list(history.seconds)[-CURVE:]
    return {str(key): curve_row(history.seconds[key]) for key in keys}


def curve_row(s: Second) -> list[Any]:
    """[tokens, prompt tokens computed, prompt tokens asked for, of these cached, TTFT p50, p95, ITL p50, p95 (ms), running,
    waiting, busy us, idle us, steps, requests that started and that ended]."""
    shares = [*_percentiles(s.ttft), *_percentiles(s.itl)]
    return [
        s.tokens,
        s.prefill,
        s.prompt,
        s.cached,
        *shares,
        s.running,
        s.waiting,
        s.busy_us,
        s.idle_us,
        s.steps,
        s.started,
        s.ended,
    ]


def _percentiles(values: Iterable[float]) -> list[float | None]:
    ordered = sorted(values)
    if not ordered:
        return [None, None]
    return [round(1000 * ordered[min(len(ordered) - 1, int(q * len(ordered)))], 2) for q in (0.5, 0.95)]


def sections(machine: StepMachine, history: History, sight: Sight) -> View:
    """Everything but the tree."""
    return {
        "totals": dict(totals(machine, history)),
        "limits": limits(machine),
        "slots": slots(machine, sight),
        "waiting": waiting(machine, history, sight),
        "steps": steps(history, sight),
        "requests": requests(machine, history, sight),
        "curve": curves(history),
    }
