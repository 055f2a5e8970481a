"""`minisgl cluster`: what it starts, and that it reports what dies and leaves nothing.  Stand-ins serve in place of servers."""

from __future__ import annotations

import http.server
import os
import re
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from processes import alive, eventually

from minisgl.__main__ import main
from minisgl.deploy import plan_cluster
from minisgl.deploy.plan_cluster import Launch, Ports, launches, router_command, visible_gpus
from minisgl.deploy.program import Program, get, is_free
from minisgl.errors import UserError
from scripts.check.front_door import CUT, EVENT, OK, SILENT, free_ports, outcome_of_stream

PORTS = [Ports(9001, 9101, 9201), Ports(9002, 9102, 9202), Ports(9003, 9103, 9203)]


def plan(*flags: str, n: int = 3, gpus: tuple[str, ...] = (), cores: int = 8, exact: bool = False) -> list[Launch]:
    return launches(flags, PORTS[:n], cores=cores, gpus=gpus, exact=exact)


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


# ---------------- what is started
def test_replicas_on_a_cpu_share_cores_and_memory() -> None:
    found = plan()
    assert [value(r.flags, "--threads") for r in found] == ["2", "2", "2"]
    assert sum(float(value(r.flags, "--memory-fraction")) for r in found) == pytest.approx(0.4, abs=1e-3)
    assert [value(r.flags, "--port") for r in found] == ["9001", "9002", "9003"]
    assert value(plan(cores=2)[0].flags, "--threads") == "1"
    assert value(plan("--tp", "2", cores=2)[0].flags, "--threads") == "2"


def test_what_the_flags_say_about_cores_and_memory_stays() -> None:
    for flags in (["--threads", "5", "--kv-tokens", "512"], ["--threads", "5", "--memory-fraction", "0.1"]):
        assert plan(*flags)[0].flags[:4] == flags
        assert plan(*flags)[0].flags.count("--threads") == 1
        assert plan(*flags)[0].flags.count("--memory-fraction") == flags.count("--memory-fraction")
    assert "--threads" not in plan(n=1)[0].flags


def test_each_replica_has_gpus_of_its_own() -> None:
    found = plan("--tp", "2", gpus=("0", "1", "4", "5", "6", "7"))
    assert [r.environment["CUDA_VISIBLE_DEVICES"] for r in found] == ["0,1", "4,5", "6,7"]
    assert "--threads" not in found[0].flags
    assert not plan("--device", "cpu", gpus=("0",))[0].environment
    assert not plan("fake", gpus=("0",))[0].environment
    with pytest.raises(UserError, match=r"3 replicas of --tp 2 need 6 GPUs and this host shows 4: ask for 2 replicas"):
        plan("--tp", "2", gpus=("0", "1", "2", "3"))


def test_the_gpus_are_those_that_this_process_may_use() -> None:
    listed = "GPU 0: NVIDIA H200 (UUID: GPU-1)\nGPU 1: NVIDIA H200 (UUID: GPU-2)\n"
    assert visible_gpus(listed, {}) == ["0", "1"]
    assert visible_gpus(listed, {"CUDA_VISIBLE_DEVICES": "1"}) == ["1"]
    assert visible_gpus(listed, {"CUDA_VISIBLE_DEVICES": ""}) == []
    assert visible_gpus("", {"CUDA_VISIBLE_DEVICES": "0"}) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "9"], "--port 9 behind --"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 behind --"),
        (["--ssl-certfile", "c.pem"], "TLS belongs before it"),
        (["--data-dir", "state"], r"--data-dir: replicas cannot share it; write \{replica\}"),
        (["--journal=j"], "--journal: replicas cannot share it"),
        (["--trace", "t"], "--trace: replicas cannot share it"),
        (["--batch-socket", "tcp://127.0.0.1:5"], "--batch-socket: replicas cannot share it"),
    ],
)
def test_a_flag_that_replicas_cannot_share_is_refused(flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan(*flags)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--kv-events", "tcp://*:1"], "--kv-events: with --policy kv_aware each replica has its own"),
        (["--kv-events-replay=tcp://*:1"], "--kv-events-replay: with --policy kv_aware each replica has its own"),
        (["--kv-events-format", "array"], "--kv-events-format array: the router reads map alone"),
    ],
)
def test_flags_of_kv_events_that_the_router_would_not_follow_are_refused(flags: list[str], said: str) -> None:
    assert plan(*flags)
    with pytest.raises(UserError, match=said):
        plan(*flags, exact=True)


def test_the_number_of_a_replica_can_stand_in_its_flags() -> None:
    found = plan("--data-dir", "state{replica}", "--journal=j{replica}")
    assert [value(r.flags, "--data-dir") for r in found] == ["state1", "state2", "state3"]
    assert "--journal=j3" in found[2].flags
    assert plan("--data-dir", "state", n=1)


