"""Converts grammars in GBNF, as llama.cpp writes them, to Lark, in time linear in their length.

llguidance parses the rules and prints them; its own conversion looks for the terminals among them in as many passes as they
form a chain, and for the marks of Lark in a time that is quadratic in blank lines.  Runs in the checker process, or in the
caller's of minisgl.grammar.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance.gbnf_to_lark import ASTNode, RuleNode

_START = re.compile(r"%llguidance\b|start\s*:")


def to_lark(text: str) -> str:
    """A grammar in Lark, from Lark or GBNF.  Raises ValueError with the fault where it is neither."""
    if any(_START.match(line.lstrip()) for line in text.splitlines()):
        return text
    from llguidance.gbnf_to_lark import GrammarParser

    try:
        rules = GrammarParser().parse(text)
        _resolve(rules)
        return "%llguidance {}\n\n" + "\n".join(map(str, rules.values())) + "\n"
    except RecursionError:
        raise ValueError("its groups are nested too deeply") from None
    except Exception as e:  # the library raises bare exceptions
        raise ValueError(str(e)) from e


def _resolve(rules: dict[str, RuleNode]) -> None:
    """Link the rules, and give them the names that Lark demands: capital letters for terminals.  Raises ValueError."""
    from llguidance.gbnf_to_lark import RuleRefNode

    if "root" not in rules:
        raise ValueError("No 'root' rule found")
    users: defaultdict[str, list[str]] = defaultdict(list)
    unknown: dict[str, int] = {}  # of a rule that may be a terminal: its references to rules that are not known to be
    for name, rule in rules.items():
        rule.alternatives = rule.alternatives.simplify()
        unknown[name] = 0
        for node in _nodes(rule):
            if isinstance(node, RuleRefNode):
                if node.name not in rules:
                    raise ValueError(f"Rule '{node.name[:80]}' not found")
                node.target = rules[node.name]
                users[node.name].append(name)
                unknown[name] += 1
    ready = deque(name for name, n in unknown.items() if not n and name != "root")
    while ready:
        rules[name := ready.popleft()].rule_is_terminal = True
        for user in users[name]:
            unknown[user] -= 1
            if not unknown[user] and user != "root":
                ready.append(user)
    taken: set[str] = set()
    for name, rule in rules.items():
        snake = re.sub(r"([a-z])([A-Z])", r"\1_\2", name.replace("-", "_"))
        rule.name = "start" if name == "root" else snake.upper() if rule.rule_is_terminal else snake.lower()
        if rule.name in taken:
            raise ValueError(f"Rule '{rule.name[:80]}' already exists")
        taken.add(rule.name)


def _nodes(rule: RuleNode) -> Iterator[ASTNode]:
    """All nodes below a rule."""
    stack: list[ASTNode] = [rule]
    while stack:
        children = stack.pop().children()
        stack.extend(children)
        yield from children
