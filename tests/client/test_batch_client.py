"""The batch client and the batch command against a ROUTER socket of our own."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from minisgl import __main__ as cli
from minisgl.actors.messages import BatchPing, BatchPong, BatchRefused, BatchResult, BatchSubmit
from minisgl.actors.wire import decode, encode
from minisgl.client import batch_client, connection
from minisgl.client.batch_client import BatchClient, BatchRequest, find_socket
from minisgl.commands import batch
from minisgl.commands.batch import ResultLog
from minisgl.errors import RequestError, UserError
from minisgl.sampling_params import SamplingParams

Answer = tuple[int, Any]


class FakeServer:
    """Answers in reverse order once `group` requests have come in, or when the line has been quiet for a moment.

    `reply(body) -> (status, body)`.
    """

    def __init__(self, path: Path) -> None:
        self.address = f"ipc://{path}"
        self.reply: Callable[[Any], Answer] = echo
        self.group = 3
        self.silent = False
        self.seen: list[BatchSubmit] = []
        self.clients: set[bytes] = set()
        self.most_open = 0
        self.pings = 0
        self.pinged = threading.Condition()
        self._open: list[tuple[bytes, BatchSubmit]] = []
        self._end = threading.Event()
        self._context = zmq.Context()
        self._sock = self._context.socket(zmq.ROUTER)
        self._sock.linger = 0
        self._sock.bind(self.address)
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()
        self._sock.close()
        self._context.term()

    def _main(self) -> None:
        while not self._end.is_set():
            if self._sock.poll(10):
                self._receive(*self._sock.recv_multipart())
            else:
                self._answer()
            if len(self._open) >= self.group:
                self._answer()

    def _receive(self, identity: bytes, raw: bytes) -> None:
        msg = decode(raw)
        if self.silent:
            return
        self.clients.add(identity)
        if isinstance(msg, BatchPing):
            with self.pinged:
                self.pings += 1
                self.pinged.notify_all()
            self._sock.send_multipart([identity, encode(BatchPong(len(self._open)))])
            return
        self.seen.append(msg)
        if json.loads(msg.body).get("prompt") == "refuse":
            self._sock.send_multipart([identity, encode(BatchRefused("what is this?"))])
            return
        if json.loads(msg.body).get("prompt") != "swallow":
            self._open.append((identity, msg))
        self.most_open = max(self.most_open, len(self._open))

    def _answer(self) -> None:
        for identity, m in reversed(self._open):
            status, body = self.reply(json.loads(m.body))
            result = BatchResult(m.custom_id, status, "req", json.dumps(body).encode())
            self._sock.send_multipart([identity, encode(result)])
        self._open.clear()


def echo(body: Any) -> Answer:
    text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    usage = {"completion_tokens": 2}
    return 200, {"choices": [{"text": text + "!", "message": {"content": text + "!"}}], "usage": usage}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    fake = FakeServer(tmp_path / "sock")
    yield fake
    fake.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PING_SECONDS", 0.02)
    monkeypatch.setattr(batch_client, "MAX_BACKOFF_SECONDS", 0.01)


def requests(texts: Iterable[str]) -> Iterator[BatchRequest]:
    return (BatchRequest(f"id-{t}", "/v1/completions", {"prompt": t}) for t in texts)


# ---------------- the client
def test_every_request_is_answered_once_within_the_window(server: FakeServer) -> None:
    texts = [str(i) for i in range(50)]
    with BatchClient(socket=server.address, window=7) as c:
        got = [(r.custom_id, r.status, json.loads(r.body)["choices"][0]["text"]) for r in c.run(requests(texts))]
    assert sorted(got) == sorted((f"id-{t}", 200, t + "!") for t in texts)
    assert [g[0] for g in got] != [f"id-{t}" for t in texts], "results come as they finish"
    assert server.most_open <= 7


def test_requests_are_read_as_room_becomes_free(server: FakeServer) -> None:
    drawn: list[str] = []

    def source() -> Iterator[str]:
        for i in range(30):
            drawn.append(str(i))
            yield drawn[-1]

    with BatchClient(socket=server.address, window=4) as c:
        for n, _ in enumerate(c.run(requests(source())), 1):
            assert len(drawn) <= n + 4


def test_the_same_id_may_be_used_twice(server: FakeServer) -> None:
    with BatchClient(socket=server.address) as c:
        got = [r.custom_id for r in c.run(requests(["a", "a", "a"]))]
    assert got == ["id-a"] * 3


def test_texts_come_back_in_order(server: FakeServer) -> None:
    with BatchClient(socket=server.address) as c:
        assert c.generate(list("abcdefg"), SamplingParams(max_tokens=3, stop=("x",))) == [t + "!" for t in "abcdefg"]
        assert c.chat([[{"role": "user", "content": t}] for t in "xyz"], temperature=0) == ["x!", "y!", "z!"]
        assert c.generate("abc") == ["abc!"]
        assert c.chat([{"role": "user", "content": "abc"}]) == ["abc!"]
        server.reply = lambda body: (400, {"error": {"message": "no", "param": "prompt", "code": "c"}})
        with pytest.raises(RequestError, match="no") as e:
            c.generate(["a"])
    assert (e.value.status, e.value.param, e.value.code) == (400, "prompt", "c")
    body = json.loads(server.seen[0].body)
    assert (body["max_tokens"], body["stop"]) == (3, ["x"])
    assert "seed" not in body


def test_an_overloaded_server_is_asked_again_later(server: FakeServer) -> None:
    tries: Counter[str] = Counter()

    def reply(body: Any) -> Answer:
        tries[body["prompt"]] += 1
        if tries[body["prompt"]] < 4:
            return (429, 503)[tries[body["prompt"]] % 2], {"error": {"message": "busy", "retry_after": 1}}
        return echo(body)

    server.reply = reply
    with BatchClient(socket=server.address, window=2) as c:
        assert c.generate(["a", "b", "c"]) == ["a!", "b!", "c!"]
    assert set(tries.values()) == {4}


def test_an_overloaded_server_is_given_up_in_the_end(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_client, "MAX_ATTEMPTS", 3)
    server.reply = lambda body: (503, "not even an object")
    with BatchClient(socket=server.address) as c:
        assert [r.status for r in c.run(requests("ab"))] == [503, 503]
    assert len(server.seen) == 6


def test_pauses_grow_and_respect_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_client, "MAX_BACKOFF_SECONDS", 30.0)
    pauses = [batch_client._pause(b"{}", n) for n in (1, 3, 20)]
    for pause, least in zip(pauses, (0.5, 2.0, 30.0), strict=True):
        assert least <= pause <= 1.25 * least
    assert 7 <= batch_client._pause(b'{"error": {"retry_after": 7}}', 1) < 9


def test_pings_go_on_while_the_caller_takes_its_time(server: FakeServer) -> None:
    with BatchClient(socket=server.address) as c:
        run = c.run(requests("ab"))
        next(run)
        before = server.pings
        with server.pinged:
            assert server.pinged.wait_for(lambda: server.pings >= before + 3, 60), "no pings while nobody asked for a result"
        assert len(list(run)) == 1


def test_a_server_that_falls_silent_is_noticed(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SILENT_SECONDS", 0.1)
    server.silent = True
    with BatchClient(socket=server.address) as c, pytest.raises(UserError, match="has not answered"):
        list(c.run(requests("a")))


def test_a_socket_that_vanishes_is_noticed(server: FakeServer, tmp_path: Path) -> None:
    server.silent = True
    with BatchClient(socket=server.address) as c:
        (tmp_path / "sock").unlink()
        with pytest.raises(UserError, match="does not exist here"):
            list(c.run(requests("a")))


def test_a_request_that_the_server_no_longer_knows_is_noticed(server: FakeServer) -> None:
    with BatchClient(socket=server.address) as c, pytest.raises(UserError, match="lost 1 request"):
        list(c.run(requests(["swallow"])))


def test_a_refusal_ends_the_run(server: FakeServer) -> None:
    with BatchClient(socket=server.address) as c, pytest.raises(UserError, match="what is this"):
        list(c.run(requests(["refuse"])))


def test_leaving_early_gives_up_the_connection_and_the_client_goes_on(server: FakeServer) -> None:
    with BatchClient(socket=server.address) as c:
        run = c.run(requests("abcdef"))
        next(run)
        run.close()
        assert c.generate(["x"]) == ["x!"]
    assert len(server.clients) == 2


def test_a_body_that_is_too_large_is_not_sent(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_client, "MAX_BODY_BYTES", 100)
    with BatchClient(socket=server.address) as c:
        statuses = {r.custom_id[:5]: r.status for r in c.run(requests(["a", "b" * 200]))}
    assert statuses == {"id-a": 200, "id-bb": 413}
    assert len(server.seen) == 1


def test_a_link_that_nobody_closes_holds_up_nobody_who_collects_garbage(tmp_path: Path) -> None:
    code = f"""
        import gc
        from minisgl.client.connection import Link
        link = Link("ipc://{tmp_path}/nobody")
        link._thread.join()
        link.myself = link
        del link
        gc.collect()
        print("collected")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "collected\n", done.stderr


