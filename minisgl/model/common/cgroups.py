"""The control groups around this process, which bound what a container may use.  Linux; no torch."""

from __future__ import annotations

import os


def groups(root: str, controller: str) -> list[str]:
    """The directories of this process's control groups and their parents, for both versions of the interface.

    `controller`: "memory" or "cpu"; `root` stands in for the root directory in tests.
    """
    found = []
    try:
        with open(os.path.join(root, "proc/self/cgroup"), encoding="utf-8") as f:
            lines = [line.rstrip("\n").split(":", 2) for line in f]
    except OSError:
        return []
    for line in lines:
        if len(line) == 3 and (line[1] == "" or controller in line[1].split(",")):
            base = os.path.join(root, "sys/fs/cgroup", controller if line[1] else "")
            path = line[2].strip("/")
            while True:  # inside a container the inner directories may be invisible: the base itself still counts
                found.append(os.path.join(base, path))
                if not path:
                    break
                path = os.path.dirname(path)
    return found
