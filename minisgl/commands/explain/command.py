"""Runs `minisgl explain JOURNAL`: replays a journal and tells in English what the scheduler decided at each step, and why."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import chain
from typing import Any

from minisgl.actors.scheduler.interface import Event, Output
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.commands.explain.witness import Step, Witness
from minisgl.commands.explain.words import narrate, sentences, waiting
from minisgl.commands.parser import Parser
from minisgl.errors import UserError
from minisgl.journal.files import parts_of
from minisgl.journal.replay import Divergence, Replay, steps

DIFFERS = 1  # exit code
_RANGE = re.compile(r"(\d+)(?:-(\d*))?")


def run(argv: list[str]) -> int:
    """Print the story.  Returns 0, or DIFFERS where the replay comes to another decision.  Raises UserError."""
    p = Parser(prog="minisgl explain", description="Tell in English what the scheduler decided, step by step, and why.")
    p.add_argument("journal", metavar="JOURNAL", help="a file that serve --journal or POST /debug/journal/start has written")
    p.add_argument("--steps", metavar="A-B", help="only these steps: 7, 7-20 or 7-")
    p.add_argument("--request", type=int, metavar="ID", help="only what concerns this request, by its number in the journal")
    p.add_argument("--json", action="store_true", help="the facts instead, one JSON object a call of the machine")
    args = p.parse_args(argv)
    if re.match(r"https?://", args.journal):
        raise UserError(
            f"{args.journal}: a live server is explained from its journal: POST /debug/journal/start, or serve --journal FILE; "
            "then `minisgl explain FILE` where the file is"
        )
    if not parts_of(args.journal):
        raise UserError(f"{args.journal}: there is no such journal")
    first, last = _bounds(args.steps)
    head: dict[str, Any] = {}
    told = _between(witnessed(args.journal, head), first, last)
    if args.request is not None:
        told = (mine for step in told if (mine := of_request(step, args.request)) is not None)
    try:
        if args.json:
            for step in told:
                print(json.dumps(_plain(step)))
        else:
            _print(told, head)
    except Divergence as e:
        print(f"{args.journal}: the replay differs, and what follows cannot be told: {e}")
        return DIFFERS
    except BrokenPipeError:
        raise
    except OSError as e:
        raise UserError(f"{args.journal}: cannot be read ({e.strerror})") from e
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise UserError(f"{args.journal}: damaged, or written by another version ({type(e).__name__}: {e})") from e
    return 0


def _print(told: Iterator[Step], head: dict[str, Any]) -> None:
    first = next(told, None)
    if head.get("hashed"):
        print("(a journal of hashes: a page that was evicted cannot be told from one that never was in the cache)")
    if first is not None:
        for line in narrate(chain((first,), told), head.get("time", 0.0)):
            print(line)


def witnessed(path: str, head: dict[str, Any]) -> Iterator[Step]:
    """The facts of every recorded call; `head` gets the values of its first part.  Raises Divergence."""
    watch, replay = _Watch(), Replay()
    replay.call = watch
    for _ in steps(path, replay):
        head.update({} if head else replay.head)
        if replay.head["hashed"]:  # an evicted page is not known again
            joins = [replace(j, why="gone") if j.why in ("new", "evicted") else j for j in watch.last.joins]
            watch.last.joins = joins
        yield watch.last


class _Watch:
    """Calls the machine of a replay with a Witness beside it, another one for each machine."""

    def __init__(self) -> None:
        self.last = Step()
        self._witness: Witness | None = None

    def __call__(self, machine: StepMachine, inbox: list[Event], now: float, step: int | None) -> Output:
        if self._witness is None or self._witness.machine is not machine:
            self._witness = Witness(machine)
        output, self.last = self._witness.step(inbox, now)
        return output


def of_request(step: Step, uid: int) -> Step | None:
    """The facts that concern one request; None if there are none."""
    arrived = [pair for pair in step.arrived if pair[0] == uid]
    mine = replace(step, flushed=False, evicted=0, withheld=0, arrived=arrived)
    for name in ("joins", "chunks", "retractions", "ends", "waits"):
        setattr(mine, name, [fact for fact in getattr(step, name) if fact.uid == uid])
    return mine if sentences(mine) or waiting(mine) else None


def _bounds(text: str | None) -> tuple[int, int]:
    """First and last step of "7", "7-20" or "7-".  Raises UserError."""
    if text is None:
        return -1, 1 << 62
    found = _RANGE.fullmatch(text)
    if found is None:
        raise UserError(f"--steps {text}: write 7, 7-20 or 7-")
    first = int(found[1])
    return first, first if found[2] is None else int(found[2] or 1 << 62)


def _between(told: Iterable[Step], first: int, last: int) -> Iterator[Step]:
    """The calls whose plans are of these steps, and those without a plan between them."""
    at = -1
    for step in told:
        at = at if step.number is None else step.number
        if first <= at <= last:
            yield step
        elif at > last:
            return


def _plain(step: Step) -> dict[str, object]:
    return asdict(step) | {"ends": [asdict(e) | {"finish": e.finish.name} for e in step.ends]}
