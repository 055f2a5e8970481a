"""`python -m minisgl trace FILE` says what is in a trace, and how well the work of scheduler and device overlaps.

A spool that a killed server has left (FILE.events) becomes a trace with --out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minisgl.commands.parser import Parser
from minisgl.errors import UserError
from minisgl.tracing.assemble import MAGIC, assemble
from minisgl.tracing.summary import overlap, parse

DEFINITIONS = {
    "device_busy": "of the time from the first step's begin to the last one's end, the device computed a step",
    "scheduler_hidden": "of the scheduler's work in that time was done while the device computed",
}


def _parser() -> Parser:
    p = Parser(prog="minisgl trace", description="Say what is in a trace, and how well scheduler and device overlap.")
    p.add_argument("file", metavar="FILE", help="of POST /debug/trace or --trace; or FILE.events of a server that was killed")
    p.add_argument("--json", action="store_true", help="as JSON")
    p.add_argument("--out", metavar="FILE", help="write the trace of FILE.events")
    return p


def run(argv: list[str]) -> int:
    """Returns 0.  Raises UserError for a file that is no trace."""
    args = _parser().parse_args(argv)
    try:
        raw = Path(args.file).read_bytes()
        if raw.startswith(MAGIC):
            raw = assemble(raw)
            if args.out:
                Path(args.out).write_bytes(raw)
        elif args.out:
            raise UserError("--out is for the events of a server that was killed: this is a trace already")
    except OSError as e:
        raise UserError(f"{e.filename}: {e.strerror}") from e
    facts = about(raw)
    if args.json:
        print(json.dumps(facts))
        return 0
    print(f"{facts['steps']} steps in {facts['seconds']:.3f} s, {facts['requests']} requests, {facts['flows']} arrows")
    print(f"processes: {', '.join(facts['processes'])}")
    for name, meaning in DEFINITIONS.items():
        value = facts[name]
        print(f"{name:17} {'unknown: there are no steps' if value is None else f'{value:8.2%}  {meaning}'}")
    return 0


def about(raw: bytes) -> dict[str, Any]:
    """What is in a trace.  Raises UserError."""
    tracks = parse(raw)
    return {
        **overlap(tracks),
        "processes": sorted({track.process for track in tracks.values()} - {""}),
        "requests": sum(track.name.startswith("request ") for track in tracks.values()),
        "flows": sum(len(e.ends) for track in tracks.values() for e in track.events),
        "bytes": len(raw),
    }
