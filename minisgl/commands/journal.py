"""`python -m minisgl journal replay FILE` lives through a journal again, and `info FILE` says what is in it.

A replay that comes to another plan than the recorded one ends with exit code 1 and the first difference.
"""

from __future__ import annotations

import argparse
import bdb
import json
import os
import pdb  # noqa: T100 (what --pdb is for)
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

from minisgl.actors.scheduler.interface import Event, Output, SchedulerLimits
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.cache.no_cache import CACHES
from minisgl.commands.parser import Parser
from minisgl.errors import UserError
from minisgl.journal.files import parts_of
from minisgl.journal.format import Kind
from minisgl.journal.replay import Divergence, Replay, records, steps
from minisgl.journal.state import lines, state_of
from minisgl.simulation.policies import POLICIES

DIFFERS = 1  # exit code
_CHANGES: tuple[tuple[str, type, str, str], ...] = (  # flag, its type, field of SchedulerLimits, help
    ("--lag", int, "max_steps_in_flight", "plans in flight"),
    ("--step-tokens", int, "step_tokens", "token budget of a step"),
    ("--max-running", int, "slots", "slots"),
    ("--kv-tokens", int, "num_pages", "size of the KV cache in tokens"),
    ("--itl-target-ms", float, "itl_target", "0: off; -1: as the server does"),
    ("--order", str, "order", "prefix or arrival"),
    ("--cache", str, "cache", ", ".join(CACHES)),
)


def _replay_parser() -> Parser:
    p = Parser(prog="minisgl journal replay", description="Live through a journal again, and check every plan.")
    p.add_argument("file", metavar="FILE")
    p.add_argument("--step", type=int, metavar="N", help="show the state at step N")
    p.add_argument("--json", action="store_true", help="the state, or the comparison, as JSON")
    p.add_argument("--pdb", action="store_true", help="stop in the step machine, at --step or at the first plan")
    what_if = p.add_argument_group("what if: simulate the same requests under other settings")
    what_if.add_argument("--policy", metavar="NAME", choices=tuple(POLICIES), help=", ".join(POLICIES))
    for flag, kind, _, text in _CHANGES:
        what_if.add_argument(flag, type=kind, metavar="NAME" if kind is str else "N", help=text)
    return p


def _info_parser() -> Parser:
    p = Parser(prog="minisgl journal info", description="Say what is in a journal: parts, span, requests and sizes.")
    p.add_argument("file", metavar="FILE")
    p.add_argument("--json", action="store_true", help="as JSON")
    return p


def run(argv: list[str]) -> int:
    """Returns the exit code.  Raises UserError."""
    commands = {"replay": (_replay_parser, _replay), "info": (_info_parser, _info)}
    if argv[:1] in (["--help"], ["-h"]):
        print((__doc__ or "").strip())
        return 0
    if not argv or argv[0] not in commands:
        raise UserError(f"journal: one of {' and '.join(commands)} is expected, then FILE")
    parser, command = commands[argv[0]]
    args = parser().parse_args(argv[1:])
    if not parts_of(args.file):
        raise UserError(f"{args.file}: there is no such journal")
    try:
        return command(args)
    except OSError as e:
        raise UserError(f"{args.file}: cannot be read ({e.strerror})") from e
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise UserError(f"{args.file}: damaged, or written by another version ({type(e).__name__}: {e})") from e


def _replay(args: argparse.Namespace) -> int:
    flags = ["--policy", *(flag for flag, _, _, _ in _CHANGES)]
    changed = [flag for flag in flags if getattr(args, _name(flag)) is not None]
    if changed and (args.step is not None or args.pdb):
        raise UserError(f"{changed[0]} simulates other plans: use it without --step and --pdb")
    try:
        return _what_if(args) if changed else _live_again(args)
    except Divergence as e:
        print(f"{args.file}: the replay differs: {e}")
        return DIFFERS


def _live_again(args: argparse.Namespace) -> int:
    replay = Replay()
    if args.pdb:
        replay.call = _Debugged(args.step)
    first, size = None, sum(map(os.path.getsize, parts_of(args.file)))
    shown = _shown(steps(args.file, replay), replay, size, hidden=args.pdb)
    try:
        for _ in shown:
            plan = replay.output.plan
            if plan is not None:
                first = plan.step if first is None else first
                if plan.step == args.step:
                    state = state_of(replay)
                    shown.close()
                    print(json.dumps(state) if args.json else "\n".join(lines(state)))
                    return 0
    except bdb.BdbQuit:
        return 0
    last = replay.machine.counters.steps - 1 if replay.machine else None
    if args.step is not None:
        raise UserError(f"--step {args.step}: the journal has the steps {first} to {last}")
    torn = f"; the last {replay.torn} bytes are torn and left out" if replay.torn else ""
    print(f"{replay.steps} steps, {replay.requests} requests, all plans equal{torn}")
    return 0


