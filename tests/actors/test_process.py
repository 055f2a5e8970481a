"""The runtime with real processes: start, speak, die, and leave nothing behind."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import process_actors
import pytest
import zmq
from processes import REPOSITORY, TESTS, Root, alive, eventually

from minisgl.actors.messages import ActorDied, Cancel, Failed, Hello, Stop, Stopped, Tokenized, Wake
from minisgl.actors.runtime.process import address
from minisgl.actors.runtime.ring import RingWriter, create_ring
from minisgl.actors.runtime.supervisor import make_run_dir
from minisgl.errors import UserError


@pytest.fixture
def root() -> Iterator[Root]:
    r = Root()
    yield r
    r.close()


def test_an_actor_says_hello_answers_and_leaves_when_asked(root: Root) -> None:
    root.supervisor.spawn("echo", process_actors.make_echo)
    hello = root.wait_for(Hello)
    pid = root.supervisor.pids["echo"]
    assert hello.pid == pid
    assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"minisgl::echo")
    root.ctx.send("echo", Cancel(5))
    assert root.wait_for(Tokenized).uid == 5
    root.ctx.send("echo", Stop("done"))
    assert root.wait_for(Stopped).name == "echo"
    assert root.supervisor.join(60, root.pump)
    assert not alive(pid)


@pytest.mark.parametrize(
    ("message", "exitcode"), [(Wake(), 70), (Tokenized(0, int(signal.SIGKILL)), -9), (Tokenized(0, int(signal.SIGSEGV)), -11)]
)
def test_a_death_becomes_a_message_with_its_exit_code(root: Root, message: object, exitcode: int) -> None:
    root.supervisor.spawn("echo", process_actors.make_echo)
    root.wait_for(Hello)
    root.ctx.send("echo", message)
    died = root.wait_for(ActorDied)
    assert (died.name, died.exitcode) == ("echo", exitcode)
    assert root.supervisor.pids == {}


def test_an_actor_that_cannot_start_says_why(root: Root) -> None:
    root.supervisor.spawn("worker0", process_actors.make_refusing)
    assert root.wait_for(Failed).text == "the file weights.gguf is damaged: download it again"


def test_a_stranger_cannot_crash_an_actor_through_its_socket(root: Root) -> None:
    root.supervisor.spawn("echo", process_actors.make_echo)
    root.wait_for(Hello)
    push = zmq.Context.instance().socket(zmq.PUSH)
    push.linger = 0
    push.connect(address(root.run_dir, "echo"))
    for raw in (b"", b"\x01", b"\x01\xdd\xff\xff\xff\xff", b"garbage" * 1000):
        push.send(raw)
    root.ctx.send("echo", Cancel(6))
    assert root.wait_for(Tokenized).uid == 6
    push.close()


def test_a_parked_actor_uses_no_cpu_and_hears_the_bell(root: Root) -> None:
    spec, fd = create_ring("t", 1, 4096)
    root.supervisor.spawn("echo", process_actors.make_ring_echo, spec)
    root.wait_for(Hello)
    writer = RingWriter(spec)
    pid = root.supervisor.pids["echo"]

    def switches() -> int:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(re.search(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.MULTILINE)[1])

    for n in range(1, 30):
        eventually(writer.parked)
        writer.publish(bytes(n))
        if writer.parked():
            root.ctx.send("echo", Wake())
        root.seen.clear()
        assert root.wait_for(Tokenized).n == n
    eventually(writer.parked)
    before = switches()
    root.pump(0.4)  # an idle poll loop of 5 ms would wake up 80 times in this time
    assert switches() - before <= 8
    os.close(fd)


def test_the_run_directory_is_private_and_paths_that_are_too_long_are_refused(monkeypatch, tmp_path) -> None:
    run_dir = make_run_dir()
    assert stat.S_IMODE(os.stat(run_dir).st_mode) == 0o700
    os.rmdir(run_dir)
    with pytest.raises(UserError, match="XDG_RUNTIME_DIR"):
        address("/" + "x" * 120, "api")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert make_run_dir().startswith(str(tmp_path))


def test_control_c_is_the_roots_business_and_nobody_survives_a_killed_root(tmp_path: Path) -> None:
    script = tmp_path / "root.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal, sys, time
            sys.path.insert(0, sys.argv[1])
            from processes import Root
            import process_actors
            from minisgl.actors.messages import Hello
            root = Root()          # no `if __name__ == "__main__"`: children do not import this script
            for i in range(3):
                root.supervisor.spawn(f"echo{i}", process_actors.make_echo)
            while sum(isinstance(m, Hello) for m in root.seen) < 3:
                root.pump(0.05)
            # not print: the signal may come before the print below has returned, and a buffered file refuses to be reentered
            signal.signal(signal.SIGINT, lambda *_: os.write(1, b"root saw it\\n"))
            print(*root.supervisor.pids.values(), flush=True)
            while True:
                time.sleep(60)
            """
        )
    )
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "XDG_RUNTIME_DIR": str(tmp_path)}
    proc = subprocess.Popen(
        [sys.executable, str(script), str(TESTS)], stdout=subprocess.PIPE, text=True, start_new_session=True, env=env
    )
    assert proc.stdout is not None
    pids = [int(x) for x in proc.stdout.readline().split()]
    assert len(pids) == 3
    os.killpg(proc.pid, signal.SIGINT)
    assert proc.stdout.readline().strip() == "root saw it"
    assert all(map(alive, pids))
    proc.kill()
    proc.wait()
    eventually(lambda: not any(map(alive, pids)))
    proc.stdout.close()


def test_an_exception_in_the_root_ends_everything_but_the_end_of_its_fork_nothing(tmp_path: Path) -> None:
    code = (
        "import os, sys, process_actors; from processes import Root, alive; from minisgl.actors.messages import Hello\n"
        "root = Root(); root.supervisor.spawn('echo', process_actors.make_echo); root.wait_for(Hello)\n"
        "if os.fork() == 0: sys.exit()\n"
        "os.wait(); pid = root.supervisor.pids['echo']; assert alive(pid)\n"
        "print(pid, flush=True); raise KeyError('a bug')"
    )
    env = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{TESTS}", "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60, check=False)
    assert "KeyError: 'a bug'" in done.stderr
    assert not alive(int(done.stdout))
    assert list(tmp_path.iterdir()) == []


def test_a_context_that_nobody_closes_holds_up_nobody_who_collects_garbage(tmp_path: Path) -> None:
    """In a cycle: then nothing is left of a context's weak references to its sockets when it ends."""
    code = f"""
        import gc
        from minisgl.actors.runtime.process import ZmqContext
        ctx = ZmqContext({str(tmp_path)!r}, "api")
        ctx.peer = ctx.socket(8)  # PUSH
        ctx.myself = ctx
        del ctx
        gc.collect()
        print("collected")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, cwd=REPOSITORY
    )
    assert done.stdout == "collected\n", done.stderr


def test_the_scheduler_never_imports_torch() -> None:
    code = (
        "import sys, minisgl.actors.spawn, minisgl.actors.scheduler.actor, minisgl.api.system, minisgl.api.gateway\n"
        "heavy = {'torch', 'transformers', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
