"""Views of a machine against slow references, on machines with random pasts."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from conftest import cases, prompt
from journal.loads import Recorded, random_load

from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.cache.radix import Node
from minisgl.plan import StepPlan
from minisgl.sampling_params import Finish, RequestOptions
from minisgl.view import tree as trees
from minisgl.view import views
from minisgl.view.history import History
from minisgl.view.scenes import Scene
from minisgl.view.tree import Choice, Names, tree
from minisgl.view.viewer import Viewer
from minisgl.view.views import Sight, delta, merge, sections

ALL = Sight(None, True)


def scenes(seed: int, **limits: Any) -> Any:
    """A random load, lived through: (recorded loop, the scene after each call)."""
    loop = random_load(seed, **limits)
    scene = Scene()
    for data in loop.parts[True]:
        scene.next_part(bytes(data))
        while scene.advance():
            yield loop, scene


def below(node: Node) -> list[Node]:
    """A node and all below it, the slow way."""
    return [node, *(n for child in (node.children or {}).values() for n in below(child))]


def check_slots(machine: StepMachine, rows: dict[str, Any]) -> None:
    assert {int(k) for k in rows} == {slot for slot, _ in machine.running.values()}
    for key, (uid, prefilling, n_prompt, length, planned, limit, pages, shared) in rows.items():
        slot, request = machine.running[uid]
        assert slot == int(key)
        assert bool(prefilling) is (slot in machine._prefilling)
        assert n_prompt == len(request.ids)
        assert length == len(machine.table.ids(slot)) or prefilling
        assert (planned, limit) == (machine.table.planned[slot], request.limit)
        assert pages == machine.table.n_pages[slot]
        walk, n = machine.table.handle[slot], 0
        while walk.parent is not None:
            walk, n = walk.parent, n + len(walk.pages)
        assert shared == n


def check_tree(machine: StepMachine, rows: dict[str, Any], names: Names) -> None:
    """Every row says the truth of its node, and rows with what they leave out add up to the tree."""
    pages = nodes = 0
    for key, row in rows.items():
        if key.endswith("+"):
            pages, nodes = pages + row[1], nodes + row[3]
            continue
        node = names.by_name[int(key)]
        parent, n_pages, refs, _, children, all_pages, all_nodes, uids, opened, _ = row
        assert parent == (names.by_node[node.parent] if node.parent is not None else 0)
        assert (n_pages, refs, children) == (len(node.pages), node.refs, len(node.children or {}))
        everything = below(node)
        assert all_pages == sum(len(n.pages) for n in everything)
        assert all_nodes == len([n for n in everything if n.parent is not None])
        assert uids == [r.uid for slot, r in machine.running.values() if machine.table.handle[slot] is node][:8]
        if opened:
            pages, nodes = pages + n_pages, nodes + (node.parent is not None)
        else:
            pages, nodes = pages + all_pages, nodes + all_nodes
    assert pages == machine.cache.num_pages
    assert nodes == machine.cache.num_nodes == len(list(machine.cache.nodes()))


@pytest.mark.parametrize("seed", range(cases(3)))
def test_what_a_view_says_is_the_state_of_the_machine_at_every_step(seed: int) -> None:
    rng, shown = random.Random(seed), {}
    for _, scene in scenes(seed):
        machine = scene.machine
        assert machine is not None
        if rng.random() < 0.6:
            continue
        view = sections(machine, scene.history, ALL)
        view["tree"] = tree(machine, scene.history, scene.names, ALL)
        check_slots(machine, view["slots"])
        check_tree(machine, view["tree"], scene.names)
        order = [r.uid for r in machine.waiting.front(1000)]
        assert [int(uid) for uid in sorted(view["waiting"], key=lambda k: view["waiting"][k][0])] == order[: views.QUEUE]
        totals = view["totals"]
        in_tree = sum(len(n.pages) for n in machine.cache.nodes())
        owned = sum(int(machine.table.n_pages[s] - machine.table.n_shared[s]) for s, _ in machine.running.values())
        assert totals["cached_pages"] == in_tree
        assert totals["private_pages"] == owned
        assert totals["free_pages"] + in_tree + owned == machine.limits.num_pages == totals["total_pages"]
        assert totals["evictable_pages"] == sum(len(n.pages) for n in machine.cache.nodes() if n.refs == 0)
        assert totals["running_requests"] == len(view["slots"])
        # deltas bring whoever looks on to the same view, also as JSON
        change = json.loads(json.dumps(delta(shown, view)))
        merged = merge(shown, change)
        assert {name: rows for name, rows in merged.items() if rows} == {
            n: r for n, r in json.loads(json.dumps(view)).items() if r
        }
        shown = json.loads(json.dumps(view))


@pytest.mark.parametrize("seed", range(cases(3)))
def test_the_steps_and_lives_are_those_of_the_plans_and_answers(seed: int) -> None:
    loop, scene = list(scenes(seed))[-1]
    history: History = scene.history
    plans: dict[int, StepPlan] = {plan.step: plan for plan in loop.plans}
    decoding: dict[int, list[int]] = {}
    last: list[int] = []
    for plan in loop.plans:
        last = last if plan.decode is None else plan.decode.tolist()
        decoding[plan.step] = last
    for key, row in views.steps(history, ALL).items():
        plan = plans[int(key)]
        assert [(c[0], c[3]) for c in row["chunks"]] == [(s, n) for s, _, n in plan.prefill.tolist()]
        assert sorted(s for a, b in row["decode"] for s in range(a, b + 1)) == sorted(decoding[plan.step])
        assert (row["rows"], row["tokens"]) == (len(decoding[plan.step]), len(plan.ids))
    for uid, life in history.ended.items():
        ids, _ = loop.asked[uid]
        assert life.said == loop.said[uid]
        assert life.prompt.tolist() == ids
        assert life.cached == loop.started.get(uid)
        assert life.finish == loop.ends.get(uid, Finish.STOP)  # that of a vector is none
        spans = [(start, start + n) for _, _, start, n in life.chunks]
        if life.cached is not None and not life.retracted and life.said:
            assert spans[0][0] == life.cached
            assert [b for _, b in spans[:-1]] == [a for a, _ in spans[1:]]
            assert spans[-1][1] == len(ids)
        assert len(life.times) == len(life.said)
    seconds = history.seconds.values()
    if len(loop.plans) == len(plans) and history.began == 0.0:
        assert sum(s.tokens for s in seconds) == sum(map(len, loop.said.values()))
        assert sum(s.prefill for s in seconds) == loop.prefilled()
        assert sum(s.cached for s in seconds) == scene.machine.counters.cached_tokens


@pytest.mark.parametrize("seed", range(cases(3)))
def test_looking_changes_nothing(seed: int) -> None:
    """A replay with views after each call still comes to the recorded decisions: Divergence would be raised."""
    for _, scene in scenes(seed, wait_for_shared_prefix=True):
        sections(scene.machine, scene.history, ALL)
        tree(scene.machine, scene.history, scene.names, ALL)


@pytest.mark.parametrize("seed", range(cases(3)))
def test_a_client_sees_its_own_requests_alone(seed: int) -> None:
    for i, (_, scene) in enumerate(scenes(seed)):
        if i % 6:
            continue
        machine, history = scene.machine, scene.history
        whose = {uid: life.client for uid, life in [*history.lives.items(), *history.ended.items()]}
        for client in range(3):
            sight = Sight(client, True)
            view = sections(machine, history, sight)
            assert all(whose[row[0]] == client for row in view["slots"].values())
            assert all(whose[int(uid)] == client for uid in [*view["waiting"], *view["requests"]])
            for row in view["steps"].values():
                assert all(whose.get(c[1]) == client for c in row["chunks"] + row["joins"])
            for step in history.steps:
                pairs = zip(step.decode.tolist(), step.uids.tolist(), strict=True)
                mine_ = sorted(slot for slot, uid in pairs if whose.get(uid) == client)
                shown = view["steps"][str(step.number)]["decode"]
                assert [slot for a, b in shown for slot in range(a, b + 1)] == mine_
            mine = [r.uid for _, r in machine.running.values() if r.options.client == client]
            rows = tree(machine, history, scene.names, sight)
            assert sorted(uid for key, row in rows.items() if "+" not in key for uid in row[7]) == sorted(mine)[: len(mine)]
            assert all(row[2] > 0 for key, row in rows.items() if "+" not in key and row[0])


# ---------------- why requests wait
def why(loop: Recorded) -> dict[int, str]:
    return views.reasons(loop.machine)


def test_the_reason_why_a_request_waits_is_the_one_that_holds_it() -> None:
    loop = Recorded(slots=2, num_pages=40)
    for i in range(3):
        loop.add(prompt(8, i), 20, RequestOptions(client=i, call=i))
    loop.step()
    loop.step()
    assert why(loop) == {3: "slot"}
    loop.run()

    loop = Recorded(slots=4, num_pages=16, step_tokens=64)
    loop.add(prompt(40, 1), 8)
    loop.step()
    loop.add(prompt(32, 2), 8)
    loop.step(0)
    assert why(loop) == {2: "pages"}
    text = views.reason(loop.machine, loop.machine.waiting.front(1)[0])[1]
    assert "needs 9 pages" in text
    loop.run()

    loop = Recorded(slots=4, num_pages=16, step_tokens=64)
    loop.add(prompt(20, 1), 12)
    loop.add(prompt(16, 2), 12)
    loop.step()
    loop.add(prompt(32, 3), 8)
    loop.step(0)
    assert len(loop.machine.running) == 2
    assert why(loop) == {3: "pages"}
    loop.run()

    loop = Recorded(slots=4, num_pages=40, step_tokens=9)
    loop.add(prompt(30, 1), 4)
    loop.step()
    loop.add(prompt(29, 1), 4)
    loop.step(0)
    assert why(loop) == {2: "prefix"}
    loop.run()

    loop = Recorded(slots=4, num_pages=40, step_tokens=9)
    loop.add(prompt(20, 1), 4)
    loop.add(prompt(20, 2), 4)
    loop.step()
    assert why(loop) == {2: "turn"}
    loop.run()


# ---------------- a large tree
def large(n: int) -> tuple[StepMachine, History]:
    """A machine whose tree has about `n` nodes."""
    rng = random.Random(1)
    loop = Recorded(slots=4, num_pages=8 * n, max_context=64)
    cache, pool = loop.machine.cache, loop.machine.pool
    import numpy as np

    while cache.num_nodes < n:
        ids = np.array([rng.randrange(1, 4) for _ in range(4 * rng.randrange(1, 12))], np.int32)
        handle, _ = cache.acquire(cache.match(np.append(ids, np.int32(1)).astype(np.int32)))
        have = 0
        walk = handle
        while walk.parent is not None:
            have, walk = have + len(walk.pages), walk.parent
        rest = ids[4 * have :]
        if len(rest):
            handle, _, duplicates = cache.extend(handle, rest, pool.alloc(len(rest) // 4))
            pool.release(duplicates)
        cache.release(handle)
    history = History()
    history.begin(loop.machine, 0.0)
    return loop.machine, history


def test_ten_thousand_nodes_are_shown_as_a_bounded_view_that_opens_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, history = large(10_000)
    names = Names()
    rows = tree(machine, history, names, ALL)
    assert 50 < len(rows) <= trees.BUDGET + 2 * trees.CHILDREN + 2
    assert len(json.dumps(rows)) < 20_000
    check_tree(machine, rows, names)
    closed = next(int(k) for k, row in rows.items() if "+" not in k and row[4] and not row[8])
    more = tree(machine, history, names, ALL, Choice(opened=frozenset([closed])))
    assert sum(row[0] == closed for key, row in more.items() if "+" not in key) >= 1
    check_tree(machine, more, names)
    root = names.by_node[machine.cache.root]
    shut = tree(machine, history, names, ALL, Choice(closed=frozenset([root])))
    assert list(shut) == [str(root)]
    check_tree(machine, shut, names)
    cut = next(k for k in rows if k.endswith("+"))
    whole = tree(machine, history, names, ALL, Choice(whole=frozenset([int(cut[:-1])])))
    assert cut not in whole
    walks = 0

    def counted(m: StepMachine) -> Any:
        nonlocal walks
        walks += 1
        return add_up(m)

    add_up = trees.add_up
    monkeypatch.setattr(trees, "add_up", counted)
    tree(machine, history, names, ALL)
    assert walks == 1


# ---------------- the viewer
def test_the_last_view_has_the_last_tree_even_if_the_tree_was_not_due_with_the_last_change() -> None:
    """A large tree is made less often than the rest; when nothing happens any more, it follows."""
    loop = Recorded()
    clock, shown = 0.0, dict[str, dict[str, Any]]()
    viewer = Viewer(lambda ids: [f"<{i}>" for i in ids], lambda: clock)
    sent = 0

    def follow(seconds: float) -> None:
        nonlocal clock, shown, sent
        loop.recorder.rest(loop.now + 1)
        data = bytes(loop.parts[True][0])
        if len(data) > sent:
            viewer.take("journal", data[sent:], sent == 0)
            sent = len(data)
        for _ in range(int(seconds / 0.01)):
            clock += 0.01
            viewer.due()
            for message in viewer.out:
                said = json.loads(message[2])
                shown = merge({} if "view" in said else shown, said.get("view") or said.get("change") or {})
                viewer.take("ready", 1)
            viewer.out = []

    viewer.take("watch", 1, None, True)
    follow(0.05)
    for i in range(12):
        loop.add(prompt(12, i), 3)
        loop.step()
        follow(0.03 * (i % 4))
    loop.run()
    follow(1.0)
    machine = viewer.live.machine
    assert machine is not None
    watcher = viewer._watchers[1]
    want = tree(machine, viewer.live.history, viewer.live.names, ALL)
    assert {k: row[:3] for k, row in shown["tree"].items()} == {k: row[:3] for k, row in want.items()}
    assert shown["totals"]["steps"] == machine.counters.steps
    assert all(row[10].startswith("<") for k, row in shown["tree"].items() if row[1] and "+" not in k)
    before = watcher.calls
    follow(1.0)
    assert (watcher.calls, viewer.out) == (before, [])


def test_a_reader_that_is_slow_gets_its_next_view_when_it_has_taken_the_last_one() -> None:
    loop = Recorded()
    clock = 0.0
    viewer = Viewer(lambda ids: [""] * len(list(ids)), lambda: clock)
    viewer.take("watch", 1, None, True)
    loop.recorder.rest(1.0)
    sent = 0
    for i in range(30):
        loop.add(prompt(12, i % 7), 3)
        loop.step()
        loop.recorder.rest(loop.now + 1)
        viewer.take("journal", bytes(loop.parts[True][0][sent:]), sent == 0)
        sent = len(loop.parts[True][0])
        clock += 1.0
        viewer.due()
    assert len(viewer.out) == 1
    viewer.out = []
    viewer.take("ready", 1)
    viewer.due()
    (message,) = viewer.out
    assert json.loads(message[2])["change"]["totals"]["steps"] == loop.machine.counters.steps