def test_with_kv_events_the_router_hears_every_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan("fake", exact=True)
    assert value(found[1].flags, "--kv-events") == "tcp://127.0.0.1:9102"
    assert value(found[1].flags, "--kv-events-replay") == "tcp://127.0.0.1:9202"
    words = router_command(["r"], "h", 1, found, policy="kv_aware", page_size=16, model="m", metrics_port=5)
    sources = [words[i + 1] for i, word in enumerate(words) if word == "--kv-event-source"]
    assert sources == [f"http://127.0.0.1:900{i}=tcp://127.0.0.1:910{i}" for i in (1, 2, 3)]
    assert "http://127.0.0.1:9003=tcp://127.0.0.1:9203" in words
    assert (value(words, "--kv-event-block-size"), value(words, "--kv-event-model")) == ("16", "m")


def test_the_router_asks_every_second_whether_replicas_are_ready() -> None:
    words = router_command(
        ["r"], "h", 1, plan("fake"), policy="cache_aware", page_size=16, model="m", metrics_port=5, extra=["--x", "1"]
    )
    assert (value(words, "--health-check-endpoint"), value(words, "--health-check-interval-secs")) == ("/ready", "1")
    assert words[words.index("--worker-urls") + 1 :][:3] == [f"http://127.0.0.1:900{i}" for i in (1, 2, 3)]
    assert "--kv-event-source" not in words
    assert value(words, "--prometheus-port") == "5"  # two clusters on one host would want the same one
    assert words[-2:] == ["--x", "1"]


def test_the_policy_follows_what_the_server_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cluster, "publishes_kv_events", lambda: True)
    assert plan_cluster.best_policy() == "kv_aware"
    assert plan_cluster.best_policy(keys=True) == "cache_aware"
    assert plan_cluster.best_policy(cache="none") == "cache_aware"
    monkeypatch.setattr(plan_cluster, "publishes_kv_events", lambda: False)
    assert plan_cluster.best_policy() == "cache_aware"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["0"], "N must be between 1 and 64"),
        (["2", "--port", "70000"], "--port 70000: between 1 and"),
        (["2", "--router", "/no/such"], "--router /no/such: there is no such program"),
        (["2", "--router", sys.executable, "--host", "no.such.host.invalid"], "--host no.such.host.invalid: "),
        (
            ["2", "--router", sys.executable, "--log-dir", "/proc/self/fdinfo"],
            "--log-dir /proc/self/fdinfo: replica1.log cannot",
        ),
        (["2", "--router", sys.executable, "--router-flags", "--x '"], '--router-flags "--x \'": no flags as a shell'),
        (["2", "--", "--api-key", "short"], "--api-key: it must hold keys of at least"),
        (["2", "--", "--port", "8001"], "--port 8001 behind --: replicas listen on this host alone"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minisgl.deploy.cluster._gpus", list)
    assert main(["cluster", *words]) == 2
    assert said in capsys.readouterr().err


def test_api_keys_keep_prefixes_private_so_that_no_router_can_know_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_cluster, "publishes_kv_events", lambda: True)
    assert main(["cluster", "2", "--policy", "kv_aware", "--", "--api-key", "k" * 40]) == 2
    assert "what is cached for the owner of an API key is not published; choose cache_aware" in capsys.readouterr().err


# ---------------- what runs
STAND_IN = """#!{python}
import http.server, json, os, signal, sys
words = sys.argv[1:]
port = int(words[len(words) - 1 - words[::-1].index("--port") + 1])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/words":
            body = json.dumps(words).encode()
        elif self.path == "/secret":
            body = os.environ.get("MINISGL_ADMIN_API_KEY", "").encode()
        else:
            body = json.dumps({{"data": [{{"id": "model"}}]}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
print("hello from", port, flush=True)
if "--dies" in words:
    sys.exit("this one dies")
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
SUPERVISOR = """
import sys
from minisgl.lifeline import die_with_parent
die_with_parent(int(sys.argv.pop(1)))
import minisgl.deploy.cluster as cluster
cluster.server_command = lambda *flags: [sys.argv[1], *flags, *(["--dies"] if "dies" in flags else [])]
cluster._gpus = list
sys.exit(cluster.run([*sys.argv[2:4], "--router", *sys.argv[1:2], "--port", *sys.argv[4:]]))
"""


class Running:
    """`minisgl cluster 2` with stand-ins; `said` is its stderr so far."""

    def __init__(self, tmp_path: Path, *flags: str) -> None:
        self.stand_in, self.err = tmp_path / "stand-in", tmp_path / "stderr"
        self.stand_in.write_text(STAND_IN.format(python=sys.executable))
        self.stand_in.chmod(0o755)
        self.port = free_ports(4)[0].http
        words = [str(os.getpid()), str(self.stand_in), "2", "--policy=cache_aware", str(self.port), "--", *flags]
        with self.err.open("wb") as err:
            self.process = subprocess.Popen([sys.executable, "-c", SUPERVISOR, *words], stderr=err, start_new_session=True)

    def said(self) -> str:
        return self.err.read_text()

    def pids(self) -> list[int]:
        """Of the stand-ins: those whose parent is the supervisor."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent = path.read_text().rpartition(")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(parent) == self.process.pid and state != "Z":
                found.append(int(path.parent.name))
        return sorted(found)

    def pid_at(self, port: int) -> int:
        """Of the stand-in for a port, when it is more than a copy of the supervisor."""

        def found() -> int:
            for pid in self.pids():
                with suppress(FileNotFoundError, ProcessLookupError):
                    if f"\0--port\0{port}\0" in Path(f"/proc/{pid}/cmdline").read_text():
                        return pid
            return 0

        return int(eventually(found))


