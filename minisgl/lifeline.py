"""Processes that never outlive the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Runs first in a child of process `parent`: the kernel kills this process when the parent dies, however that happens.

    With SIGKILL, for nothing else is certain.  A handler in Python runs when the interpreter next looks, which is never if it
    is in a C call that does not return: that may be a signal's own bad luck, come between the last look and a poll without
    end.  The parent's death makes that likely, as its closing sockets wake everybody up just before the signal.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
