"""The embedded model on the CPU against llama.cpp and transformers, in one run on one machine, the contenders by turns.

    .venv/bin/python scripts/bench/cpu.py [--rounds 3] [--tokens 48] [--streams 1 4 16 64] [--peers DIRECTORY]

llama.cpp is built from the llama-cpp-python of PyPI in a virtual environment of its own (once; takes minutes), and reads the
same GGUF file through its own batch interface: as many sequences as there are streams, one token of each in every call, which
is what its server does with as many slots.  transformers runs in float32 from this repository's environment.  Ours is measured
three times: the bare loop of its CPU worker, which llama.cpp's figures compare with; the whole engine with all its processes,
offline; and the server, over HTTP, with answers streamed to a client on the same cores.

One JSON line per measure; ratios are of medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from scripts.lib.live_server import live_server

PACKAGE = "llama-cpp-python==0.3.36"
PROMPT = 32  # tokens before decoding
LONG = 512  # of the prefill that is measured


def ids(n: int, seed: int) -> list[int]:
    """Tokens from anywhere in the vocabulary: their values do not matter to anybody's speed."""
    return [(7919 * (i + 1) + 104_729 * seed) % 49_000 + 20 for i in range(n)]


class LlamaCpp:
    """Runs in the other environment: answers lines of JSON."""

    def __init__(self, path: str, streams: int, threads: int) -> None:
        import llama_cpp

        self.lib: Any = llama_cpp
        model = self.lib.llama_model_default_params()
        context = self.lib.llama_context_default_params()
        self.lib.llama_log_set(self._quiet, None)
        self.model = self.lib.llama_model_load_from_file(path.encode(), model)
        context.n_ctx = streams * LONG  # each sequence has its part
        context.n_batch = context.n_ubatch = LONG
        context.n_seq_max = streams
        context.n_threads = context.n_threads_batch = threads
        self.context = self.lib.llama_init_from_model(self.model, context)
        self.batch = self.lib.llama_batch_init(LONG, 0, 1)

    @property
    def _quiet(self) -> Any:
        self._callback = self.lib.llama_log_callback(lambda *_: None)
        return self._callback

    def feed(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, whether logits are wanted)."""
        b = self.batch
        b.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, position, 1, wanted
            b.seq_id[i][0] = sequence
        if self.lib.llama_decode(self.context, b):
            raise RuntimeError("llama_decode failed")

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def decode(self, streams: int, tokens: int) -> float:
        """Tokens per second of greedy decoding."""
        import numpy as np

        self.clear()
        for s in range(streams):
            self.feed([(t, i, s, i == PROMPT - 1) for i, t in enumerate(ids(PROMPT, s))])
        vocabulary = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        chosen = [1] * streams
        start = time.perf_counter()
        for step in range(tokens):
            self.feed([(chosen[s], PROMPT + step, s, True) for s in range(streams)])
            for s in range(streams):
                row = np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, s), (vocabulary,))
                chosen[s] = int(row.argmax())
        return streams * tokens / (time.perf_counter() - start)

    def prefill(self) -> float:
        self.clear()
        start = time.perf_counter()
        self.feed([(t, i, 0, i == LONG - 1) for i, t in enumerate(ids(LONG, 0))])
        self.lib.llama_get_logits_ith(self.context, LONG - 1)
        return LONG / (time.perf_counter() - start)


class Loop:
    """The CPU worker's runner without the other processes."""

    def __init__(self, streams: int, threads: int, quantization: str) -> None:
        from minisgl.model.common.host import prepare_environment

        prepare_environment(threads)  # before torch is loaded
        from minisgl.actors.spawn import make_runner
        from minisgl.config import Config, EngineConfig
        from minisgl.model.checkpoint.resolve import resolve

        engine = EngineConfig(
            max_running=streams,
            step_tokens=streams + LONG,
            kv_tokens=streams * 256 + LONG,
            threads=threads,
            quantization=quantization,
        )
        self.size = engine.page_size
        self.runner = make_runner(Config(resolve(None), engine), 0, "")
        self.runner.allocate(self.runner.max_pages())
        self.step = 0

    def plan(self, prompts: dict[int, list[int]], decode: list[int] | None, pages: int) -> None:
        """Prompts start anew on pages of their own."""
        import numpy as np

        from minisgl.plan import StepPlan

        self.step += 1
        empty = StepPlan(self.step)
        new_slots, prefill = np.zeros(len(prompts), empty.new_slots.dtype), np.zeros(len(prompts), empty.prefill.dtype)
        page_grants = np.zeros(len(prompts) * pages, empty.page_grants.dtype)
        slots = list(prompts)
        if slots:
            new_slots["slot"] = prefill["slot"] = slots
            new_slots["top_p"] = 1
            prefill["n_ids"], prefill["sample"] = [len(p) for p in prompts.values()], 1
            page_grants["slot"], page_grants["index"] = np.repeat(slots, pages), np.tile(np.arange(pages), len(slots))
            page_grants["page"] = page_grants["slot"] * pages + page_grants["index"]
        tokens = np.array([t for p in prompts.values() for t in p], np.int32)
        going = None if decode is None else np.array(decode, np.int32)
        self.runner.launch(
            StepPlan(self.step, new_slots=new_slots, page_grants=page_grants, prefill=prefill, ids=tokens, decode=going)
        )

    def decode(self, streams: int, tokens: int) -> float:
        for s in range(streams):
            self.plan({s: ids(PROMPT, s)}, [], 256 // self.size)
        self.plan({}, list(range(streams)), 0)
        start = time.perf_counter()
        for _ in range(tokens):
            self.plan({}, None, 0)
        return streams * tokens / (time.perf_counter() - start)

    def prefill(self) -> float:
        start = time.perf_counter()
        self.plan({0: ids(LONG, 0)}, [], LONG // self.size)
        return LONG / (time.perf_counter() - start)


class Engine:
    """All processes."""

    def __init__(self, streams: int, threads: int, quantization: str) -> None:
        from minisgl import LLM

        self.llm = LLM(
            cache="none",
            threads=threads,
            quantization=quantization,
            max_running=max(streams, 2),
            step_tokens=max(LONG, streams + 64),
        )

    def _timed(self, prompts: list[list[int]], tokens: int) -> float:
        from minisgl import SamplingParams

        start = time.perf_counter()
        answers = self.llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
        seconds = time.perf_counter() - start
        assert all(len(a.token_ids) == tokens for a in answers)
        return seconds

    def decode(self, streams: int, tokens: int) -> float:
        prompts = [ids(PROMPT, s) for s in range(streams)]
        return streams * tokens / (self._timed(prompts, tokens + 1) - self._timed(prompts, 1))  # the prompts' time goes out

    def prefill(self) -> float:
        """With everything that is between a request and its first token."""
        return LONG / self._timed([ids(LONG, 0)], 1)

    def close(self) -> None:
        self.llm.close()


class Http:
    """The server, and a client that reads streams without taking them apart."""

    def __init__(self, streams: int, threads: int, quantization: str) -> None:
        settings = {"cache": "none", "threads": threads, "quantization": quantization}
        settings |= {"max-running": max(streams, 2), "step-tokens": max(LONG, streams + 64)}
        flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        self._open = ExitStack()
        self.port = int(self._open.enter_context(live_server(*flags)).rsplit(":", 1)[1])

    async def _ask(self, prompt: list[int], tokens: int) -> None:
        body = {"model": "SmolLM2-135M-Instruct", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        raw = json.dumps(body | {"ignore_eos": True}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        answer = bytearray()
        while more := await reader.read(1 << 16):
            answer += more
        writer.close()
        if b'"finish_reason":"length"' not in answer.replace(b": ", b":"):
            raise SystemExit(f"an unexpected answer: {answer[:500]!r}")

    def _timed(self, prompts: list[list[int]], tokens: int) -> float:
        async def all_of_them() -> None:
            await asyncio.gather(*(self._ask(p, tokens) for p in prompts))

        start = time.perf_counter()
        asyncio.run(all_of_them())
        return time.perf_counter() - start

    def decode(self, streams: int, tokens: int) -> float:
        prompts = [ids(PROMPT, s) for s in range(streams)]
        return streams * tokens / (self._timed(prompts, tokens + 1) - self._timed(prompts, 1))

    def prefill(self) -> float:
        return LONG / self._timed([ids(LONG, 0)], 1)

    def close(self) -> None:
        self._open.close()


class Transformers:
    """One static batch."""

    def __init__(self, streams: int, threads: int) -> None:
        from minisgl.model.checkpoint.resolve import resolve
        from scripts.lib.reference import load_transformers

        self.model = load_transformers(resolve(None), threads)

    def _timed(self, prompts: list[list[int]], tokens: int) -> float:
        from scripts.lib.reference import greedy

        start = time.perf_counter()
        greedy(self.model, prompts, tokens, False)
        return time.perf_counter() - start

    def decode(self, streams: int, tokens: int) -> float:
        prompts = [ids(PROMPT, s) for s in range(streams)]
        return streams * tokens / (self._timed(prompts, tokens + 1) - self._timed(prompts, 1))

    def prefill(self) -> float:
        return LONG / self._timed([ids(LONG, 0)], 1)


def serve(make: Any) -> None:
    """Answer requests ["decode", streams, tokens] or ["prefill"] on standard input until it ends."""
    begin = time.perf_counter()
    contender = make()
    print(json.dumps({"ready": time.perf_counter() - begin}), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(contender, name)(*arguments)), flush=True)
    if isinstance(contender, Engine | Http):
        contender.close()


class Peer:
    """A contender in a process of its own; stopped while others are measured, as it waits for its standard input."""

    def __init__(self, python: str, name: str, arguments: list[str]) -> None:
        command = [python, __file__, "--serve", name, *arguments]
        start = time.perf_counter()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()
        self.ready = time.perf_counter() - start

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a contender ended; see its message above")
        return json.loads(line)

    def ask(self, *request: Any) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return float(self._answer())

    def memory_mb(self) -> int:
        """Proportional set size of the process and all below it."""
        parents, sizes = {}, {}
        for status in Path("/proc").glob("[0-9]*"):
            try:
                parents[int(status.name)] = int((status / "stat").read_text().rsplit(")", 1)[1].split()[1])
                rollup = (status / "smaps_rollup").read_text()
                sizes[int(status.name)] = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
            except (OSError, ValueError):
                continue

        def below(pid: int) -> int:
            return sizes.get(pid, 0) + sum(below(child) for child, parent in parents.items() if parent == pid)

        return below(self.process.pid) // 1000

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def llama_python(directory: Path) -> str:
    """The interpreter of an environment that has llama.cpp, made if need be."""
    python = directory / "bin" / "python"
    if (
        subprocess.run([str(python), "-c", "import llama_cpp"], capture_output=True, check=False).returncode
        if python.exists()
        else 1
    ):
        print(f"building {PACKAGE} in {directory} (minutes, once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", PACKAGE], check=True)
    return str(python)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--without", nargs="*", default=[], choices=["loop", "engine", "http", "transformers", "llama.cpp"])
    parser.add_argument("--peers", type=Path, help="environment of llama.cpp (minisgl/bench-llama-cpp in the user's cache)")
    parser.add_argument("--quantization", default="auto", help="of ours")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--path", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    most, threads = max(args.streams), len(os.sched_getaffinity(0))
    if args.serve == "llama.cpp":
        serve(lambda: LlamaCpp(args.path, most, threads))
        return
    if args.serve:
        if args.serve == "transformers":
            serve(lambda: Transformers(most, threads))
        else:
            serve(lambda: {"loop": Loop, "engine": Engine, "http": Http}[args.serve](most, threads, args.quantization))
        return
    from minisgl.model.checkpoint.resolve import resolve
    from minisgl.model.cpu.build import cache_directory
    from scripts.lib.reference import provenance

    print(
        json.dumps(
            {
                "bench": "cpu",
                **provenance(),
                "threads": threads,
                "tokens": args.tokens,
                "quantization": args.quantization,
                "load": os.getloadavg(),
            }
        )
    )
    peers: dict[str, Peer] = {}
    for name in ("loop", "engine", "http", "llama.cpp", "transformers"):
        if name not in args.without:
            python = (
                llama_python(args.peers or cache_directory() / "bench-llama-cpp") if name == "llama.cpp" else sys.executable
            )
            streams = ["--streams", str(most), "--quantization", args.quantization]
            peers[name] = Peer(python, name, [*streams, "--path", resolve(None).path])
    measures = [("prefill", ["prefill"]), *((f"decode, {n} streams", ["decode", n, args.tokens]) for n in args.streams)]
    found: dict[str, dict[str, list[float]]] = {}
    for turn in range(args.rounds + 1):  # the first warms up
        for measure, request in measures:
            for name, peer in peers.items():
                if name == "transformers" and measure.startswith("decode") and request[1] > 16:
                    continue
                value = peer.ask(*request)
                if turn:
                    found.setdefault(measure, {}).setdefault(name, []).append(value)
    for name, peer in peers.items():
        print(json.dumps({"contender": name, "seconds to ready": round(peer.ready, 2), "memory MB": peer.memory_mb()}))
        peer.close()
    pairs = [("loop", "llama.cpp"), ("http", "llama.cpp"), ("http", "loop"), ("http", "transformers")]
    pairs = [(a, b) for a, b in pairs if {a, b} <= set(peers)]
    print(f"\n| tok/s (median) | {' | '.join([*peers, *(f'{a} / {b}' for a, b in pairs)])} |")
    print("|---" * (len(peers) + len(pairs) + 1) + "|")
    for measure, by in found.items():
        print(json.dumps({"measure": measure, "runs": {k: [round(x, 1) for x in v] for k, v in by.items()}}), file=sys.stderr)
        median = {name: statistics.median(v) for name, v in by.items()}
        cells = [f"{median[n]:.1f}" if n in median else "-" for n in peers]
        cells += [f"{median[a] / median[b]:.2f}" if {a, b} <= set(median) else "-" for a, b in pairs]
        print(f"| {measure} | {' | '.join(cells)} |")
    firsts = (f"{LONG / statistics.median(found['prefill'][n]) * 1e3:.0f}" for n in peers)
    print(f"| time to first token, prompt of {LONG}, ms | {' | '.join(firsts)} |{' - |' * len(pairs)}")


if __name__ == "__main__":
    main()
