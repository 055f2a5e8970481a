"""Ties the life of a process to that of its parent."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Runs first in a child of process `parent`: the kernel kills this process when the parent dies, however that happens.

    It must be SIGKILL.  A Python handler cannot run while C code blocks, so a signal just before a poll() without end would be
    lost.  The parent's death makes that likely, because its closing sockets wake all children just before the signal.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # the parent died before the line above
        os._exit(1)
