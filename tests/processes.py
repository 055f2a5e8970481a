"""Real processes for tests: a root with its supervisor, and how to wait for what processes do."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minisgl.actors.runtime.process import ZmqContext
from minisgl.actors.runtime.supervisor import Supervisor, make_run_dir

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def minisgl_command(*arguments: str) -> list[str]:
    """`python -m minisgl ARGUMENTS`, as a process that ends with this one should a test fail or be killed."""
    code = f"import sys; from minisgl.lifeline import die_with_parent; die_with_parent({os.getpid()})\n"
    return [sys.executable, "-c", f"{code}from minisgl.__main__ import main; sys.exit(main(sys.argv[1:]))", *arguments]


def eventually(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Poll until `what()` is true; the deadline only bounds a failing test."""
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)
    return value


class Root:
    """A supervisor and the mailbox named api."""

    def __init__(self) -> None:
        self.run_dir = make_run_dir()
        self.ctx = ZmqContext(self.run_dir, "api")
        self.supervisor = Supervisor(self.run_dir)
        self.seen: list[Any] = []

    def pump(self, seconds: float) -> None:
        self.ctx.inbox.poll(int(seconds * 1000))
        dead = self.supervisor.reap()
        while (msg := self.ctx.recv()) is not None:
            self.seen.append(msg)
        self.seen.extend(dead)

    def pump_until_readable(self) -> None:
        """Wait for one of the descriptors that a server watches, for ever, and do what it then does."""
        select.select(self.supervisor.sentinels(), [], [])
        self.pump(0)

    def wait_for(self, kind: type) -> Any:
        def look() -> Any:
            self.pump(0.02)
            return next((m for m in self.seen if isinstance(m, kind)), None)

        return eventually(look)

    def close(self) -> None:
        self.supervisor.kill()
        self.ctx.close()
