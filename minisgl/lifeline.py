"""What a child process asks of the kernel: to die with its parent, and to wake up on time."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG, _PR_SET_TIMERSLACK = 1, 29


def die_with_parent(parent: int) -> None:
    """Runs first in a child of process `parent`: the kernel kills this process when the parent dies, however that happens.

    It must be SIGKILL.  A Python handler cannot run while C code blocks, so a signal just before a poll() without end would be
    lost.  The parent's death makes that likely, because its closing sockets wake all children just before the signal.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # the parent died before the line above
        os._exit(1)


def wake_on_time() -> None:
    """Let timed sleeps of this thread end within a microsecond.

    The kernel's default is 50 us, so a worker that looks every 20 us whether a step has ended would look every 75 us, twice
    between a result and the next launch.
    """
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)
