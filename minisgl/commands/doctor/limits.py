"""Limits of the operating system: descriptors, connections, memory between processes, disks, clock, port."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from minisgl.commands.doctor.rows import GIB, Check, Fact, Missing, read

CONNECTIONS = 4096  # the default of --max-open-requests
BACKLOG = 1024  # connections that wait to be accepted, as serve asks for
_FAST_CLOCKS = ("tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page", "xen")


def checks(port: int, data_dir: str) -> Iterator[Check]:
    """The rows, in their order."""
    yield Check("shared memory between processes", True, memfd)
    yield Check("sockets between processes", True, sockets)
    yield Check("4,096 connections", False, open_files)
    yield Check("connections that wait", False, backlog)
    yield Check("processes", False, processes)
    yield Check("clock", False, clock)
    yield Check("disk for kernels", False, kernel_cache)
    yield Check("disk for models", False, model_cache)
    yield Check("disk for --data-dir", False, lambda: data(data_dir))
    yield Check(f"port {port}", False, lambda: free_port(port))


def memfd() -> Fact:
    with os.fdopen(os.memfd_create("minisgl-doctor"), "wb") as file:
        file.truncate(1 << 20)
    return Fact("memfd works", "plans, results and token ids travel through it; /dev/shm is not used for them")


def sockets() -> Fact:
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    parent = base if base and os.access(base, os.W_OK) else None
    try:
        with tempfile.TemporaryDirectory(prefix="minisgl-", dir=parent) as folder, socket.socket(socket.AF_UNIX) as sock:
            sock.bind(f"{folder}/detokenizer")
            return Fact(str(Path(folder).parent))
    except OSError as e:
        raise Missing(f"no socket can be made in {parent or tempfile.gettempdir()}: {e}", "export XDG_RUNTIME_DIR=/tmp") from e


def open_files() -> Fact:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < CONNECTIONS + 256:
        most = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
        if most >= CONNECTIONS + 256:
            return Fact(f"{soft} files may be open at a time, and a server may raise it to {most}", "it does so at its start")
        means = f"fewer than {CONNECTIONS} clients can be connected"
        raise Missing(f"{soft} files may be open at a time, at most {most}", "ulimit -n 65536, as root", means)
    return Fact(f"{'any number of' if soft == resource.RLIM_INFINITY else soft} open files")


def backlog() -> Fact:
    most = read("/proc/sys/net/core/somaxconn")
    if not most.isdecimal() or int(most) >= BACKLOG:
        return Fact(f"{most or 'an unknown number of'} (net.core.somaxconn)")
    means = f"of more than {most} clients that connect at once, some wait a second or are refused"
    return Fact(f"{most} (net.core.somaxconn)", means, f"sudo sysctl -w net.core.somaxconn={BACKLOG}", "better")


def processes() -> Fact:
    """Room for the engine's processes and their threads."""
    from minisgl.model.common.host import groups

    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    limits = [int(text) for g in groups("/", "pids") if (text := read(str(g / "pids.max"))).isdecimal()]
    if soft != resource.RLIM_INFINITY:
        limits.append(soft)
    least = min(limits, default=0)
    if limits and least < 512:
        return Fact(
            f"at most {least}",
            "a server has about ten, with some hundred threads",
            "docker run --pids-limit 4096 ...",
            "better",
        )
    return Fact(f"at most {least}" if limits else "no limit")


def clock() -> Fact:
    source = read("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    if not source or source in _FAST_CLOCKS:
        return Fact(source or "not told by this kernel")
    there = read("/sys/devices/system/clocksource/clocksource0/available_clocksource").split()
    means = "reading the time is a system call, several times in each step"
    fast = next((c for c in _FAST_CLOCKS if c in there), "")
    mend = f"echo {fast} | sudo tee /sys/devices/system/clocksource/clocksource0/current_clocksource" if fast else ""
    return Fact(source, means, mend, "better")


def kernel_cache() -> Fact:
    from minisgl.model.cpu.build import cache_directory

    return room(cache_directory(), 0.1, "export XDG_CACHE_HOME=/a/folder/with/space")


def model_cache() -> Fact:
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return room(Path(home).expanduser(), 5.0, "export HF_HOME=/a/folder/with/space")


def data(folder: str) -> Fact:
    if not folder:
        return Fact("none is given", "/v1/files and /v1/batches are off", "minisgl serve --data-dir DIR", "absent")
    return room(Path(folder), 10.0, "minisgl serve --data-dir-gb 1, or another --data-dir")  # the default of --data-dir-gb


def room(folder: Path, least: float, mend: str) -> Fact:
    """The space in `folder`, which may not exist yet.  least: GiB."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(place, os.W_OK):
        raise Missing(f"{folder} cannot be written", mend)
    free = shutil.disk_usage(place).free / GIB
    if free < least:
        raise Missing(f"{free:.1f} GiB free in {folder}", mend, f"less than {least:g}")
    return Fact(f"{free:.1f} GiB free in {folder}")


def free_port(port: int) -> Fact:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as e:
            raise Missing(f"it cannot be taken ({e}); something may be listening there", "minisgl --port 0") from e
    return Fact("free")
