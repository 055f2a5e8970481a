"""Damaged model files: each works, or is refused in one short sentence that names it, in little memory."""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cases
from safetensors.torch import load_file, save_file
from test_gguf import write_gguf
from tiny_models import save_byte_tokenizer, save_llama
from tokenizers import Tokenizer, processors

from minisgl.config import Config, EngineConfig
from minisgl.errors import RequestError, UserError
from minisgl.model.architectures.llama import Llama
from minisgl.model.checkpoint.gguf_file import MAX_VALUES, GGUFFile
from minisgl.model.checkpoint.loader import open_weights
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.common.interfaces import Build
from minisgl.model.common.parallel import Parallel
from minisgl.model.common.rope import frequencies
from minisgl.model.common.shard import Shard
from minisgl.model.cpu.layers import CpuLayers
from minisgl.model.text.chat_format import styles_of
from minisgl.model.text.tokenizer import load_tokenizer

MOST = 512 << 20  # address space, of which allocators reserve more than they use
ROUNDS = cases(12)  # faults in each test below
GONE = object()  # the key is taken away
VALUES: list[Any] = [
    *(True, False, 0, -1, 1, 2, 3, 0.5, -0.5, 1e308, float("inf"), float("nan"), 2**31 - 1, 2**32, 2**63, 10**9),
    *("", "x", "\x00", "x" * 100_000, [], [1], ["x"], [2**40], [0.5], GONE),
]
JSON_VALUES: list[Any] = [*VALUES, None, 10**30, [[]], [None], {}, {"a": 1}, {"content": 5}, {"type": "x"}, [{}]]


def load(path: Path) -> None:
    """All that a server reads of a model, but for the vocabulary of grammars."""
    spec = resolve(str(path))
    styles_of(spec)
    tokenizer = load_tokenizer(spec)
    with suppress(RequestError):
        tokenizer.encode("wörld <s>", True)
    with suppress(RequestError):
        tokenizer.encode_chat(b'{"messages": [{"role": "user", "content": "x"}]}')
    tokenizer.piece(0)
    assert isinstance(Config(spec, EngineConfig()).sampling_defaults, dict)
    assert frequencies(spec)[0].isfinite().all()
    weights = open_weights(spec, torch.float32)
    Llama(Build(spec, Shard.of(spec, 0, 1), weights, Parallel(), CpuLayers(torch.float32)))
    weights.finish()


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Too large an allocation fails."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MOST, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def attempt(path: Path, what: Any, capfd: Any) -> str:
    """The complaint about a model, "" where it works."""
    complaint = ""
    try:
        load(path)
    except UserError as e:
        complaint = str(e)
        assert len(complaint) < 1200, what
        assert "\n" not in complaint, what
        assert path.name in complaint, (what, complaint)
    except BaseException as e:
        raise AssertionError(f"{what!r:.300}: {type(e).__name__}: {e!s:.200}") from e
    assert "panicked" not in capfd.readouterr().err, what
    return complaint


# ---------------- GGUF files, written by hand: no writer would write these
def string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def value(v: Any) -> bytes:
    """The type and the bytes of a value; of bytes, the bytes themselves."""
    match v:
        case bytes():
            return v
        case bool():
            return struct.pack("<IB", 7, v)
        case int():
            return struct.pack("<Ii", 5, v) if v < 0 else struct.pack("<II", 4, v) if v < 2**32 else struct.pack("<IQ", 10, v)
        case float():
            return struct.pack("<If", 6, v) if v != 1e308 else struct.pack("<Id", 12, v)
        case str():
            return struct.pack("<I", 8) + string(v)
    items = [value(x) for x in v] or [struct.pack("<II", 4, 0)]
    return struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(v)) + b"".join(i[4:] for i in items[: len(v)])


def gguf_bytes(fields: dict[str, Any], tensors: dict[str, tuple[tuple[int, ...], bytes]]) -> tuple[bytes, int]:
    """A file of these keys and float32 tensors, and the length of its header."""
    out, data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)), b""
    out += b"".join(string(key) + value(v) for key, v in fields.items())
    for name, (shape, raw) in tensors.items():
        out += string(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in reversed(shape))
        out += struct.pack("<IQ", 0, len(data))
        data += raw + bytes(-len(raw) % 32)
    return out + bytes(-len(out) % 32) + data, len(out)


