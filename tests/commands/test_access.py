"""Who may use a server: files of keys as editors leave them, certificates, and what SIGHUP reads again."""

from __future__ import annotations

import asyncio
import functools
import http.client
import json
import os
import pty
import re
import signal
import socket
import ssl
import subprocess
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from processes import REPOSITORY, minisgl_command
from test_server import TEXT, USER, ScriptedEngine, events

from minisgl import logs
from minisgl.api.http.app import RUN_KWARGS, build_app
from minisgl.api.http.connection import Connection
from minisgl.commands import chat
from minisgl.commands.access import PASSWORD_VARIABLE, Access, page_url, tls, url_of
from minisgl.commands.chat_http import ChatError
from minisgl.commands.flags import config_from, read_keys
from minisgl.commands.serve import parser
from minisgl.config import Config
from minisgl.errors import UserError
from minisgl.model.checkpoint.resolve import resolve

PEM = Path(__file__).parent.parent / "tls"
CERTIFICATE, KEY_FILE = str(PEM / "certificate.pem"), str(PEM / "key.pem")
KEY, SECOND, ADMIN = "a-key-of-twenty-letters", "another-of-twenty-letters", "the-administrator-has-one"


def access(line: str) -> Access:
    args = parser().parse_args([*line.split(), "--model", "fake", "--device", "cpu"])
    return Access(config_from(args, resolve("fake")), args)


def config(line: str) -> Config:
    return access(line).config


# ---------------- files of keys
@pytest.mark.parametrize(
    "content",
    [
        f"{KEY}\n{SECOND}\n".encode(),
        f"{KEY}\n{SECOND}".encode(),
        f"\ufeff{KEY}\r\n{SECOND}\r\n".encode(),
        f"\ufeff{KEY}\n\ufeff{SECOND}\n".encode(),  # two such files in one
        f"{KEY}\r{SECOND}\r".encode(),
        f"  {KEY}  \n\t{SECOND}\t \n\n \n".encode(),
        f"# keys of the team\n{KEY}\n\n  # of a guest\n{SECOND}\n{KEY}\n#\n".encode(),
        f"\ufeff# caf\u00e9\r\n{KEY}\r\n{SECOND}".encode(),
    ],
)
@pytest.mark.parametrize("admin", [False, True])
def test_a_file_of_keys_is_read_as_editors_leave_it(tmp_path: Path, content: bytes, admin: bool) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    assert read_keys(str(path), admin=admin) == (KEY, SECOND)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "at least 16 characters, one a line"),
        (b"\xef\xbb\xbf\r\n", "at least 16 characters"),
        (b"# no key\n", "at least 16 characters"),
        (b"short\n", "at least 16 characters"),
        (KEY.encode() + b"\nshort\n", "at least 16 characters"),
        ("a-key-of-twenty-letters-\u00e9\n".encode(), "printable ASCII"),
        (b"a-key-of-twenty-\x00letters\n", "printable ASCII"),
        (b"a-key-of-twenty\tletters\n", "printable ASCII"),
        (("\ufeff" + KEY).encode("utf-16-le"), "UTF-8"),
        (b"a-key-of-twenty-letters-\xe9\n", "UTF-8"),
        (b"x" * (1 << 21), "no file of keys"),
    ],
)
@pytest.mark.parametrize("flag", ["--api-key-file", "--admin-api-key-file"])
def test_a_file_without_usable_keys_is_refused_by_the_name_of_its_flag(
    tmp_path: Path, flag: str, content: bytes, fault: str
) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{flag} {path}: .*{fault}") as refused:
        config(f"{flag} {path}")
    assert KEY not in str(refused.value)
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError, match=f"^{flag} {path}: cannot read it: "):
            config(f"{flag} {path}")


def test_keys_of_administrators_come_from_flags_and_a_variable_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys"
    path.write_text(f"{ADMIN}-1\n")
    monkeypatch.setenv("MINISGL_ADMIN_API_KEY", f"\ufeff{ADMIN}-2\r\n")
    server = config(f"--admin-api-key-file {path} --admin-api-key {ADMIN}-3 --api-key {KEY}").server
    assert set(server.admin_api_keys) == {f"{ADMIN}-{i}" for i in (1, 2, 3)}
    assert server.api_keys == (KEY,)
    with pytest.raises(UserError, match=r"^--admin-api-key: it must hold keys"):
        config("--admin-api-key short")
    for line in (f"--admin-api-key-file {path} --api-key {ADMIN}-1", f"--admin-api-key {KEY} --api-key {KEY}"):
        with pytest.raises(UserError, match=r"^--admin-api-key(-file)?: an administrator's key must not be one of the other"):
            config(line)


