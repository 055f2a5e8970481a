"""The terminal chat against a small HTTP server of our own."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from minisgl.commands import chat
from minisgl.commands.chat import strip_control

ROOT = Path(__file__).parents[2]


class FakeServer(ThreadingHTTPServer):
    """Answers every chat with `pieces`; "WAIT" among them keeps the stream open until the client leaves."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pieces = ["Hel", "lo"]
        self.status = 200
        self.bodies: list[dict[str, Any]] = []
        self.left = threading.Event()  # a client closed its connection in the middle of an answer
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *_: Any) -> None:
        pass

    def _json(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def do_GET(self) -> None:
        self._json(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        server = self.server
        server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if server.status != 200:
            self._json(server.status, {"error": {"message": "too \x1b[2J hot"}})
            return
        self.send_response(200)
        self.end_headers()
        for piece in server.pieces:
            if piece == "WAIT":
                if select.select([self.connection], [], [], 60)[0] and not self.connection.recv(1):
                    server.left.set()
                return
            if piece == "ERROR":
                self._event('{"error": {"message": "the engine failed"}}')
            else:
                self._event(json.dumps({"choices": [{"delta": {"content": piece}}]}))
        usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
        self._event(json.dumps({"choices": [], "usage": usage}))
        self._event("[DONE]")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    fake.shutdown()
    fake.server_close()
    thread.join()


@pytest.fixture
def talk(server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the chat with these input lines, without a terminal; returns (exit code, stdout, stderr)."""

    def run(lines: str, *flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code = chat.run(["--url", server.url, *flags])
        return code, *capsys.readouterr()

    return run


def test_answers_are_printed_and_the_conversation_goes_along(server: FakeServer, talk: Any) -> None:
    code, out, err = talk("Hi\nAgain\n", "--system", "be brief", "--max-tokens", "5", "--temperature", "0", "--seed", "3")
    assert (code, out) == (0, "Hello\nHello\n")
    assert "9 + 2 tokens, 4 cached" in err
    assert "TTFT" in err
    system, hi, hello = {"role": "system", "content": "be brief"}, {"role": "user", "content": "Hi"}, "Hello"
    assert server.bodies[0]["messages"] == [system, hi]
    assert server.bodies[1]["messages"] == [
        system,
        hi,
        {"role": "assistant", "content": hello},
        {"role": "user", "content": "Again"},
    ]
    body = server.bodies[0]
    assert (body["max_tokens"], body["temperature"], body["seed"], body["stream"]) == (5, 0, 3, True)
    assert "model" not in body


def test_commands_and_lines_that_go_on(server: FakeServer, talk: Any) -> None:
    lines = "one\\\ntwo\n/reset\n/system be kind\nthree\n/history\n/help\n/nonsense\n\n/usr/bin is what?\n/exit\nnever sent\n"
    code, _, err = talk(lines)
    assert code == 0
    contents = [[m["content"] for m in b["messages"]] for b in server.bodies]
    assert contents == [["one\ntwo"], ["be kind", "three"], ["be kind", "three", "Hello", "/usr/bin is what?"]]
    assert "user: three" in err
    assert "/nonsense" in err
    assert "^C stops" in err


def test_an_error_is_the_servers_sentence_and_leaves_no_trace_in_the_history(server: FakeServer, talk: Any) -> None:
    server.status = 400
    code, out, err = talk("Hi\n")
    assert (code, out) == (1, "")
    assert "error: too [2J hot" in err  # the text, without its escape character
    server.status, server.pieces = 200, ["par", "ERROR"]
    code, out, err = talk("Hi\nand?\n")
    assert (code, out) == (1, "par\npar\n")
    assert "error: the engine failed" in err
    assert server.bodies[-1]["messages"][1] == {"role": "assistant", "content": "par"}


def test_without_a_server_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("http://127.0.0.1:1", "localhost:no", "http://", "http://[::1"):
        assert chat.run(["--url", url]) == 1, url
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "--url" in err


def test_control_sequences_do_not_reach_the_terminal(server: FakeServer, talk: Any) -> None:
    server.pieces = ["a\x1b]52;c;aGk=\x07b", "\x1b", "[2Jc\x9b31md\r\x08\x7f", "\x90é\n\t€"]
    _, out, _ = talk("Hi\n")
    assert out == "a]52;c;aGk=b[2Jc31mdé\n\t€\n"
    every = "".join(map(chr, range(0x110000 - 0x800)))
    left = {c for c in strip_control(every) if ord(c) < 0xA0}
    assert left == {*map(chr, range(0x20, 0x7F)), "\n", "\t"}


# ---------------- with a terminal
class Screen:
    """`python -m minisgl chat` on a pseudo-terminal."""

    def __init__(self, url: str, home: Path) -> None:
        self.fd, slave = pty.openpty()
        env = {**os.environ, "XDG_STATE_HOME": str(home), "TERM": "dumb"}
        command = [sys.executable, "-m", "minisgl", "chat", "--url", url]
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env=env,
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(slave)
        self.seen = b""

    def expect(self, needle: str, keys: str = "") -> None:
        """Wait for `needle`; press `keys` whenever nothing happens for a moment.

        A ^C between the display of the prompt and readline's select is seen by Python with the next key only.
        """
        end = time.monotonic() + 60
        while needle.encode() not in self.seen:
            if not select.select([self.fd], [], [], 0.2 if keys else max(0.0, end - time.monotonic()))[0]:
                assert time.monotonic() < end, f"{needle!r} did not appear after {self.seen!r}"
                self.type(keys)
                continue
            try:
                self.seen += os.read(self.fd, 4096)
            except OSError:
                raise AssertionError(f"ended without {needle!r}: {self.seen!r}") from None
        self.seen = self.seen.partition(needle.encode())[2]

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def close(self) -> int:
        code = self.process.wait(60)
        os.close(self.fd)
        return code


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that ^C becomes a signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a test run in the background has inherited as ignored


def test_a_terminal_session_with_interrupts(server: FakeServer, tmp_path: Path) -> None:
    screen = Screen(server.url, tmp_path)
    try:
        screen.expect("tiny at ")
        screen.expect("> ")
        screen.expect("^D or /exit leaves", keys="\x03")
        screen.expect("> ")
        server.pieces = ["par", "tial", "WAIT"]
        screen.type("Hi\n")
        screen.expect("partial")
        screen.type("\x03")
        screen.expect("[stopped")
        assert server.left.wait(60), "the connection stayed open: the server would go on generating"
        server.pieces = ["Hel", "lo"]
        screen.expect("> ")
        screen.type("go on\n")
        screen.expect("Hello")
        screen.expect("9 + 2 tokens")
        assert [m["content"] for m in server.bodies[1]["messages"]] == ["Hi", "partial", "go on"]
        screen.expect("> ")
        screen.type("\x04")
        assert screen.close() == 0
    finally:
        screen.process.kill()
        screen.process.wait()
    assert "go on" in (tmp_path / "minisgl" / "chat_history").read_text()


def test_the_script_runs_the_chat_from_anywhere(server: FakeServer, tmp_path: Path) -> None:
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("no .venv in the repository")
    command = [str(ROOT / "scripts/chat.sh"), "--url", server.url]
    done = subprocess.run(command, input="Hi\n", capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (0, "Hello\n")


def test_the_script_says_what_to_do_without_an_environment(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "chat.sh"
    script.write_bytes((ROOT / "scripts/chat.sh").read_bytes())
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "run scripts/launch.sh first" in done.stderr
