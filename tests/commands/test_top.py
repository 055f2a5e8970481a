"""`minisgl top`: figures from readings, frames, a server that refuses, is silent or goes away, and a terminal left clean."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import select
import signal
import subprocess
import threading
from bisect import bisect_left
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import minisgl_command
from rich.console import Console
from test_server import ScriptedEngine

from minisgl.__main__ import main
from minisgl.api.engine import Chunk
from minisgl.api.http.exposition import Exposition
from minisgl.api.http.metrics import Metered
from minisgl.api.http.process_facts import Process
from minisgl.commands.top import _Watched
from minisgl.commands.top_frame import frame
from minisgl.commands.top_readings import Reading, Readings
from minisgl.sampling_params import Finish

INFO = {"model": "tiny", "version": "0.1", "max_context": 8192, "tp": 2}


class Scripted:
    """The metrics of an engine whose numbers a test sets."""

    def __init__(self) -> None:
        self.scripted = ScriptedEngine()
        self.engine = Metered(self.scripted)
        self.metrics = self.engine.metrics
        self.metrics.processes._now = iter(range(0, 10**6, 2)).__next__  # each time is another second
        self.scripted.stats = {"total_pages": 200, "free_pages": 100, "evictable_pages": 50, "running_requests": 3}

    def text(self) -> str:
        return asyncio.run(Exposition(self.engine).render())[0].decode()

    def reading(self, at: float, state: str = "ready", **health: Any) -> Reading:
        return Reading(at, self.text(), {"status": state, **health})


def drawn(readings: Readings, lost: str = "", width: int = 100, info: dict[str, Any] = INFO) -> str:
    console = Console(markup=False, highlight=False, width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(frame(readings, info, lost, width))
    return capture.get()


# ---------------- figures
def test_rates_and_shares_are_those_of_the_last_seconds() -> None:
    engine, readings = Scripted(), Readings()
    engine.metrics.prompt_tokens = engine.metrics.generation_tokens = 10_000
    engine.scripted.stats |= {"prompt_tokens": 1000, "cached_tokens": 0}
    readings.add(engine.reading(0.0))
    assert readings.rate("generation_tokens_total") is None
    assert readings.share("prefix_cache_hits_total", "prefix_cache_queries_total") == 0
    engine.metrics.prompt_tokens += 300
    engine.metrics.generation_tokens += 40
    engine.scripted.stats |= {"prompt_tokens": 1100, "cached_tokens": 75}
    readings.add(engine.reading(2.0))
    assert readings.rate("prompt_tokens_total") == 150
    assert readings.rate("generation_tokens_total") == 20
    assert readings.share("prefix_cache_hits_total", "prefix_cache_queries_total") == 0.75
    for at in (9.0, 11.0, 14.0):
        readings.add(engine.reading(at))
    assert readings.seconds == 5.0  # what is older is forgotten
    assert readings.rate("generation_tokens_total") == 0


def test_a_server_that_has_begun_again_counts_from_zero() -> None:
    engine, readings = Scripted(), Readings()
    engine.metrics.generation_tokens = 1000
    for seconds in (0.1, 0.2):
        engine.metrics.ttft.observe(seconds)
    readings.add(engine.reading(0.0))
    again = Scripted()
    again.metrics.generation_tokens = 50
    again.metrics.ttft.observe(0.3)
    readings.add(again.reading(1.0))
    assert readings.rate("generation_tokens_total") == 50
    assert 0.25 <= (readings.quantile("time_to_first_token_seconds", 0.5) or 0) <= 0.5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.0005, 100), min_size=1, max_size=40), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_lies_in_the_bucket_of_the_observation_that_has_its_rank(values: list[float], q: float) -> None:
    engine, readings = Scripted(), Readings()
    engine.metrics.ttft.observe(77.0, 1000)  # before the window
    readings.add(engine.reading(0.0))
    for value in values:
        engine.metrics.ttft.observe(value)
    readings.add(engine.reading(1.0))
    found = readings.quantile("time_to_first_token_seconds", q)
    rank = next(i for i in range(1, len(values) + 1) if i >= q * len(values))
    bounds = engine.metrics.ttft.bounds
    bucket = bisect_left(bounds, sorted(values)[rank - 1])
    assert found is not None
    assert (bounds[bucket - 1] if bucket else 0.0) <= found <= bounds[min(bucket, len(bounds) - 1)]


def test_what_lies_above_all_bounds_is_shown_as_the_last_of_them_and_without_observations_there_is_none() -> None:
    engine, readings = Scripted(), Readings()
    readings.add(engine.reading(0.0))
    assert readings.quantile("time_to_first_token_seconds", 0.5) is None
    engine.metrics.ttft.observe(1e6)
    readings.add(engine.reading(1.0))
    assert readings.quantile("time_to_first_token_seconds", 0.5) == 2560


def test_what_has_happened_is_told_once() -> None:
    engine, readings = Scripted(), Readings()
    engine.metrics.processes.processes = lambda: {"worker0": Process(os.getpid(), 0.1)}
    readings.add(engine.reading(0.0))
    engine.scripted.restarts = {"worker0": 1}
    engine.metrics.finished["error"] += 2
    engine.metrics.closed["slow_reader"] += 1
    readings.add(engine.reading(1.0, "recovering", down=["worker0"], still=[]))
    readings.add(engine.reading(2.0, "recovering", down=["worker0"], still=[]))
    assert [what for _, what in readings.events] == [
        "the engine was ready, and is recovering",
        "worker0 is being started",
        "worker0 was started again",
        "connections ended early (slow_reader)",
        "2 x requests failed",
    ]
    assert {at for at, _ in readings.events} == {1.0}


# ---------------- frames
def test_a_frame_shows_requests_tokens_latencies_the_cache_and_the_processes() -> None:
    engine, readings = Scripted(), Readings()
    engine.metrics.processes.processes = lambda: {"api": Process(os.getpid()), "worker0": Process(os.getpid(), 61.0)}
    readings.add(engine.reading(0.0))
    engine.metrics.begin(Chunk("a", (1,), Finish.NONE, 1500, 300, queued=0.1, waited=0.2), 0.3)
    engine.metrics.itl.observe(0.02, 9)
    engine.metrics.generation_tokens = 50
    engine.scripted.stats |= {"waiting_requests": 4, "following_requests": 1, "prompt_tokens": 1500, "cached_tokens": 300}
    engine.scripted.restarts = {"worker0": 2}
    readings.add(engine.reading(1.0))
    text = drawn(readings)
    assert re.search(r"tiny +ready +context 8192 +tp 2 +minisgl 0.1", text)
    assert re.search(r"3 running +4 waiting \(3 capacity, 1 deferred\)", text)
    assert re.search(r"1,500/s in +50/s out", text)
    assert re.search(r"TTFT +p50 325.0 ms", text)
    assert re.search(r"ITL +p50 17.5 ms +p99 24.9 ms", text)
    assert "25 % used, 25 % cached, 50 % free of 200 pages; prefix hit rate 20 %" in text
    assert re.search(r"worker0 +\d+ % +[\d,]+ MB +\d+ +\d+ +61.0 s +2", text)
    assert re.search(r"api +\d+ %", text)
    bar = next(line for line in text.splitlines() if "█" in line)
    assert (bar.count("█"), bar.count("▒"), bar.count("·")) == (24, 24, 48)


@pytest.mark.parametrize("width", [20, 40, 64, 200])
def test_a_frame_fits_into_its_terminal(width: int) -> None:
    readings = Readings()
    readings.add(Scripted().reading(0.0))
    assert max(map(len, drawn(readings, width=width).splitlines())) <= width


def test_what_a_server_tells_cannot_change_the_terminal() -> None:
    engine, readings = Scripted(), Readings()
    engine.metrics.processes.processes = lambda: {"\x1b[2Jx": Process(os.getpid(), 1.0)}
    readings.add(engine.reading(0.0, "\x1b]0;title\x07[bold]ready"))
    text = drawn(readings, "lost\x1b[31m", info=INFO | {"model": "a\x1b[2J[red]b", "version": ["\x9b1m"]})
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert "[red]b" in text


# ---------------- a server
class Served:
    """An HTTP server that tells what a test wants; `broken`: path -> (status, body)."""

    def __init__(self) -> None:
        outer, self.engine, self.key = self, Scripted(), ""
        self.broken: dict[str, tuple[int, bytes]] = {}
        self.health: dict[str, Any] = {"status": "ready", "down": [], "still": []}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = outer.answer(self.path, self.headers.get("Authorization", ""))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, path: str, key: str) -> tuple[int, bytes]:
        if path in self.broken:
            return self.broken[path]
        if path == "/server_info":
            return (200, json.dumps(INFO).encode()) if key == (self.key and f"Bearer {self.key}") else (401, b"{}")
        if path == "/health":
            return 200 if self.health["status"] != "dead" else 503, json.dumps(self.health).encode()
        return 200, self.engine.text().encode()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.delenv("MINISGL_API_KEY", raising=False)
    server = Served()
    yield server
    server.close()


@pytest.mark.parametrize("way", ["word", "url", "v1", "port"])
def test_one_frame_is_printed_of_the_server_that_is_named(way: str, served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    ways = {"word": [served.url[7:]], "url": ["--url", served.url], "v1": [f"{served.url}/v1"]}
    ways["port"] = ["--port", str(served.http.server_port)]
    assert main(["top", *ways[way], "--once", "--seconds", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "3 running" in out
    assert "25 % used" in out


def test_a_server_that_wants_a_key_gets_it_and_says_so_where_there_is_none(
    served: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served.key = "k" * 20
    command = ["top", served.url, "--once", "--seconds", "0.1"]
    assert main(command) == 1
    assert "wants an API key: set MINISGL_API_KEY" in capsys.readouterr().err
    assert main([*command, "--api-key", "x" * 20]) == 1
    assert "does not accept this API key" in capsys.readouterr().err
    (tmp_path / "key").write_text(f"{served.key}\n")
    assert main([*command, "--api-key-file", str(tmp_path / "key")]) == 0
    monkeypatch.setenv("MINISGL_API_KEY", served.key)
    assert main(command) == 0
    assert "tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "answer", "told"),
    [
        ("/metrics", (404, b"nothing"), "404"),
        ("/metrics", (200, b"vllm:num_requests_running 3\n"), "no minisgl server"),
        ("/metrics", (200, b"minisgl_num_requests_running {{{\n"), "no minisgl server"),
        ("/metrics", (200, b"\xff\xfe"), "no minisgl server"),
        ("/server_info", (200, b"<html>"), "no minisgl server"),
        ("/server_info", (200, b"[1]"), "no minisgl server"),
        ("/health", (500, b""), "500"),
    ],
)
def test_what_is_no_server_to_watch_is_one_sentence(
    path: str, answer: tuple[int, bytes], told: str, served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    served.broken[path] = answer
    assert main(["top", served.url, "--once", "--seconds", "0.1"]) == 1
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1


def test_mistakes_are_told_before_anything_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "http://127.0.0.1:1", "--once"]) == 1
    assert "no server answers at http://127.0.0.1:1" in capsys.readouterr().err
    assert main(["top"]) == 2
    assert "--once" in capsys.readouterr().err
    for wrong, told in ((["--seconds", "0"], "0.1"), (["--seconds", "nan"], "seconds"), (["a:1", "--port", "5"], "twice")):
        with pytest.raises(SystemExit) as e:
            main(["top", "--once", *wrong])
        assert e.value.code == 2
        assert told in capsys.readouterr().err


def test_a_server_that_goes_away_is_waited_for_and_read_anew_when_there_is_one_again(served: Served) -> None:
    from minisgl.commands.chat_http import Server as Client

    watched = _Watched(Client(served.url))
    served.broken = {"/metrics": (500, b"")}
    watched.try_to_read()
    assert "500" in watched.lost
    assert watched._info == INFO  # is shown meanwhile
    served.broken = {"/server_info": (200, b'{"model": "another"}')}
    watched.try_to_read()
    assert (watched.lost, watched._info) == ("", {"model": "another"})
    served.health["status"] = "dead"
    watched.try_to_read()
    assert (watched.lost, watched.readings.last.state) == ("", "dead")


def test_the_terminal_is_as_it_was_after_an_interrupt(served: Served) -> None:
    ours, theirs = pty.openpty()
    command = minisgl_command("top", served.url, "--seconds", "0.1")
    env = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True) as process:
        os.close(theirs)
        seen, interrupted = b"", False
        while select.select([ours], [], [], 60)[0]:
            try:
                seen += os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                break
            if seen.count(b"running") >= 3 and not interrupted:
                interrupted = True
                process.send_signal(signal.SIGINT)
        os.close(ours)
    assert process.returncode == 0
    assert seen.count(b"\x1b[?1049h") == seen.count(b"\x1b[?1049l") == 1  # the other screen
    assert seen.rfind(b"\x1b[?25h") > seen.rfind(b"\x1b[?25l")  # the cursor
    assert b"Traceback" not in seen
