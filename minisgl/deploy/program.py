"""A child process that serves: started, asked whether it is ready, and stopped so that nothing of it stays.

Runs in whatever starts servers (cluster.py, ray.py, scripts/check/front_door.py), which is none of the processes of a server.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

LAST_LINES = 20  # of a program's output that are kept, to be shown when it dies
# The kernel kills the program with its parent; the setting stays over exec.
_TIED = (
    "import os, sys; from minisgl.lifeline import die_with_parent; die_with_parent(int(sys.argv[1])); "
    "os.execvp(sys.argv[2], sys.argv[2:])"
)
_PACKAGE = str(Path(__file__).parents[2])


def get(port: int, path: str, seconds: float = 2.0, host: str = "127.0.0.1") -> tuple[int, bytes]:
    """Status and body of a GET; (0, b"") where nobody answers within `seconds`."""
    connection = http.client.HTTPConnection(host, port, timeout=seconds)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port of this host at which nothing listens now; another program may be faster to take it."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def server_command(*flags: str) -> list[str]:
    """The command line of an ordinary server, by the Python that runs now."""
    return [sys.executable, "-m", "minisgl", "serve", *flags]


class Program:
    """One child that listens on `port` and answers 200 at `path` when it is ready.

    It is in a session of its own, so that ^C in a terminal reaches only its parent, and dies with its parent.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        port: int,
        path: str = "/ready",
        *,
        host: str = "127.0.0.1",
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        """`host`: where this host reaches it.  `environment`: beside ours.  `log`: a file for its output."""
        self.name, self.command, self.port, self.path = name, list(command), port, path
        self._host = host
        self.lines: deque[str] = deque(maxlen=LAST_LINES)
        self._log = log
        self._environment = dict(environment or {})
        self._child: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None

    def start(self) -> None:
        """Start it, the first time or again.  Call from a thread that lives as long as the program shall."""
        package = os.pathsep.join(filter(None, [_PACKAGE, os.environ.get("PYTHONPATH")]))
        self.lines.clear()
        self._child = subprocess.Popen(
            [sys.executable, "-c", _TIED, str(os.getpid()), *self.command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": package} | self._environment,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self._child,), daemon=True)
        self._reader.start()

    def _read(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        with child.stdout, open(self._log or os.devnull, "ab", buffering=0) as log:
            for line in child.stdout:
                with suppress(OSError):  # of a full disk: a program whose output nobody reads would stand still
                    log.write(line)
                self.lines.append(line.decode(errors="replace").rstrip())

    @property
    def pid(self) -> int:
        """Of its process; 0 before the first start."""
        return self._child.pid if self._child else 0

    def ended(self) -> str:
        """How it ended, for people: "was killed by SIGKILL"; "" while it runs."""
        code = self._child.poll() if self._child else None
        if code is None:
            return ""
        if self._reader is not None:
            self._reader.join(1)  # its last words
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    @property
    def exit_code(self) -> int | None:
        return self._child.poll() if self._child else None

    def is_ready(self) -> bool:
        return not self.ended() and get(self.port, self.path, host=self._host)[0] == 200

    def signal(self, number: int) -> None:
        """To the program itself; a server passes it on to its own processes."""
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within `seconds`."""
        end = time.monotonic() + seconds
        while self._child is not None and self._child.poll() is None:
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)
        return True

    def kill(self) -> None:
        """At once, with everything in its session."""
        if self._child is not None and self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
