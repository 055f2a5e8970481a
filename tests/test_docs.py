"""docs/structures.md is true: messages, edges, arenas and imports are read from its tables and compared with the code."""

from __future__ import annotations

import ast
import dataclasses as dc
import functools
import re
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import World, fake_config, prompt, random_traffic

from minisgl.actors.detokenizer import DetokenizerActor
from minisgl.actors.runtime import shared_memory
from minisgl.actors.runtime.local import LocalSystem
from minisgl.actors.runtime.ring import RingWriter
from minisgl.actors.scheduler.actor import SchedulerActor
from minisgl.actors.spawn import make_checker
from minisgl.actors.tokenizer import TokenizerActor
from minisgl.actors.wire import registry
from minisgl.actors.worker import WorkerActor
from minisgl.api.engine import ChatPrompt, TextPrompt, TokenPrompt
from minisgl.api.gateway import Gateway
from minisgl.config import Config, EngineConfig, ServerConfig
from minisgl.grammar import regex
from minisgl.journal.desk import Desk
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.fake_runner import FakeRunner
from minisgl.sampling_params import RequestOptions, SamplingParams
from scripts.check import lines

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minisgl"


TABLES = lines.tables((ROOT / "docs/structures.md").read_text())


def fields_of(name: str) -> str:
    return " ".join(f.name for f in dc.fields(registry()[name]))


def observed_edges() -> set[tuple[str, str, str]]:
    """Every edge seen while all real actors work in one deterministic system, text, chat and trouble included."""
    engine = EngineConfig(tp=2, kv_tokens=512, max_context=256, max_running=8, step_tokens=64)
    config = Config(resolve(None), engine, ServerConfig(reasoning_parser="deepseek_r1"))
    memory = shared_memory.Memory(config)
    shared = memory.arenas
    system = LocalSystem(3)
    gateway = system.spawn("api", lambda ctx: Gateway(ctx, config, shared))
    system.spawn("tokenizer", lambda ctx: TokenizerActor(ctx, config, RingWriter(shared.prompts[0])))
    system.spawn("detokenizer", lambda ctx: DetokenizerActor(ctx, config))
    system.spawn("checker", lambda ctx: make_checker(ctx, config))
    system.spawn("scheduler", lambda ctx: SchedulerActor(ctx, config, shared, 0, Desk(ctx, config)))
    for rank in range(2):
        system.spawn(f"worker{rank}", lambda ctx, r=rank: WorkerActor(ctx, r, shared, lambda: FakeRunner(config, 32)))
    gateway.silent.clear()
    system.run()
    seen: list[object] = []
    gateway.journals.watch(lambda data, begins: seen.append(data))
    greedy, thinks = SamplingParams(max_tokens=60), SamplingParams(max_tokens=60, reasoning="deepseek_r1")
    gateway.open(TextPrompt("Once upon a time"), greedy, seen.append)
    gateway.open(ChatPrompt(b'{"messages": [{"role": "user", "content": "Hi"}], "kwargs": {}}'), thinks, seen.append)
    gateway.open(ChatPrompt(b'{"messages": 5, "kwargs": {}}'), greedy, seen.append)
    gateway.open(TextPrompt("x"), SamplingParams(max_tokens=60, stop=tuple("aeiou nrst")), seen.append)
    gateway.open(TokenPrompt((1, 2, 3)), SamplingParams(max_tokens=6, logprobs=2, echo=True), seen.append)
    gateway.open(TokenPrompt((1, 2, 3)), SamplingParams(max_tokens=1), seen.append, RequestOptions(pooling="mean"))
    gateway.detokenize((1, 2, 3), False, seen.append)
    gateway.check_grammar(regex("a+"), "regex", seen.append)
    gateway.check_grammar(regex("(a"), "regex", seen.append)
    gateway.open(TokenPrompt((1, 2, 3)), SamplingParams(max_tokens=3, grammar=regex("a+")), seen.append)
    victim = gateway.open(TokenPrompt((1, 2, 3)), greedy, seen.append)
    gateway.close(victim)
    system.run()
    gateway.flush_cache()
    system.run()
    assert gateway.stats["admitted"] >= 3
    assert gateway.stats["cached_pages"] == 0
    assert gateway.stats["free_pages"] == gateway.stats["total_pages"]
    assert gateway.stats["evicted_pages"] > 0
    gateway.lost(["detokenizer"], shared.requests)
    gateway.lost(["scheduler"], shared.requests)
    memory.close()
    small = World(0, fake_config(tp=1, kv_tokens=16))
    small.submit(list(range(1, 20)), 2)
    random_traffic(small, 0)
    for first in (1, 2, 1):  # each takes the pages of the one before
        small.submit(prompt(12, first), 1)
        small.system.run()
    edges = system.edges | small.system.edges
    small.close()
    return {(name, re.sub(r"\d+$", "", src), re.sub(r"\d+$", "", dst)) for name, src, dst in edges}


def test_the_message_table_is_what_the_actors_really_say() -> None:
    documented = {(name, src, dst) for name, src, dst, _ in TABLES["message"]}
    assert observed_edges() == documented
    for name, _, _, fields in TABLES["message"]:
        assert fields == fields_of(name), name


def test_every_message_of_the_registry_is_documented() -> None:
    runtime = {name: fields for name, _, fields in TABLES["runtime message"]}
    for name, fields in runtime.items():
        assert fields == fields_of(name), name
    assert {r[0] for r in TABLES["message"]} | set(runtime) == set(registry()) - {"SamplingParams", "RequestOptions"}


