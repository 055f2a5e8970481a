"""docs/tour.md is true: its functions are on the path of a request, and its exercises do what they say."""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import aiohttp
import pytest
from processes import REPOSITORY
from test_server import Server

from minisgl.api.gateway import Gateway
from minisgl.api.in_process import InProcessSystem
from minisgl.config import Config, EngineConfig
from minisgl.model.checkpoint.resolve import resolve

TOUR = (REPOSITORY / "docs/tour.md").read_text()
LINK = re.compile(r"\[`([\w.]+)`\]\(\.\./(minisgl/[\w/]+)\.py\)")
TRACED_ELSEWHERE = {"RadixCache.next_victim", "RadixCache.evict"}  # pages run out in the second exercise


def function(module: str, name: str) -> CodeType:
    found: Any = importlib.import_module(module.replace("/", "."))
    for part in name.split("."):
        found = getattr(found, part)
    return found.__code__


class Driven:
    """A gateway whose actors run in the turns of the event loop."""

    def __init__(self, system: InProcessSystem) -> None:
        self._system = system

    def __getattr__(self, name: str) -> Any:
        return getattr(self._system.gateway, name)

    def open(self, *args: Any, **kwargs: Any) -> int:
        uid = self._system.gateway.open(*args, **kwargs)
        asyncio.get_running_loop().call_soon(self._go_on)
        return uid

    def _go_on(self) -> None:
        if self._system.pump(0):
            asyncio.get_running_loop().call_soon(self._go_on)


@functools.cache
def path_of_a_request() -> tuple[frozenset[CodeType], str]:
    """(every function that ran, the text that came) for one streamed chat request over HTTP."""
    system = InProcessSystem(Config(resolve(None), EngineConfig(kv_tokens=2048)))
    system.wait_ready()
    seen: set[CodeType] = set()

    def trace(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            seen.add(frame.f_code)

    async def ask() -> str:
        http = Server(Driven(system))  # type: ignore[arg-type]
        await http.start()
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        body = {"messages": messages, "stream": True, "temperature": 0, "max_tokens": 12}
        try:
            url = http.make_url("/v1/chat/completions")
            async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
                lines = (await answer.text()).splitlines()
        finally:
            await http.close()
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])

    sys.setprofile(trace)
    try:
        text = asyncio.run(ask())
    finally:
        sys.setprofile(None)
        system.close()
    return frozenset(seen), text


def test_the_tour_has_twelve_stops() -> None:
    stops = re.findall(r"^(\d+)\. \[`", TOUR, flags=re.MULTILINE)
    assert stops == [str(i) for i in range(1, 13)]


@pytest.mark.parametrize(("name", "module"), sorted(set(LINK.findall(TOUR))))
def test_a_function_of_the_tour_is_on_the_path_of_a_request(name: str, module: str) -> None:
    seen, text = path_of_a_request()
    assert "Paris" in text
    code = function(module, name)
    assert code in seen or name in TRACED_ELSEWHERE


def test_a_function_that_is_not_on_the_path_would_be_found_out() -> None:
    seen, _ = path_of_a_request()
    assert Gateway.flush_cache.__code__ not in seen


# ---------------- the exercises, as they stand in the text
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the files of the exercises are: every Python block that begins with its name."""
    for name, text in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TOUR, flags=re.DOTALL):
        (tmp_path / name).write_text(text)
    return tmp_path


def run(folder: Path, command: list[str], text: str = "") -> str:
    env = os.environ | {"PYTHONPATH": f"{folder}:{REPOSITORY}", "XDG_RUNTIME_DIR": str(folder), "COLUMNS": "300"}
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=env, cwd=folder, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands(program: str) -> list[list[str]]:
    lines = re.findall(r"^\$ \.venv/bin/python (.*)$", TOUR, flags=re.MULTILINE)
    return [[sys.executable, *shlex.split(line)] for line in lines if program in line]


def test_a_breakpoint_steps_through_a_chunked_prefill(folder: Path) -> None:
    session = re.search(r"chunks\.py\n(\(Pdb\).*?)```", TOUR, flags=re.DOTALL)
    assert session is not None
    typed = [line.removeprefix("(Pdb) ") for line in session[1].splitlines() if line.startswith("(Pdb) ")]
    shown = [line for line in session[1].splitlines() if not line.startswith("(Pdb) ")]
    out = run(folder, commands("chunks.py")[0], "\n".join(typed) + "\n")
    at = -1
    for line in shown:
        at = out.index(line, at + 1)
    assert len(json.loads(out.splitlines()[-1].removeprefix("(Pdb) "))) == 3


def test_with_one_plan_in_flight_nothing_is_in_flight_when_a_chunk_is_cut(folder: Path) -> None:
    script = folder / "chunks.py"
    script.write_text(script.read_text().replace("max_running=8", "max_running=8, lag=1"))
    typed = "from minisgl.actors.scheduler.step_machine import StepMachine\nbreak StepMachine._cut_chunk\ncontinue\ncontinue\n"
    assert "(Pdb) 0" in run(folder, commands("chunks.py")[0], f"{typed}p len(self.inflight)\nclear 1\ncontinue\n")


def rows(table: str) -> dict[str, dict[str, str]]:
    """Policy -> column -> cell of the command's table."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[1:]}


def test_an_eviction_policy_of_one_method_runs_next_to_lru(folder: Path) -> None:
    found = rows(run(folder, commands("--cache lfu:LFU")[0]))
    lfu, lru = (float(found[name]["hit rate"].rstrip("%")) for name in ("as given", "cache=radix"))
    assert lfu > lru > 0


def test_without_overlap_scheduling_the_device_idles(folder: Path) -> None:
    (command,) = commands("--compare lag=1,lag=2")
    busy = {}
    for flags in ([], ["--latency-us", "1000"]):
        found = rows(run(folder, [*command, *flags]))
        busy[len(flags)] = {name: float(found[name]["GPU busy"].rstrip("%")) for name in ("lag=1", "lag=2")}
    assert busy[0]["lag=2"] == busy[2]["lag=2"] == 100.0
    assert busy[2]["lag=1"] < busy[0]["lag=1"] < 100.0