def test_the_chat_reads_its_key_from_the_same_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(f"\ufeff# mine\r\n\r\n{KEY}  \r\n{SECOND}".encode())
    assert chat._api_key(Namespace(api_key=None, api_key_file=str(path))) == KEY
    path.write_bytes(b"\xff")
    with pytest.raises(ChatError, match=f"--api-key-file {path}: cannot read it"):
        chat._api_key(Namespace(api_key=None, api_key_file=str(path)))


# ---------------- reading again
class Said:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines: list[str] = []
        monkeypatch.setattr(logs, "say", lambda event, text, *_, **__: self.lines.append(text))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return Said(monkeypatch).lines


class FakeKeys:
    def __init__(self) -> None:
        self.now: Any = None

    def replace(self, *keys: Any) -> None:
        self.now = keys


def test_reading_again_takes_all_keys_or_keeps_all(tmp_path: Path, said: list[str]) -> None:
    users, admins = tmp_path / "users", tmp_path / "admins"
    users.write_text(f"{KEY}\n")
    admins.write_text(f"{ADMIN}\n")
    mine = access(f"--api-key-file {users} --admin-api-key-file {admins} --api-key {KEY}-by-flag")
    keys: Any = FakeKeys()
    users.write_bytes(f"\ufeff{SECOND}\r\n{KEY}\r\n".encode())
    mine.reload(keys)
    assert keys.now == ((SECOND, KEY, f"{KEY}-by-flag"), (ADMIN,))
    assert said == ["SIGHUP: 3 API keys are in force, and 1 of administrators"]
    before, keys.now = keys.now, None
    for path, content, fault in (
        (users, b"", "must hold keys"),
        (users, b"k\xff", "UTF-8"),
        (admins, b"short", "must hold keys"),
        (admins, SECOND.encode(), "must not be one of the other"),
    ):
        kept = path.read_bytes()
        path.write_bytes(content)
        said.clear()
        mine.reload(keys)
        assert keys.now is None
        assert re.match(f"SIGHUP: the API keys stay as they were: --(admin-)?api-key-file.*{fault}", said[0]), said
        path.write_bytes(kept)
    for path in (users, admins):
        kept = path.read_bytes()
        path.unlink()
        for make in (os.mkfifo, os.mkdir):
            make(path)
            said.clear()
            mine.reload(keys)
            assert keys.now is None
            assert said[0].startswith("SIGHUP: the API keys stay as they were: ")
            path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(kept)
    mine.reload(keys)
    assert keys.now == before
    assert not any(key in line for key in (KEY, SECOND, ADMIN) for line in said)


def test_without_files_reading_again_says_that_there_is_nothing(said: list[str]) -> None:
    for line in ("", f"--api-key {KEY}"):
        keys: Any = FakeKeys()
        access(line).reload(keys)
        assert keys.now is None
        assert said.pop() == "SIGHUP: there is no --api-key-file to read again; nothing has changed"


# ---------------- addresses that others reach
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "10.0.0.1", "fe80::1", "::ffff:10.0.0.1"])
def test_an_address_that_others_reach_is_warned_of_unless_keys_are_asked_for(host: str, said: list[str]) -> None:
    for line in ("", f"--admin-api-key {ADMIN}"):
        access(line).warn(host)
        assert len(said) == 1
        assert host in said[0]
        assert "--api-key" in said.pop()
    access(f"--api-key {KEY}").warn(host)
    assert not said


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_an_address_of_this_machine_is_not_warned_of(host: str, said: list[str]) -> None:
    access("").warn(host)
    assert not said


def test_events_that_others_may_read_and_events_that_tell_nothing_are_warned_of(said: list[str]) -> None:
    events = "--kv-events tcp://{}:5557 --kv-events-replay tcp://127.0.0.1:5558"
    access(events.format("*")).warn("127.0.0.1")
    assert "--kv-events tcp://*:5557: whoever reaches it reads the token ids of all prompts without a salt" in said.pop()
    access(events.format("127.0.0.1")).warn("127.0.0.1")
    assert not said
    keyed = f"--api-key {KEY} {events.format('127.0.0.1')}"
    access(keyed).warn("127.0.0.1")
    assert "the prompts of keys have salts, and are not published" in said.pop()
    for more in ("--kv-events-salted", "--salt-by-key off"):
        access(f"{keyed} {more}").warn("127.0.0.1")
        assert not said
    with pytest.raises(UserError, match="--kv-events-topic needs"):
        access("--kv-events-topic kv@a")


# ---------------- certificates
def test_addresses_are_announced_with_the_scheme_that_is_served() -> None:
    assert url_of("127.0.0.1", 5, "https") == "https://127.0.0.1:5"
    assert page_url("::", 5, "https") == "https://[::1]:5/"