def test_unreachable_servers_are_sentences(tmp_path: Path) -> None:
    for url in ("http://127.0.0.1:1", "nonsense", "http://[::1"):
        with pytest.raises(UserError, match=r"scripts/launch\.sh"):
            find_socket(url)
    with pytest.raises(UserError, match="own machine"):
        BatchClient(socket=f"ipc://{tmp_path}/nothing")
    with pytest.raises(UserError, match="window"):
        BatchClient(socket="ipc://x", window=0)


def test_a_client_is_closed_twice_without_harm_and_then_says_so(server: FakeServer) -> None:
    c = BatchClient(socket=server.address)
    c.close()
    c.close()
    with pytest.raises(UserError, match="closed"):
        list(c.run(requests("a")))


# ---------------- the command
@pytest.fixture
def command(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command on in.jsonl and out.jsonl of the test's directory."""
    monkeypatch.setattr(batch_client, "find_socket", lambda url, key: server.address)
    monkeypatch.chdir(tmp_path)

    def run(*flags: str) -> int:
        return cli.main(["batch", "in.jsonl", "out.jsonl", *flags])

    return run


def line(custom_id: str, prompt: str = "p", **more: Any) -> str:
    request = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt}} | more
    return json.dumps(request) + "\n"


def read(path: str = "out.jsonl") -> dict[str, Any]:
    results = [json.loads(text) for text in Path(path).read_text().splitlines()]
    assert len({r["id"] for r in results}) == len(results)
    return {r["custom_id"]: r for r in results}


