"""Nobody outlives a root that is killed, at any time, whatever the children are doing, and nothing stays on the disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import REPOSITORY, TESTS, Root, alive, eventually

from minisgl.actors.runtime import supervisor

# Four children: two in C calls that neither return nor are interrupted (one before it has said Hello), one that is stopped,
# and one that has only just been started; and the resource tracker of multiprocessing, the first that is spawned.
ROOT = """
import multiprocessing.util, os, signal, sys
import process_actors
from processes import Root
from minisgl.actors.messages import Hello, Tokenized, Wake

root, spawn, pids = Root(), multiprocessing.util.spawnv_passfds, []

def report(*args):
    pids.append(spawn(*args))
    print(pids[-1], flush=True)
    if len(pids) == 5 and sys.argv[1:]:
        os.kill(os.getpid(), signal.SIGKILL)  # before the child has been told what it is
    return pids[-1]

multiprocessing.util.spawnv_passfds = report
for name, make in (("deaf", "deaf"), ("starting", "deaf_at_once"), ("worker0", "echo")):
    root.supervisor.spawn(name, getattr(process_actors, f"make_{make}"))
while sum(isinstance(m, Hello) for m in root.seen) < 2:
    root.pump(0.05)
root.ctx.send("deaf", Wake())
os.kill(root.supervisor.pids["worker0"], signal.SIGSTOP)
while sum(isinstance(m, Tokenized) for m in root.seen) < 2:
    root.pump(0.05)
root.supervisor.spawn("new", process_actors.make_echo)
signal.pause()
"""


@pytest.mark.parametrize("how", ["alone, stopped before", "with its group", "while it starts a child"])
def test_nobody_and_nothing_outlives_a_root_that_is_killed(tmp_path: Path, how: str) -> None:
    env = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{TESTS}", "XDG_RUNTIME_DIR": str(tmp_path)}
    command = [sys.executable, "-c", ROOT, *(["now"] if how == "while it starts a child" else [])]
    root = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)
    assert root.stdout is not None
    pids = [int(root.stdout.readline()) for _ in range(5)]
    try:
        if how == "alone, stopped before":
            os.kill(root.pid, signal.SIGSTOP)
            os.kill(root.pid, signal.SIGKILL)
        elif how == "with its group":
            os.killpg(root.pid, signal.SIGKILL)
        root.communicate(timeout=60)  # its output ends when root and children have ended, who have it from the root
        assert root.returncode == -signal.SIGKILL
        eventually(lambda: not any(map(alive, pids)))
        eventually(lambda: list(tmp_path.iterdir()) == [])
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


GUARDED = """
import os, signal, sys
from processes import Root

root = Root()
for _ in range(2):
    os.kill(guard := root.supervisor._guard.pid, signal.SIGKILL)
    while root.supervisor._guard.pid == guard:
        root.pump_until_readable()
print(root.supervisor._guard.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_guard_that_dies_first_has_a_successor(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{TESTS}", "XDG_RUNTIME_DIR": str(tmp_path)}
    root = subprocess.Popen([sys.executable, "-c", GUARDED], stdout=subprocess.PIPE, text=True, env=env)
    said, _ = root.communicate(timeout=60)
    assert root.returncode == -signal.SIGKILL
    eventually(lambda: not alive(int(said)))
    assert list(tmp_path.iterdir()) == []


def test_guards_that_cannot_live_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_GUARDS", 3)
    monkeypatch.setattr(supervisor, "_GUARD", "raise SystemExit")
    root = Root()
    try:
        guards = {root.supervisor._guard.pid}
        while root.supervisor.sentinels():
            root.supervisor.reap()
            guards.add(root.supervisor._guard.pid)
        assert len(guards) == 4
    finally:
        root.close()
        shutil.rmtree(root.run_dir)
