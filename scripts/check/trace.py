"""Traces a server under a small load, checks the file, and prints how well scheduler and device overlap, as JSON.

    python3 scripts/check/trace.py [--model M] [--device cpu|cuda] [--kernels] [--out FILE]    starts a server, and ends it
    python3 scripts/check/trace.py --file FILE                                                 a trace that is there
    ... --bin TRACE_PROCESSOR                                                                  asks the same in SQL, too

Exit code 1: the file is not as it should be; what is wrong is in the JSON, under "faults".  Needs what the server needs.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from minisgl.commands.trace import about
from minisgl.tracing.summary import Track, parse
from scripts.lib.live_server import live_server

# The numbers of minisgl.tracing.summary in SQL: steps of one device never overlap, nor do slices of one thread at depth 0.
SQL = """
with
named as (
  select s.ts, s.dur, s.name, s.depth, coalesce(th.name, t.name) as track, coalesce(p1.name, p2.name) as process
  from slice s join track t on s.track_id = t.id
  left join thread_track tt on tt.id = t.id left join thread th using (utid) left join process p1 on p1.upid = th.upid
  left join process_track pt on pt.id = t.id left join process p2 on p2.upid = pt.upid),
step as (select ts, ts + dur as te from named where process = 'minisgl::worker0' and track = 'device' and name = 'step'),
span as (select min(ts) as a, max(te) as b from step),
work as (
  select max(ts, a) as ts, min(ts + dur, b) as te from named, span
  where process = 'minisgl::scheduler' and track = 'scheduler' and depth = 0 and name != 'idle' and ts < b and ts + dur > a)
select
  (select count(*) from step) as steps,
  (select 1.0 * sum(te - ts) from step) / (select b - a from span) as device_busy,
  (select 1.0 * sum(min(w.te, s.te) - max(w.ts, s.ts)) from work w join step s on w.ts < s.te and s.ts < w.te)
    / (select sum(te - ts) from work) as scheduler_hidden,
  (select count(*) from flow) as flows;
"""


def faults(tracks: dict[int, Track]) -> Iterator[str]:
    """What is wrong with a trace whose slices nest, which `parse` has seen: times, arrows, and the tracks of requests."""
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    for track in tracks.values():
        newest = 0
        for e in track.events:
            if not newest <= e.begin <= e.end:
                yield f"the clock of {track.process} {track.name} goes back at {e.begin}"
            newest = e.begin
            for flows, at in ((e.starts, starts), (e.ends, ends)):
                for flow in flows:
                    if flow in at:
                        yield f"flow {flow} has two ends of one kind"
                    at[flow] = e.begin
    if unresolved := starts.keys() ^ ends.keys():
        yield f"flows without one of their ends: {sorted(unresolved)[:9]}"
    for flow in starts.keys() & ends.keys():
        if starts[flow] > ends[flow]:
            yield f"flow {flow} goes back in time"
    for track in tracks.values():
        if track.name.startswith("request "):
            names = [e.name for e in track.events]
            tokens = [e.args["n"] for e in track.events if e.name == "token"]
            decode = [e.args["tokens"] for e in track.events if e.name == "decode"]
            if tokens != list(range(len(tokens))) or (tokens and decode != [len(tokens)]):
                yield f"{track.name} has not the tokens that it says"
            if names.count("end") > 1 or [n for n in names if n in ("queued", "prefill", "decode")] != [
                n for n in ("queued", "prefill", "decode") if n in names
            ]:
                yield f"{track.name} has its parts in another order: {names[:9]}"


def ask(url: str, path: str, body: Any = None, method: str = "POST") -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=300) as answer:
        return bytes(answer.read())


def traced(flags: list[str], steps: int, kernels: bool, requests: int, tokens: int) -> bytes:
    """The trace of a server with these flags under a load of so many requests."""
    bodies = [
        {"prompt": [10 + (7 * i + k) % 200 for k in range(20 + 30 * (i % 7))], "max_tokens": tokens, "ignore_eos": True}
        for i in range(requests)
    ]
    with live_server(*flags) as url, ThreadPoolExecutor(requests + 1) as pool:
        ask(url, "/v1/completions", bodies[0] | {"max_tokens": 8})  # what is compiled or captured for the first one
        trace = pool.submit(ask, url, f"/debug/trace?steps={steps}&seconds=60{'&kernels=1' * kernels}")
        while not json.loads(ask(url, "/debug/trace", method="GET"))["running"]:
            time.sleep(0.01)
        for answer in [pool.submit(ask, url, "/v1/completions", body) for body in bodies]:
            answer.result()
        return trace.result()


def in_sql(binary: str, raw: bytes) -> dict[str, float]:
    """The numbers as a trace processor has them."""
    with tempfile.TemporaryDirectory() as folder:
        query, file = Path(folder, "query.sql"), Path(folder, "trace")
        query.write_text(SQL)
        file.write_bytes(raw)
        done = subprocess.run([binary, "-q", str(query), str(file)], capture_output=True, text=True, check=True)
    header, row, *_ = [line for line in csv.reader(io.StringIO(done.stdout)) if line]
    return dict(zip(header, map(float, row), strict=True))


def main() -> int:
    p = argparse.ArgumentParser(allow_abbrev=False, description="Trace a server, check the file, print the overlap as JSON.")
    p.add_argument("--model", default="", help="default: the embedded one")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    p.add_argument("--lag", default="2")
    p.add_argument("--kernels", action="store_true", help="with kernels by torch's profiler")
    p.add_argument("--requests", type=int, default=16)
    p.add_argument("--tokens", type=int, default=64, help="of each answer")
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--file", help="check this trace, and start no server")
    p.add_argument("--out", help="keep the trace here")
    p.add_argument("--bin", help="a trace processor, to ask in SQL")
    args = p.parse_args()
    if args.file:
        raw = Path(args.file).read_bytes()
    else:
        flags = ["--device", args.device, "--lag", args.lag, *(["--model", args.model] if args.model else [])]
        raw = traced(flags, args.steps, args.kernels, args.requests, args.tokens)
    if args.out:
        Path(args.out).write_bytes(raw)
    found = list(faults(tracks := parse(raw)))
    facts: dict[str, Any] = about(raw) | {"faults": found}
    facts["kernels"] = sum(len(t.events) for t in tracks.values() if t.name.startswith(("stream ", "operators ")))
    if args.bin:
        facts["sql"] = in_sql(args.bin, raw)
        for name in ("steps", "device_busy", "scheduler_hidden", "flows"):
            if abs(facts["sql"][name] - facts[name]) > 1e-6:
                found.append(f"{name} is {facts['sql'][name]} in SQL")
    print(json.dumps(facts))
    return int(bool(found) or not facts["steps"])


if __name__ == "__main__":
    sys.exit(main())