def test_tls_is_1_2_at_least() -> None:
    context = tls(CERTIFICATE, KEY_FILE)
    assert context is not None
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert tls("") is None


def test_a_certificate_and_its_key_may_be_one_file(tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_text(Path(KEY_FILE).read_text() + Path(CERTIFICATE).read_text())
    assert tls(str(both)) is not None


def test_an_encrypted_key_needs_the_password_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    encrypted = str(PEM / "encrypted_key.pem")
    with pytest.raises(UserError, match=rf"^--ssl-keyfile {encrypted}: the key is encrypted: set {PASSWORD_VARIABLE}$"):
        tls(CERTIFICATE, encrypted)
    for wrong in ("wrong", "", "x" * 2000):
        monkeypatch.setenv(PASSWORD_VARIABLE, wrong)
        with pytest.raises(UserError, match=f"cannot be used; is {PASSWORD_VARIABLE} the password"):
            tls(CERTIFICATE, encrypted)
    monkeypatch.setenv(PASSWORD_VARIABLE, "a-password-of-a-test")
    assert tls(CERTIFICATE, encrypted) is not None


@pytest.mark.parametrize(
    ("certificate", "key", "fault"),
    [
        ("", KEY_FILE, r"^--ssl-keyfile .*: it needs the certificate, too: --ssl-certfile FILE"),
        ("nothing", KEY_FILE, r"^--ssl-certfile .*nothing: cannot read it: No such file"),
        (".", KEY_FILE, r"^--ssl-certfile .*: cannot read it: Is a directory"),
        (CERTIFICATE, "nothing", r"^--ssl-keyfile .*nothing: cannot read it: No such file"),
        (CERTIFICATE, "", r"^--ssl-keyfile .*: there is no private key .*: name its file with --ssl-keyfile"),
        (KEY_FILE, KEY_FILE, r"^--ssl-certfile .*: there is no certificate in PEM format in it"),
        (CERTIFICATE, CERTIFICATE, r"^--ssl-keyfile .*: there is no private key in PEM format in it"),
        ("empty", KEY_FILE, r"^--ssl-certfile .*: there is no certificate"),
        ("der", KEY_FILE, r"^--ssl-certfile .*: there is no certificate in PEM format"),
        ("damaged", KEY_FILE, r"^--ssl-certfile .*damaged --ssl-keyfile .*: cannot be used"),
        (
            CERTIFICATE,
            str(PEM / "other_key.pem"),
            r"^--ssl-certfile .* --ssl-keyfile .*: the key is not that of the certificate",
        ),
    ],
)
def test_files_that_make_no_certificate_are_refused_by_their_flags(
    tmp_path: Path, certificate: str, key: str, fault: str
) -> None:
    text = Path(CERTIFICATE).read_text()
    (tmp_path / "empty").touch()
    (tmp_path / "der").write_bytes(ssl.PEM_cert_to_DER_cert(text))
    (tmp_path / "damaged").write_text(text[:200] + "!" + text[201:])
    with pytest.raises(UserError, match=fault):
        tls(str(tmp_path / certificate) if certificate else "", str(tmp_path / key) if key else "")


def test_answers_and_streams_are_served_over_tls() -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        runner = web.AppRunner(build_app(engine), **RUN_KWARGS)  # type: ignore[arg-type]
        await runner.setup()
        make = functools.partial(Connection, runner.server, 30.0)
        listener = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0, ssl=tls(CERTIFICATE, KEY_FILE))
        url = f"https://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1/chat/completions"
        trust = ssl.create_default_context(cafile=CERTIFICATE)
        async with aiohttp.ClientSession() as session:
            for stream in (False, True):
                async with session.post(url, json={"messages": USER, "stream": stream}, ssl=trust) as answer:
                    raw = await answer.read()
                    assert answer.status == 200
                    said = (
                        [e["choices"][0]["delta"] for e in events(raw)]
                        if stream
                        else [json.loads(raw)["choices"][0]["message"]]
                    )
                    assert "".join(part.get("content") or "" for part in said) == TEXT
        listener.close()
        await runner.cleanup()
        assert sorted(engine.closed) == [0, 1]

    asyncio.run(main())


# ---------------- a server
@contextmanager
def server(tmp: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "XDG_RUNTIME_DIR": str(tmp)}
    command = minisgl_command("--model", "fake", "--port", "0", "--device", "cpu", *flags)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        try:
            lines, url = [], ""
            while not url and (line := process.stderr.readline()):
                lines.append(line)
                url = (re.findall(r"(https?://\S+)/v1", line) or [""])[0] if line.startswith("ready") else ""
            assert url, lines
            yield process, url, lines
            process.send_signal(signal.SIGTERM)
            lines += process.stderr.readlines()
            assert process.wait(60) == 0, lines
        finally:
            process.kill()


