"""Compiles the C kernels for this machine at the first start, and loads them.  No torch.

The shared library is kept in the user's cache directory under a name that is a hash of the sources, the compiler, its flags
and the processor's features: another machine with the same home directory builds its own.  Takes about two seconds, once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-pthread", "-shared", "-fno-math-errno", "-Wno-psabi")
_SECONDS = 120


class NoKernels(RuntimeError):
    """The kernels cannot be built or loaded here, for the reason in the text."""


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/minisgl, by default ~/.cache/minisgl."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "minisgl"


@functools.cache
def processor() -> str:
    """The architecture and the features of the first processor, which decide what instructions a compiler may use."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    lines = [line for line in text.splitlines() if line.lower().startswith(("flags", "features"))]
    return f"{platform.machine()} {lines[0] if lines else platform.processor()}"


def load_kernels(flags: tuple[str, ...] = ("-march=native",)) -> ctypes.CDLL:
    """The library, built unless it is cached.  flags: the instruction set.  Raises NoKernels."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise NoKernels(f"there is no C compiler ({os.environ.get('CC', 'cc')}): install one (on Debian: apt install gcc)")
    sources = sorted(SOURCES.glob("*.[ch]"))
    parts = [os.path.realpath(compiler), *FLAGS, *flags, processor(), *(p.read_text(encoding="utf-8") for p in sources)]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    path = cache_directory() / f"kernels-{name}.so"
    try:
        if not path.exists():
            _build(compiler, flags, [str(p) for p in sources if p.suffix == ".c"], path)
        return ctypes.CDLL(str(path))
    except OSError as e:
        raise NoKernels(f"{path} cannot be made or loaded ({e})") from e


def _build(compiler: str, flags: tuple[str, ...], sources: list[str], path: Path) -> None:
    """Builds into a temporary file: several ranks may be building, and a half-written library must never be loaded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    try:
        command = [compiler, *FLAGS, *flags, "-o", partial, *sources, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if done.returncode:
            raise NoKernels(f"{compiler} could not compile the kernels: {done.stderr.strip()[-400:]}")
        os.replace(partial, path)
    except subprocess.TimeoutExpired as e:
        raise NoKernels(f"{compiler} took more than {_SECONDS} s to compile the kernels") from e
    finally:
        Path(partial).unlink(missing_ok=True)
