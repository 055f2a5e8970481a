"""The path from a sampled token to a client's socket, without a model: CPU time, tokens a second, gaps, memory.

    .venv/bin/python scripts/bench/api.py [stream] [flood] [page] [gap] [memory]

The server and all its processes are real except the worker (fast_worker.py: a token for each running request at a set
pace).  The clients are raw sockets in this process.  CPU times are those of /proc.  One JSON line per measure.

stream   256 streams at 100 tokens a second each: CPU time of every process per streamed token
flood    256 streams at more and more tokens a second, until the clients no longer get them: streamed tokens a second
page     256 streams at `--rate`, in turns with and without an open page (GET /debug/live): tokens a second, CPU time
gap      longest time between two pieces of a running stream while prompts of 47,000 tokens are tokenized, and without them
memory   resident memory of every process after more and more short requests (--requests), and its slope
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import numpy as np

STREAMS = 256
LONG_TOKENS = 47_000
TICK = os.sysconf("SC_CLK_TCK")
_END = b"\r\n0\r\n\r\n"  # of a chunked body


# ---------------- the server
def serve(rate: float, tokenizers: int) -> int:
    """The main function of the server's process.  Prints its port."""
    from minisgl.commands.serve import _Server, bind
    from minisgl.config import Config, EngineConfig, ServerConfig
    from minisgl.model.checkpoint.resolve import resolve
    from scripts.lib import fast_worker

    model = replace(resolve(None), max_context=65_536)
    engine = EngineConfig(max_running=512, step_tokens=8192, kv_tokens=4_000_000, page_size=64)
    config = Config(model, engine, ServerConfig(max_open_requests=8192, num_tokenizers=tokenizers))
    with bind("127.0.0.1", 0) as sock:
        print(sock.getsockname()[1], flush=True)
        return asyncio.run(
            _Server(config, sock, time.monotonic(), functools.partial(fast_worker.make_worker, rate=rate)).main()
        )


class Server:
    """The server's process and its children."""

    def __init__(self, port: int, pid: int) -> None:
        self.address = ("127.0.0.1", port)
        self.pids = {"api": pid}
        with open(f"/proc/{pid}/task/{pid}/children") as f:
            for child in map(int, f.read().split()):
                with open(f"/proc/{child}/cmdline") as g:
                    if "minisgl::" in (name := g.read()):
                        self.pids[name.split("::")[1].rstrip("\0 ")] = child

    def cpu(self) -> dict[str, float]:
        """Seconds that each process has run."""
        times = {}
        for name, pid in self.pids.items():
            with open(f"/proc/{pid}/stat") as f:
                fields = f.read().rsplit(")", 1)[1].split()
            times[name] = (int(fields[11]) + int(fields[12])) / TICK
        return times

    def memory(self) -> dict[str, float]:
        """MB that each process alone occupies."""
        sizes = {}
        for name, pid in self.pids.items():
            with open(f"/proc/{pid}/smaps_rollup") as f:
                sizes[name] = sum(int(line.split()[1]) for line in f if line.startswith("Private")) / 1024
        return sizes

    def post(self, body: dict[str, object]) -> bytes:
        raw = json.dumps(body).encode()
        return (
            b"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(raw), raw)
        )

    def get(self, path: str) -> bytes:
        with socket.create_connection(self.address) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n".encode())
            return b"".join(iter(lambda: sock.recv(1 << 16), b""))


@contextmanager
def server(rate: float, tokenizers: int = 1) -> Iterator[Server]:
    command = [sys.executable, __file__, "--serve", str(rate), "--num-tokenizers", str(tokenizers)]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            ready = Server(port, process.pid)
            while b"200" not in ready.get("/ready").split(b"\r\n", 1)[0]:
                time.sleep(0.1)
            yield Server(port, process.pid)
        except Exception:
            log.seek(0)
            sys.stderr.write(log.read())
            raise
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


