"""What of minisgl reads foreign bytes: one target each, with inputs to begin from.  For scripts/check/fuzz.py and tests.

`try_` of a target takes bytes.  It returns when they were taken, and raises one of `refusals` when they were refused; anything
else that it raises is a finding.  `seeds` are real inputs, and `mutate` changes one with regard to its structure.
"""

from __future__ import annotations

import json
import random
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

import minisgl.actors.messages as m
from minisgl.actors.runtime.actor import Unhandled
from minisgl.actors.wire import BadMessage, decode, encode
from minisgl.config import Config, EngineConfig, ModelSpec, ServerConfig
from minisgl.errors import RequestError, UserError
from minisgl.plan import StepPlan, StepResult
from minisgl.sampling_params import SamplingParams
from scripts.lib.fuzz_http import NotServed, change_http, close_house, requests, try_http
from scripts.lib.fuzz_seeds import BESIDE, LINE, LLAMA, bodies, directories, ggufs, messages, records, safetensors, tokenizers_

Mutate = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True, slots=True)
class Target:
    """`mutate`: None where bytes have no structure that is worth keeping."""

    try_: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]
    mutate: Mutate | None = None


# ---------------- values that programs do not expect
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        0.5,
        -0.5,
        1e308,
        float("inf"),
        float("nan"),
        2**31 - 1,
        2**31,
        2**32,
        2**63,
        2**64,
        10**30,
    ),
    *("", "x", "\x00", "²", "1" * 5000, "x" * 5000, "\ud800", "😀", [], [1], [-1], ["x"], [2**40], [0.5], [[]], [None], [{}]),
    *({}, {"a": 1}, {"content": 5}, {"type": "x"}, {"content": "x", "role": 7}, [[0] * 50], {"²": {"content": "</s>"}}),
]


def _places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys: Any = list(tree)[:60] if isinstance(tree, dict) else range(min(len(tree), 6)) if isinstance(tree, list) else ()
    return [at, *(place for key in keys for place in _places(tree[key], (*at, key)))]


def _changed(tree: Any, at: tuple[Any, ...], new: Any) -> Any:
    if not at:
        return new
    copy = tree.copy()
    copy[at[0]] = _changed(tree[at[0]], at[1:], new)
    return copy


