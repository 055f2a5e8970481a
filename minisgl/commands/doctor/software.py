"""What must be installed: Python, packages and their versions, torch, the embedded model."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minisgl.commands.doctor.rows import Check, Fact, Missing, has, pip
from minisgl.commands.embedded import MODEL, MODULE, install_command

# Module -> requirement: install_requires of setup.cfg.
PACKAGES = {
    "torch": "torch>=2.11",
    "transformers": "transformers>=5.0",
    "tokenizers": "tokenizers>=0.22",
    "numpy": "numpy>=1.26",
    "zmq": "pyzmq>=26",
    "msgpack": "msgpack>=1.0.8",
    "aiohttp": "aiohttp>=3.11,<4",
    "prometheus_client": "prometheus_client>=0.20",
    "rich": "rich>=13",
    "setproctitle": "setproctitle>=1.3",
    "gguf": "gguf>=0.17",
    "safetensors": "safetensors>=0.5",
    "huggingface_hub": "huggingface_hub>=1.0",
    "jinja2": "jinja2>=3.1.6",
    "llguidance": "llguidance>=1.6,<2",
    "tqdm": "tqdm>=4.66",
    "typing_extensions": "typing_extensions>=4.5",
}
CONSTRAINTS = Path(__file__).parents[3] / "constraints.txt"  # of a checkout; an installed package has none
_TORCH = (
    "import json, torch; gpu = torch.cuda.is_available(); print(json.dumps([torch.__version__, torch.version.cuda, gpu, "
    "torch.cuda.get_arch_list() if gpu else []]))"
)
_SECONDS = 120  # for importing torch from a slow disk


def checks(torch: Torch) -> Iterator[Check]:
    """The rows, in their order."""
    yield Check("Python", True, python)
    yield Check("packages", True, packages)
    yield Check("versions", False, versions)
    yield Check("torch", True, torch.version)
    yield Check("embedded model", False, embedded)
    yield Check("plots", False, plots)


def python() -> Fact:
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    if sys.platform != "linux":
        raise Missing(f"{found}; minisgl runs on Linux")
    return Fact(found)


def packages() -> Fact:
    missing = [name for name in PACKAGES if not has(name)]
    if missing:
        raise Missing(f"not installed: {', '.join(missing)}", pip(*(PACKAGES[name] for name in missing)))
    return Fact(f"all {len(PACKAGES)}")


def versions() -> Fact:
    """The installed versions against the ranges of the package, then against those that its tests use."""
    installed = {name: version(name) for name in map(_name, PACKAGES.values())}
    outside = [r for r in PACKAGES.values() if (v := installed[_name(r)]) and not within(v, r)]
    if outside:
        found = ", ".join(f"{_name(r)} {installed[_name(r)]} (needs {r})" for r in outside)
        return Fact(found, "these were never meant to work together", pip(*outside), "missing")
    pins = tested(CONSTRAINTS.read_text(encoding="utf-8")) if CONSTRAINTS.exists() else {}
    other = {n: v for n, v in installed.items() if v and n in pins and v.partition("+")[0] not in pins[n]}
    if not other:
        return Fact("those that the tests run with" if pins else "within the ranges of the package")
    names = ", ".join(f"{name} {v} (tested: {' or '.join(sorted(pins[name]))})" for name, v in other.items())
    means = "within the allowed ranges, but not what the tests run with"
    return Fact(names, means, pip("-c", str(CONSTRAINTS), *other), "better")


def _name(requirement: str) -> str:
    return re.split(r"[<>=!~ ]", requirement, maxsplit=1)[0]


def version(package: str) -> str:
    """The installed version of a package, "" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def within(found: str, requirement: str) -> bool:
    """Whether a version is in the range of a requirement of >= and < alone."""
    key = _numbers(found)
    bounds = re.findall(r"(>=|<)([\d.]+)", requirement)
    return all((key >= _numbers(bound)) == (relation == ">=") for relation, bound in bounds)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text.partition("+")[0])[:3])


def tested(text: str) -> dict[str, set[str]]:
    """Package -> the versions that a file of constraints has of it, for any Python."""
    found: dict[str, set[str]] = {}
    for name, pinned in re.findall(r"^([\w.-]+)==([^\s;+]+)", text, re.M):
        found.setdefault(name.lower(), set()).add(pinned)
    return found


class Torch:
    """What torch says of itself, in a process of its own: importing it may fail in any way, and takes seconds."""

    def __init__(self) -> None:
        self.answer: list[Any] | None = None  # version, CUDA of the build, whether a GPU works, the GPUs it is compiled for

    def version(self) -> Fact:
        """Its version.  Raises Missing where it cannot be imported."""
        if not has("torch"):
            raise Missing("not installed", pip(PACKAGES["torch"]))
        code = f"import sys; sys.path[:] = {sys.path!r}; {_TORCH}"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
            raise Missing(f"cannot be imported: {last}", pip("--force-reinstall", PACKAGES["torch"]))
        self.answer = json.loads(done.stdout.splitlines()[-1])
        assert self.answer is not None
        return Fact(str(self.answer[0]))


def embedded() -> Fact:
    if not has(MODULE):
        raise Missing(f"{MODEL} is not installed", shlex.join(install_command()), "--model has to name one")
    from minisgl.model.checkpoint.resolve import embedded_model

    return Fact(os.path.basename(embedded_model()))


def plots() -> Fact:
    if not has("matplotlib"):
        raise Missing("matplotlib is not installed", pip("matplotlib"), "no `minisgl simulate --plot`")
    return Fact("matplotlib")