class Gguf:
    def __init__(self, folder: Path, kind: str) -> None:
        self.path = folder / "damaged.gguf"
        file = GGUFFile(write_gguf(folder / "good.gguf", save_llama(folder / "hf")))
        self.tensors = {name: (t.shape, file.data(name).tobytes()) for name, t in file.tensors.items()}
        self.fields = {k: v for k, v in file.fields.items() if not k.startswith("tokenizer.")}
        self.fields |= {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0, "general.sampling.temp": 0.5}
        self.fields |= {"tokenizer.chat_template": "{{ bos_token }}", "tokenizer.chat_templates": ["tool_use"]}
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(195)), "a", "▁a", "b", "▁", "▁▁"]
        more: dict[str, Any] = {"model": "llama", "tokens": tokens, "scores": [0.0] * 203, "token_type": [2, 3, 3] + [6] * 200}
        if kind == "gpt2":
            tokens = [*map(chr, range(33, 127)), "ab", *(f"<{i}>" for i in range(108))]
            more = {"model": "gpt2", "tokens": tokens, "merges": ["a b"], "pre": "llama-bpe"}
        more |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True, "eot_token_id": 3}
        self.fields |= {f"tokenizer.ggml.{k}": v for k, v in more.items()}

    def damaged(self, changes: dict[str, Any]) -> Path:
        fields = {k: v for k, v in (self.fields | changes).items() if v is not GONE}
        self.path.write_bytes(gguf_bytes(fields, self.tensors)[0])
        return self.path


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def gguf(request: Any, tmp_path_factory: Any) -> Gguf:
    return Gguf(tmp_path_factory.mktemp("gguf"), request.param)


@pytest.mark.parametrize("seed", range(2))
def test_a_gguf_file_with_a_wrong_value_works_or_is_refused(seed: int, gguf: Gguf, capfd: Any) -> None:
    rng = random.Random(seed)
    assert attempt(gguf.damaged({}), "whole", capfd) == ""
    others = ("llama.rope.scale_linear", "llama.attention.scale", "llama.expert_count", "split.count", "split.no")
    for _ in range(ROUNDS):
        key, v = rng.choice([*gguf.fields, *others]), rng.choice(VALUES)
        attempt(gguf.damaged({key: v}), (key, v), capfd)


@pytest.mark.parametrize("seed", range(2))
def test_a_gguf_file_with_wrong_bytes_works_or_is_refused(seed: int, gguf: Gguf, capfd: Any) -> None:
    rng = random.Random(seed)
    raw, header = gguf_bytes(gguf.fields, gguf.tensors)
    for _ in range(ROUNDS):
        damaged = bytearray(raw[: rng.randrange(len(raw))] if rng.random() < 0.2 else raw)
        for _ in range(rng.randint(1, 3)):
            at, n = rng.randrange(header), rng.choice((1, 1, 2, 4, 8))
            damaged[at : at + n] = rng.choice((b"\xff" * n, bytes(n), rng.randbytes(n)))
        gguf.path.write_bytes(damaged)
        attempt(gguf.path, seed, capfd)


@pytest.mark.parametrize(
    ("key", "v"),
    [
        ("general.architecture", ["llama"]),
        ("general.alignment", [1] * 1000),
        ("llama.block_count", 2**31 - 1),
        ("llama.block_count", 1024),
        ("llama.context_length", 2**31 - 1),
        ("llama.embedding_length", 10**9),
        ("llama.attention.key_length", 10**9),
        ("llama.rope.freq_base", 1.0),
        ("llama.rope.scaling.type", ["yarn"]),
        ("llama.rope.scaling.factor", float("nan")),
        ("tokenizer.ggml.model", 7),
        ("tokenizer.ggml.tokens", 7),
        ("tokenizer.ggml.tokens", ["a", 7]),
        ("tokenizer.ggml.eos_token_id", 2**32),
        ("tokenizer.ggml.add_bos_token", 7),
        ("tokenizer.chat_templates", 7),
    ],
)
def test_a_wrong_value_in_a_gguf_file_is_named_by_its_key(key: str, v: Any, gguf: Gguf, capfd: Any) -> None:
    if v == ["a", 7]:
        v = struct.pack("<IIQ", 9, 4, 203) + bytes(4 * 203)  # numbers
    named = "blk.1023." if v == 1024 else key
    assert named in attempt(gguf.damaged({key: v}), (key, v), capfd)