# ---------------- the clients
class Streams:
    """Streaming requests, with counts of their events."""

    def __init__(self, server: Server, n: int, tokens: int) -> None:
        self.selector = selectors.EpollSelector()
        self.events = np.zeros(n, np.int64)
        self.last = np.zeros(n)  # when the latest piece came
        self.gaps = np.zeros(n)  # the longest time between two pieces
        self.open = n
        self._tails = [b""] * n
        body = {"prompt": "Tell me a story.", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        for i in range(n):
            sock = socket.create_connection(server.address)
            sock.sendall(server.post(body))
            sock.setblocking(False)
            self.selector.register(sock, selectors.EVENT_READ, i)

    def poll(self, seconds: float) -> None:
        for key, _ in self.selector.select(seconds):
            i, sock = key.data, key.fileobj
            assert isinstance(sock, socket.socket)
            data = sock.recv(1 << 18)
            now = time.monotonic()
            if not self.last[i] and not self.events[i] and b" 200 " not in data[:20]:
                raise RuntimeError(f"a stream was refused: {data[:400]!r}")
            text = self._tails[i] + data
            self.events[i] += text.count(b"data: ")
            if self.last[i]:
                self.gaps[i] = max(self.gaps[i], now - self.last[i])
            self.last[i] = now
            self._tails[i] = text[-5:]
            if not data or text.endswith(_END):
                self.selector.unregister(sock)
                sock.close()
                self.open -= 1
                self.last[i] = 0.0

    def start(self) -> None:
        """Read until every stream has begun."""
        while not self.events.all():
            self.poll(1.0)

    def follow(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.open and time.monotonic() < end:
            self.poll(0.05)

    def close(self) -> None:
        for key in list(self.selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self.selector.close()


def report(measure: str, value: object, unit: str, must: str, **config: object) -> None:
    print(json.dumps({"measure": measure, "value": value, "unit": unit, "must": must, "config": config}), flush=True)


# ---------------- the measures
@contextmanager
def looking_on(server: Server) -> Iterator[list[int]]:
    """Somebody who reads GET /debug/live, as an open page does.  Yields the counts of events and bytes."""
    read = [0, 0]
    sock = socket.create_connection(server.address)

    def follow() -> None:
        while data := sock.recv(1 << 18):
            read[0] += data.count(b"\n\n")
            read[1] += len(data)

    sock.sendall(b"GET /debug/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    while read[0] < 3:  # the viewer has begun
        time.sleep(0.05)
    yield read
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    thread.join(2.0)
    sock.close()


def run_streams(rate: float, seconds: float, page: bool = False) -> dict[str, Any]:
    """STREAMS streams to their end, `rate` tokens a second each; counted from when all of them have begun.

    `page`: one is open.
    """
    tokens = int(rate * seconds)
    with server(rate) as started, looking_on(started) if page else nullcontext([0, 0]) as events:
        s = Server(started.address[1], started.pids["api"])  # with the viewer
        streams = Streams(s, STREAMS, tokens)
        streams.start()
        read = list(events)
        before, start, begun = s.cpu(), time.monotonic(), int(streams.events.sum())
        mine = resource.getrusage(resource.RUSAGE_SELF)
        streams.follow(4 * seconds + 30)
        wall, after, mine_after = time.monotonic() - start, s.cpu(), resource.getrusage(resource.RUSAGE_SELF)
        read = [now - then for now, then in zip(events, read, strict=True)]
        streams.close()
    if streams.open:
        raise RuntimeError(f"{streams.open} streams did not end")
    said = STREAMS * tokens - begun
    client = mine_after.ru_utime + mine_after.ru_stime - mine.ru_utime - mine.ru_stime
    return {
        "cpu": {name: round(1e6 * (after[name] - before[name]) / said, 2) for name in before},
        "client": round(1e6 * client / said, 2),
        "tokens_per_second": round(said / wall),
        "target": round(rate * STREAMS),
        "tokens_per_event": round(said / (int(streams.events.sum()) - begun), 2),
        "updates_per_second": round(read[0] / wall, 1),
        "update_bytes": round(read[1] / max(1, read[0])),
    }


def measure_stream(args: argparse.Namespace) -> None:
    for _ in range(args.repeats):
        r = run_streams(args.rate, args.seconds)
        for name, must in (("api", "<= 15"), ("detokenizer", "<= 6"), ("scheduler", ""), ("worker0", "")):
            report(f"cpu_{name}", r["cpu"][name], "us per streamed token", must, **{k: r[k] for k in r if k != "cpu"})


def measure_flood(args: argparse.Namespace) -> None:
    best = 0
    for rate in (120, 160, 200, 250, 300, 400):
        r = run_streams(rate, args.seconds)
        reached = r.pop("tokens_per_second")
        report("flood", reached, "tokens/s", ">= 40000", streams=STREAMS, **r)
        if reached <= 1.02 * best:
            break
        best = reached


def measure_page(args: argparse.Namespace) -> None:
    """Pairs of runs, one of each kind, the order turned round each time; the difference of each pair."""
    losses = []
    for i in range(args.repeats):
        found = {page: run_streams(args.rate, args.seconds, page) for page in ((False, True) if i % 2 else (True, False))}
        reached = {page: r["tokens_per_second"] for page, r in found.items()}
        losses.append(100 * (1 - reached[True] / reached[False]))
        cpu = {name: [found[False]["cpu"].get(name, 0), us] for name, us in found[True]["cpu"].items()}
        more = {name: found[True][name] for name in ("updates_per_second", "update_bytes")}
        report("page", round(losses[-1], 2), "% of throughput", "<= 2", tokens_per_second=reached, cpu_us_per_token=cpu, **more)
    report("page_mean", round(float(np.mean(losses)), 2), "% of throughput", "<= 2", error=round(float(np.std(losses)), 2))


def send_each(s: Server, raw: bytes, n: int) -> None:
    """Send a request `n` times, one after the other.  Raises RuntimeError if one is refused."""
    for _ in range(n):
        with socket.create_connection(s.address) as sock:
            sock.sendall(raw)
            if b" 200 " not in (answer := sock.recv(1 << 16))[:20]:
                raise RuntimeError(f"refused: {answer!r}")


def measure_gap(args: argparse.Namespace) -> None:
    for prompts in (0, 8):
        with server(20, args.num_tokenizers) as s:
            text = "The quick brown fox jumps over the lazy dog. " * (LONG_TOKENS // 10)
            long = s.post({"prompt": text, "max_tokens": 1, "ignore_eos": True})
            streams = Streams(s, STREAMS, 2000)
            streams.start()
            streams.follow(1.0)
            streams.gaps[:] = 0
            sender = threading.Thread(target=send_each, args=(s, long, prompts))
            sender.start()
            streams.follow(8.0)
            sender.join()
            gaps = 1000 * streams.gaps
            streams.close()
        values = {"p50": round(float(np.median(gaps)), 1), "max": round(float(gaps.max()), 1)}
        report(
            "gap",
            values,
            "ms, longest of each stream",
            "< 20 above the pace",
            pace_ms=50,
            long_prompts=prompts,
            streams=STREAMS,
            num_tokenizers=args.num_tokenizers,
        )


async def short_requests(s: Server, n: int) -> None:
    """`n` requests over 32 connections, every other one streamed."""
    left = iter(range(n))

    async def client() -> None:
        reader, writer = await asyncio.open_connection(*s.address)
        for i in left:
            writer.write(s.post({"prompt": f"{i} Tell me", "max_tokens": 4, "ignore_eos": True, "stream": i % 2 == 0}))
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in head[:20]:
                raise RuntimeError(head)
            if i % 2 == 0:
                await reader.readuntil(_END)
            else:
                length = next(x for x in head.lower().split(b"\r\n") if x.startswith(b"content-length"))
                await reader.readexactly(int(length.split(b":")[1]))
        writer.close()

    await asyncio.gather(*(client() for _ in range(32)))


def measure_memory(args: argparse.Namespace) -> None:
    parts = 20
    with server(0) as s:
        asyncio.run(short_requests(s, args.requests // 20))  # warm
        sizes = [s.memory()]
        start, before = time.monotonic(), s.cpu()
        for _ in range(parts):
            asyncio.run(short_requests(s, args.requests // parts))
            sizes.append(s.memory())
        wall, after = time.monotonic() - start, s.cpu()
    x = np.arange(parts // 2 + 1) * args.requests // parts
    for name in ("api", "detokenizer", "tokenizer", "scheduler"):
        y = np.array([m[name] for m in sizes])[-len(x) :] * 1024 * 1024
        slope, error = np.polyfit(x, y, 1, cov=True)[0][0], np.sqrt(np.polyfit(x, y, 1, cov=True)[1][0][0])
        report(
            f"memory_{name}",
            {when: round(sizes[at][name], 1) for when, at in (("before", 0), ("middle", parts // 2), ("after", -1))},
            "MB private",
            "flat",
            bytes_per_request=f"{slope:.1f} +- {2 * error:.1f} (second half)",
            cpu_us_per_request=round(1e6 * (after[name] - before[name]) / args.requests),
            requests=args.requests,
            requests_per_second=round(args.requests / wall),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measures = {
        "stream": measure_stream,
        "flood": measure_flood,
        "page": measure_page,
        "gap": measure_gap,
        "memory": measure_memory,
    }
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help=f"of {', '.join(measures)}; default: all")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of every stream")
    parser.add_argument("--rate", type=float, default=100.0, help="tokens a second of every stream of `stream`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--num-tokenizers", type=int, default=1)
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        sys.exit(serve(args.serve, args.num_tokenizers))
    unknown = set(args.measures) - set(measures)
    if unknown:
        parser.error(f"unknown measure {', '.join(sorted(unknown))}")
    from scripts.lib.reference import provenance  # not in the server's process: it imports torch

    print(json.dumps(provenance()), flush=True)
    for name in args.measures or measures:
        measures[name](args)


if __name__ == "__main__":
    main()
