"""A view of the radix tree: the top of it, the largest subtrees, and what somebody opened; the rest is added up.

Nodes have names, numbers that stay while a node lives.  One walk over the tree adds up its subtrees; then nodes are opened in
the order of their size until BUDGET rows are shown.  A row that stands for siblings that are left out has the key "PARENT+".
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.cache.radix import Node
from minisgl.view.history import History
from minisgl.view.views import Sight

BUDGET = 160  # rows that are opened unasked
CHILDREN = 12  # of one node, unasked


@dataclass(slots=True)
class Subtree:
    """What is below and in a node."""

    pages: int = 0
    nodes: int = 0
    refs: int = 0  # nodes that are referenced


@dataclass(frozen=True, slots=True)
class Choice:
    """What somebody has opened and closed by hand, by names of nodes, and of which nodes all children are shown."""

    opened: frozenset[int] = frozenset()
    closed: frozenset[int] = frozenset()
    whole: frozenset[int] = frozenset()


@dataclass(slots=True)
class Names:
    """Numbers for nodes.  A node that is gone loses its own, and nobody else gets it."""

    by_node: dict[Node, int] = field(default_factory=dict)
    by_name: dict[int, Node] = field(default_factory=dict)
    last: int = 0

    def renew(self, nodes: Iterable[Node]) -> None:
        """These nodes exist."""
        old, self.by_node, self.by_name = self.by_node, {}, {}
        for node in nodes:
            name = old.get(node)
            if name is None:
                self.last += 1
                name = self.last
            self.by_node[node], self.by_name[name] = name, node


def roots(machine: StepMachine) -> list[Node]:
    """The root without a salt, and those of all salts."""
    return [machine.cache.root, *machine.cache._salted.values()]


def add_up(machine: StepMachine) -> dict[Node, Subtree]:
    """The subtree of every node, roots included, parents before children.  O(tree)."""
    order: list[Node] = []
    for root in roots(machine):
        stack = [root]
        while stack:
            node = stack.pop()
            order.append(node)
            if node.children:
                stack.extend(node.children.values())
    sums = {node: Subtree(len(node.pages), int(node.parent is not None), int(node.refs > 0)) for node in order}
    for node in reversed(order):
        if node.parent is not None:
            mine, above = sums[node], sums[node.parent]
            above.pages += mine.pages
            above.nodes += mine.nodes
            above.refs += mine.refs
    return sums


def hanging(machine: StepMachine, sight: Sight) -> dict[Node, list[int]]:
    """The running requests by the node where their prefix ends."""
    out: dict[Node, list[int]] = {}
    for slot, request in machine.running.values():
        if sight.may(request):
            out.setdefault(machine.table.handle[slot], []).append(request.uid)
    return out


def tree(machine: StepMachine, history: History, names: Names, sight: Sight, choice: Choice = Choice()) -> dict[str, Any]:
    """Rows by name: [parent or 0, pages, references, seconds since it was used, children, pages in and below it, nodes in and
    below it, uids that hang here, open, salted].  Roots have the parent 0 and no pages."""
    sums = add_up(machine)
    names.renew(sums)
    users = hanging(machine, sight)
    for node in users:
        history.touch(node, history.now)
    history.touched = {node: at for node, at in history.touched.items() if node in sums}
    allowed = _paths(users) if sight.client is not None else None
    rows: dict[str, Any] = {}
    heap = [(-sums[root].pages, i, root) for i, root in enumerate(roots(machine)) if allowed is None or root in allowed]
    heapq.heapify(heap)
    tie = len(heap)
    while heap:
        _, _, node = heapq.heappop(heap)
        name = names.by_node[node]
        children = [c for c in (node.children or {}).values() if allowed is None or c in allowed]
        opened = bool(children) and name not in choice.closed and (name in choice.opened or len(rows) + len(heap) < BUDGET)
        used, below = history.touched.get(node), sums[node]
        age = None if used is None else round(history.now - used, 1)
        parent = names.by_node[node.parent] if node.parent is not None else 0
        mine = [parent, len(node.pages), node.refs, age, len(children), below.pages, below.nodes]
        rows[str(name)] = [*mine, users.get(node, [])[:8], int(opened), int(bool(node.salt))]
        if not opened:
            continue
        children.sort(key=lambda c: (-sums[c].refs, -sums[c].pages))
        shown = children if name in choice.whole else children[:CHILDREN]
        for child in shown:
            tie += 1
            heapq.heappush(heap, (-sums[child].pages, tie, child))
        if rest := children[len(shown) :]:
            pages, nodes = sum(sums[c].pages for c in rest), sum(sums[c].nodes for c in rest)
            rows[f"{name}+"] = [name, pages, len(rest), nodes]
    return rows


def _paths(users: dict[Node, list[int]]) -> set[Node]:
    """The nodes from these up to their roots."""
    out: set[Node] = set()
    for node in users:
        walk: Node | None = node
        while walk is not None and walk not in out:
            out.add(walk)
            walk = walk.parent
    return out