def test_the_arena_table_is_the_arenas() -> None:
    assert [r[0] for r in TABLES["arena"]] == [f.name for f in dc.fields(shared_memory.Arenas)]
    for row in TABLES["arena"]:  # the module's own docstring has the same table
        assert re.search(r"\s+".join(map(re.escape, row)), shared_memory.__doc__ or ""), row[0]


@functools.cache
def modules() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text()) for name, path in lines.modules(PACKAGE).items()}


def room_of(module: str) -> str:
    return lines.room_of(module, lines.patterns())


def imports_of(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
    return names


@functools.cache
def imported(module: str) -> set[str]:
    """The modules of the package that a module imports, anywhere in its text."""
    names = {name.removeprefix("minisgl.") for name in imports_of(modules()[module]) if name.startswith("minisgl.")}
    return names & set(modules()) - {module}


@pytest.mark.parametrize("module", modules())
def test_no_room_imports_upwards(module: str) -> None:
    allowed = {row[0]: set(row[2].split()) for row in TABLES["imports"]}
    mine = room_of(module)
    for target in imported(module):
        assert room_of(target) in {mine} | allowed[mine], f"{module} imports {target}"


def test_the_table_of_imports_allows_nothing_that_is_not_needed() -> None:
    used: dict[str, set[str]] = defaultdict(set)
    for module in modules():
        used[room_of(module)] |= {room_of(target) for target in imported(module)} - {room_of(module)}
    assert {row[0]: set(row[2].split()) for row in TABLES["imports"]} == {row[0]: used[row[0]] for row in TABLES["imports"]}


def test_no_import_goes_in_a_circle() -> None:
    """Neither between modules nor between rooms: what has no import left to follow is taken away until nothing remains."""
    rooms = {row[0]: set(row[2].split()) for row in TABLES["imports"]}
    for graph in ({module: imported(module) for module in modules()}, rooms):
        left = dict(graph)
        while leaves := {name for name, targets in left.items() if not targets & set(left)}:
            left = {name: targets for name, targets in left.items() if name not in leaves}
        assert not left, f"these import each other in a circle: {sorted(left)}"


def test_the_core_imports_nothing_from_the_periphery() -> None:
    kinds = {row[0]: row[3] for row in TABLES["room"]}
    for room, _, targets in TABLES["imports"]:
        for target in targets.split():
            assert not (kinds[room].startswith("core") and kinds[target] == "periphery"), f"{room} imports {target}"
            assert not (kinds[room] == "core" and kinds[target] == "core, GPU"), f"{room} imports {target}"


# ---------------- the map
CORE_LINES = {"core": 6076, "core, GPU": 3967}  # raising one needs an ADR that says what the lines buy


def test_every_room_is_on_the_map_with_its_lines() -> None:
    assert {row[0] for row in TABLES["room"]} == {row[0] for row in TABLES["imports"]}
    for path in (lines.MAP, lines.PATH):
        assert lines.with_todays_numbers(path) == path.read_text(), "run scripts/check/lines.py --write"


def test_the_core_does_not_grow_unnoticed() -> None:
    found = lines.lines_by_kind()
    for kind, pinned in CORE_LINES.items():
        assert found[kind] <= pinned, f"{kind}: {found[kind]} lines of code, {pinned} are pinned"


@pytest.mark.parametrize(("term", "home"), [(row[0], row[1]) for row in TABLES["term"]])
def test_a_term_of_the_field_is_found_where_it_happens(term: str, home: str) -> None:
    texts = {str(path.relative_to(PACKAGE)): path.read_text().lower() for path in PACKAGE.rglob("*.py")}
    first = (ast.get_docstring(ast.parse((PACKAGE / home).read_text())) or "").split("\n\n")[0]
    assert term.lower() in " ".join(first.lower().split())
    counts = {name: text.count(term.lower()) for name, text in texts.items()}
    assert max(counts, key=lambda name: (counts[name], name == home)) == home, counts


def test_the_documents_name_files_that_exist() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for name in re.findall(r"(?:minisgl|scripts|tests|docs)/[\w/.-]+\.(?:py|md|sh|c)\b", path.read_text()):
            if path.name != "CHANGELOG.md":
                assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_what_the_documents_say_is_shown_by_tests_that_exist() -> None:
    tests = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    for document in ("security.md", "reliability.md"):
        rows = [row for row in lines.tables((ROOT / "docs" / document).read_text())["promise"] if row]
        assert len(rows) > 20
        for promise, shown in rows:
            assert set(shown.split(", ")) <= tests, f"{document}: {promise}"


def test_prose_in_the_documents_is_at_most_131_characters_wide() -> None:
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]:
        code = False
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code ^= line.lstrip().startswith("```")
            assert code or line.startswith("|") or len(line) < 132, f"{path.name}:{number}"


def test_torch_is_imported_on_the_workers_side_only() -> None:
    users = {m for m, tree in modules().items() if any(n == "torch" or n.startswith("torch.") for n in imports_of(tree))}
    assert users == {row[0] for row in TABLES["torch"]}


def test_nothing_unpickles_or_evaluates() -> None:
    banned = {"pickle", "marshal", "dill", "cloudpickle", "shelve", "yaml"}
    for module, tree in modules().items():
        if module != "api.reader":  # its jobs come from its parent, and its answers go nowhere else
            assert not imports_of(tree) & banned, module
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                assert name not in {"recv_pyobj", "send_pyobj"}, module
                if isinstance(node.func, ast.Name):
                    assert name not in {"eval", "exec"}, module
