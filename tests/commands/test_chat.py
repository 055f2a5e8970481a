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
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from minisgl.commands import chat
from minisgl.commands.chat import strip_control

ROOT = Path(__file__).parents[2]


class FakeServer(ThreadingHTTPServer):
    """Answers every chat with `pieces`: texts, or deltas with other fields.

    "WAIT" among them keeps the stream open until the client leaves.  `fits`: whether a body fits into the context.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pieces: list[str | dict[str, str]] = ["Hel", "lo"]
        self.finish = "stop"
        self.context: int | None = None
        self.key = ""
        self.fits: Callable[[dict[str, Any]], bool] = lambda body: True
        self.completion = 2
        self.status = 200
        self.loading = 0  # questions that come too early
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

    def _refused(self) -> bool:
        if refused := self.server.key not in ("", self.headers.get("Authorization", "").removeprefix("Bearer ")):
            self._json(401, {"error": {"message": "Missing or invalid API key."}})
        return refused

    def do_GET(self) -> None:
        model = {"id": "tiny"} | ({"max_model_len": self.server.context} if self.server.context else {})
        if not self._refused():
            self._json(200 if self.path == "/v1/models" else 404, {"data": [model]})

    def do_POST(self) -> None:
        try:
            self._answer()
        except ConnectionError:
            self.server.left.set()

    def _answer(self) -> None:
        server = self.server
        server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if self._refused():
            return
        if not server.fits(server.bodies[-1]):
            self._json(400, {"error": {"message": "too long", "code": "context_length_exceeded"}})
            return
        if server.status != 200:
            self._json(server.status, {"error": {"message": "too \x1b[2J hot"}})
            return
        if len(server.bodies) <= server.loading:
            self._json(503, {"error": {"message": "still loading", "code": "model_loading"}})
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
                delta = {"content": piece} if isinstance(piece, str) else piece
                self._event(json.dumps({"choices": [{"delta": delta, "finish_reason": None}]}))
        self._event(json.dumps({"choices": [{"delta": {}, "finish_reason": server.finish}]}))
        usage = {"prompt_tokens": 9, "completion_tokens": server.completion, "prompt_tokens_details": {"cached_tokens": 4}}
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

    def run(lines: str, *flags: str, url: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code = chat.run([*(["--url", url or server.url] if "--port" not in flags else []), *flags])
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


def test_a_question_waits_for_a_model_that_is_still_being_loaded(
    server: FakeServer, talk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minisgl.commands.chat_conversation._LOADING_SECONDS", 0)
    server.loading = 3
    code, said, notes = talk("hi\n")
    assert (code, said.strip()) == (0, "".join(server.pieces))
    assert notes.count("still being loaded") == 1
    assert len(server.bodies) == 4


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


# ---------------- keys and addresses
def test_a_key_comes_from_a_flag_a_file_or_the_environment(
    server: FakeServer, talk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "sk-0123456789abcdef"
    (tmp_path / "keys").write_text(f"\n{server.key}\nsk-another\n")
    assert talk("Hi\n", "--api-key", server.key)[:2] == (0, "Hello\n")
    assert talk("Hi\n", "--api-key-file", str(tmp_path / "keys"))[:2] == (0, "Hello\n")
    monkeypatch.setenv("MINISGL_API_KEY", server.key)
    assert talk("Hi\n")[:2] == (0, "Hello\n")
    code, _, err = talk("Hi\n", "--api-key", "wrong")  # flags come before the environment
    assert (code, err.count("\n")) == (1, 1)
    assert "does not accept this API key" in err


def test_without_a_key_one_sentence_says_how_to_give_it(server: FakeServer, talk: Any) -> None:
    server.key = "sk-0123456789abcdef"
    code, out, err = talk("Hi\n")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "wants an API key: set MINISGL_API_KEY, or name a file that holds the key with --api-key-file" in err


@pytest.mark.parametrize("content", [None, b"", b" \n\n", b"\xff\xfe", "schlüssel".encode()])
def test_a_key_that_cannot_be_used_is_refused_with_its_source(talk: Any, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "keys").write_bytes(content)
    code, _, err = talk("Hi\n", "--api-key-file", str(tmp_path / "keys"))
    assert (code, err.count("\n")) == (1, 1)
    assert f"--api-key-file {tmp_path / 'keys'}: " in err
    assert "in it" in talk("Hi\n", "--api-key", "")[2]
    assert "printable" in talk("Hi\n", "--api-key", "a\r\nX-Other: b")[2]


def test_every_form_of_an_address_reaches_the_server(server: FakeServer, talk: Any) -> None:
    bare = server.url.removeprefix("http://")
    for url in (bare, f"{bare}/v1", *(server.url + path for path in ("", "/", "/v1", "/v1/", "/v1/chat/completions"))):
        assert talk("Hi\n", url=url)[:2] == (0, "Hello\n"), url
    assert talk("Hi\n", "--port", bare.rpartition(":")[2])[:2] == (0, "Hello\n")
    assert "http://" in talk("Hi\n", url="ftp://127.0.0.1")[2]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--port", "0"), "1 to 65535"),
        (("--port", "80", "--url", "x"), "not allowed with"),
        (("--max-tokens", "-1"), "0 for no bound"),
        (("--api-key", "a", "--api-key-file", "b"), "not allowed with"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        chat.run(list(flags))
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


# ---------------- answers that are not as they should be
def test_thoughts_are_told_from_answers(server: FakeServer, talk: Any) -> None:
    for name in ("reasoning_content", "reasoning"):
        server.pieces = [{"reasoning_content": "I th", name: "I th"}, {name: "ink\x1b[2J"}, "Hel", "lo"]
        code, out, err = talk("Hi\nAgain\n")
        assert (code, out) == (0, "Hello\nHello\n")
        assert err.startswith("[thought] I think[2J [/thought]\n[9 + 2 tokens")
        assert server.bodies[-1]["messages"][1] == {"role": "assistant", "content": "Hello"}


def test_a_cut_off_answer_says_so_and_how_to_go_on(server: FakeServer, talk: Any) -> None:
    assert "cut off" not in talk("Hi\n")[2]
    server.finish = "length"
    server.completion = 1024
    code, out, err = talk("Hi\ngo on\n")
    assert (code, out) == (0, "Hello\nHello\n")
    assert 'cut off after 1024 tokens: say "go on" for the rest; /tokens 2048 (or --max-tokens) allows longer answers' in err
    assert server.bodies[-1]["messages"][1] == {"role": "assistant", "content": "Hello"}
    server.context = 1033
    assert "cut off: the context of 1033 tokens is full" in talk("Hi\n")[2]
    server.context, server.pieces = None, [{"reasoning": "Well"}]
    assert "in the middle of a thought: /tokens 2048" in talk("Hi\n")[2]


@pytest.mark.parametrize(("context", "bound"), [(None, 1024), (8192, 1024), (131_072, 16_384), (1000, 500), (1, 1)])
def test_answers_have_a_bound_that_goes_with_the_context(
    server: FakeServer, talk: Any, context: int | None, bound: int
) -> None:
    server.context = context
    talk("Hi\n/tokens 7\nHi\n/tokens 0\nHi\n/tokens x\n/tokens\n")
    assert [body.get("max_tokens") for body in server.bodies] == [bound, 7, None]
    talk("Hi\n", "--max-tokens", "0")
    assert "max_tokens" not in server.bodies[-1]


def test_an_answer_that_repeats_itself_is_stopped_and_not_kept(server: FakeServer, talk: Any) -> None:
    circle = "The cat sat on the mat and it was a good cat. "
    for kind in ("content", "reasoning_content"):
        server.left.clear()
        server.pieces = [{kind: "Once. "}, *[{kind: circle}] * 500, "WAIT"]
        code, out, err = talk("Hi\nmore\n/history\n")
        assert code == 0
        assert "stopped: the answer only repeats itself (--allow-repeats" in err
        assert (out + err).count(circle) < 120
        assert server.left.wait(20)
        if kind == "content":
            assert server.bodies[-1]["messages"][1]["content"].count(circle) < 5
    server.pieces = [circle] * 500
    code, out, err = talk("Hi\n", "--allow-repeats")
    assert (out, "repeats" in err) == (circle * 500 + "\n", False)


# ---------------- the context
def words(body: dict[str, Any]) -> int:
    return sum(len(m["content"].split()) for m in body["messages"])


def test_a_full_context_forgets_the_oldest_turns_and_asks_again(server: FakeServer, talk: Any) -> None:
    server.fits = lambda body: words(body) <= 12
    code, out, err = talk("".join(f"this is question {i}\n" for i in range(5)), "--system", "be brief")
    assert (code, out) == (0, "Hello\n" * 5)
    assert "the context was full: the oldest turn of the conversation had to be forgotten" in err
    assert "error" not in err
    assert [m["content"] for m in server.bodies[-1]["messages"]] == [
        "be brief",
        "this is question 3",
        "Hello",
        "this is question 4",
    ]


def test_a_long_conversation_is_not_shortened_turn_by_turn(server: FakeServer, talk: Any) -> None:
    server.fits = lambda body: words(body) <= 200
    talk("".join(f"{i}\n" for i in range(300)))
    refused = sum(not server.fits(body) for body in server.bodies)
    assert 0 < refused <= 300 // 5  # two shorter answers are tried first


def test_a_message_that_does_not_fit_alone_is_an_error_and_nothing_is_forgotten(server: FakeServer, talk: Any) -> None:
    server.fits = lambda body: words(body) <= 6
    code, _, err = talk("one\n" + "many words " * 10 + "\n/history\ntwo\n", "--system", "be brief")
    assert code == 1
    assert "this message and the system message (/system - removes it) is too long for the context" in err
    assert "too long\n" in err
    assert "forgotten" not in err
    assert [m["content"] for m in server.bodies[-1]["messages"]] == ["be brief", "one", "Hello", "two"]


def test_a_longest_answer_that_has_no_room_is_shortened(server: FakeServer, talk: Any) -> None:
    server.context = 8192
    server.fits = lambda body: words(body) + body.get("max_tokens", 1) <= 8192
    assert talk("one\ntwo\n", "--max-tokens", "9000")[0] == 0
    assert [b.get("max_tokens") for b in server.bodies] == [9000, 1024, 9000, 1024]
    server.fits = lambda body: words(body) + body.get("max_tokens", 1) <= 300
    server.bodies.clear()
    server.finish = "length"
    assert "forgotten" not in (said := talk("one\ntwo\nthree\n")[2].replace("by forgetting", ""))
    assert said.count("cut off: the context of 8192 tokens is full") == 3
    assert [b.get("max_tokens") for b in server.bodies] == [1024, 512, 256] * 3
    server.fits = lambda body: body.get("max_tokens", 1) <= 5
    assert talk("one\n")[:2] == (0, "Hello\n")
    assert "max_tokens" not in server.bodies[-1]


def test_the_system_message_can_be_emptied(server: FakeServer, talk: Any) -> None:
    for word in ("-", "clear"):
        _, _, err = talk(f"a\n/system\n/system {word}\nb\n/system\n", "--system", "be brief")
        assert [m["role"] for m in server.bodies[-1]["messages"]] == ["user", "assistant", "user"]
        assert err.count("system: be brief") == 1
        assert err.count("system: (none)") == 2
    assert "/system -" in talk("/help\n")[2]


# ---------------- with a terminal
class Screen:
    """`python -m minisgl chat` on a pseudo-terminal."""

    def __init__(self, url: str, home: Path, term: str = "dumb", before: str = "") -> None:
        """`before`: Python that runs before the chat, in its process."""
        self.fd, slave = pty.openpty()
        env = {**os.environ, "XDG_STATE_HOME": str(home), "TERM": term}
        program = f"{before}\nimport sys; from minisgl.__main__ import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", program, "chat", "--url", url]
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

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

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
        screen.end()
    assert "go on" in (tmp_path / "minisgl" / "chat_history").read_text()


def test_a_pasted_text_of_several_lines_is_one_message(server: FakeServer, tmp_path: Path) -> None:
    for term in ("xterm", "dumb"):
        screen = Screen(server.url, tmp_path, term)
        try:
            screen.expect("tiny at ")
            if term == "xterm":
                screen.expect("\x1b[?2004h")  # a terminal marks pasted text when it is asked to
            screen.expect("> ")
            screen.type("Read: \x1b[200~def f():\r\treturn 1\r\r/exit\r\x1b[201~")
            screen.type("please\r")
            screen.expect("9 + 2 tokens")
            assert server.bodies[-1]["messages"][-1]["content"] == "Read: def f():\n\treturn 1\n\n/exit\nplease"
            screen.expect("> ")
            screen.type("\x1b[200~/system be\rbrief\x1b[201~\r")
            screen.expect("system: be")
            screen.expect("> ")
            screen.type("\x1b[200~/reset\ris a command\x1b[201~\r")
            screen.expect("9 + 2 tokens")
            contents = [m["content"] for m in server.bodies[-1]["messages"]]
            assert (contents[0], contents[-1]) == ("be\nbrief", "/reset\nis a command")
            screen.expect("> ")
            screen.type("\x04")
            assert screen.close() == 0
        finally:
            screen.end()


def test_without_readline_lines_that_come_at_once_are_one_message(server: FakeServer, tmp_path: Path) -> None:
    screen = Screen(server.url, tmp_path, before="import sys; sys.modules['readline'] = None")
    try:
        screen.expect("> ")
        screen.type("one\ntwo\nthree\n")
        screen.expect("9 + 2 tokens")
        assert server.bodies[-1]["messages"][-1]["content"] == "one\ntwo\nthree"
        screen.expect("> ")
        screen.type("\x04")
        assert screen.close() == 0
    finally:
        screen.end()


def test_thoughts_are_dim_on_a_terminal_and_marked_where_there_are_no_colours(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.pieces = [{"reasoning_content": "I thi"}, {"reasoning_content": "nk"}, "Hello"]
    for colours in (True, False):
        if not colours:
            monkeypatch.setenv("NO_COLOR", "1")
        screen = Screen(server.url, tmp_path, "xterm")
        try:
            screen.expect("> ")
            screen.type("Hi\r")
            screen.expect(
                "\x1b[2mI thi\x1b[0m\x1b[2mnk\x1b[0m\r\nHello" if colours else "[thought] I think [/thought]\r\nHello"
            )
            screen.expect("> ")
        finally:
            screen.end()


def test_an_interrupt_in_a_thought_stops_it_and_a_second_one_at_the_prompt_leaves(server: FakeServer, tmp_path: Path) -> None:
    server.pieces = [{"reasoning_content": "I think"}, "WAIT"]
    screen = Screen(server.url, tmp_path)
    try:
        screen.expect("> ")
        screen.type("Hi\n")
        screen.expect("I think")
        screen.type("\x03")
        screen.expect("[stopped")
        assert server.left.wait(20)
        screen.expect("> ")
        screen.expect("^D or /exit leaves", keys="\x03")
        screen.expect("> ")
        screen.type("\x03")
        end = time.monotonic() + 20
        while screen.process.poll() is None and time.monotonic() < end:
            select.select([], [], [], 0.2)
            screen.type("\x03")  # see `expect`; and one more changes nothing
        assert screen.close() == 0
    finally:
        screen.end()


def test_the_script_runs_the_chat_from_anywhere(server: FakeServer, tmp_path: Path) -> None:
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("no .venv in the repository")
    command = [str(ROOT / "scripts/chat.sh"), "--url", server.url]
    done = subprocess.run(command, input="Hi\n", capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (0, "Hello\n")


def test_the_script_finds_the_checkout_through_a_link_and_files_where_the_user_is(server: FakeServer, tmp_path: Path) -> None:
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("no .venv in the repository")
    server.key = "sk-0123456789abcdef"
    (tmp_path / "keys").write_text(server.key)
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong module')")
    (tmp_path / "chat").symlink_to(ROOT / "scripts/chat.sh")
    command = ["./chat", "--url", server.url, "--api-key-file", "keys"]
    done = subprocess.run(command, input="Hi\n", capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (0, "Hello\n"), done.stderr


def test_the_script_says_what_to_do_without_an_environment(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "chat.sh"
    script.write_bytes((ROOT / "scripts/chat.sh").read_bytes())
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "run scripts/launch.sh first" in done.stderr