def change_json(raw: bytes, rng: random.Random) -> bytes:
    """Another value at one or two places, a key taken away, or one given to another object."""
    head, line, text = raw.partition(LINE)
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return raw
    for _ in range(rng.randint(1, 2)):
        places = _places(tree)
        at, other = rng.choice(places), rng.choice(places)
        new = rng.choice(VALUES)
        if rng.random() < 0.2:
            for key in other:
                new = tree[key] if key == other[0] else new[key]
        if at and rng.random() < 0.1:
            parent = tree
            for key in at[:-1]:
                parent = parent[key]
            tree = _changed(tree, at[:-1], {k: v for k, v in parent.items() if k != at[-1]} if isinstance(parent, dict) else [])
        else:
            tree = _changed(tree, at, new)
    return head + line + json.dumps(tree, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")


# ---------------- messages
def change_frame(raw: bytes, rng: random.Random) -> bytes:
    """Another value in one field of a message, or in a field of a value in it; or an array of another length or dtype."""
    try:
        fields = msgpack.unpackb(raw[1:], strict_map_key=False)
        at = rng.randrange(len(fields))
        fields[at] = _changed_field(fields[at], fields, rng)
        return raw[:1] + bytes(msgpack.packb(fields))
    except (ValueError, TypeError, LookupError, ArithmeticError, msgpack.UnpackException, RecursionError):
        return raw


def _changed_field(old: Any, fields: Any, rng: random.Random) -> Any:
    if isinstance(old, msgpack.ExtType) and rng.random() < 0.8:
        if old.code == 1:
            return msgpack.ExtType(1, change_frame(b"\x01" + old.data, rng)[1:])
        if rng.random() < 0.5:
            numbers = np.array(rng.choices([0, 1, -1, 2, 7, 200, 2**31 - 1, -(2**31), 2**63 - 1], k=rng.randrange(5)))
            return msgpack.ExtType(2, old.data[:3] + numbers.astype(old.data[:3].decode()).tobytes())
        return msgpack.ExtType(2, rng.choice((b"<i4", b"<i8", b"|u1", b"<f4", b"|O8")) + old.data[3:] * rng.randrange(3))
    return rng.choice([*VALUES, rng.choice(fields), 4, 5, "<think>", "qwen3", b"\xff", b"{}"])


# ---------------- records of rings
def _read_record(raw: bytes) -> object:
    return (StepPlan if raw[:1] == b"p" else StepResult).unpack(raw[1:])


# ---------------- bodies of requests
@cache
def fake_config() -> Config:
    from minisgl.model.checkpoint.resolve import fake_model

    return Config(fake_model(), server=ServerConfig(tool_call_parser="hermes", trust_request_chat_template=True))


def _check_body(raw: bytes) -> object:
    from minisgl.api.endpoints.table import ENDPOINTS
    from minisgl.api.requests.fields import parse_json

    path, _, body = raw.partition(LINE)
    paths = list(ENDPOINTS)
    name = path.decode("utf-8", "replace")
    endpoint = ENDPOINTS[name if name in ENDPOINTS else paths[len(path) % len(paths)]]
    return endpoint.checked(fake_config(), parse_json(body))


# ---------------- files of models
@cache
def _folder() -> Path:
    """A directory of a tiny model, whose files are replaced."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "tokenizer.json").write_bytes(tokenizers_()[0])
    (folder / "model.safetensors").write_bytes(safetensors()[0])
    return folder


def _with(name: str, raw: bytes, use: Callable[[str], object]) -> object:
    """`use` the directory with other content in one file."""
    file = _folder() / name
    kept = file.read_bytes() if file.exists() else None
    file.write_bytes(raw)
    try:
        return use(str(_folder()))
    finally:
        if kept is None:
            file.unlink()
        else:
            file.write_bytes(kept)


def _spec(path: str) -> ModelSpec:
    from minisgl.model.checkpoint.hf_config import spec_from_directory

    return spec_from_directory(path)


def _use_directory(path: str) -> object:
    from minisgl.model.text.chat_format import styles_of

    spec = _spec(path)
    styles_of(spec)
    Config(spec)
    return _use_tokenizer(path, spec)


def _read_directory(raw: bytes) -> object:
    name, _, content = raw.partition(LINE)
    known = ["config.json", *BESIDE]
    given = name.decode("utf-8", "replace")
    return _with(given if given in known else known[len(name) % len(known)], content, _use_directory)


def _use_tokenizer(path: str, spec: ModelSpec | None = None) -> object:
    from minisgl.model.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(spec or _spec(path))
    stream = tokenizer.stream(skip_special=True)
    for i in (0, 1, 97, 299, 10**6):
        stream.push(i)
        tokenizer.piece(i)
    stream.flush()
    tokenizer.describe()
    ids = tokenizer.encode("wörld <s>  a\n", True).tolist()
    return tokenizer.decode(ids, skip_special=False)


def change_safetensors(raw: bytes, rng: random.Random) -> bytes:
    """Another value in the header, whose length stays right."""
    n = int.from_bytes(raw[:8], "little")
    if n > len(raw):
        return raw
    head = change_json(b"x\n" + raw[8 : 8 + n], rng)[2:]
    return struct.pack("<Q", len(head)) + head + raw[8 + n :]


def _read_safetensors(raw: bytes) -> object:
    from minisgl.model.checkpoint.files import SafetensorsFiles

    def use(path: str) -> object:
        _spec(path)
        files = SafetensorsFiles(path)
        for name in list(files)[:4]:
            files.dtype(name)
            files.get(name)[:]
        return files.unused()

    return _with("model.safetensors", raw, use)


def _read_gguf(raw: bytes) -> object:
    from minisgl.model.checkpoint.gguf_spec import spec_from_gguf

    path = str(_folder() / "model.gguf")
    with open(path, "wb") as f:
        f.write(raw)
    spec = spec_from_gguf(path)
    Config(spec)
    return _use_tokenizer(path, spec)


def change_gguf(raw: bytes, rng: random.Random) -> bytes:
    """Other bytes in the header, which begins the file; lengths are likely places."""
    damaged = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at, n = rng.randrange(min(len(raw), rng.choice((64, 1500, 12000)))), rng.choice((1, 1, 2, 4, 8))
        damaged[at : at + n] = rng.choice((b"\xff" * n, bytes(n), rng.randbytes(n), bytes([rng.randrange(12)]) + bytes(n - 1)))
    return bytes(damaged)


# ---------------- messages to actors
def _sequences() -> list[bytes]:
    """Every message to every actor, a few in each."""
    frames = [encode(msg) for msg in messages() if not isinstance(msg, (m.Stop, m.Failed))]
    one = [bytes([actor]) + struct.pack("<H", len(frame)) + frame for frame in frames for actor in range(5)]
    return [b"".join(one[i : i + 10]) for i in range(0, len(one), 10)]


def change_sequence(raw: bytes, rng: random.Random) -> bytes:
    """Other messages, in another order, to other actors."""
    parts = [bytes([rng.randrange(5)]) + frame for _, frame in _parts(raw)]
    rng.shuffle(parts)
    changed = (change_frame(part[1:], rng) if rng.random() < 0.7 else part[1:] for part in parts[: rng.randint(1, 12)])
    return b"".join(part[:1] + struct.pack("<H", len(frame)) + frame for part, frame in zip(parts, changed, strict=False))


def _parts(raw: bytes) -> list[tuple[int, bytes]]:
    """(number of an actor, frame) of each message in a sequence."""
    out, at = [], 0
    while at + 3 <= len(raw):
        n = int.from_bytes(raw[at + 1 : at + 3], "little")
        out.append((raw[at], raw[at + 3 : at + 3 + n]))
        at += 3 + n
    return out


def _play(raw: bytes) -> None:
    """Messages to the actors of a system that works on requests; a later request must be answered.

    Stop and Failed are left out, as they end an actor, and Forget and Reconnect, as they lose requests: as they should.
    """
    from minisgl.actors.detokenizer import DetokenizerActor
    from minisgl.actors.runtime.local import LocalSystem
    from minisgl.actors.runtime.ring import RingWriter
    from minisgl.actors.runtime.shared_memory import Memory
    from minisgl.actors.scheduler.actor import SchedulerActor
    from minisgl.actors.tokenizer import TokenizerActor
    from minisgl.actors.worker import WorkerActor
    from minisgl.api.engine import TextPrompt, TokenPrompt
    from minisgl.api.gateway import Gateway
    from minisgl.model.fake_runner import FakeRunner

    config = _small_config()
    memory = Memory(config)
    arenas = memory.arenas
    system = LocalSystem(1)
    try:
        runner = FakeRunner(config, 40)
        gateway = system.spawn("api", lambda ctx: Gateway(ctx, config, arenas))
        system.spawn("scheduler", lambda ctx: SchedulerActor(ctx, config, arenas))
        system.spawn("worker0", lambda ctx: WorkerActor(ctx, 0, arenas, lambda: runner))
        system.spawn("detokenizer", lambda ctx: DetokenizerActor(ctx, config))
        system.spawn("tokenizer", lambda ctx: TokenizerActor(ctx, config, RingWriter(arenas.prompts[0])))
        names = list(system.actors)
        gateway.silent.clear()  # nobody says Hello
        system.run()
        heard: list[Any] = []
        for prompt in (TokenPrompt((1, 2, 3)), TextPrompt("abc"), TokenPrompt((5,) * 20)):
            gateway.open(prompt, SamplingParams(max_tokens=4, logprobs=1), lambda chunk: None)
        refused: Exception | None = None
        for actor, frame in _parts(raw):
            try:
                msg = decode(frame)
                if not isinstance(msg, (m.Stop, m.Failed, m.Forget, m.Reconnect)):
                    system.actors[names[actor % len(names)]].receive(msg)
            except (BadMessage, Unhandled) as e:
                refused = e
            for _ in range(3):
                _step(system)
        while _step(system):
            pass
        gateway._last_uid = 1 << 40  # which nobody has named
        gateway.open(TextPrompt("abc"), SamplingParams(max_tokens=2), heard.append)
        while _step(system):
            pass
        if not heard or not getattr(heard[-1], "finish", None):
            raise RuntimeError(f"the next request was not answered: {heard!r:.200}")
        if refused is not None:
            raise refused
    finally:
        memory.close()
        for each in system.actors.values():
            each.__dict__.clear()  # cycles, which would keep the arenas mapped


def _step(system: Any) -> bool:
    """One event.  Actors of ours send each other nonsense only in answer to some, and it is refused."""

    try:
        return bool(system.step())
    except (BadMessage, Unhandled):
        return True


@cache
def _small_config() -> Config:
    model = replace(fake_config().model, vocab_size=256, max_context=64, path="", eos_ids=(0,), bos_id=None)
    return Config(model, EngineConfig(page_size=4, max_running=4, step_tokens=9, kv_tokens=160))


TARGETS: dict[str, Target] = {
    "message": Target(decode, (BadMessage,), lambda: list(map(encode, messages())), change_frame),
    "actors": Target(_play, (BadMessage, Unhandled), _sequences, change_sequence),
    "record": Target(_read_record, (ValueError,), records),
    "body": Target(_check_body, (RequestError,), bodies, change_json),
    "http": Target(try_http, (NotServed,), requests, change_http),
    "gguf": Target(_read_gguf, (UserError, RequestError), ggufs, change_gguf),
    "safetensors": Target(_read_safetensors, (UserError,), safetensors, change_safetensors),
    "tokenizer": Target(
        lambda raw: _with("tokenizer.json", raw, _use_tokenizer),
        (UserError, RequestError),
        tokenizers_,
        lambda raw, rng: change_json(b"x\n" + raw, rng)[2:],
    ),
    "directory": Target(_read_directory, (UserError, RequestError), directories, change_json),
}


def clean_up() -> None:
    """Remove the files of the targets that were tried, and what runs for them."""
    import shutil

    close_house()

    if _folder.cache_info().currsize:
        shutil.rmtree(_folder(), ignore_errors=True)
    _folder.cache_clear()
