"""Measures the cores and the memory that this process may use, inside control groups too, and sets its threads.

No torch: `prepare_environment` must run before the first `import torch` of its process.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from minisgl.config import EngineConfig

SPIN_COUNT = 20_000  # some tens of microseconds
MAX_KV_TOKENS = 262_144  # of a KV cache in the memory of the host: a CPU is too slow to use more
_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a huge number


# ---------------- threads
def usable_cores(root: str = "/") -> int:
    """The cores that this process may run on, or fewer where a control group around it has a quota (`docker run --cpus`).

    root: a stand-in for the root directory in tests.
    """
    quota = cpu_quota(root)
    return max(1, min(len(os.sched_getaffinity(0)), math.ceil(quota) if quota is not None else 1 << 30))


def cpu_quota(root: str = "/") -> float | None:
    """The cores' worth of time that the control groups around this process leave it; None: no limit.  root: as above."""
    return min((q for group in groups(root, "cpu") if (q := _quota(group)) is not None), default=None)


def threads_per_rank(engine: EngineConfig) -> int:
    """`threads` (0: `usable_cores`) divided over the ranks, at least 1.

    Ranks are not pinned to cores of their own: two of them on two cores generated 16 tokens a second as the system placed them
    and 9.5 pinned (150 and 131 at 16 streams), because the other actors need a core now and then.
    """
    return max(1, (engine.threads or usable_cores()) // engine.tp)


def prepare_environment(n_threads: int) -> None:
    """Set the OpenMP variables that are read once, when torch is loaded.

    libgomp's threads wait at a barrier by spinning, by default for so long that on cores shared with another busy process a
    step takes ten times as long; PASSIVE puts them to sleep at once, which costs a wake-up in each of the hundreds of parallel
    regions of a step.  A bounded spin is better than both.  Decode of the embedded model with 2 threads on 2 cores, tokens
    per second at 1 and at 16 streams: PASSIVE 20 and 147, a spin count of 1,000 23 and 173, of 6,000 27 and 166, of 20,000 30
    and 210, of 200,000 28 and 184; next to a process that keeps a core half busy: PASSIVE 19 and 133, 20,000 21 and 161.
    Variables that the user has set are left alone.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(n_threads))
    os.environ.setdefault("MKL_NUM_THREADS", str(n_threads))
    os.environ.setdefault("OMP_DYNAMIC", "FALSE")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    os.environ.setdefault("KMP_BLOCKTIME", "0")  # the same for a torch built with Intel's OpenMP
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# ---------------- memory
def available_bytes(root: str = "/") -> int:
    """The machine's available memory, or less where a control group around this process has less left.  root: as above."""
    candidates = [_meminfo(Path(root, "proc/meminfo"))]
    for group in groups(root, "memory"):
        v2 = (group, "memory.max", "memory.current", "inactive_file")
        v1 = (group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        candidates += [left for left in (_left(*v2), _left(*v1)) if left is not None]
    return max(0, min(candidates))


def anonymous_bytes(root: str = "/") -> int:
    """The memory of this process that belongs to no file; 0 where the kernel does not say."""
    try:
        lines = Path(root, "proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


# ---------------- files of the kernel
def groups(root: str, controller: str) -> list[Path]:
    """The directories of this process's control groups and their parents, for both versions of the interface.

    controller: "memory" or "cpu".
    """
    found: list[Path] = []
    try:
        lines = [line.split(":", 2) for line in Path(root, "proc/self/cgroup").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []
    for line in lines:
        if len(line) == 3 and (line[1] == "" or controller in line[1].split(",")):
            base = Path(root, "sys/fs/cgroup", controller if line[1] else "")
            inner = Path(line[2].strip("/"))  # inside a container it may be invisible: the base itself still counts
            found += [base / path for path in (inner, *inner.parents)]
    return found


def _quota(group: Path) -> float | None:
    """The cores' worth of time that a group may use; None: all."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / name).read_text(encoding="ascii") for name in names).split()
            return int(quota) / int(period) if quota not in ("max", "-1") else None
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return None


def _left(group: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """Limit minus usage of one group in bytes, where file pages that the kernel can drop do not count; None: no limit."""
    try:
        most, used = (group / limit).read_text(encoding="ascii").strip(), int((group / usage).read_text(encoding="ascii"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    if most == "max" or int(most) >= _UNLIMITED:
        return None
    return int(most) - used + int(stat.get(reclaimable, 0))


def _meminfo(path: Path) -> int:
    lines = path.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), _UNLIMITED)
