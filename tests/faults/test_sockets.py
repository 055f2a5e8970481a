"""Who may connect to the sockets of a run: no other user, whatever the directory is, and nobody over TCP."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import zmq
from test_server import ScriptedEngine, Server, play

from minisgl.actors.messages import BatchPing, BatchPong, Hello
from minisgl.actors.runtime import process, supervisor
from minisgl.actors.runtime.process import ZmqContext, address
from minisgl.actors.runtime.supervisor import make_run_dir
from minisgl.actors.wire import decode, encode
from minisgl.api.batches.socket import BatchServer, local_socket
from minisgl.client import connection
from minisgl.client.batch_client import BatchClient, find_socket
from minisgl.commands import batch
from minisgl.errors import UserError

NOBODY = 65534


def arrives(ctx: ZmqContext, run_dir: str) -> bool:
    """Whether a message to the mailbox arrives."""
    with zmq.Context() as other, other.socket(zmq.PUSH) as sock:
        sock.linger = 300
        sock.connect(address(run_dir, ctx.name))
        sock.send(encode(Hello("stranger", 1)))
        return bool(ctx.inbox.poll(300)) and ctx.recv() is not None


def arrives_from(uid: int, ctx: ZmqContext, run_dir: str) -> bool:
    """The same from a process of another user."""
    if not (pid := os.fork()):
        try:
            os.setuid(uid)
            with zmq.Context() as other, other.socket(zmq.PUSH) as sock:
                sock.linger = 300
                sock.connect(address(run_dir, ctx.name))
                sock.send(encode(Hello("stranger", 1)))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    return bool(ctx.inbox.poll(300)) and ctx.recv() is not None


@pytest.mark.parametrize("mine", [True, False])
def test_a_mailbox_hears_the_users_that_may_speak_to_it_alone(tmp_path: Path, monkeypatch: Any, mine: bool) -> None:
    if not mine:
        monkeypatch.setattr(process, "peers", lambda: {NOBODY - 1})
    ctx = ZmqContext(str(tmp_path), "box")
    assert arrives(ctx, str(tmp_path)) is mine
    ctx.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else; the test above needs no root")
def test_another_user_is_not_heard_even_where_the_directory_is_open(tmp_path: Path) -> None:
    run_dir = make_run_dir()
    ctx = ZmqContext(run_dir, "box")
    os.chmod(run_dir, 0o777)
    os.chmod(f"{run_dir}/box", 0o777)
    assert not arrives_from(NOBODY, ctx, run_dir)
    assert arrives_from(0, ctx, run_dir)
    ctx.close()
    shutil.rmtree(run_dir)


def test_the_batch_socket_has_the_same_guard(tmp_path: Path, monkeypatch: Any) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        for mine in (True, False):
            (run_dir := tmp_path / str(mine)).mkdir()
            if not mine:
                monkeypatch.setattr(process, "peers", lambda: {NOBODY - 1})
            ctx = ZmqContext(str(run_dir), "api")
            server = BatchServer(local_socket(ctx, str(run_dir)), engine)  # type: ignore[arg-type]
            with zmq.Context() as other, other.socket(zmq.DEALER) as sock:
                sock.linger = 0
                sock.connect(server.address)
                sock.send(encode(BatchPing()))
                for _ in range(50):
                    server._drain()
                    if sock.poll(10):
                        break
                heard = sock.poll(0) and isinstance(decode(sock.recv()), BatchPong)
                assert bool(heard) is mine
            server.close()
            ctx.close()

    play(scene)


# ---------------- the directory
@pytest.mark.parametrize(("mode", "used"), [(0o700, True), (0o755, True), (0o1777, True), (0o777, False), (0o702, False)])
def test_a_directory_that_others_may_change_is_not_where_a_run_keeps_its_sockets(
    tmp_path: Path, monkeypatch: Any, mode: int, used: bool
) -> None:
    (base := tmp_path / "base").mkdir()
    base.chmod(mode)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    run_dir = Path(make_run_dir())
    assert (run_dir.parent == base) is used
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    run_dir.rmdir()


def test_a_directory_of_another_user_is_not_used_and_one_of_roots_is(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    mine = os.stat(tmp_path).st_uid
    for uid, used in ((mine, True), (mine + 1, mine == 0)):  # as whom the server runs
        monkeypatch.setattr(supervisor.os, "geteuid", lambda uid=uid: uid)
        assert supervisor._ours(str(tmp_path)) is used
    monkeypatch.setattr(supervisor, "_ours", lambda path: path != str(tmp_path))  # su keeps the variable
    run_dir = Path(make_run_dir())
    assert run_dir.parent != tmp_path
    run_dir.rmdir()


def test_a_file_system_that_keeps_nothing_private_is_refused_and_left_clean(tmp_path: Path, monkeypatch: Any) -> None:
    make = supervisor.tempfile.mkdtemp

    def shared(**more: Any) -> str:
        path: str = make(**more)
        os.chmod(path, 0o777)
        return path

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(supervisor.tempfile, "mkdtemp", shared)
    with pytest.raises(UserError, match="keeps no directory private: set XDG_RUNTIME_DIR or TMPDIR"):
        make_run_dir()
    assert not list(tmp_path.iterdir())


# ---------------- the client
@pytest.mark.parametrize("given", ["tcp:/127.0.0.1:5555", "pgm://x", "inproc://x", "127.0.0.1:5555", "x" * 300, "IPC:///x"])
def test_a_batch_socket_that_is_no_file_of_this_machine_is_refused(given: str) -> None:
    with pytest.raises(UserError, match=r"begins with ipc://.* with tcp:// elsewhere"):
        BatchClient(socket=given)


@pytest.mark.parametrize("given", ["tcp://127.0.0.1:5555", "tcp://*:1", "tcp://"])
def test_a_batch_socket_over_tcp_is_refused_without_keys(given: str) -> None:
    with pytest.raises(UserError, match=r"needs keys.*: --server-key FILE and --client-key FILE"):
        BatchClient(socket=given)


def test_a_batch_socket_of_another_user_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "batch"
    path.touch()
    found = os.stat(path)
    theirs = os.stat_result((*found[:4], 4321, *found[5:]))
    monkeypatch.setattr(connection.os, "stat", lambda _: theirs)
    for me, refused in ((1234, True), (4321, False), (0, False)):
        monkeypatch.setattr(connection.os, "geteuid", lambda me=me: me)
        if refused:
            with pytest.raises(UserError, match="belongs to another user"):
                connection.check_path(f"ipc://{path}")
        else:
            connection.check_path(f"ipc://{path}")


@contextmanager
def answering(status: int, body: bytes) -> Iterator[tuple[str, list[str | None]]]:
    """A server's URL, and the Authorization of what it is asked."""
    heard: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.headers.get("Authorization"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", heard
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_batch_client_brings_its_key_and_says_what_is_missing(tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("MINISGL_API_KEY", "MINISGL_ADMIN_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with answering(200, b'{"batch_socket": "ipc:///x"}') as (url, heard):
        assert find_socket(url) == "ipc:///x"
        monkeypatch.setenv("MINISGL_API_KEY", "user")
        find_socket(url)
        monkeypatch.setenv("MINISGL_ADMIN_API_KEY", "admin\n")
        find_socket(url)
        with pytest.raises(UserError, match="does not exist here"):
            BatchClient(url, api_key="mine")
        (tmp_path / "keys").write_bytes("\ufeff# an administrator's\r\nfrom-a-file\r\n".encode())
        (tmp_path / "in").write_text('{"custom_id": "a", "url": "/v1/completions", "body": {}}\n')
        flags = ["--url", url, "--api-key-file", str(tmp_path / "keys")]
        assert batch.run([str(tmp_path / "in"), str(tmp_path / "out"), *flags]) == 1
        assert heard == [None, "Bearer user", "Bearer admin", "Bearer mine", "Bearer from-a-file"]
    with answering(401, b"{}") as (url, _), pytest.raises(UserError, match="does not accept this API key: set MINISGL_ADMIN"):
        find_socket(url)
    with answering(200, b"{}") as (url, _), pytest.raises(UserError, match=r"to administrators .*: set MINISGL_ADMIN_API_KEY"):
        find_socket(url)
    with answering(200, b'{"batch_socket": null}') as (url, _), pytest.raises(UserError, match="has no batch socket"):
        find_socket(url)
    with answering(503, b"") as (url, _), pytest.raises(UserError, match="answered 503"):
        find_socket(url)
    monkeypatch.delenv("MINISGL_ADMIN_API_KEY")
    monkeypatch.delenv("MINISGL_API_KEY")
    with answering(401, b"{}") as (url, _), pytest.raises(UserError, match="wants an API key"):
        find_socket(url)
