"""Runs `minisgl explain JOURNAL|URL`: tells in English what the scheduler decided at each step, and why.

A journal is replayed here; a live server is watched, and its own viewer replays what the scheduler does (GET /debug/explain).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

from minisgl.commands.chat import add_key_flags, server_of
from minisgl.commands.chat_http import ChatError, Server
from minisgl.commands.explain.words import narrate, sentences, waiting
from minisgl.commands.parser import Parser
from minisgl.errors import UserError
from minisgl.journal.files import parts_of
from minisgl.journal.replay import Divergence, Replay, steps
from minisgl.journal.witness import Step, Watch, plain, step_of

DIFFERS = NO_SERVER = 1  # exit codes
_NEXT, _SECONDS = 50, 60.0  # of a live server
_SILENCE = 30.0  # seconds of a server that says nothing at all, not even that it rests
_RANGE = re.compile(r"(\d+)(?:-(\d*))?")


def run(argv: list[str]) -> int:
    """Print the story.  Returns 0, or DIFFERS where the replay comes to another decision.  Raises UserError."""
    p = Parser(prog="minisgl explain", description="Tell in English what the scheduler decided, step by step, and why.")
    what = "a file that serve --journal or POST /debug/journal/start has written; or the URL of a live server"
    p.add_argument("journal", metavar="JOURNAL|URL", help=what)
    p.add_argument("--steps", metavar="A-B", help="of a journal only these steps: 7, 7-20 or 7-")
    p.add_argument("--next", type=_count, metavar="N", help=f"of a live server the next N steps ({_NEXT})")
    p.add_argument("--seconds", type=_seconds, metavar="S", help=f"and no longer than this ({_SECONDS:g})")
    p.add_argument("--request", type=int, metavar="ID", help="only what concerns this request, by its number in the journal")
    p.add_argument("--json", action="store_true", help="the facts instead, one JSON object a call of the machine")
    add_key_flags(p)
    args = p.parse_args(argv)
    if re.match(r"https?://", args.journal):
        if args.steps is not None:
            p.error("--steps is of a journal; of a live server --next N tells the next N steps")
        return _live(args)
    for name in ("next", "seconds", "api_key", "api_key_file"):
        if getattr(args, name) is not None:
            p.error(f"--{name.replace('_', '-')} is of a live server, and {args.journal} is no URL (http://...)")
    if not parts_of(args.journal):
        raise UserError(f"{args.journal}: there is no such journal")
    first, last = _bounds(args.steps)
    head: dict[str, Any] = {}
    try:
        _print(_between(witnessed(args.journal, head), first, last), head, args)
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


def _print(told: Iterator[Step], head: dict[str, Any], args: argparse.Namespace) -> None:
    if args.request is not None:
        told = (mine for step in told if (mine := of_request(step, args.request)) is not None)
    if args.json:
        for step in told:
            print(json.dumps(plain(step)), flush=True)
        return
    first = next(told, None)
    if head.get("hashed"):
        print("(a journal of hashes: a page that was evicted cannot be told from one that never was in the cache)")
    if first is not None:
        for line in narrate(chain((first,), told), head.get("time", 0.0)):
            print(line, flush=True)


# ---------------- a live server
def _live(args: argparse.Namespace) -> int:
    """Tell the next steps of a server.  Returns 0, or NO_SERVER."""
    head: dict[str, Any] = {}
    left = [args.next or _NEXT]
    try:
        args.url = args.journal
        _print(_told(server_of(args), args, head, left), head, args)
    except ChatError as e:
        print(f"minisgl explain: {e}", file=sys.stderr)
        return NO_SERVER
    except (KeyError, TypeError, ValueError) as e:
        print(f"minisgl explain: what {args.journal} sends is no explanation ({type(e).__name__}: {e})", file=sys.stderr)
        return NO_SERVER
    except KeyboardInterrupt:
        return 0
    if left[0]:
        seconds = f"{args.seconds or _SECONDS:g} s"
        print(f"minisgl explain: {left[0]} steps fewer than asked for have come within {seconds} (--seconds)", file=sys.stderr)
    return 0


def _told(server: Server, args: argparse.Namespace, head: dict[str, Any], left: list[int]) -> Iterator[Step]:
    """The facts of a server's calls as they come.  `left`: steps that have not come yet."""
    end = time.monotonic() + (args.seconds or _SECONDS)
    for line in server.lines(f"/debug/explain?steps={left[0]}", _SILENCE):
        if line.strip():
            values = json.loads(line)
            if untold := values.get("untold"):
                print(f"minisgl explain: {untold} calls of the scheduler came too fast to be told", file=sys.stderr)
                continue
            head["time"] = values.pop("began")
            step = step_of(values)
            left[0] -= step.number is not None
            yield step
        if time.monotonic() > end:
            return


# ---------------- a journal
def witnessed(path: str, head: dict[str, Any]) -> Iterator[Step]:
    """The facts of every recorded call; `head` gets the values of its first part.  Raises Divergence."""
    watch, replay = Watch(), Replay()
    replay.call = watch
    for _ in steps(path, replay):
        head.update({} if head else replay.head)
        step = watch.steps.pop()
        if replay.head["hashed"]:  # an evicted page is not known again
            step.joins = [replace(j, why="gone") if j.why in ("new", "evicted") else j for j in step.joins]
        yield step


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


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of steps: 1 to 1000000")
    return int(text)


def _seconds(text: str) -> float:
    try:
        if 0.1 <= (seconds := float(text)) <= 86_400:
            return seconds
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0.1 to 86400")
