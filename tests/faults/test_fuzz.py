"""Foreign bytes: whatever they are, they are refused in one clear error, at once, in little memory; nothing ends by them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import sys
import tracemalloc
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import process_actors
import pytest
import zmq
from conftest import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Root, eventually
from scripted import serve

from minisgl.actors import wire
from minisgl.actors.messages import BatchPing, BatchPong, BatchRefused, Cancel, Hello, Text, Tokenized, Wake
from minisgl.actors.runtime.process import address
from minisgl.actors.runtime.ring import RingReader, RingWriter, create_ring
from minisgl.actors.wire import PROTOCOL, BadMessage, decode, encode
from minisgl.errors import UserError
from scripts.check import fuzz
from scripts.lib import fuzz_seeds, fuzz_targets
from scripts.lib.fuzz_seeds import messages
from scripts.lib.fuzz_targets import TARGETS, Target

SECONDS = 2.0  # for one input, on a machine that does other things besides
# How many inputs take about two seconds.
USUAL = {"message": 2500, "record": 4000, "actors": 25, "body": 1500}
USUAL |= {"http": 200, "gguf": 120, "safetensors": 200, "tokenizer": 120, "directory": 120}


@pytest.fixture(scope="module", autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    fuzz_targets.clean_up()


@pytest.fixture
def trial(tmp_path: Path) -> Callable[..., fuzz.Trial]:
    def make(name: str, target: Target | None = None) -> fuzz.Trial:
        return fuzz.Trial(name, target or TARGETS[name], tmp_path, "random", 20 * SECONDS)

    return make


# ---------------- every target
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_inputs_are_taken_or_refused_in_time_and_in_little_memory(name: str, trial: Any) -> None:
    report = fuzz.run_random(trial(name), 60, random.Random(name).randrange(1000), cases(USUAL[name]))
    assert not report.findings
    assert report.refused
    assert report.worst_mib < 48


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"actors"}))
def test_most_inputs_to_begin_from_are_whole(name: str) -> None:
    """Otherwise the fuzzer would only see the first check fail."""
    target, taken = TARGETS[name], 0
    seeds = target.seeds()
    for raw in seeds:
        try:
            target.try_(raw)
            taken += 1
        except target.refusals:
            pass
    assert taken > 0.8 * len(seeds)


@settings(max_examples=cases(300), deadline=None)
@given(st.sampled_from(["message", "record", "body"]), st.binary(max_size=300), st.data())
def test_any_bytes_are_taken_or_refused(name: str, raw: bytes, data: st.DataObject) -> None:
    target = TARGETS[name]
    seed = data.draw(st.sampled_from(target.seeds()))
    at = data.draw(st.integers(0, len(seed)))
    for given_ in (raw, seed[:at] + raw, seed[:at] + raw + seed[at:]):
        with contextlib.suppress(*target.refusals):
            target.try_(given_)


def test_there_is_a_real_input_for_every_kind_of_message_and_it_survives_the_wire() -> None:
    from minisgl.sampling_params import RequestOptions, SamplingParams

    assert {type(msg) for msg in messages()} == set(wire.registry().values()) - {SamplingParams, RequestOptions}
    for msg in messages():
        assert encode(decode(encode(msg))) == encode(msg)


# ---------------- the fuzzer itself
def _break_records(monkeypatch: pytest.MonkeyPatch) -> str:
    real = fuzz_targets.StepResult.unpack
    monkeypatch.setattr(fuzz_targets.StepResult, "unpack", lambda raw: {5: real(raw)}[raw[0]])
    return "record"


def _break_bodies(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("minisgl.api.requests.fields._bad_json", lambda fault: KeyError(fault))
    return "body"


@pytest.mark.parametrize("plant", [_break_records, _break_bodies])
def test_the_fuzzer_finds_a_planted_bug_and_keeps_the_input(
    plant: Any, trial: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = plant(monkeypatch)
    found = trial(name)
    one = fuzz.inputs(found.target, random.Random(0))
    for _ in range(600):
        found.run(one())
        if found.report.findings:
            break
    assert found.report.findings
    [kept] = tmp_path.glob(f"{name}-*.bin")
    assert str(kept) in capsys.readouterr().err
    with pytest.raises(Exception) as again:  # noqa: PT011
        found.target.try_(kept.read_bytes())
    assert not isinstance(again.value, found.target.refusals)


def test_a_message_that_would_end_an_actor_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    none = np.zeros(1, np.int32)
    forged = encode(Text(np.array([1]), np.zeros(1, np.uint8), none[:0], np.full(1, 99, np.uint8), none, ("",)))
    to_api = bytes([0]) + struct.pack("<H", len(forged)) + forged
    with pytest.raises(BadMessage):
        TARGETS["actors"].try_(to_api)
    monkeypatch.setitem(wire._LAYOUTS, "Text", wire._LAYOUTS["Text"]._replace(agrees=None))
    with pytest.raises(ValueError, match="99 is not a valid Finish"):
        TARGETS["actors"].try_(to_api)


def test_the_fuzzer_sees_what_takes_long_what_takes_memory_and_what_ends_its_process(trial: Any, tmp_path: Path) -> None:
    slow = trial("slow", Target(lambda raw: None, (), lambda: [b""]))
    slow.limit = 0.0
    slow.run(b"x")
    assert any("TimeoutError" in kind for kind in slow.report.findings)
    large = trial("large", Target(lambda raw: bytes(8 << 20), (), lambda: [b""]))
    for _ in range(fuzz.SAMPLED):
        large.run(b"x")
    assert large.report.worst_mib > 7
    code = (
        "import os, sys; from scripts.check import fuzz; from scripts.lib import fuzz_seeds, fuzz_targets as t\n"
        "t.TARGETS['record'] = t.Target(lambda raw: os.abort() if len(raw) % 7 == 3 else None, (), lambda: [b'x'])\n"
        f"sys.argv = ['fuzz']; fuzz.main(['record', '--child', '--seconds', '20', '--out', {str(tmp_path)!r}])"
    )
    done = fuzz.subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -6
    assert len((tmp_path / "record.current").read_bytes()) % 7 == 3


# ---------------- messages that are not for an actor
def test_a_message_of_the_wrong_kind_is_dropped_with_one_line_and_its_actor_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    root = Root()
    try:
        root.supervisor.spawn("echo", process_actors.make_echo)
        root.wait_for(Hello)
        for _ in range(3):
            root.ctx.send("echo", BatchPing())
            root.ctx.send("echo", BatchPong(1))
        root.ctx.send("echo", Cancel(6))
        assert root.wait_for(Tokenized).uid == 6
        said = capfd.readouterr().err
        assert said.count("Echo got BatchPing") == said.count("Echo got BatchPong") == 1
    finally:
        root.close()


def test_a_record_that_is_not_there_or_has_another_length_is_refused_and_none_is_taken() -> None:
    spec, fd = create_ring("t", 1, 4096)
    writer, reader = RingWriter(spec), RingReader(spec)
    with pytest.raises(BadMessage, match="not in the ring"):
        reader.take_now(8)
    writer.publish(bytes(8))
    with pytest.raises(BadMessage, match="not in the ring"):
        reader.take_now(12)
    assert reader.take_now(8) == bytes(8)
    os.close(fd)


def test_what_never_travels_on_a_socket_is_no_message() -> None:
    assert "ActorDied" not in wire.registry()
    with pytest.raises(BadMessage, match="unknown message"):
        decode(bytes([PROTOCOL]) + msgpack.packb(["ActorDied", "scheduler", 1]))


# ---------------- files of models
@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("config.json", {"x": "\ud800"}, "config.json: holds half of a surrogate pair"),
        ("config.json", {"\udc00": 1}, "config.json: holds half of a surrogate pair"),
        ("special_tokens_map.json", {"unk_token": {"content": "a\udc00"}}, "special_tokens_map.json: holds half"),
        ("tokenizer_config.json", {"eos_token": "\ud800", "added_tokens_decoder": {}}, "tokenizer_config.json: holds half"),
        ("tokenizer_config.json", {"eos_token": "a", "added_tokens_decoder": {"²": {"content": "a"}}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"eos_token": "a", "added_tokens_decoder": {"1" * 5000: {"content": "a"}}}, "added_tokens"),
    ],
)
def test_what_a_model_should_not_hold_is_named(file: str, change: Any, named: str) -> None:
    content = {**fuzz_seeds.LLAMA, **change} if file == "config.json" else change
    target = TARGETS["directory"]
    with pytest.raises(UserError, match=named):
        target.try_(file.encode() + b"\n" + json.dumps(content).encode())


@pytest.mark.parametrize("kind", [{}, ["llama"], 7, "unheard of"])
def test_a_model_type_of_no_other_architecture_is_harmless(kind: Any) -> None:
    TARGETS["directory"].try_(b"config.json\n" + json.dumps(fuzz_seeds.LLAMA | {"model_type": kind}).encode())


def test_a_whole_pair_of_surrogates_is_text() -> None:
    content = {**fuzz_seeds.LLAMA, "x": "\U0001f600"}
    TARGETS["directory"].try_(b"config.json\n" + json.dumps(content).encode())


def test_the_length_of_a_header_is_not_believed_before_the_file_is_as_long() -> None:
    raw = (1 << 40).to_bytes(8, "little") + b"{}"
    TARGETS["safetensors"].seeds()
    tracemalloc.start()
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        TARGETS["safetensors"].try_(raw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


# ---------------- a live server
def _memory(pid: int) -> int:
    """Bytes that a process has in memory."""
    status = Path(f"/proc/{pid}/statm").read_text().split()
    return int(status[1]) * 4096


def _actors(pid: int) -> dict[str, int]:
    """Process ids of the actors of a server, by their names."""
    out = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                title = (path / "cmdline").read_bytes().split(b"\0")[0].decode()
                if title.startswith("minisgl::"):
                    out[title.removeprefix("minisgl::")] = int(path.name)
        except (FileNotFoundError, ProcessLookupError, IndexError):
            continue
    return out


def test_whatever_comes_on_the_sockets_of_a_live_server_it_answers_right_afterwards_in_bounded_memory() -> None:
    with serve("--model", "fake") as server:
        ask = {"prompt": "abc", "max_tokens": 4, "temperature": 0}
        before = server.post("/v1/completions", ask)["choices"]
        run_dir = Path(json.loads(server.raw("GET", "/server_info")[1])["batch_socket"].removeprefix("ipc://")).parent
        actors = _actors(server.process.pid)
        assert {"scheduler", "worker0", "tokenizer", "detokenizer", "checker"} <= set(actors)
        sizes = {pid: _memory(pid) for pid in (*actors.values(), server.process.pid)}
        rng, context = random.Random(0), zmq.Context()
        # They end an actor or what it has, load torch's profiler, or make a file.
        powerful = ("Stop", "Failed", "Stopped", "Forget", "Reconnect", "Trace", "Journal")
        frames = [encode(msg) for msg in messages() if type(msg).__name__ not in powerful]
        frames += [fuzz_targets.change_frame(rng.choice(frames), rng) for _ in range(300)]
        frames = [raw for raw in frames if not any(msgpack.packb(name) in raw for name in powerful)]
        bombs = [b"\xdc\xff\xff" * 1000, b"\x91" * 100_000, bytes(1 << 20), b"\xdd\xff\xff\xff\xff"]
        nested = msgpack.packb(["SamplingParams"])
        for _ in range(400):
            nested = msgpack.packb(["SamplingParams", msgpack.ExtType(1, nested)])
        bombs = [bytes([PROTOCOL]) + raw for raw in (*bombs, nested)] + [b"", rng.randbytes(5000)]
        try:
            for name in (*actors, "api"):
                push = context.socket(zmq.PUSH)
                push.connect(address(str(run_dir), name))
                for raw in (*frames, *bombs):
                    push.send(raw)
                push.close(linger=5000)
            dealer = context.socket(zmq.DEALER)
            dealer.connect(address(str(run_dir), "batch"))
            refused = 0
            for raw in (*frames, *bombs):
                dealer.send(raw)
            dealer.send(encode(BatchPing()))
            while not isinstance(msg := _heard(dealer), BatchPong) or msg.open_requests:
                refused += isinstance(msg, BatchRefused)
                if isinstance(msg, BatchPong):
                    dealer.send(encode(BatchPing()))
            assert refused > len(bombs)
            dealer.close(linger=0)
        finally:
            context.destroy(linger=5000)
        with socket.socket(socket.AF_UNIX) as raw_socket:  # no ZMQ at all
            raw_socket.connect(str(run_dir / "scheduler"))
            raw_socket.sendall(rng.randbytes(5000))
        assert server.post("/v1/completions", ask)["choices"] == before
        assert _actors(server.process.pid) == actors, "an actor has ended"
        grown = {pid: _memory(pid) - size for pid, size in sizes.items()}
        assert max(grown.values()) < 192 << 20
        said = "".join(server.said)
        assert "Traceback" not in said
        assert eventually(lambda: "dropped what came from a socket" in "".join(server.said))
        assert "".join(server.said).count("dropped what came from a socket") < 300  # one for each kind and actor


def _heard(dealer: Any) -> Any:
    assert dealer.poll(20_000)
    return decode(dealer.recv())


def test_every_kind_of_message_that_may_hold_disagreeing_values_says_whether_it_does() -> None:
    """A column of rows beside another one."""
    for cls in (c for c in wire.registry().values() if c.__module__.endswith("messages")):
        columns = [hint for hint in typing.get_type_hints(cls).values() if np.ndarray in wire._kinds(hint)]
        assert len(columns) < 2 or hasattr(cls, "agrees"), cls
    assert hasattr(Text, "agrees")
    assert not hasattr(Wake, "agrees")