@pytest.mark.parametrize(
    "head",
    [
        struct.pack("<IIQ", 9, 0, 300 << 20),  # an array of bytes
        struct.pack("<IIQ", 9, 8, 30 << 20),  # of empty strings
        struct.pack("<IIQ", 9, 6, MAX_VALUES + 1),
        struct.pack("<IQ", 8, 300 << 20),  # a string
    ],
)
def test_metadata_of_hundreds_of_megabytes_is_not_read(head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    with path.open("wb") as f:  # mostly a hole
        f.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("general.name") + head)
        f.truncate(f.tell() + (300 << 20))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"large\.gguf: not a usable GGUF file: key 'general\.name': "):
        GGUFFile(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_number_of_keys_or_tensors_is_not_believed(tmp_path: Path) -> None:
    for counts in ((0, 1 << 20), (1 << 20, 0)):
        path = tmp_path / "many.gguf"
        with path.open("wb") as f:
            f.write(b"GGUF" + struct.pack("<IQQ", 3, *counts))
            f.truncate(64 << 20)
        with pytest.raises(UserError, match=r"many\.gguf: .* keys and .* tensors"):
            GGUFFile(str(path))


def test_a_very_long_token_costs_no_more_than_its_length(gguf: Gguf, capfd: Any) -> None:
    tokens = [*gguf.fields["tokenizer.ggml.tokens"]]
    tokens[-1] = "ab" * 150_000
    assert attempt(gguf.damaged({"tokenizer.ggml.tokens": tokens}), "long token", capfd) == ""


# ---------------- directories
@pytest.fixture(scope="module")
def directory(tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("models") / "whole"
    save_llama(path)
    save_byte_tokenizer(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path / "tokenizer.json"))
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    parts = {name: f"part{i % 2}.safetensors" for i, name in enumerate(sorted(weights))}
    for part in sorted(set(parts.values())):
        save_file({name: weights[name] for name in parts if parts[name] == part}, path / part)
    for name, content in {
        "model.safetensors.index.json": {"metadata": {}, "weight_map": parts},
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ bos_token }}"},
        "special_tokens_map.json": {"unk_token": {"content": "<unk>"}},
        "generation_config.json": {"eos_token_id": [2, 3], "temperature": 0.5, "top_k": 4, "repetition_penalty": 1.1},
        "chat_template.json": {"chat_template": [{"name": "default", "template": "x"}]},
    }.items():
        (path / name).write_text(json.dumps(content))
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    shutil.copytree(directory, tmp_path / "damaged")
    return tmp_path / "damaged"


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    keys = list(tree)[:40] if isinstance(tree, dict) else range(min(len(tree), 3)) if isinstance(tree, list) else ()
    for key in keys:
        yield from places(tree[key], (*at, key))


def changed(tree: Any, at: tuple[Any, ...], new: Any) -> Any:
    if not at:
        return new
    copy = dict(tree) if isinstance(tree, dict) else dict(enumerate(tree))
    copy[at[0]] = changed(copy.get(at[0]), at[1:], new)
    if copy[at[0]] is GONE:
        del copy[at[0]]
    return copy if isinstance(tree, dict) else list(copy.values())


KEYS = (
    *("rope_scaling", "sliding_window", "layer_types", "quantization_config", "text_config", "partial_rotary_factor", "dtype"),
    *("attention_bias", "mlp_bias", "auto_map", "original_max_position_embeddings", "max_window_layers", "rope_theta"),
)


@pytest.mark.parametrize("seed", range(2))
def test_a_directory_with_a_wrong_value_works_or_is_refused(seed: int, directory: Path, copy: Path, capfd: Any) -> None:
    rng = random.Random(seed)
    assert attempt(copy, "whole", capfd) == ""
    files = sorted(f.name for f in directory.glob("*.json")) + ["config.json"] * 5
    for _ in range(ROUNDS):
        name, new = rng.choice(files), rng.choice(JSON_VALUES)
        tree = json.loads((directory / name).read_text())
        options = [*places(tree), *((key,) for key in KEYS)] if name == "config.json" else [*places(tree)]
        at = rng.choice(options)
        (copy / name).write_text(json.dumps({} if not at and new is GONE else changed(tree, at, new)))
        attempt(copy, (name, at, new), capfd)
        shutil.copy(directory / name, copy / name)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn", "longrope"])
