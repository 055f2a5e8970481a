"""A snapshot of the step machine as plain values, and back: a replay can begin at any part of a journal.

Every field is named here; nothing else of the machine is read, and nothing but these values is made of a file.  `freeze` and
`thaw` are exact for all that decides over plans.  Left out is what does not: the fit of the cost model and the rate of prompts
(their answers are inputs), and, with hashed ids, the pages that were evicted (they only name the reason of a miss).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from minisgl.actors.scheduler.fair_queue import FairQueue, _Flow
from minisgl.actors.scheduler.interface import Counters, SchedulerLimits
from minisgl.actors.scheduler.logprobs import ExpectedLogprobs
from minisgl.actors.scheduler.plan_builder import InFlight
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.arrays import I32
from minisgl.cache.radix import NO_PAGES, Node, RadixCache
from minisgl.journal.identity import PlainIds
from minisgl.journal.requests import make_request, options_of, pack, params_of, set_state, state_of, unpack
from minisgl.plan import GRANT

_COLUMNS = ("uid", "epoch", "length", "planned", "limit", "n_pages", "n_shared", "logprobs")  # i64 in a snapshot
_LOST = -(1 << 30)  # less the number of its node: a token that does not exist
_SWITCHES = ("ignore_eos", "sampling_extra", "has_grammar")
_CACHE = ("evictable", "num_pages", "num_nodes", "evicted_pages", "_forgotten")


# ---------------- out of the machine
def freeze(machine: StepMachine, ids: PlainIds) -> dict[str, Any]:
    """The state of a machine between two calls."""
    state, work = capture(machine, ids)
    for _ in work:
        pass
    return state


def capture(machine: StepMachine, ids: PlainIds) -> tuple[dict[str, Any], Iterator[None]]:
    """The state without ids, and the work of filling these in: short slices, between which the machine may go on."""
    table, fair = machine.table, machine.fair
    tree, nodes, number = _tree(machine.cache, ids)
    known = [r for _, r in machine.running.values()] + [r for _, r in machine.waiting._sorted]
    requests, coming = [], []
    for request in known:
        slot = machine.running[request.uid][0] if request.uid in machine.running else None
        requests.append(row := [*request_values(request, ids), len(request.ids), state_of(request)])
        path = () if slot is None else _path(table.handle[slot], number)
        coming.append((row, request, _tokens(machine, request), path, slot))
    uids = {r.uid for r in known}
    live = [slot for slot, _ in machine.running.values()]
    state = {
        "requests": requests,
        "running": [[uid, slot] for uid, (slot, _) in machine.running.items()],
        "waiting": [[list(key), request.uid] for key, request in machine.waiting._sorted],
        "added": machine.waiting._added,
        "arrivals": [machine._arrivals, machine._seen],
        "newcomers": [r.uid for r in machine._newcomers if r.uid in uids],
        "counters": asdict(machine.counters),
        "pool": pack(machine.pool._stack[: machine.pool.free]),
        "tree": tree,
        "ghosts": [] if ids.hashed else list(machine.cache._ghosts),
        "columns": {name: getattr(table, name).astype("<i8").tobytes() for name in _COLUMNS},
        "switches": {name: getattr(table, name).tobytes() for name in _SWITCHES},
        "pages": pack(np.concatenate([NO_PAGES, *(table.row(s, 0, int(table.n_pages[s])) for s in live)])),
        "handles": [number[table.handle[slot]] for slot in live],
        "free_slots": list(table._free),
        "grants": [rows.tobytes() for rows in table._grants],
        "fair": {
            "time": fair.time,
            "weight": fair.weight,
            "rows": [list(item) for item in fair.rows.items()],
            "call_rows": [[*key, n] for key, n in fair.call_rows.items()],
            "flows": [[*key, flow.finish, flow.tokens, flow.rivals] for key, flow in fair._flows.items()],
            "ends": [[end, *key] for end, key in fair._ends],
            "sizes": [[*key, n] for key, n in fair._sizes.items()],
        },
        "prefilling": list(machine._prefilling),
        "decoding": pack(machine._decoding),
        "last_decode": None if machine._last_decode is None else pack(machine._last_decode),
        "since": machine._since,
        "inflight": [_sent(plan, ids) for plan in machine.inflight],
    }
    return state, _fill(ids, coming, list(machine.inflight), nodes, tree)


def _fill(ids: PlainIds, coming: list[Any], sent: list[InFlight], nodes: list[Any], tree: dict[str, Any]) -> Iterator[None]:
    """Fill in the ids of requests and nodes."""
    rows, keys = [], []
    for row, request, raw, path, slot in coming:
        rows.append((row, ids.request(request, raw, path)))
        if slot is not None:
            ids.joined([slot], [request.uid])
        yield
    for i, (parent, key, salt) in enumerate(nodes):
        keys.append(ids.node(i, parent, key, salt))
        if i % 16 == 0:
            yield
    for plan in sent:
        ids.sent(plan)
    yield from ids.settling()
    for row, tokens in rows:
        row[1] = pack(tokens.ids)
    tree["keys"] = pack(np.concatenate([k.ids for k in keys]))


def _path(handle: Node, number: dict[Node, int]) -> list[tuple[int, int]]:
    """The nodes from the root to a handle, see identity.Path."""
    path, end = [], 0
    while handle.parent is not None:
        path.append((number[handle], len(handle.key) // 4))
        handle = handle.parent
    path.reverse()
    return [(i, end := end + n) for i, n in path]


def _tokens(machine: StepMachine, request: Request) -> I32:
    """All known tokens of a request."""
    if request.uid not in machine.running or (slot := machine.running[request.uid][0]) in machine._prefilling:
        return request.ids
    return machine.table.ids(slot)


def request_values(request: Request, ids: PlainIds) -> list[Any]:
    """What a request brings.  Its ids, the second value, are filled in when they are settled."""
    params, options = params_of(ids.params(request.params)), options_of(request.options, ids.salt(request.salt))
    return [request.uid, b"", request.limit, request.seed, params, options, request.n_prompt, request.scored]


def _tree(cache: RadixCache, ids: PlainIds) -> tuple[dict[str, Any], list[tuple[int, bytes, str]], dict[Node, int]]:
    """The radix tree as columns, parents before their children; (parent, key, salt) of its nodes; the numbers of the nodes."""
    roots = [cache.root, *cache._salted.values()]
    order: list[Node] = []
    number: dict[Node, int] = {}
    for root in roots:
        stack = [root]
        while stack:
            node = stack.pop()
            number[node] = len(order)
            order.append(node)
            stack.extend(reversed((node.children or {}).values()))
    nodes: list[tuple[int, bytes, str]] = []
    lost: set[Node] = set()  # below a forgotten node that nobody holds: no request comes there any more
    for i, node in enumerate(order):
        above, key = node.parent, node.key
        if above is not None and (above in lost or (above.refs == 0 and above.key and above.key[3] >= 0x80)):
            lost.add(node)
            key = pack(np.full(len(key) // 4, _LOST - i))
        nodes.append((-1 if above is None else number[above], key, node.salt))
    columns = {
        "salts": [ids.salt(salt) for salt in cache._salted],
        "parents": pack([parent for parent, _, _ in nodes]),
        "sizes": pack([len(n.pages) for n in order]),
        "refs": pack([n.refs for n in order]),
        "scores": np.array([n.score for n in order], "<f8").tobytes(),
        "sound": bytes(n.sound for n in order),
        "pages": pack(np.concatenate([n.pages for n in order])),
        "unused": pack([number[n] for n in cache._unused]),
        "totals": [getattr(cache, name) for name in _CACHE],
    }
    return columns, nodes, number


def _sent(plan: InFlight, ids: PlainIds) -> list[Any]:
    logprobs = None
    if (expected := plan.logprobs) is not None:
        targets = np.zeros_like(expected.targets) if ids.hashed else expected.targets
        columns = (expected.drawn, expected.slots, expected.epochs, targets, expected.positions)
        logprobs = [column.astype("<i8").tobytes() for column in columns]
    return [plan.step, pack(plan.slots), plan.epochs.astype("<i8").tobytes(), plan.cost.tolist(), logprobs, pack(plan.pooled)]


# ---------------- back into a machine
def thaw(state: dict[str, Any], limits: SchedulerLimits) -> StepMachine:
    """A machine in a state that `freeze` has written.  Raises KeyError, TypeError or ValueError if that is damaged."""
    machine = StepMachine(limits)
    table, size = machine.table, limits.page_size
    requests: dict[int, Request] = {}
    known: dict[int, I32] = {}
    for uid, raw, *values, n, written in state["requests"]:
        known[uid] = unpack(raw)
        request = requests[uid] = make_request(uid, known[uid][:n], values)
        set_state(request, written)
    nodes = _thaw_tree(machine.cache, state["tree"], size)
    machine.cache._ghosts.update(dict.fromkeys(state["ghosts"], 0.0))
    for name, raw in state["columns"].items():
        getattr(table, name)[:] = np.frombuffer(raw, "<i8")
    for name, raw in state["switches"].items():
        getattr(table, name)[:] = np.frombuffer(raw, np.bool_)
    for node in machine.cache.nodes():
        table.page_ids[node.pages] = np.frombuffer(node.key, np.int32).reshape(-1, size)
    table.handle = [machine.cache.root] * limits.slots
    pages, at = unpack(state["pages"]), 0
    for (uid, slot), handle in zip(state["running"], state["handles"], strict=True):
        request = requests[uid]
        machine.running[uid] = slot, request
        n = int(table.n_pages[slot])
        mine, at = pages[at : at + n], at + n
        table.pages[slot, :n] = mine
        table.handle[slot] = nodes[handle]
        ids = known[uid][: n * size]
        table.page_ids[mine[np.arange(len(ids)) // size], np.arange(len(ids)) % size] = ids
        table.tail[slot] = known[uid][-1]
        _restore_params(machine, slot, request)
    for key, uid in state["waiting"]:
        machine.waiting._sorted.append(((key[0], key[1], key[2]), requests[uid]))
        machine.waiting._keys[uid] = (key[0], key[1], key[2])
        machine.waiting.tokens += len(requests[uid].ids)
    machine.waiting._added = state["added"]
    machine._arrivals, machine._seen = state["arrivals"]
    machine._newcomers = [requests[uid] for uid in state["newcomers"]]
    machine.counters = Counters(**state["counters"])
    stack = unpack(state["pool"])
    machine.pool._n = len(stack)
    machine.pool._stack[: len(stack)] = stack
    table._free = list(state["free_slots"])
    table._grants = [np.frombuffer(raw, GRANT).copy() for raw in state["grants"]]
    _thaw_fair(machine.fair, state["fair"])
    machine._prefilling = list(state["prefilling"])
    machine._decoding = unpack(state["decoding"])
    machine._last_decode = None if state["last_decode"] is None else unpack(state["last_decode"])
    machine._since = state["since"]
    machine.inflight = deque(map(_thaw_sent, state["inflight"]))
    return machine


def _restore_params(machine: StepMachine, slot: int, request: Request) -> None:
    """What the slot table derives from the parameters of a request; see SlotTable.take."""
    table, params = machine.table, request.params
    if params.stop_token_ids:
        table.stop_ids[slot] = frozenset(params.stop_token_ids)
    if params.logprobs is not None:
        table.with_logprobs.add(slot)
    if params.grammar:
        table.with_grammar.add(slot)


def _thaw_tree(cache: RadixCache, tree: dict[str, Any], page_size: int) -> list[Node]:
    parents, sizes, refs = unpack(tree["parents"]).tolist(), unpack(tree["sizes"]).tolist(), unpack(tree["refs"]).tolist()
    pages, scores, sound, keys = (
        unpack(tree["pages"]),
        np.frombuffer(tree["scores"], "<f8").tolist(),
        tree["sound"],
        tree["keys"],
    )
    salts = iter(tree["salts"])
    nodes: list[Node] = []
    at, page_bytes = 0, 4 * page_size
    for i, parent in enumerate(parents):
        if i == 0:
            node = cache.root
        elif parent < 0:
            salt = next(salts)
            node = cache._salted[salt] = Node(b"", NO_PAGES, None, salt)
        else:
            end, above = at + sizes[i], nodes[parent]
            node = Node(keys[at * page_bytes : end * page_bytes], pages[at:end].copy(), above)
            if above.children is None:
                above.children = {}
            above.children[node.key[:page_bytes]] = node
            at = end
        node.refs, node.score, node.sound = refs[i], scores[i], bool(sound[i])
        nodes.append(node)
    for i in unpack(tree["unused"]).tolist():
        cache._unused[nodes[i]] = None
    for name, value in zip(_CACHE, tree["totals"], strict=True):
        setattr(cache, name, value)
    return nodes


def _thaw_fair(fair: FairQueue, state: dict[str, Any]) -> None:
    fair.time, fair.weight = state["time"], state["weight"]
    fair.rows = Counter(dict(state["rows"]))
    fair.call_rows = Counter({(client, call): n for client, call, n in state["call_rows"]})
    fair._flows = {(client, call): _Flow(end, tokens, rivals) for client, call, end, tokens, rivals in state["flows"]}
    fair._ends = [(end, (client, call)) for end, client, call in state["ends"]]
    fair._sizes = Counter({(client, bits): n for client, bits, n in state["sizes"]})


def _thaw_sent(row: list[Any]) -> InFlight:
    step, slots, epochs, cost, logprobs, pooled = row
    expected = None
    if logprobs is not None:
        drawn, at, owners, targets, positions = (np.frombuffer(raw, "<i8").astype(np.int64) for raw in logprobs)
        expected = ExpectedLogprobs(drawn, at.astype(np.int32), owners, targets.astype(np.int32), positions.astype(np.int32))
    times = np.frombuffer(epochs, "<i8").astype(np.int64)
    return InFlight(step, unpack(slots), times, np.array(cost), expected, unpack(pooled))
