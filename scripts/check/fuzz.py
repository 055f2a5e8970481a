"""Feeds damaged bytes to everything in minisgl that reads foreign ones: no crash, no hang, no allocation beyond a bound.

    .venv/bin/python scripts/check/fuzz.py [TARGET ... | all] [--seconds 60] [--engine random|atheris] [--seed 0] [--out DIR]
    .venv/bin/python scripts/check/fuzz.py TARGET --replay FILE

The targets are message, record, actors, body, http, gguf, safetensors, tokenizer and directory (scripts/lib/fuzz_targets.py).
Each runs in a process of its own, within --megabytes of address space more than it begins with.  One that is refused with a
clear error is refused; any other exception, one that takes more than --limit seconds of a core, and one that ends the process
are findings: the input is kept in DIR (TARGET-KIND.bin), and its traceback is printed.  `random` changes real inputs by bytes
and by structure; `atheris` (pip install atheris) is guided by coverage besides.  One JSON line for each target: how many inputs
were tried, accepted and refused, the longest time and the largest allocation of one (a sample is measured), and what was found.
The exit code is 1 after findings.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import time
import traceback
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if {"--child", "--engine=atheris"} <= set(sys.argv):  # which counts the branches of what is imported from here on
    import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

    atheris.instrument_imports(include=["minisgl"]).__enter__()

from scripts.lib.fuzz_targets import TARGETS, Target, clean_up

SAMPLED = 16  # the allocations of one input in so many are measured, which makes it slower
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, 1 << 63, (1 << 64) - 1]
SMALL = 1 << 16  # bytes that a spliced or repeated part has at most


@dataclass(slots=True)
class Report:
    """What a target has seen.  `findings`: by kind, the exception with its place, how often."""

    target: str
    engine: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    worst_ms: float = 0.0
    worst_mib: float = 0.0
    findings: dict[str, int] = field(default_factory=dict)


class Trial:
    """Runs the inputs of one target, and keeps what is found; the file `current` has each input that runs.

    `watched`: a hang ends the process.
    """

    def __init__(self, name: str, target: Target, out: Path, engine: str, limit: float, *, watched: bool = False) -> None:
        self.target, self.limit = target, limit
        self.report = Report(name, engine)
        self._out = out
        self.current = out / f"{name}.current"
        self._fd = os.open(self.current, os.O_CREAT | os.O_WRONLY)
        self._armed, self._watched = 0.0, watched

    def run(self, raw: bytes) -> None:
        """One input."""
        report = self.report
        os.pwrite(self._fd, raw, 0)
        os.ftruncate(self._fd, len(raw))
        report.inputs += 1
        measured = report.inputs % SAMPLED == 0
        if measured:
            tracemalloc.start()
        if self._watched and time.monotonic() - self._armed > 5 * self.limit:
            faulthandler.dump_traceback_later(20 * self.limit, exit=True)
            self._armed = time.monotonic()
        began = time.process_time()
        try:
            self.target.try_(raw)
            report.accepted += 1
        except self.target.refusals:
            report.refused += 1
        except KeyboardInterrupt:
            raise
        except BaseException as e:  # a panic of a library in Rust is no Exception
            self._found(raw, e)
        took = time.process_time() - began
        if measured:
            report.worst_mib = max(report.worst_mib, tracemalloc.get_traced_memory()[1] / 2**20)
            tracemalloc.stop()
        else:
            report.worst_ms = max(report.worst_ms, 1000 * took)
            if took > self.limit:
                self._found(raw, TimeoutError(f"it took {took:.1f} s"))

    def _found(self, raw: bytes, error: BaseException) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "minisgl" in f.filename] or frames
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
        kind = f"{type(error).__name__} {place}".strip()
        if kind not in self.report.findings:
            path = self._out / f"{self.report.target}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}.bin"
            path.write_bytes(raw)
            print(f"{path}: {kind}: {str(error)[:200]!r}", file=sys.stderr)
            traceback.print_exception(error, limit=-6, file=sys.stderr)
        self.report.findings[kind] = self.report.findings.get(kind, 0) + 1


# ---------------- changes
def change(raw: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A few changes of bytes: bits, numbers of all widths, cuts, repetitions, parts of another input."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        at = rng.randrange(len(data)) if data else 0
        n = rng.choice((1, 2, 4, 8, 16, min(SMALL, len(data))))
        match rng.randrange(8):
            case 0 if data:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                width = rng.choice((1, 2, 4, 8))
                number = rng.choice(INTERESTING) & ((1 << 8 * width) - 1)
                data[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
            case 3 if rng.random() < 0.3:
                del data[at:]
            case 4:
                del data[at : at + n]
            case 5:
                data[at:at] = data[at : at + n] * rng.choice((1, 1, 2, 100))
            case 6:
                data[at:at] = rng.randbytes(n)
            case _:
                other = rng.choice(others)
                start = rng.randrange(len(other)) if other else 0
                data[at : at + rng.choice((0, n))] = other[start : start + rng.choice((n, SMALL))]
        del data[1 << 20 :]
    return bytes(data)


def inputs(target: Target, rng: random.Random) -> Callable[[], bytes]:
    """A source of changed inputs; the first are the seeds themselves."""
    seeds = target.seeds()
    first = iter(seeds)

    def one() -> bytes:
        raw = next(first, None)
        if raw is not None:
            return raw
        raw = rng.choice(seeds)
        if target.mutate is not None and rng.random() < 0.6:
            raw = target.mutate(raw, rng)
            return raw if rng.random() < 0.8 else change(raw, seeds, rng)
        return change(raw, seeds, rng)

    return one


# ---------------- engines
def bound_memory(megabytes: int) -> None:
    """Too large an allocation fails from here on."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (megabytes << 20), hard))


