"""Runs `minisgl doctor`: a table of what is here and used, what that means, and what to do where something better exists."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from minisgl.commands.doctor import cpu, driver, gpu, limits, software
from minisgl.commands.doctor.rows import Row, rows_of
from minisgl.commands.parser import Parser


def run(argv: list[str]) -> int:
    """Print the table.  Returns 0 if a model can be served here, else 1."""
    p = Parser(
        prog="minisgl doctor",
        description="Say what is here and used, and how to get what is better.  Exit code 1 if no model can be served.",
    )
    p.add_argument("--model", metavar="PATH_OR_HUB_ID", help="say also what this model would use, as for serve")
    p.add_argument("--tp", type=int, default=1, metavar="N", help="with so many ranks (%(default)s)")
    p.add_argument("--data-dir", default="", metavar="DIR", help="look at the space there")
    p.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    p.add_argument("--port", type=int, default=8000, metavar="PORT", help="the port that a server would take (%(default)s)")
    args = p.parse_args(argv)
    if args.tp < 1:
        p.error(f"--tp must be at least 1, got {args.tp}")
    rows = list(examine(args.port, tp=args.tp, data_dir=args.data_dir, name=args.model))
    blocking = [row.feature for row in rows if row.needed and row.state == "missing"]
    what = f"{args.model} " if args.model else "a model "
    if args.json:
        print(json.dumps({"ok": not blocking, "checks": [asdict(row) for row in rows]}, indent=2))
        return 1 if blocking else 0
    width = max(len(row.feature) for row in rows)
    print(f"{'feature':<{width}}  state    found")
    for row in rows:
        print(f"{row.feature:<{width}}  {row.state:<7}  {row.found}")
        if row.means:
            print(f"{'':<{width}}           {row.means}")
        if row.mend:
            print(f"{'':<{width}}           {_LABELS.get(row.state, 'mend')}: {row.mend}")
    print(f"{what}cannot be served here: {', '.join(blocking)}" if blocking else f"{what}can be served here")
    return 1 if blocking else 0


_LABELS = {"absent": "to have it", "ok": "or", "better": "better"}


def examine(port: int, *, tp: int = 1, data_dir: str = "", name: str | None = None) -> Iterator[Row]:
    """All rows, in the order of the table."""
    torch, asked, around = software.Torch(), driver.ask(), driver.look()
    yield from rows_of(software.checks(torch))
    yield from rows_of(cpu.checks(tp))
    yield from rows_of(gpu.checks(asked, around, torch))
    yield from rows_of(limits.checks(port, data_dir))
    if name is not None:
        from minisgl.commands.doctor import model  # needs numpy

        yield from rows_of(model.checks(name, tp, asked))
