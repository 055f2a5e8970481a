"""The batch socket over TCP: served to clients with a key alone, and whatever else comes ends nothing."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import zmq
from test_server import ScriptedEngine

from minisgl import logs
from minisgl.__main__ import main as cli
from minisgl.actors.messages import BatchPing, BatchPong, BatchRefused, BatchSubmit
from minisgl.actors.wire import decode, encode
from minisgl.api.batches import curve as server_side
from minisgl.api.batches.curve import ClientKeys, CurveServer
from minisgl.api.engine import OnChunk, Prompt
from minisgl.client import connection
from minisgl.client import curve as client_side
from minisgl.client.batch_client import BatchClient, BatchRequest
from minisgl.client.curve import ServerGone, read_curve, read_key
from minisgl.commands.batch_keys import address_of, client_keys, server_secret
from minisgl.errors import UserError
from minisgl.sampling_params import DEFAULT_OPTIONS, RequestOptions, SamplingParams

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PING_SECONDS", 0.02)
    monkeypatch.setattr(client_side, "CONNECT_SECONDS", 0.5)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    folder = tmp_path / "keys"
    assert cli(["batch-keys", str(folder), "alice", "bob"]) == 0
    return folder


class Salted(ScriptedEngine):
    """Remembers with which salt, and for whom, requests are opened."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.options: list[RequestOptions] = []

    def open(self, prompt: Prompt, params: SamplingParams, on_chunk: OnChunk, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        self.options.append(options)
        return super().open(prompt, params, on_chunk, options)


class Live:
    """A server in a thread: its address, its engine, and the keys that are allowed."""

    def __init__(self, keys: Path) -> None:
        self.clients = ClientKeys(client_keys(str(keys)), lambda key: f"tenant of {key}")
        self.address, self.port = "", 0
        self._secret, self._ready = server_secret(str(keys)), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._thread.start()
        assert self._ready.wait(20)

    async def _main(self) -> None:
        self.engine, self._end, self._loop = Salted(), asyncio.Event(), asyncio.get_running_loop()
        self.server = CurveServer(
            socket.create_server(("127.0.0.1", 0)),
            self._secret,
            self.clients,
            self.engine,  # type: ignore[arg-type]
        )
        self.address = self.server.address
        self.port = int(self.address.rpartition(":")[2])
        self._ready.set()
        await self._end.wait()
        self.server.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    def guests(self) -> int:
        """Open connections, as the server counts them."""
        return len(self.server._guests)


@pytest.fixture
def live(keys: Path) -> Iterator[Live]:
    running = Live(keys)
    yield running
    running.close()


@pytest.fixture
def patient(keys: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    """A server that would wait for handshakes for ever."""
    monkeypatch.setattr(server_side, "HANDSHAKE_SECONDS", 600.0)
    running = Live(keys)
    yield running
    running.close()


def eventually(what: Callable[[], Any], seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)
    return value


def client(live: Live, keys: Path, name: str = "alice", server_key: Path | None = None) -> BatchClient:
    pair = {"server_key": str(server_key or keys / "server.key"), "client_key": str(keys / f"{name}.key_secret")}
    return BatchClient(socket=live.address, **pair)


@contextmanager
def dealer(live: Live, keys: Path, **options: Any) -> Iterator[zmq.Socket[bytes]]:
    """A socket with alice's keys, and what is set beyond or instead."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger = 0
        mine = read_curve(str(keys / "server.key"), str(keys / "alice.key_secret"))
        assert mine is not None
        given = {"curve_serverkey": mine.server, "curve_publickey": mine.public, "curve_secretkey": mine.secret}
        for name, value in ({"routing_id": b"m" + secrets.token_bytes(16)} | given | options).items():
            if value is not None:
                setattr(sock, name, value)
        sock.connect(live.address)
        yield sock


# ---------------- keys
def test_keys_are_private_files_and_making_them_again_changes_none(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {path: path.read_bytes() for path in keys.rglob("*") if path.is_file()}
    assert sorted(str(path.relative_to(keys)) for path in files) == [
        "alice.key_secret",
        "bob.key_secret",
        "clients/alice.key",
        "clients/bob.key",
        "server.key",
        "server.key_secret",
    ]
    assert {stat.S_IMODE(os.stat(path).st_mode) for path in files} == {0o600}
    assert {stat.S_IMODE(os.stat(path).st_mode) for path in (keys, keys / "clients")} == {0o700}
    secret = (keys / "alice.key_secret").read_text().split('secret-key = "')[1][:40]
    assert secret not in capsys.readouterr().out
    (keys / "bob.key_secret").unlink()  # handed over
    assert cli(["batch-keys", str(keys), "alice", "bob", "carol"]) == 0
    assert len(client_keys(str(keys))) == 3
    said = capsys.readouterr()
    assert "alice.key_secret exists already" in said.err
    assert "bob.key_secret is known by its public key alone" in said.err
    for path, content in files.items():
        assert path.name == "bob.key_secret" or path.read_bytes() == content


@pytest.mark.parametrize("name", ["server", "../x", "a/b", "", ".hidden", "-x y", "é", "x" * 65])
def test_names_that_are_no_files_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    assert cli(["batch-keys", str(tmp_path / "k"), "--", name]) == 2
    assert not (tmp_path / "k").exists()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "cannot read it: no such file"),
        (b"", "there is no key in it"),
        (b"public-key = short", "40 characters of Z85"),
        (b'public-key = "' + b"~" * 40 + b'"', "40 characters of Z85"),
        (b'public-key = "' + b"#" * 40 + b'"', "40 characters of Z85"),
        (b"\xff\x00public-key = " + b"\xff" * 40, "there is no key in it"),
        (b'public-key = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"', "no secret key in it: its name ends with .key_secret"),
        (
            b'public-key = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"\nsecret-key = "JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh7"',
            "its public key is not that of its secret key",
        ),
    ],
)
def test_files_that_hold_no_pair_are_refused_by_their_flag(tmp_path: Path, content: bytes | None, fault: str) -> None:
    path = tmp_path / "x.key_secret"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^--client-key .*x.key_secret: .*{fault}"):
        read_key(str(path), "--client-key", secret=True)
    with pytest.raises(UserError, match=r"^--client-key \S+: cannot read it: Is a directory"):
        read_key(str(tmp_path), "--client-key", secret=True)


def test_a_folder_without_clients_or_with_a_damaged_key_is_refused(keys: Path) -> None:
    (keys / "clients" / "notes.txt").write_text("no key")
    assert len(client_keys(str(keys))) == 2
    (keys / "clients" / "bob.key").write_text("damaged")
    with pytest.raises(UserError, match=r"--batch-keys .*bob.key: cannot read it"):
        client_keys(str(keys))
    for path in (keys / "clients").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"there is no public key of a client in it; `minisgl batch-keys"):
        client_keys(str(keys))
    with pytest.raises(UserError, match=r"--batch-keys .*/clients: cannot read it: No such file"):
        client_keys(str(keys / "nowhere"))


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("tcp://127.0.0.1:5557", ("127.0.0.1", 5557)),
        ("tcp://*:0", ("0.0.0.0", 0)),
        ("tcp://[::1]:1", ("::1", 1)),
        ("tcp://a-host.example:65535", ("a-host.example", 65535)),
        *(
            (bad, None)
            for bad in ("tcp://127.0.0.1", "tcp://:1", "ipc:///x", "0.0.0.0:1", "tcp://::1:5", "tcp://a:1/", "tcp://a:x")
        ),
    ],
)
def test_an_address_is_a_host_and_a_port(given: str, found: tuple[str, int] | None) -> None:
    if found is None:
        with pytest.raises(UserError, match=r"^--batch-socket .*: write tcp://HOST:PORT"):
            address_of(given)
    else:
        assert address_of(given) == found


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (
            ["--batch-socket", "tcp://127.0.0.1:0"],
            r"clients with a key alone: --batch-keys DIR, which `minisgl batch-keys DIR`",
        ),
        (["--batch-keys", "KEYS"], r"--batch-keys \S+: it needs the address to listen on, too: --batch-socket"),
        (["--batch-socket", "ipc://x", "--batch-keys", "KEYS"], r"--batch-socket 'ipc://x': write tcp://HOST:PORT"),
        (["--batch-socket", "tcp://127.0.0.1:70000", "--batch-keys", "KEYS"], r"the port must be between 0 and 65535"),
        (
            ["--batch-socket", "tcp://127.0.0.1:TAKEN", "--batch-keys", "KEYS"],
            r"--batch-socket \S+ is already in use: stop what",
        ),
        (["--batch-socket", "tcp://192.0.2.1:0", "--batch-keys", "KEYS"], r"cannot listen on --batch-socket tcp://192.0.2.1:0"),
        (["--batch-socket", "tcp://127.0.0.1:0", "--batch-keys", "NOWHERE"], r"--batch-keys NOWHERE/server.key_secret: cannot"),
    ],
)
def test_a_server_that_cannot_check_keys_does_not_start(
    keys: Path, flags: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = {"KEYS": str(keys), "TAKEN": str(taken.getsockname()[1])}
        words = [re.sub("KEYS|TAKEN", lambda m: places[m[0]], word) for word in flags]
        assert cli(["serve", "fake", "--device", "cpu", "--port", "0", *words]) == 2
    assert re.search(fault, capsys.readouterr().err)


# ---------------- clients
def test_a_client_with_a_key_is_served_and_is_a_tenant(live: Live, keys: Path) -> None:
    for name in ("alice", "bob", "alice"):
        with client(live, keys, name) as c:
            [result] = c.run([BatchRequest("a", CHAT, BODY)])
            assert (result.custom_id, result.status) == ("a", 200)
            assert json.loads(result.body)["choices"][0]["message"]["content"]
    first, other, again = live.engine.options
    assert first.cache_salt
    assert first.cache_salt == again.cache_salt != other.cache_salt
    assert first.client == again.client != other.client


def test_a_client_whose_key_is_unknown_is_told_so_and_the_server_says_it_once(
    live: Live, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(logs, "say", lambda event, text, level=0, **more: said.append(text))
    assert cli(["batch-keys", str(tmp_path / "theirs"), "mallory"]) == 0
    for _ in range(3):
        with pytest.raises(UserError, match=r"does not know the key of this client, \S{40}: its operator adds"):
            client(live, tmp_path / "theirs", "mallory", server_key=keys / "server.key")
    public, _ = read_key(str(tmp_path / "theirs/clients/mallory.key"), "x")
    assert len(said) == 1
    assert public.decode() in said[0]
    assert "127.0.0.1" in said[0]
    live.clients.replace([*client_keys(str(keys)), public.decode()])  # its operator has added it
    with client(live, tmp_path / "theirs", "mallory", server_key=keys / "server.key") as c:
        assert [r.status for r in c.run([BatchRequest("a", CHAT, BODY)])] == [200]


def test_a_client_with_another_servers_key_gives_up_in_time(live: Live, keys: Path) -> None:
    with pytest.raises(ServerGone, match=r"cannot be reached: it ends the handshake: is --server-key its public key\?"):
        client(live, keys, server_key=keys / "clients/bob.key")


def test_a_client_whose_server_is_not_there_gives_up_in_time(live: Live, keys: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        live.address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServerGone, match="cannot be reached"):
            client(live, keys)
    with pytest.raises(ServerGone, match="cannot be reached: nothing listens there"):
        client(live, keys)
    for bad in ("tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:x"):
        live.address = bad
        with pytest.raises(UserError, match="cannot be used: Invalid argument"):
            client(live, keys)


def test_keys_and_addresses_that_do_not_belong_together_are_refused(keys: Path, tmp_path: Path) -> None:
    pair = {"server_key": str(keys / "server.key"), "client_key": str(keys / "alice.key_secret")}
    with pytest.raises(UserError, match="need the address of the batch socket: --socket tcp://HOST:PORT"):
        BatchClient(**pair)
    with pytest.raises(UserError, match="are for a batch socket over TCP"):
        BatchClient(socket=f"ipc://{tmp_path}/x", **pair)
    for flag in pair:
        with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} FILE is missing"):
            BatchClient(socket="tcp://127.0.0.1:1", **(pair | {flag: ""}))


def test_a_key_that_is_taken_away_is_refused_at_the_next_message(live: Live, keys: Path) -> None:
    with client(live, keys, "alice") as a, client(live, keys, "bob") as b:
        assert [r.status for r in a.run([BatchRequest("a", CHAT, BODY)])] == [200]
        live.clients.replace([read_key(str(keys / "clients/bob.key"), "x")[0].decode()])
        with pytest.raises(UserError, match="the server refused a message: the key of this client is not allowed any more"):
            list(a.run([BatchRequest("b", CHAT, BODY)]))
        assert [r.status for r in b.run([BatchRequest("c", CHAT, BODY)])] == [200]


def test_a_client_notices_that_the_server_has_ended(keys: Path) -> None:
    running = Live(keys)
    with client(running, keys) as c:
        running.close()
        with pytest.raises(ServerGone, match="cannot be reached"):
            c.link.receive(20)


def test_a_connection_that_others_could_take_over_is_refused(live: Live, keys: Path) -> None:
    for options, heard in (({}, BatchPong), ({"routing_id": None}, BatchRefused), ({"routing_id": b"short"}, BatchRefused)):
        with dealer(live, keys, **options) as sock:
            sock.send(encode(BatchPing()))
            assert sock.poll(20_000)
            assert isinstance(decode(sock.recv()), heard)


# ---------------- everything else
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00"
CURVE = GREETING + b"CURVE".ljust(20, b"\0") + bytes(32)


def frame(flags: int, size: int) -> bytes:
    return bytes([flags | 2]) + size.to_bytes(8, "big")


HOSTILE = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "zeros": bytes(4096),
    "random": bytes(range(256)) * 16,
    "ZMTP 1.0": b"\x01\x00\x05\x00hello" * 50,
    "ZMTP 2.0": b"\xff" + bytes(8) + b"\x7f\x01\x05\x00\x00",
    "NULL": GREETING + b"NULL".ljust(20, b"\0") + bytes(32) + b"\x04\x19\x05READY",
    "PLAIN": GREETING + b"PLAIN".ljust(20, b"\0") + bytes(32) + b"\x04\x0a\x05HELLO\x01a\x01b",
    "another mechanism": GREETING + b"\xff" * 20 + bytes(32),
    "a message instead of HELLO": CURVE + b"\x00\x05hello",
    "a frame too large": CURVE + frame(4, 1 << 40),
    "the largest number": CURVE + frame(4, (1 << 64) - 1),
    "HELLO too large": CURVE + frame(4, 1 << 20) + bytes(1 << 20),
    "HELLO that is forged": CURVE + b"\x04\xc8\x05HELLO\x01\x00" + bytes(192),
    "INITIATE at once": CURVE + frame(4, 257) + b"\x08INITIATE" + bytes(248),
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bytes_are_shown_out_and_clients_are_served(live: Live, keys: Path, hostile: bytes) -> None:
    with client(live, keys) as c:
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", live.port), 20) as sock, suppress(ConnectionError):
                sock.sendall(hostile)
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass
        assert [r.status for r in c.run([BatchRequest("a", CHAT, BODY)])] == [200]
    eventually(lambda: live.guests() == 0)
    assert len(live.engine.options) == 1


def test_other_mechanisms_of_zmq_are_not_served(live: Live, keys: Path) -> None:
    none: dict[str, Any] = {"curve_serverkey": None, "curve_publickey": None, "curve_secretkey": None}
    for options in (none, none | {"plain_username": b"a", "plain_password": b"b"}):
        with dealer(live, keys, **options) as sock:
            sock.send(encode(BatchSubmit("a", CHAT, json.dumps(BODY).encode())))
            assert not sock.poll(200)
    assert not live.engine.options


def test_strangers_are_few_at_a_time_and_a_client_finds_its_way_in(patient: Live, keys: Path) -> None:
    with client(patient, keys) as c:
        strangers = [socket.create_connection(("127.0.0.1", patient.port)) for _ in range(5 * server_side.STRANGERS)]
        try:
            for sock in strangers[::2]:
                sock.sendall(CURVE + frame(4, 1 << 20) + bytes(1000))
            eventually(lambda: patient.guests() <= server_side.STRANGERS + 1)
            with client(patient, keys, "bob") as late:
                assert [r.status for r in late.run([BatchRequest("a", CHAT, BODY)])] == [200]
            assert [r.status for r in c.run([BatchRequest("a", CHAT, BODY)])] == [200]
        finally:
            for sock in strangers:
                sock.close()


def test_a_stranger_that_sends_more_than_a_handshake_is_shown_out_before_it_has_sent_it(patient: Live, keys: Path) -> None:
    with socket.create_connection(("127.0.0.1", patient.port), 20) as large, client(patient, keys) as c:
        large.sendall(CURVE + frame(4, 15 << 20) + bytes(8192))
        with suppress(ConnectionError):
            while large.recv(4096):
                pass
        with socket.create_connection(("127.0.0.1", patient.port), 20) as slow:
            slow.sendall(CURVE + frame(4, 15 << 20) + bytes(1000))
            assert len(slow.recv(4096))
            eventually(lambda: patient.guests() == 2)
            assert [r.status for r in c.run([BatchRequest("a", CHAT, BODY)])] == [200]
            assert patient.guests() == 2


def test_connections_are_bounded(live: Live, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_side, "CONNECTIONS", 2)
    with client(live, keys) as a, client(live, keys, "bob") as b:
        with pytest.raises(ServerGone):
            client(live, keys)
        for c in (a, b):
            assert [r.status for r in c.run([BatchRequest("a", CHAT, BODY)])] == [200]
    eventually(lambda: live.guests() == 0)
    with client(live, keys) as a:
        assert [r.status for r in a.run([BatchRequest("a", CHAT, BODY)])] == [200]


def test_a_descriptor_that_has_become_another_is_not_shut_down(live: Live) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, socket.create_connection(other.getsockname()) as mine:
        their, _ = other.accept()
        with their:
            live.server._guests._shut(their.fileno())
            read, write = os.pipe()
            live.server._guests._shut(read)
            live.server._guests._shut(10_000)
            os.close(read)
            os.close(write)
            their.sendall(b"x")
            assert mine.recv(1) == b"x"
