"""Traces of real servers: the fake engine, the embedded model, processes that are killed, and the route for administrators."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from journal.test_journal_server import Server, server
from processes import eventually

from minisgl.__main__ import main
from minisgl.commands.trace import about
from minisgl.tracing.summary import Track, parse
from scripts.check.trace import faults

ACTORS = {"api", "tokenizer", "detokenizer", "scheduler", "worker0"}
HOPS = {"Tokenize", "Tokenized", "Generate", "Track", "Tokens", "Text", "take plan", "take result"}


def fetch(running: Server, query: str, key: str = "") -> bytes:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(running.url + "/debug/trace" + query, None, headers, method="POST")
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["Content-Type"] == "application/octet-stream"
        return bytes(answer.read())


def runs(running: Server) -> bool:
    return bool(running.ask("/debug/trace", None, "GET")[1]["running"])


def sound(raw: bytes) -> dict[int, Track]:
    tracks = parse(raw)
    assert not list(faults(tracks))
    return tracks


@pytest.mark.parametrize(("model", "flags"), [("fake", ()), ("", ("--lag", "1"))])
def test_a_trace_of_a_server_has_all_hops_phases_steps_and_requests(tmp_path: Path, model: str, flags: tuple[str, ...]) -> None:
    named = ("--model", model) if model else ()
    with server(tmp_path, *named, *flags) as running, ThreadPoolExecutor(8) as pool:
        trace = pool.submit(fetch, running, "?steps=30&seconds=30")
        eventually(lambda: runs(running))
        assert running.ask("/debug/trace", None)[0] == 409
        bodies = [{"prompt": "one two three " * (i + 2), "max_tokens": 40, "ignore_eos": True} for i in range(3)]
        answers = [pool.submit(running.ask, "/v1/completions", body) for body in bodies]
        assert all(answer.result()[0] == 200 for answer in answers)
        tracks = sound(trace.result())
        facts = about(trace.result())
        assert {*facts["processes"]} >= ACTORS
        assert 30 <= facts["steps"] < 40
        assert 0 < facts["device_busy"] <= 1
        assert facts["requests"] == 3
        seen = [e for track in tracks.values() for e in track.events]
        assert {e.name for e in seen} >= HOPS | {"admission and plan", "publish", "idle", "launch", "post result", "queued"}
        unresolved = [e.name for e in seen if e.name in HOPS and not e.ends]
        assert not unresolved
        counters = {track.name for track in tracks.values() if any(e.value is not None for e in track.events)}
        assert counters == {"running", "waiting", "free pages"}
        told = [e.args["cached_tokens"] for e in seen if e.name == "prefill"]
        assert len(told) == 3
        again = sound(fetch(running, "?seconds=0.01"))  # nothing is left of the one before
        assert not [t for t in again.values() if t.name.startswith("request ")]


def test_a_trace_of_the_embedded_model_has_operators_where_asked(tmp_path: Path) -> None:
    with server(tmp_path, "--quantization", "none") as running, ThreadPoolExecutor(2) as pool:
        trace = pool.submit(fetch, running, "?steps=4&seconds=30&kernels=1")
        eventually(lambda: runs(running))
        assert running.ask("/v1/completions", {"prompt": "Hello", "max_tokens": 8, "ignore_eos": True})[0] == 200
        tracks = sound(trace.result())
    operators = [e for t in tracks.values() if t.process == "worker0" and t.name.startswith("operators") for e in t.events]
    steps = [e for t in tracks.values() if (t.process, t.name) == ("worker0", "device") for e in t.events if e.name == "step"]
    assert len(operators) > 100
    inside = [e for e in operators if any(s.begin <= e.begin <= s.end for s in steps)]
    assert len(inside) > 0.9 * len(operators)


def refusal(running: Server, query: str) -> tuple[int, Any]:
    status, answer = running.ask("/debug/trace" + query, None)
    return status, answer["error"]["param"]


def test_what_cannot_be_traced_is_refused_with_the_name_of_the_parameter(tmp_path: Path) -> None:
    with server(tmp_path, "--model", "fake") as running:
        for query, param in (
            ("?steps=0", "steps"),
            ("?steps=-1", "steps"),
            ("?steps=1.5", "steps"),
            ("?steps=x", "steps"),
            ("?steps=", "steps"),
            ("?steps=true", "steps"),
            ("?seconds=0", "seconds"),
            ("?seconds=601", "seconds"),
            ("?seconds=NaN", "seconds"),
            ("?kernels=2", "kernels"),
            ("?kernels=1", "kernels"),
            ("?step=5", "step"),
        ):
            assert refusal(running, query) == (400, param), query
        status, answer = running.ask("/debug/trace", {"steps": 5})
        assert (status, answer["error"]["param"]) == (400, "body")
        assert not runs(running)
        assert sound(fetch(running, "?seconds=0.01")) is not None


def test_who_is_no_administrator_traces_nothing(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret-of-administrators\n")
    (tmp_path / "user").write_text("secret-of-a-user-of-it\n")
    keys = ("--admin-api-key-file", str(tmp_path / "key"), "--api-key-file", str(tmp_path / "user"))
    with server(tmp_path, "--model", "fake", *keys) as running:
        assert running.ask("/debug/trace", None)[0] == 401
        for key, status in (("secret-of-a-user-of-it", 403), ("wrong", 401)):
            with pytest.raises(urllib.error.HTTPError) as refused:
                fetch(running, "?seconds=0.01", key)
            assert refused.value.code == status
        assert sound(fetch(running, "?seconds=0.01", "secret-of-administrators")) is not None


def test_a_client_that_leaves_ends_its_trace(tmp_path: Path) -> None:
    with server(tmp_path, "--model", "fake") as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 60) as sock:
            sock.sendall(f"POST /debug/trace?seconds=300 HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            eventually(lambda: runs(running))
        eventually(lambda: not runs(running))
        assert fetch(running, "?seconds=0.01")


def test_the_trace_of_a_whole_run_is_a_file_and_a_process_that_dies_takes_its_own_events_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.pftrace"
    with server(tmp_path, "--model", "fake", "--trace", str(path)) as running:
        assert running.ask("/debug/trace", None)[0] == 409
        running.mixed(6)
        first = running.scheduler()
        os.kill(first, signal.SIGKILL)
        second = eventually(lambda: (pid := running.scheduler()) != first and pid)
        running.mixed(6)
        assert not path.exists()
    tracks = sound(path.read_bytes())
    assert not (tmp_path / "t.pftrace.events").exists()
    assert second in {t.pid for t in tracks.values() if t.process == "scheduler"}  # it has joined
    assert main(["trace", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {*facts["processes"]} >= ACTORS | {"checker"}
    assert facts["requests"] >= 6
    assert main(["trace", str(path)]) == 0
    assert "device_busy" in capsys.readouterr().out


def test_the_events_of_a_server_that_was_killed_become_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, events = tmp_path / "t", tmp_path / "t.events"
    with server(tmp_path, "--model", "fake", "--trace", str(path)) as running:
        before = events.stat().st_size
        running.leave({"prompt": "on and on", "max_tokens": 400})
        for _ in range(20):
            running.mixed(4)
            if events.stat().st_size > before + 1000:
                break
        running.process.kill()
        running.code = -signal.SIGKILL
    assert main(["trace", str(events), "--out", str(path)]) == 0
    sound(path.read_bytes())
    assert main(["trace", str(path), "--out", str(path)]) == 2
    assert main(["trace", str(tmp_path / "nowhere")]) == 2
    (tmp_path / "text").write_text("hello")
    assert main(["trace", str(tmp_path / "text")]) == 2
    capsys.readouterr()
