"""Run the RUN lines of docs/deploy's Dockerfiles in an empty folder, where there is no Docker.

    .venv/bin/python scripts/check/dockerfile.py [--file docs/deploy/Dockerfile] [--arg GPU=1] [--keep]

Copies what COPY names from this repository, sets what ENV and ARG say, and runs each command as the build would, the folder
being WORKDIR.  What needs root (packages of the system, users) is only said.  Downloads packages; MINISGL_PIP_ARGS and
MINISGL_TORCH_INDEX say from where.  At last the programs that the image starts answer --help.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Step:
    """One instruction, on one line, with the stage it is in, its folder, and the variables that ENV has set before."""

    word: str
    text: str
    stage: str
    folder: str
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def needs_root(self) -> bool:
        """Whether it changes the system instead of the folder."""
        return bool(re.search(r"\b(apt-get|useradd)\b", self.text))


def steps(text: str, arguments: Mapping[str, str] | None = None) -> list[Step]:
    """The instructions of a Dockerfile.  `arguments`: of --build-arg."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found: list[Step] = []
    stage, folder, count = "", "/", 0
    values: dict[str, str] = {}
    environment: dict[str, str] = {}
    for line in filter(None, map(str.strip, joined.splitlines())):
        word, _, rest = line.partition(" ")
        rest = re.sub(r"\$\{(\w+)\}", lambda m: values.get(m[1], m[0]), " ".join(rest.split()))
        if word == "FROM":
            name = rest.split(" AS ")
            stage, folder, environment, count = name[1] if len(name) > 1 else str(count), "/", {}, count + 1
        elif word == "ARG":
            key, _, default = rest.partition("=")
            values[key] = (arguments or {}).get(key, default)
        elif word == "ENV":
            environment = environment | dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word == "WORKDIR":
            folder = rest
        found.append(Step(word, rest, stage, folder, dict(environment)))
    return found


def run(found: list[Step], image: Path) -> None:
    """Carry out the steps under `image`, which stands for the file system.  Raises CalledProcessError."""
    for step in found:
        here = image / step.folder.lstrip("/")
        if step.word in ("WORKDIR", "COPY", "RUN"):
            print(f"[{step.stage}] {step.word} {step.text}", flush=True)
        if step.word == "WORKDIR":
            here.mkdir(parents=True, exist_ok=True)
        elif step.word == "COPY" and not step.text.startswith("--from"):
            *sources, target = step.text.split()
            for source in sources:
                copy(ROOT / source, here / target / ("" if (ROOT / source).is_dir() else Path(source).name))
        elif step.word == "RUN" and step.needs_root:
            print("    not run: it needs root, and changes the system")
        elif step.word == "RUN":
            plain = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
            subprocess.run(["/bin/sh", "-ec", step.text], cwd=here, env=plain | inside(step.environment, image), check=True)


def inside(environment: Mapping[str, str], image: Path) -> dict[str, str]:
    """Variables with the folders of the image, where it is now."""
    path = os.environ["PATH"]
    return {k: re.sub(r"(?<![\w/])/(?=opt/)", f"{image}/", v).replace("$PATH", path) for k, v in environment.items()}


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)


def main() -> int:
    p = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").split("\n", maxsplit=1)[0])
    p.add_argument("--file", default="docs/deploy/Dockerfile", help="which (%(default)s)")
    p.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="as docker's --build-arg")
    p.add_argument("--keep", action="store_true", help="keep the folder")
    args = p.parse_args()
    found = steps((ROOT / args.file).read_text(), dict(pair.split("=", 1) for pair in args.arg))
    image = Path(tempfile.mkdtemp(prefix="minisgl-image-"))
    try:
        run(found, image)
        (start,) = (step for step in found if step.word == "ENTRYPOINT")
        program = shlex.split(start.text.strip("[]").replace(",", " "))[0]
        path = inside(start.environment, image)["PATH"]
        subprocess.run([program, "--help"], env=os.environ | {"PATH": path}, stdout=subprocess.DEVNULL, check=True)
        print(f"{program} of the image starts")
    except subprocess.CalledProcessError as e:
        print(f"FAILED: exit code {e.returncode}")
        return 1
    finally:
        if args.keep:
            print(f"kept: {image}")
        else:
            shutil.rmtree(image, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
