"""How much memory is free, as this process is allowed to see it.  Linux; no torch."""

from __future__ import annotations

import os

from minisgl.model.common.cgroups import groups

_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a huge number


def available_bytes(root: str = "/") -> int:
    """The smaller of the machine's available memory and what is left of every control group around this process.

    `root` stands in for the root directory in tests.
    """
    candidates = [_meminfo(os.path.join(root, "proc/meminfo"))]
    for group in groups(root, "memory"):
        v2 = (group, "memory.max", "memory.current", "inactive_file")
        v1 = (group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        candidates += [left for left in (_left(*v2), _left(*v1)) if left is not None]
    return max(0, min(candidates))


def _meminfo(path: str) -> int:
    with open(path, encoding="ascii") as f:
        for line in f:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return _UNLIMITED


def _left(group: str, limit: str, usage: str, reclaimable: str) -> int | None:
    """Limit minus usage of one group, where file pages that the kernel can drop do not count as used."""
    try:
        with open(os.path.join(group, limit), encoding="ascii") as f:
            bound = f.read().strip()
        with open(os.path.join(group, usage), encoding="ascii") as f:
            used = int(f.read())
        with open(os.path.join(group, "memory.stat"), encoding="ascii") as f:
            stat = dict(line.split() for line in f)
    except (OSError, ValueError):
        return None
    if bound == "max" or int(bound) >= _UNLIMITED:
        return None
    return int(bound) - used + int(stat.get(reclaimable, 0))
