"""Journals of real servers: mixed requests, processes that are killed, and the routes for administrators."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import REPOSITORY, eventually, minisgl_command

from minisgl.__main__ import main
from minisgl.journal.files import parts_of

SMALL = ("--kv-tokens", "1024", "--max-context", "512", "--max-running", "8", "--step-tokens", "64")


class Server:
    """A server and its address."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url, self.code = process, url, 0

    def ask(self, path: str, body: Any, method: str = "POST") -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return int(answer.status), json.load(answer)
        except urllib.error.HTTPError as e:
            return e.code, json.load(e)

    def leave(self, body: Any) -> None:
        """Ask for a stream and leave after its first event."""
        host, port = self.url.removeprefix("http://").split(":")
        raw = json.dumps(body | {"stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(raw)}\r\n"
        head += "Content-Type: application/json\r\n\r\n"
        with socket.create_connection((host, int(port)), 60) as sock:
            sock.sendall(head.encode() + raw)
            sock.recv(1000)

    def scheduler(self) -> int:
        """The pid of the scheduler; 0 while there is none."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for pid in (task / "children").read_text().split():
                try:
                    if "minisgl::scheduler" in Path(f"/proc/{pid}/cmdline").read_text():
                        return int(pid)
                except OSError:
                    pass
        return 0

    def mixed(self, n: int = 12) -> None:
        """Requests of many kinds at the same time."""
        trunk = "one two three four five six seven eight nine ten " * 3
        bodies = [
            ("/v1/completions", {"prompt": f"{trunk}{i}", "n": 1 + i % 3, "max_tokens": 5 + i * 3, "priority": -(i % 2)})
            for i in range(n)
        ]
        bodies += [
            ("/v1/completions", {"prompt": trunk, "max_tokens": 8, "guided_choice": ["yes", "no"], "logprobs": 2}),
            ("/v1/completions", {"prompt": trunk, "max_tokens": 8, "cache_salt": "pepper", "stop_token_ids": [5, 6, 7]}),
            ("/v1/embeddings", {"input": ["red", "green " * 20, trunk]}),
            (
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": trunk}], "max_tokens": 9, "logit_bias": {"5": 3}},
            ),
        ]
        with ThreadPoolExecutor(8) as pool:
            left = [pool.submit(self.leave, {"prompt": f"{trunk} gone {i}", "max_tokens": 300}) for i in range(2)]
            answers = list(pool.map(lambda request: self.ask(*request), bodies))
            for future in left:
                future.result()
        assert [status for status, _ in answers] == [200] * len(bodies), answers


@contextmanager
def server(tmp: Path, *flags: str) -> Iterator[Server]:
    env = os.environ | {"XDG_RUNTIME_DIR": str(tmp), "PYTHONPATH": str(REPOSITORY)}
    command = minisgl_command("--port", "0", "--device", "cpu", *SMALL, *flags)
    with (tmp / "lines").open("w+") as lines, subprocess.Popen(command, stderr=lines, text=True, env=env) as process:
        try:

            def address() -> str:
                assert process.poll() is None, (tmp / "lines").read_text()
                return (re.findall(r"^ready.*?(http://\S+)/v1", (tmp / "lines").read_text(), re.MULTILINE) or [""])[0]

            running = Server(process, eventually(address))
            yield running
            process.terminate()
            assert process.wait(60) in (0, running.code)
        finally:
            process.kill()


def replays(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["journal", "replay", str(path)]) == 0
    out = capsys.readouterr().out
    assert "all plans equal" in out
    return out


@pytest.mark.parametrize("tokens", [False, True])
def test_a_journal_of_mixed_requests_replays_also_after_its_scheduler_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokens: bool
) -> None:
    path = tmp_path / "j"
    with server(tmp_path, "--model", "fake", "--journal", str(path), *["--journal-tokens"] * tokens) as running:
        running.mixed()
        first = running.scheduler()
        os.kill(first, signal.SIGKILL)
        eventually(lambda: running.scheduler() not in (0, first))
        running.mixed()
    assert len(parts_of(str(path))) == 2
    out = replays(path, capsys)
    assert int(out.split()[2]) >= 2 * 25
    whole = b"".join(Path(name).read_bytes() for name in parts_of(str(path)))
    assert (b"pepper" in whole) is (b"choice" in whole or b"yes" in whole) is tokens
    assert main(["journal", "info", str(path)]) == 0
    assert "2 of run" not in capsys.readouterr().out


def test_a_journal_is_whole_but_for_its_end_when_the_server_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "j"
    with server(tmp_path, "--model", "fake", "--journal", str(path)) as running:
        running.mixed()
        size = eventually(path.stat).st_size
        running.leave({"prompt": "on and on", "max_tokens": 400})
        eventually(lambda: path.stat().st_size > size)
        running.process.kill()
        running.code = -signal.SIGKILL
    assert int(replays(path, capsys).split()[0]) > 10


def test_the_embedded_model_has_a_journal_that_replays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with server(tmp_path, "--journal", str(tmp_path / "j"), "--lag", "1") as running:
        running.mixed(4)
    replays(tmp_path / "j", capsys)
    assert main(["journal", "replay", str(tmp_path / "j"), "--lag", "2"]) == 0
    assert "what if" in capsys.readouterr().out


def test_administrators_begin_and_end_journals_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    with server(tmp_path, "--model", "fake", "--data-dir", str(data)) as running:
        for name in ("../x", "a/b", "", "..", ".", "a b", "x.part1", "n" * 101, "ä"):
            status, answer = running.ask("/debug/journal/start", {"name": name})
            assert (status, answer["error"]["param"]) == (400, "name"), name
        for body in ({"name": 5}, {}, {"name": None}):
            assert running.ask("/debug/journal/start", body)[1]["error"]["param"] == "name"
        assert running.ask("/debug/journal/start", {"name": "a", "mb": 0})[1]["error"]["param"] == "mb"
        assert running.ask("/debug/journal/stop", {})[0] == 409
        assert running.ask("/debug/journal/start", {"name": "a.1"}) == (200, {"journal": "a.1", "tokens": False, "mb": 256.0})
        assert running.ask("/debug/journal/start", {"name": "b"})[0] == 409
        assert running.ask("/debug/journal", None, "GET")[1]["journal"] == "a.1"
        running.mixed(3)
        assert running.ask("/debug/journal/stop", {}) == (200, {"journal": "a.1", "error": None})
        replays(data / "journals" / "a.1", capsys)
        before = (data / "journals" / "a.1").read_bytes()
        running.mixed(3)
        assert (data / "journals" / "a.1").read_bytes() == before
        assert running.ask("/debug/journal/start", {"name": "a.1", "tokens": True})[0] == 200
        running.mixed(3)
        assert running.ask("/debug/journal/stop", {})[0] == 200
        assert len(parts_of(str(data / "journals" / "a.1"))) == 2
        replays(data / "journals" / "a.1", capsys)
        (data / "journals" / "a.2").mkdir()
        assert oct((data / "journals" / "a.1").stat().st_mode & 0o777) == "0o600"


def test_a_journal_that_has_no_place_is_refused_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "nowhere" / "j", tmp_path):
        assert main(["serve", "--model", "fake", "--port", "0", "--journal", str(path)]) == 2
        assert f"--journal {path}: a file in a folder" in capsys.readouterr().err


def test_who_is_no_administrator_begins_no_journal(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret-of-administrators\n")
    with server(tmp_path, "--model", "fake", "--admin-api-key-file", str(tmp_path / "key")) as running:
        for path in ("start", "stop"):
            assert running.ask(f"/debug/journal/{path}", {"name": "a"})[0] in (401, 403)
        assert running.ask("/debug/journal", None, "GET")[0] in (401, 403)