def test_a_file_of_requests_becomes_a_file_of_answers(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("in.jsonl").write_text("".join(line(f"r{i}", f"é{i}") for i in range(20)) + "\n")
    assert command() == 0
    results = read()
    assert sorted(results) == sorted(f"r{i}" for i in range(20))
    response = results["r7"]["response"]
    assert (response["status_code"], response["request_id"]) == (200, "req")
    assert response["body"]["choices"][0]["text"] == "é7!"
    assert results["r7"]["error"] is None
    assert "20 of 20 done, 0 failed, 40 tokens" in capsys.readouterr().err


def test_the_server_of_a_port_is_on_this_machine(
    command: Any, server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(batch_client, "find_socket", lambda url, key: asked.append(url) or server.address)
    for number, flags in enumerate(([], ["--port", "8123"], ["--url", "https://a.example"])):
        Path("in.jsonl").write_text(line(f"a{number}"))
        assert command(*flags) == 0
    assert asked == ["http://127.0.0.1:8000", "http://127.0.0.1:8123", "https://a.example"]
    for wrong, said in (
        (["--port", "1", "--url", "http://x"], "--port 1: the server is named by --url already"),
        (["--port", "1", "--socket", "ipc://x"], "--port 1: the server is named by --socket already"),
        (["--port", "70000"], "--port must be between 1 and 65535, got 70000"),
    ):
        assert command(*wrong) == 2
        assert said in capsys.readouterr().err


def test_a_second_run_does_only_what_is_left(command: Any, server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    Path("in.jsonl").write_text(line("a") + line("b") + line("c"))
    server.reply = lambda body: (400, {"error": {"message": "no"}}) if len(server.seen) == 2 else echo(body)
    server.group = 1
    assert command() == 1
    assert read()["b"]["response"]["status_code"] == 400
    raw = Path("out.jsonl").read_bytes()
    torn = raw.splitlines(keepends=True)[-1]
    Path("out.jsonl").write_bytes(raw[: -len(torn) // 2])
    server.reply = echo
    server.seen.clear()
    assert command() == 0
    assert "dropped the incomplete last line" in capsys.readouterr().err
    assert len(server.seen) == 2
    assert {k: r["response"]["status_code"] for k, r in read().items()} == {"a": 200, "b": 200, "c": 200}
    assert raw.startswith(Path("out.jsonl").read_bytes()[: len(raw) - len(torn)]), "what was done stays as it was"
    server.seen.clear()
    assert command() == 0
    assert server.seen == []


def test_failures_go_to_a_file_of_their_own_if_asked(command: Any, server: FakeServer) -> None:
    Path("in.jsonl").write_text(line("a", "good") + line("b", "bad"))
    server.reply = lambda body: echo(body) if body["prompt"] == "good" else (404, {"error": {"message": "no"}})
    assert command("--errors", "errors.jsonl") == 1
    assert (list(read()), list(read("errors.jsonl"))) == (["a"], ["b"])


@pytest.mark.parametrize(
    ("text", "needles"),
    [
        (line("a") + line("b") + line("a"), ["line 3", "line 1"]),
        (line("a") + "{\n" + line(""), ["line 2: not JSON", "line 3: custom_id"]),
        ("[]\n\xff\n", ["line 1", "line 2"]),
        (line("a", method="GET"), ["line 1: method"]),
        (line("a", url=3) + line("b", url="/\ud800"), ["line 1: url", "line 2: url"]),
        (line("a", body=[]), ["line 1: body"]),
        ("\n", ["no request"]),
        ("".join("x\n" for _ in range(30)), ["line 10", "20 more"]),
    ],
)
def test_bad_lines_are_all_named_before_anything_is_sent(
    command: Any, server: FakeServer, capsys: pytest.CaptureFixture[str], text: str, needles: list[str]
) -> None:
    Path("in.jsonl").write_bytes(text.encode("latin-1"))
    assert command() == 2
    err = capsys.readouterr().err
    assert all(n in err for n in ["in.jsonl", *needles]), err
    assert server.seen == []
    assert not Path("out.jsonl").exists()


def test_files_that_are_no_output_are_left_alone(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("in.jsonl").write_text(line("a"))
    for content in ("precious\n", "precious", line("swapped"), '{"id"'):
        Path("out.jsonl").write_text(content)
        code = command()
        if content == '{"id"':  # may well be the beginning of a result
            assert code == 0
        else:
            assert (code, Path("out.jsonl").read_text()) == (2, content)
            assert "name another output file" in capsys.readouterr().err
    assert cli.main(["batch", "in.jsonl", "./in.jsonl"]) == 2
    assert cli.main(["batch", "missing.jsonl", "out.jsonl"]) == 2
    assert cli.main(["batch", "in.jsonl", "no/such/place.jsonl"]) == 2


def test_two_runs_do_not_write_one_file(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("in.jsonl").write_text(line("a"))
    with ResultLog("out.jsonl"):
        assert command() == 2
    assert "another batch run" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (UserError("the server has ended"), 1)])
def test_an_interrupted_run_keeps_what_is_done(
    command: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
) -> None:
    Path("in.jsonl").write_text("".join(line(f"r{i}") for i in range(9)))
    whole = batch_client.BatchClient.run

    def breaks(self: BatchClient, todo: Iterable[BatchRequest]) -> Iterator[BatchResult]:
        for n, result in enumerate(whole(self, todo)):
            if n == 4:
                raise error
            yield result

    with monkeypatch.context() as m:
        m.setattr(batch.BatchClient, "run", breaks)
        assert command() == code
    assert "4 of 9 done; run the same command again" in capsys.readouterr().err
    assert len(read()) == 4
    assert command() == 0
    assert len(read()) == 9
