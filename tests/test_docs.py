"""docs/structures.md is true: messages, edges, arenas and imports are read from its tables and compared with the code."""

from __future__ import annotations

import ast
import dataclasses as dc
import functools
import re
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path

import pytest
from conftest import World, fake_config, random_traffic

from minisgl.actors.detokenizer import DetokenizerActor
from minisgl.actors.runtime import shared_memory
from minisgl.actors.runtime.local import LocalSystem
from minisgl.actors.runtime.ring import RingWriter
from minisgl.actors.scheduler.actor import SchedulerActor
from minisgl.actors.tokenizer import TokenizerActor
from minisgl.actors.wire import registry
from minisgl.actors.worker import WorkerActor
from minisgl.api.engine import ChatPrompt, TextPrompt, TokenPrompt
from minisgl.api.gateway import Gateway
from minisgl.config import Config, EngineConfig, ServerConfig
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.fake_runner import FakeRunner
from minisgl.sampling_params import RequestOptions, SamplingParams

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minisgl"


def tables() -> dict[str, list[list[str]]]:
    """First header cell -> rows."""
    rows: dict[str, list[list[str]]] = defaultdict(list)
    head = None
    for line in (ROOT / "docs/structures.md").read_text().splitlines():
        if not line.startswith("|"):
            head = None
            continue
        cells = [c.strip() for c in line.strip("|").split("|")]
        if head is None:
            head = cells[0]
        elif set(cells[0]) != {"-"}:
            rows[head].append(cells)
    return rows


TABLES = tables()


def fields_of(name: str) -> str:
    return " ".join(f.name for f in dc.fields(registry()[name]))


def observed_edges() -> set[tuple[str, str, str]]:
    """Every edge seen while all real actors work in one deterministic system, text, chat and trouble included."""
    engine = EngineConfig(tp=2, kv_tokens=512, max_context=256, max_running=8, step_tokens=64)
    config = Config(resolve(None), engine, ServerConfig(reasoning_parser="deepseek_r1"))
    shared, fds = shared_memory.create_arenas(config)
    system = LocalSystem(3)
    gateway = system.spawn("api", lambda ctx: Gateway(ctx, config, shared))
    system.spawn("tokenizer", lambda ctx: TokenizerActor(ctx, config, RingWriter(shared.prompts[0])))
    system.spawn("detokenizer", lambda ctx: DetokenizerActor(ctx, config))
    system.spawn("scheduler", lambda ctx: SchedulerActor(ctx, config, shared))
    for rank in range(2):
        system.spawn(f"worker{rank}", lambda ctx, r=rank: WorkerActor(ctx, r, shared, lambda: FakeRunner(config, 32)))
    gateway._silent.clear()
    system.run()
    seen: list[object] = []
    greedy = SamplingParams(max_tokens=60)
    gateway.open(TextPrompt("Once upon a time"), greedy, seen.append)
    gateway.open(ChatPrompt(b'{"messages": [{"role": "user", "content": "Hi"}], "kwargs": {}}'), greedy, seen.append)
    gateway.open(ChatPrompt(b'{"messages": 5, "kwargs": {}}'), greedy, seen.append)
    gateway.open(TextPrompt("x"), SamplingParams(max_tokens=60, stop=tuple("aeiou nrst")), seen.append)
    gateway.open(TokenPrompt((1, 2, 3)), SamplingParams(max_tokens=6, logprobs=2, echo=True), seen.append)
    gateway.open(TokenPrompt((1, 2, 3)), SamplingParams(max_tokens=1), seen.append, RequestOptions(pooling="mean"))
    gateway.detokenize((1, 2, 3), False, seen.append)
    victim = gateway.open(TokenPrompt((1, 2, 3)), greedy, seen.append)
    gateway.close(victim)
    system.run()
    gateway.flush_cache()
    system.run()
    assert gateway.stats["admitted"] >= 3
    assert gateway.stats["cached_pages"] == 0
    assert gateway.stats["free_pages"] == gateway.stats["total_pages"]
    assert gateway.stats["evicted_pages"] > 0
    shared_memory.close_arenas(fds)
    small = World(0, fake_config(tp=1, kv_tokens=16))
    small.submit(list(range(1, 20)), 2)
    random_traffic(small, 0)
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
    out = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            out[name] = ast.parse(path.read_text())
    return out


@functools.cache
def room_of(module: str) -> str:
    patterns = {pattern: room for room, members, _ in TABLES["room"] for pattern in members.split()}
    matching = [pattern for pattern in patterns if fnmatch(module, pattern)]
    assert matching, f"{module} is in no room"
    return patterns[max(matching, key=len)]  # a folder's own row before that of the folder around it


def imports_of(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
    return names


@pytest.mark.parametrize("module", modules())
def test_no_room_imports_upwards(module: str) -> None:
    allowed = {row[0]: set(row[2].split()) for row in TABLES["room"]}
    mine = room_of(module)
    known = modules()
    for name in imports_of(known[module]):
        target = name.removeprefix("minisgl.")
        if name.startswith("minisgl.") and target in known:
            assert room_of(target) in {mine} | allowed[mine], f"{module} imports {target}"


def test_torch_is_imported_on_the_workers_side_only() -> None:
    users = {m for m, tree in modules().items() if any(n == "torch" or n.startswith("torch.") for n in imports_of(tree))}
    assert users == {row[0] for row in TABLES["torch"]}


def test_nothing_unpickles_or_evaluates() -> None:
    banned = {"pickle", "marshal", "dill", "cloudpickle", "shelve", "yaml"}
    for module, tree in modules().items():
        assert not imports_of(tree) & banned, module
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                assert name not in {"recv_pyobj", "send_pyobj"}, module
                if isinstance(node.func, ast.Name):
                    assert name not in {"eval", "exec"}, module