def test_wrong_numbers_of_rope_scaling_are_refused_or_finite(kind: str, copy: Path, capfd: Any) -> None:
    usual = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    usual |= {"original_max_position_embeddings": 64, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = json.loads((copy / "config.json").read_text())
    for key in (*usual, "mscale", "mscale_all_dim", "attention_factor", "beta_fast", "beta_slow"):
        for new in (1, 1e-308, 1e308, -1, 0, 2**40, float("nan"), "x", [], [1e-308] * 8):
            scaling = usual | {"mscale": 1.0, "mscale_all_dim": 1.0, key: new}
            (copy / "config.json").write_text(json.dumps({**config, "rope_parameters": scaling}))
            with suppress(UserError):
                freqs, amplitude = frequencies(resolve(str(copy)))
                assert freqs.isfinite().all(), scaling
                assert 0 < amplitude < 1e9, scaling


@pytest.mark.parametrize("seed", range(2))
def test_a_directory_with_wrong_bytes_works_or_is_refused(seed: int, directory: Path, copy: Path, capfd: Any) -> None:
    rng = random.Random(seed)
    for _ in range(ROUNDS):
        name = rng.choice(sorted(f.name for f in directory.iterdir()))
        raw = bytearray((directory / name).read_bytes())
        raw = raw[: rng.randrange(len(raw))] if rng.random() < 0.3 else raw
        for _ in range(rng.randint(0, 3) if raw else 0):
            at, n = rng.randrange(min(len(raw), rng.choice((16, 2000, 1 << 30)))), rng.choice((1, 2, 8))
            raw[at : at + n] = rng.choice((b"\xff" * n, bytes(n), b"9" * n, b'"', b"{", b"]", rng.randbytes(n)))
        (copy / name).write_bytes(raw)
        attempt(copy, (seed, name), capfd)
        shutil.copy(directory / name, copy / name)


@pytest.mark.parametrize(
    ("name", "at", "new", "named"),
    [
        ("tokenizer.json", ("post_processor", "special_tokens", "<s>", "ids"), [2**31], "its post_processor adds token"),
        ("config.json", ("architectures",), [["LlamaForCausalLM"]], "architecture"),
        ("config.json", ("hidden_act",), [], "hidden_act"),
        ("config.json", ("num_hidden_layers",), 2**31 - 1, "num_hidden_layers"),
        ("config.json", ("head_dim",), 10**9, "head_dim"),
        ("config.json", ("max_position_embeddings",), 2**31 - 1, "max_position_embeddings"),
        ("config.json", ("vocab_size",), 2**31 - 1, "vocab_size"),
        ("config.json", ("rope_parameters", "rope_type"), ["yarn"], "rope"),
        ("config.json", ("quantization_config",), {"quant_method": []}, "quantised by"),
        ("tokenizer.json", ("model", "vocab", "a"), 2**32, "tokenizer.json"),
        ("tokenizer.json", ("model", "vocab", "a"), 10**9, "tokenizer.json: token 'a' has the id 1000000000"),
        ("tokenizer.json", ("post_processor", "special_tokens"), {}, "tokenizer.json: cannot encode a text"),
        ("tokenizer.json", ("normalizer",), {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "tokenizer.json"),
        ("model.safetensors.index.json", ("weight_map", "model.norm.weight"), "absent.safetensors", "absent.safetensors"),
        ("model.safetensors.index.json", ("weight_map", "model.norm.weight"), "../../etc/passwd", "weight_map"),
        ("generation_config.json", ("top_k",), [4], "top_k"),
        ("chat_template.jinja", (), b"\xff\xfe", "chat_template.jinja: is not UTF-8"),
        ("config.json", (), b"\xff\xfe", "config.json: is not UTF-8"),
        ("config.json", (), b"[" * 100_000, "config.json: not valid JSON"),
        ("part0.safetensors", (), b"\xff" * 7 + b"\x00" + b"{}", "part0.safetensors"),
    ],
)
def test_what_is_wrong_in_a_directory_is_named(  # noqa: PLR0917
    name: str, at: Any, new: Any, named: str, copy: Path, capfd: Any
) -> None:
    if isinstance(new, bytes):
        (copy / name).write_bytes(new)
    else:
        (copy / name).write_text(json.dumps(changed(json.loads((copy / name).read_text()), at, new)))
    assert named in attempt(copy, (name, at, new), capfd)


def test_a_file_of_settings_as_large_as_weights_is_not_read(copy: Path, capfd: Any) -> None:
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json"):
        kept = (copy / name).read_bytes()
        with (copy / name).open("r+b") as f:
            f.truncate(300 << 20)
        assert f"{name}: has {300 << 20} bytes" in attempt(copy, name, capfd)
        (copy / name).write_bytes(kept)