def models(url: str, key: str = "", trusted: str = CERTIFICATE) -> int:
    """The status of GET /v1/models; 0 where the certificate is not `trusted`."""
    host = url.partition("://")[2]
    if url.startswith("https"):
        connection: Any = http.client.HTTPSConnection(host, timeout=20, context=ssl.create_default_context(cafile=trusted))
    else:
        connection = http.client.HTTPConnection(host, timeout=20)
    try:
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
        answer = connection.getresponse()
        answer.read()
        return int(answer.status)
    except ssl.SSLCertVerificationError:
        return 0
    finally:
        connection.close()


def hang_up(process: subprocess.Popen[str]) -> str:
    """Send SIGHUP; returns the line that it brings."""
    assert process.stderr is not None
    process.send_signal(signal.SIGHUP)
    while "SIGHUP" not in (line := process.stderr.readline()):
        assert line, "the server has stopped"
    return line


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_a_server_with_keys_and_a_certificate_exchanges_both_while_it_runs(tmp_path: Path) -> None:
    (keys := tmp_path / "keys").write_bytes(f"\ufeff{KEY}\r\n".encode())
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    certificate.write_text(Path(CERTIFICATE).read_text())
    key.write_text(Path(KEY_FILE).read_text())
    (run := tmp_path / "run").mkdir()
    flags = ("--api-key-file", str(keys), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key))
    with server(run, *flags, "--host", "127.0.0.1") as (process, url, lines):
        assert process.stderr is not None
        assert url.startswith("https://127.0.0.1:")
        assert process.stderr.readline() == f"chat and documentation in a browser: {url}/\n"
        assert (models(url, KEY), models(url, SECOND), models(url)) == (200, 401, 401)
        for least in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
            old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
            old.set_ciphers("ALL:@SECLEVEL=0")
            old.minimum_version = old.maximum_version = least
            port = int(url.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port)) as plain, pytest.raises((ssl.SSLError, ConnectionError)):
                old.wrap_socket(plain)
        with socket.create_connection(("127.0.0.1", port)) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"HTTP/1.1 200" not in plain.recv(4096)
        keys.write_bytes(b"\xff")
        assert "the API keys stay as they were: --api-key-file" in hang_up(process)
        assert "new connections get the certificate" in process.stderr.readline()
        assert models(url, KEY) == 200
        keys.write_text(f"{SECOND}\n")
        certificate.write_text((PEM / "other_certificate.pem").read_text())
        assert "1 API key is in force" in hang_up(process)
        assert "the certificate stays as it was" in process.stderr.readline()
        assert (models(url, KEY), models(url, SECOND)) == (401, 200)
        key.write_text((PEM / "other_key.pem").read_text())
        hang_up(process)
        assert "new connections get the certificate" in process.stderr.readline()
        assert models(url, SECOND) == 0
        assert models(url, SECOND, str(PEM / "other_certificate.pem")) == 200
    text = "".join(lines)
    assert "Traceback" not in text, text
    assert KEY not in text


def test_a_server_without_a_file_of_keys_outlives_sighup_and_everybodys_address_is_warned_of(tmp_path: Path) -> None:
    with server(tmp_path, "--host", "0.0.0.0") as (process, url, lines):
        assert [line for line in lines if "whoever reaches 0.0.0.0 may use this server" in line]
        assert "there is no --api-key-file to read again" in hang_up(process)
        assert models(url.replace("0.0.0.0", "127.0.0.1")) == 200


def test_a_server_whose_terminal_is_closed_stops(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "XDG_RUNTIME_DIR": str(tmp_path)}
    command = minisgl_command("--model", "fake", "--port", "0", "--device", "cpu")
    pid, terminal = pty.fork()
    if not pid:
        os.execvpe(command[0], command, env)
    text = b""
    while b"ready in" not in text:
        text += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0
    assert list(tmp_path.iterdir()) == []


def test_a_key_of_an_administrator_leaves_the_process_list_too(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: list[Any] = []
    monkeypatch.setattr("minisgl.commands.serve.hide_keys", lambda keys: hidden.extend(keys))
    monkeypatch.setattr("minisgl.commands.serve._serve", lambda *_: 0)
    from minisgl.commands import serve

    handlers = list(logs.logging.getLogger().handlers)
    serve.run(["--api-key", KEY, "--admin-api-key", ADMIN])
    logs.logging.getLogger().handlers[:] = handlers
    assert hidden == [KEY, ADMIN]
