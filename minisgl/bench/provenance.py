"""How a figure was made: commit or version, host, load."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from minisgl.version import __version__

_PACKAGE = Path(__file__).parents[1]


def provenance() -> dict[str, Any]:
    """Commit (in a checkout, otherwise the version), processor, cores, load, versions and GPUs.  Printed with every figure."""
    gpus = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    return {
        "commit": _commit() or f"minisgl {__version__}",
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),  # programs that wanted a core in the last minute, this one included
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        **({"gpus": [name.strip() for name in gpus]} if gpus else {}),
    }


def line(about: dict[str, Any]) -> str:
    """The same in one line."""
    gpus = f", {len(about['gpus'])} x {about['gpus'][0]}" if about.get("gpus") else ""
    versions = f"Python {about['python']}, torch {about['torch']}"
    return f"{about['commit']}; {about['cores']} cores of {about['cpu']}{gpus}; load {about['load']}; {versions}"


def _commit() -> str:
    """Of the checkout that this package is the top folder of; "" where it is installed, even inside another checkout."""
    if _output("git", "rev-parse", "--show-toplevel") != str(_PACKAGE.parent):
        return ""
    return _output("git", "rev-parse", "--short", "HEAD") + ("+changes" if _output("git", "status", "--porcelain") else "")


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, cwd=_PACKAGE, check=False).stdout.strip()


def _processor() -> str:
    try:
        names = [text for text in Path("/proc/cpuinfo").read_text().splitlines() if text.startswith("model name")]
    except OSError:
        names = []
    return names[0].split(":")[1].strip() if names else platform.machine()