def run_random(trial: Trial, seconds: float, seed: int, most: int = sys.maxsize) -> Report:
    """For so many seconds, or `most` inputs."""
    one, end = inputs(trial.target, random.Random(seed)), time.monotonic() + seconds
    while time.monotonic() < end and trial.report.inputs < most:
        trial.run(one())
    return trial.report


def run_atheris(trial: Trial, seconds: float, seed: int, megabytes: int) -> None:
    """Guided by coverage of minisgl; ends the process."""
    rng, seeds = random.Random(seed), trial.target.seeds()
    corpus = trial.current.with_suffix(".corpus")
    corpus.mkdir(exist_ok=True)
    for i, raw in enumerate(seeds):
        (corpus / f"seed{i}").write_bytes(raw)

    def mutate(raw: bytes, most: int, number: int) -> bytes:
        rng.seed(number)
        if trial.target.mutate is not None and rng.random() < 0.4:
            return trial.target.mutate(raw, rng)[:most]
        if rng.random() < 0.3:
            return change(raw, seeds, rng)[:most]
        mutated: bytes = atheris.Mutate(raw, most)
        return mutated

    written = 0.0

    def test(raw: bytes) -> None:
        nonlocal written
        trial.run(raw)
        if time.monotonic() - written > 0.2:
            write(trial)
            written = time.monotonic()

    flags = [f"-max_total_time={int(seconds)}", f"-seed={seed or 1}", "-max_len=131072", "-verbosity=0", "-print_final_stats=0"]
    flags += [f"-rss_limit_mb={4 * megabytes}", "-timeout=100000", f"-artifact_prefix={trial.current.parent}/"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], test, custom_mutator=mutate)
    atheris.Fuzz()


def write(trial: Trial) -> None:
    """The report so far, for the parent: libFuzzer ends its process without coming back."""
    trial.current.with_suffix(".json").write_text(json.dumps(asdict(trial.report)))


def child(args: argparse.Namespace, name: str) -> None:
    """Runs in the process of one target."""
    trial = Trial(name, TARGETS[name], args.out, args.engine, args.limit, watched=True)
    for raw in trial.target.seeds():  # its imports and tables are no allocation of an input
        try:
            trial.target.try_(raw)
        except trial.target.refusals as e:
            print(f"a seed of {name} is refused: {e}", file=sys.stderr)
    if args.engine == "atheris":
        run_atheris(trial, args.seconds, args.seed, args.megabytes)
        return
    bound_memory(args.megabytes)
    try:
        run_random(trial, args.seconds, args.seed)
    finally:
        faulthandler.cancel_dump_traceback_later()
        write(trial)
        clean_up()


def supervise(args: argparse.Namespace, name: str) -> Report:
    """Run a target in a child; one that does not come back has left its input."""
    current = args.out / f"{name}.current"
    own = [f"--{key}={getattr(args, key)}" for key in ("seconds", "engine", "seed", "out", "limit", "megabytes")]
    done = subprocess.run([sys.executable, __file__, name, "--child", *own], check=False)
    told = current.with_suffix(".json")
    report = Report(**json.loads(told.read_text())) if told.exists() else Report(name, args.engine)
    if done.returncode and current.exists():
        kept = args.out / f"{name}-ended.bin"
        current.replace(kept)
        report.findings[f"the process ended with {done.returncode}: {kept}"] = 1
    current.unlink(missing_ok=True)
    told.unlink(missing_ok=True)
    return report


def commit() -> str:
    """Of the working tree, with a + if it has changed."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", default=["all"], metavar="TARGET", help=f"all or some of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--engine", choices=("random", "atheris"), default="random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=2.0, help="seconds that an input may take")
    parser.add_argument("--megabytes", type=int, default=512, help="of address space for all that an input makes")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--replay", type=Path, help="try one file on the target, without bounds")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = list(TARGETS) if args.targets == ["all"] else args.targets
    if unknown := set(names) - TARGETS.keys():
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if args.replay:
        print(TARGETS[names[0]].try_(args.replay.read_bytes()))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    if args.child:
        child(args, names[0])
        return 0
    found: dict[str, Any] = {}
    for name in names:
        report = supervise(args, name)
        found |= report.findings
        line = asdict(report) | {"worst_ms": round(report.worst_ms, 1), "worst_mib": round(report.worst_mib, 1)}
        print(json.dumps(line | {"commit": commit()}), flush=True)
    return bool(found)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
