"""A server with the fake engine, as its operator sees it: every line of stderr, as text and as JSON."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import REPOSITORY, minisgl_command

from minisgl import BatchClient, SamplingParams

BODY = {"prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True}


class Running:
    """`lines`: all of stderr, once the server has ended."""

    def __init__(self, process: subprocess.Popen[str], lines: list[str], url: str) -> None:
        self.process, self.lines, self.url = process, lines, url
        self.kills = False

    def kill(self, name: str) -> None:
        """Kill one of its processes, which ends it."""
        self.kills = True
        out = subprocess.run(["ps", "-eo", "ppid=,pid=,args="], capture_output=True, text=True, check=True).stdout
        rows = [row.split(None, 2) for row in out.splitlines()]
        (pid,) = [int(pid) for ppid, pid, args in rows if int(ppid) == self.process.pid and args == f"minisgl::{name}"]
        os.kill(pid, signal.SIGKILL)

    def post(self, path: str, body: Any, **headers: str) -> int:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                answer.read()
                return int(answer.status)
        except urllib.error.HTTPError as e:
            return e.code


@contextmanager
def server(tmp: Path, *flags: str) -> Iterator[Running]:
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {
        "PYTHONPATH": str(REPOSITORY),
        "XDG_RUNTIME_DIR": str(tmp),
    }
    command = minisgl_command("--model", "fake", "--port", "0", "--device", "cpu", *flags)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        try:
            lines, url = [], ""
            while not url and (line := process.stderr.readline()):
                lines.append(line)
                url = (re.findall(r"(http://\S+)/v1", line) or [""])[0] if "ready" in line else ""
            running = Running(process, lines, url)
            yield running
            if not running.kills:
                process.send_signal(signal.SIGINT)
            lines += process.stderr.readlines()
            assert process.wait(60) == (70 if running.kills else 0)
        finally:
            process.kill()


def test_lines_for_people(tmp_path: Path) -> None:
    with server(tmp_path, "--max-context", "100000", "--kv-tokens", "10001", "--threads", "500") as running:
        assert running.post("/v1/completions", BODY) == 200
        assert running.post("/v1/completions", BODY | {"max_tokens": "x\nready"}) == 400
        assert running.post("/v1/completions", BODY | {"prompt": [1] * 9000}) == 400
    text = "".join(running.lines)
    assert "\x1b" not in text
    start, *changes, sampling, ready = running.lines[:6]
    assert start.startswith("minisgl ")
    assert changes == [
        "minisgl: --max-context 100000: 8192 is served, the limit of fake\n",
        "minisgl: --kv-tokens 10001: 10016 is served, in whole pages of 16 tokens\n",
        "minisgl: --threads 500: has no effect, the fake engine has no model\n",
    ]
    assert sampling == "sampling: temperature 1\n"
    assert ready.startswith("ready in")
    page, load, refused, stopped = running.lines[6:]
    assert page.startswith("chat and documentation in a browser: http://127.0.0.1:")
    assert re.match(r"\d\d:\d\d:\d\d load: 0 running, 0 waiting, \S+ tok/s in, \S+ tok/s out, .*idle after", load)
    assert refused[9:] == "refused 2: 1 x 400 invalid_type, 1 x 400 context_length_exceeded\n"
    assert stopped == "minisgl has stopped\n"


def test_lines_for_programs(tmp_path: Path) -> None:
    with server(tmp_path, "--log-format", "json", "--log-requests", "--kv-tokens", "10", "--max-restarts", "0") as running:
        assert running.post("/v1/completions", BODY, **{"x-request-id": "mine"}) == 200
        assert running.post("/v1/nothing", BODY) == 404
        with BatchClient(running.url) as client:
            client.generate(["a"], SamplingParams(max_tokens=2, ignore_eos=True))
        running.kill("worker0")
    lines = [json.loads(line) for line in running.lines]
    assert all(set(line) >= {"time", "level", "event", "message"} for line in lines)
    events = [line["event"] for line in lines]
    assert events[0] == "start"
    assert (events[-1], lines[-1]["level"]) == ("failed", "error")
    assert "worker0 was killed by signal 9" in lines[-1]["message"]
    (ready,) = [line for line in lines if line["event"] == "ready"]
    assert ready["url"] == running.url + "/v1"
    assert ready["kv_tokens"] == 16
    asked = {line["flag"]: (line["asked"], line["served"]) for line in lines if line["event"] == "adjusted"}
    assert asked == {"--kv-tokens": (10, 16), "--max-context": (8192, 16)}
    assert events.index("adjusted") < events.index("ready")
    done, refused, info, batch = [line for line in lines if line["event"] == "request"]
    assert info["route"] == "GET /server_info"  # which tells the client where the socket is
    assert (batch["kind"], batch["route"], batch["completion_tokens"]) == ("socket", "POST /v1/completions", 2)
    assert (done["id"], done["route"], done["prompt_tokens"], done["completion_tokens"]) == (
        "mine",
        "POST /v1/completions",
        3,
        5,
    )
    assert (refused["status"], refused["code"], refused["route"]) == (404, "unknown_path", "unknown")
    (load,) = [line for line in lines if line["event"] == "load"]
    assert load["generated_tokens_per_s"] > 0
    assert "refused" not in events


@pytest.mark.parametrize("flags", [["--port", "99999"], ["--lag", "0"], ["--model", "./nowhere/model.gguf"]])
def test_a_start_that_is_refused_is_an_object_too(flags: list[str]) -> None:
    command = [sys.executable, "-m", "minisgl", "--log-format", "json", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=False)
    assert done.returncode == 2
    (line,) = map(json.loads, done.stderr.splitlines())
    assert (line["event"], line["level"]) == ("failed", "error")
    assert flags[0] in line["message"]