def _shown(calls: Iterator[Replay], replay: Replay, size: int, hidden: bool) -> Generator[Replay]:
    """The same calls, with a bar on a terminal: how much of the `size` bytes has been lived through."""
    from tqdm import tqdm

    with tqdm(total=size, unit="B", unit_scale=True, dynamic_ncols=True, leave=False, disable=True if hidden else None) as bar:
        for call in calls:
            if replay.fed != bar.n:
                bar.n = replay.fed
                bar.set_postfix_str(f"{replay.steps:,} steps")
            yield call


class _Debugged:
    """Calls the machine under pdb when it is about to plan step `at` (None: the first plan)."""

    def __init__(self, at: int | None) -> None:
        self._at = at
        self._done = False

    def __call__(self, machine: StepMachine, inbox: list[Event], now: float, step: int | None) -> Output:
        if self._done or step is None or (self._at is not None and step != self._at):
            return machine.step(inbox, now)
        self._done = True
        print(f"step {step}: in StepMachine.step, with `inbox` and `now` as recorded; `c` goes on, `q` ends")
        found: Any = pdb.Pdb().runcall(machine.step, inbox, now)
        if found is None:
            raise bdb.BdbQuit
        return found  # type: ignore[no-any-return]


# ---------------- what if
def _name(flag: str) -> str:
    return flag[2:].replace("-", "_")


def _changed(args: argparse.Namespace, limits: SchedulerLimits) -> SchedulerLimits:
    if args.policy:
        limits = POLICIES[args.policy](limits)
    for flag, _, field, _ in _CHANGES:
        value: Any = getattr(args, _name(flag))
        if value is None:
            continue
        if field == "num_pages":
            value = value // limits.page_size
        elif field == "itl_target":
            value = None if value < 0 else value / 1000
        elif field == "cache":
            if value not in CACHES:
                raise UserError(f"--cache must be one of {', '.join(CACHES)}, got {value!r}")
            value = CACHES[value]
        elif field == "order" and value not in ("prefix", "arrival"):
            raise UserError(f"--order must be prefix or arrival, got {value!r}")
        if isinstance(value, int) and value < 1:
            raise UserError(f"{flag} must be at least {limits.page_size if field == 'num_pages' else 1}")
        limits = replace(limits, **{field: value})
    if limits.step_tokens <= limits.slots:
        raise UserError(f"--step-tokens ({limits.step_tokens}) must be larger than --max-running ({limits.slots})")
    return limits


def _what_if(args: argparse.Namespace) -> int:
    from minisgl.journal.whatif import Recorded
    from minisgl.simulation.report import comparison

    recorded = Recorded(args.file)
    limits = _changed(args, recorded.limits)
    results = {
        "recorded": recorded.summary(),
        "simulated": recorded.simulate(recorded.limits),
        "what if": recorded.simulate(limits),
    }
    if args.json:
        print(json.dumps(results | {"cost_model_error": recorded.error}))
        return 0
    print(comparison(results))
    print(f"The cost model is fitted to {len(recorded.works)} steps; it is off by {recorded.error:.1%} of their time.")
    if recorded.skipped or recorded.cached_pages:
        print(f"Not simulated: {recorded.skipped} requests and the cached pages with which the journal begins.")
    return 0


# ---------------- info
def _info(args: argparse.Namespace) -> int:
    parts: list[dict[str, Any]] = []
    for name in parts_of(args.file):
        about: dict[str, Any] = {"file": name, "bytes": os.path.getsize(name), "steps": 0, "requests": 0, "plans": None}
        with open(name, "rb") as file:
            for record in records(file):
                if record.kind == Kind.PART:
                    head = record.values
                    about |= {
                        key: head[key] for key in ("run", "part", "model", "hashed", "minisgl", "unix_time") if key in head
                    }
                elif record.kind == Kind.STEP:
                    now, events, _, (_, plan, *_) = record.values
                    about["steps"] += 1
                    about["requests"] += sum(event[0] == "add" for event in events)
                    about["first_time"] = about.get("first_time", now)
                    about["last_time"] = now
                    if plan is not None:
                        about["plans"] = [about["plans"][0] if about["plans"] else plan[0], plan[0]]
        parts.append(about)
    if args.json:
        print(json.dumps(parts))
        return 0
    for about in parts:
        print(f"{about['file']}: part {about.get('part')} of run {about.get('run')}, {about['bytes']:,} bytes")
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(about.get("unix_time", 0)))
        kind = "keyed hashes, no texts" if about.get("hashed") else "token ids"
        print(f"  model {about.get('model')}, minisgl {about.get('minisgl')}, journal begun {began}, with {kind}")
        seconds = about.get("last_time", 0.0) - about.get("first_time", 0.0)
        plans = "none" if about["plans"] is None else "{} to {}".format(*about["plans"])
        print(f"  {about['steps']:,} calls over {seconds:,.1f} s, plans {plans}, {about['requests']:,} requests")
    return 0