@contextmanager
def running(tmp_path: Path, *flags: str) -> Iterator[Running]:
    cluster = Running(tmp_path, *flags)
    try:
        yield cluster
    finally:
        cluster.process.kill()
        cluster.process.wait()


def test_a_replica_that_dies_is_reported_and_started_again_and_the_signal_leaves_nothing(tmp_path: Path) -> None:
    with running(tmp_path) as cluster:
        eventually(lambda: "ready in" in cluster.said())
        assert f"http://127.0.0.1:{cluster.port}/v1   (2 replicas, policy cache_aware)" in cluster.said()
        assert "^C stops everything" in cluster.said()
        assert get(cluster.port, "/words")[0] == 200
        pids = cluster.pids()
        assert len(pids) == 3
        os.kill(victim := cluster.pid_at(cluster.port + 2), signal.SIGKILL)
        eventually(lambda: "starting it again" in cluster.said())
        line = (
            f"replica 2 (port {cluster.port + 2}) was killed by SIGKILL: starting it again\n    hello from {cluster.port + 2}"
        )
        assert line in cluster.said()
        eventually(lambda: get(cluster.port + 2, "/ready")[0] == 200)
        everything = {*pids, *cluster.pids()}
        assert not alive(victim)
        cluster.process.send_signal(signal.SIGINT)
        assert cluster.process.wait(30) == 0
        assert not any(map(alive, everything))
        assert is_free(cluster.port)


def test_who_comes_through_the_router_is_no_administrator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request through the router comes from this host, so the replicas have a key for administrators, and no one else."""
    monkeypatch.delenv("MINISGL_ADMIN_API_KEY", raising=False)
    with running(tmp_path) as cluster:
        eventually(lambda: "ready in" in cluster.said())
        secrets = [get(cluster.port + i, "/secret")[1] for i in range(3)]
        assert len(secrets[1]) == 64
        assert secrets == [b"", secrets[1], secrets[1]]


def test_the_router_is_asked_where_it_listens() -> None:
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with socketserver.TCPServer(("127.0.0.2", 0), Ready) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
        program = Program("router", sleeper, server.server_address[1], host="127.0.0.2")
        program.start()
        assert program.is_ready()
        program.kill()


def test_output_that_cannot_be_written_down_is_read_all_the_same() -> None:
    program = Program("loud", [sys.executable, "-c", "print('x\\n' * 200_000)"], 1, log=Path("/dev/full"))
    program.start()
    assert program.wait(30)
    assert program.ended() == "ended with exit code 0"
    assert program.lines


def test_nothing_outlives_a_cluster_that_is_killed(tmp_path: Path) -> None:
    with running(tmp_path) as cluster:
        eventually(lambda: "ready in" in cluster.said())
        pids = cluster.pids()
        cluster.process.kill()
        eventually(lambda: not any(map(alive, pids)))


def test_what_dies_again_and_again_stays_down_and_without_a_router_all_ends(tmp_path: Path) -> None:
    with running(tmp_path) as cluster:
        eventually(lambda: "ready in" in cluster.said())
        for n in range(6):
            os.kill(cluster.pid_at(cluster.port), signal.SIGKILL)
            eventually(lambda n=n: len(re.findall(r"router .*was killed", cluster.said())) == n + 1)
            if n < 5:
                eventually(lambda: len(cluster.pids()) == 3)
        assert cluster.process.wait(30) == 70
        assert "for the 6th time within 60 s: it stays down" in cluster.said()


def test_a_replica_that_does_not_start_shows_its_last_words_and_ends_all(tmp_path: Path) -> None:
    with running(tmp_path, "dies") as cluster:
        assert cluster.process.wait(30) == 1
        assert re.search(r"replica \d ended with exit code 1 before it was ready; everything is stopped\n", cluster.said())
        assert "    this one dies" in cluster.said()


# ---------------- what clients notice
@pytest.mark.parametrize(
    ("data", "whole", "kind"),
    [
        ('data: {"x": 1}\n\ndata: [DONE]\n\n', True, OK),
        ('data: {"x": 1}\n\n', True, SILENT),
        ("", True, SILENT),
        ('data: {"x": 1}\n\ndata: {"er', False, CUT),
        ('data: {"x": 1}\n\ndata: {"error": {"message": "m"}}\n\n', True, EVENT),
        ('data: {"x": 1}\n\ndata: {"error": {"message": "m"}}\n\ndata: [DONE]\n\n', True, EVENT),
        ('data: {"error": {}}\n\ndata: {"error": {}}\n\n', True, SILENT),
        ('data: {"text": "an \\"error\\""}\n\ndata: [DONE]\n\n', True, OK),
    ],
)
def test_a_stream_that_ends_early_is_told_from_a_complete_one(data: str, whole: bool, kind: str) -> None:
    assert outcome_of_stream(data.encode(), whole).kind == kind
