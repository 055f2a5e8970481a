"""What of minisgl reads foreign bytes: one target each, with inputs to begin from.  Imported by scripts/check/fuzz.py and tests

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
from minisgl.plan import EXTRA, GRAMMAR, GRANT, JOIN, PREFILL, StepLogprobs, StepPlan, StepResult
from minisgl.sampling_params import RequestOptions, SamplingParams

Mutate = Callable[[bytes, random.Random], bytes]
LINE = b"\n"  # between the name of a file or a path and its content


@dataclass(frozen=True, slots=True)
class Target:
    """`mutate`: None where bytes have no structure that is worth keeping."""

    try_: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]
    mutate: Mutate | None = None


# ---------------- values that programs do not expect
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 0.5, -0.5, 1e308, float("inf"), float("nan"), 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30),
    *("", "x", "\x00", "²", "1" * 5000, "x" * 5000, "\ud800", "😀", [], [1], [-1], ["x"], [2**40], [0.5], [[]], [None], [{}]),
    *({}, {"a": 1}, {"content": 5}, {"type": "x"}, {"content": "x", "role": 7}, [[0] * 50], {"²": {"content": "</s>"}}),
]  # fmt: skip


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
def messages() -> list[Any]:
    """At least one of every kind, as actors send them."""
    ids, one = np.arange(3, dtype=np.int32), np.ones(2, np.uint8)
    uids, none, f32 = np.array([1, 2]), np.zeros(2, np.uint8), np.zeros(3, np.float32)
    i32 = np.zeros(2, np.int32)
    greedy = SamplingParams(temperature=0.0, max_tokens=4, stop=("x",), logit_bias={3: 1.0}, logprobs=2, seed=7)
    options = RequestOptions(priority=1, timeout=2.0, cache_salt="s", client=1, call=2)
    widths = np.array([1, 2], np.uint8)
    return [
        *(m.Hello("worker0", 5), m.Stop("x"), m.Stopped("worker0"), m.Failed("worker0", "x"), m.Wake(), m.WorkerLoaded(0, 40)),
        *(m.Capacity(40), m.WorkerArmed(0), m.MayCapture(), m.EngineReady(40), m.Tokenized(1, 3, True), m.Cancel(1)),
        *(m.Tokenize(1, "abc", None, True, 0, ""), m.Tokenize(1, None, b'{"messages": []}', False, 2, "qwen3")),
        *(m.Detokenize(1, ids, True), m.Detokenized(1, "abc"), m.TokenizerInfo('{"a": 1}'), m.FlushCache()),
        *(m.CheckGrammar(1, 'start: "a"', "guided_choice"), m.GrammarChecked(1, 'start: "a"')),
        *(m.PrepareGrammar(1, 'start: "a"'), m.GrammarPrepared(1, 0), m.Rejected(1, 400, "x", "prompt", "c", None)),
        *(m.Generate(1, 3, 3, 4, 7, greedy, options), m.Generate(9, 3, 2, 4, 7, SamplingParams(), RequestOptions())),
        *(m.Stats(("a", "b"), np.array([1, 2])), m.Embedded(1, f32), m.Track(1, 2, ids, greedy, 0.5), m.Started(1, 0.5)),
        m.Track(1, 0, ids, SamplingParams(echo=True, max_tokens=4, reasoning="qwen3", thinking=True, logprobs=1), 0.5),
        *(m.ThoughtEnded(1, 2), m.Tokens(uids, one, ids[:2], none), m.BatchPing(), m.BatchPong(3), m.BatchRefused("x")),
        m.TokenLogprobs(uids, one, ids[:2], f32[:2], widths, ids, f32),
        m.Logprobs(uids, ids[:2], i32, f32[:2], widths, ids, f32, np.ones(5, np.int32), b"abcde"),
        m.Text(uids, one, ids[:2], none, i32, ("a", "b")),
        m.BatchSubmit("a", "/v1/completions", b'{"prompt": "x"}'),
        m.BatchResult("a", 200, "r", b"{}"),
    ]


def change_frame(raw: bytes, rng: random.Random) -> bytes:
    """Another value in one field of a message, or in a field of a value in it; or an array of another length or dtype."""
    try:
        fields = msgpack.unpackb(raw[1:], strict_map_key=False)
        at = rng.randrange(len(fields))
        fields[at] = _changed_field(fields[at], fields, rng)
        return raw[:1] + bytes(msgpack.packb(fields))
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException, UnicodeEncodeError, RecursionError):
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
def _records() -> list[bytes]:
    ids = np.arange(3, dtype=np.int32)
    plan = StepPlan(
        5,
        new_slots=np.array([(0, 0, 0.5, 4, 0.9, 0.0, 7)], JOIN),
        page_grants=np.array([(0, 0, 3)], GRANT),
        prefill=np.array([(0, 1, 3)], PREFILL),
        decode=ids,
        ids=ids,
        extras=np.array([(0, 0.5, 0.0, 1.0, 2, 0, 0, 0)], EXTRA),
        grammars=np.array([(0, 4, 0)], GRAMMAR),
        grammar_text=b"text",
    )
    scores = StepLogprobs(np.zeros(3, np.float32), np.zeros((3, 2), np.int32), np.zeros((3, 2), np.float32))
    results = [StepResult(5, ids), StepResult(5, ids, 1, 2, 3, scores, np.zeros((1, 4), np.float32))]
    return [b"p" + plan.pack(), b"p" + StepPlan(6, decode=None).pack(), *(b"r" + result.pack() for result in results)]


def _read_record(raw: bytes) -> object:
    return (StepPlan if raw[:1] == b"p" else StepResult).unpack(raw[1:])


# ---------------- bodies of requests
@cache
def fake_config() -> Config:
    from minisgl.model.checkpoint.resolve import fake_model

    return Config(fake_model(), server=ServerConfig(tool_call_parser="hermes", trust_request_chat_template=True))


def _bodies() -> list[bytes]:
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    }
    schema = {
        "type": "json_schema",
        "json_schema": {"name": "s", "schema": {"$defs": {"x": {"enum": [1]}}, "anyOf": [{"$ref": "#/$defs/x"}]}},
    }
    said = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    said += [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ]  # type: ignore[list-item]
    numbers = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "seed": 1,
        "max_tokens": 5,
        "n": 2,
        "stop": ["a"],
        "logit_bias": {"3": 1},
    }
    blocks = [{"type": "text", "text": "hi"}, {"type": "tool_result", "tool_use_id": "c", "content": "1"}]
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": said, "tools": [tool], "tool_choice": "auto", "logprobs": True, **numbers}),
        ("/v1/chat/completions", {"messages": said[:1], "response_format": schema, "stream": False, "chat_template": "{{ messages }}"}),
        ("/v1/completions", {"prompt": ["a", "b"], "echo": True, "logprobs": 2, "guided_regex": "a+", **numbers}),
        ("/v1/completions", {"prompt": [1, 2], "guided_json": {"type": "array", "items": {"pattern": "^a{2,3}$"}}, "timeout": 5}),
        ("/v1/completions", {"prompt": "a", "guided_grammar": 'root ::= "a" | [b-d]+ root?', "priority": 1, "cache_salt": "s"}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}], "tools": [], "reasoning": {}}),
        ("/v1/responses", {"input": "hi", "instructions": "x", "text": {"format": {"type": "json_object"}}, "max_output_tokens": 5}),
        ("/v1/responses/input_tokens", {"input": "hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": blocks}], "max_tokens": 4, "system": blocks[:1], "stop_sequences": ["a"]}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64", "dimensions": 4}),
        ("/generate", {"text": ["a"], "sampling_params": {**numbers, "n": 1, "max_new_tokens": 3, "json_schema": "{}"}, "return_logprob": True}),
        ("/generate", {"input_ids": [[1, 2]], "sampling_params": {"regex": "a|b"}}),
        ("/tokenize", {"messages": said, "add_generation_prompt": True}),
        ("/tokenize", {"prompt": "a", "add_special_tokens": False}),
        ("/detokenize", {"tokens": [1, 2]}),
    ]  # fmt: skip
    return [path.encode() + LINE + json.dumps(body).encode() for path, body in bodies]


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
    (folder / "tokenizer.json").write_bytes(_tokenizers()[0])
    (folder / "model.safetensors").write_bytes(_safetensors()[0])
    return folder


LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
}
_ROPES: list[dict[str, Any]] = [
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"rope_type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [2.0, 2.1], "original_max_position_embeddings": 16},
    {"type": "dynamic", "factor": 2.0},
]  # fmt: skip
_QUANTIZED: list[dict[str, Any]] = [
    {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group", "symmetric": True}, "targets": ["Linear"]}}},
]  # fmt: skip
_BESIDE: dict[str, Any] = {
    "generation_config.json": {"eos_token_id": [2, 3], "temperature": 0.5, "top_k": 4, "top_p": 0.9, "repetition_penalty": 1.1},
    "tokenizer_config.json": {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "chat_template": "{{ messages }}",
        "added_tokens_decoder": {"259": {"content": "</s>", "special": True, "lstrip": True}},
    },
    "special_tokens_map.json": {"unk_token": {"content": "<unk>"}, "additional_special_tokens": ["<x>"]},
    "added_tokens.json": {"<y>": 260},
    "chat_template.json": {"chat_template": [{"name": "default", "template": "x"}]},
    "model.safetensors.index.json": {"metadata": {}, "weight_map": {"model.norm.weight": "model.safetensors"}},
}


def _directories() -> list[bytes]:
    from minisgl.model.common.registry import HF_ARCHS

    more = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4}
    more |= {
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_activation": "gelu_pytorch_tanh",
    }
    configs = [
        LLAMA,
        *(LLAMA | {"rope_scaling": rope} for rope in _ROPES),
        *(LLAMA | {"quantization_config": q} for q in _QUANTIZED),
    ]
    for name, arch in HF_ARCHS.items():
        inner = LLAMA | more | {"architectures": [name], "model_type": arch.model_type}
        if arch.sliding in ("", "all"):
            del inner["layer_types"]
        configs.append(inner if not arch.text else inner | {"text_config": inner | {"model_type": arch.text}})
    return [
        *(b"config.json" + LINE + json.dumps(config).encode() for config in configs),
        *(name.encode() + LINE + json.dumps(content).encode() for name, content in _BESIDE.items()),
    ]


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
    known = ["config.json", *_BESIDE]
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


@cache
def _tokenizers() -> list[bytes]:
    """Of each model of the tokenizers library, with what may stand around it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    from minisgl.model.text.token_bytes import BYTE_ALPHABET

    vocab = dict(BYTE_ALPHABET) | {"ab": 256, "abc": 257}
    bpe = Tokenizer(models.BPE(vocab, [("a", "b"), ("ab", "c")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken("<s>"), AddedToken("</s>", lstrip=True)])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 258)])
    bpe.enable_truncation(5)
    pieces = [
        ("<unk>", 0.0),
        *((f"<0x{b:02X}>", -9.0) for b in range(256)),
        ("▁", -1.0),
        ("a", -2.0),
        ("▁a", -1.5),
        ("b", -2.0),
    ]
    unigram = Tokenizer(models.Unigram(pieces, 0, True))
    unigram.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    unigram.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    piece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "w": 3}, unk_token="[UNK]"))
    piece.pre_tokenizer, piece.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    level = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    level.pre_tokenizer = pre_tokenizers.Metaspace()
    level.decoder = decoders.Metaspace()
    return [tokenizer.to_str().encode() for tokenizer in (bpe, unigram, piece, level)]


def _safetensors() -> list[bytes]:
    norm = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}
    tensors = {"model.norm.weight": norm, "lm_head.weight": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [32, 40]}}
    text = {"language_model.model.norm.weight": norm, "vision.x": {"dtype": "U8", "shape": [8], "data_offsets": [32, 40]}}
    heads = [json.dumps(t).encode() for t in ({"__metadata__": {"format": "pt"}, **tensors}, tensors, text)]
    return [struct.pack("<Q", len(head)) + head + bytes(40) for head in heads]


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


def string(text: str) -> bytes:
    """A string as GGUF has it."""
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


_GGUF_TYPES = ((bool, 7, "<B"), (int, 4, "<I"), (float, 6, "<f"))


def _gguf_value(value: Any) -> bytes:
    """Its type and its bytes."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + string(value)
    if isinstance(value, list):
        items = [_gguf_value(item) for item in value]
        return struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)
    kind, code = next((kind, code) for type_, kind, code in _GGUF_TYPES if isinstance(value, type_))
    return struct.pack("<I", kind) + struct.pack(code, value)


def gguf_bytes(fields: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> bytes:
    """A file of these keys and of float32 tensors of zeros, by their shapes."""
    out, at = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)), 0
    out += b"".join(string(key) + _gguf_value(value) for key, value in fields.items())
    for name, shape in tensors.items():
        out += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)) + struct.pack("<IQ", 0, at)
        at += -(-4 * int(np.prod(shape)) // 32) * 32
    return out + bytes(-len(out) % 32) + bytes(at)


@cache
def _ggufs() -> list[bytes]:
    """The header of the embedded model with fewer tokens and layers, and one of the other kind of tokenizer."""
    from minisgl.model.checkpoint.gguf_file import GGUFFile
    from minisgl.model.checkpoint.resolve import embedded_model

    tensors = {"token_embd.weight": (300, 8), "blk.0.attn_q.weight": (8, 8), "output_norm.weight": (8,)}
    sizes = {
        "block_count": 1,
        "embedding_length": 8,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "feed_forward_length": 8,
    }
    sizes |= {"context_length": 64, "rope.dimension_count": 4}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *(f"▁{i}" for i in range(41))]
    llama = {"model": "llama", "tokens": tokens, "scores": [0.5] * 300, "token_type": [2, 3, 3] + [6] * 256 + [1] * 41}
    llama |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True}
    fields = {"general.architecture": "llama", "llama.attention.layer_norm_rms_epsilon": 1e-6, "general.alignment": 32}
    fields |= {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0, "general.sampling.temp": 0.5}
    out = [fields | {f"tokenizer.ggml.{key}": value for key, value in llama.items()}]
    try:
        embedded = GGUFFile(embedded_model()).fields
    except UserError:  # not installed
        embedded = {}
    else:
        embedded = {key: value[:300] if isinstance(value, list) else value for key, value in embedded.items()}
        used = set(embedded["tokenizer.ggml.tokens"])
        merges = [m for m in embedded["tokenizer.ggml.merges"] if {*m.split(" "), m.replace(" ", "")} <= used]
        out.append(embedded | {"tokenizer.ggml.merges": merges or ["a b"]})
    return [gguf_bytes(fields | {f"llama.{key}": value for key, value in sizes.items()}, tensors) for fields in out]


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
    """Every message to every actor, in two orders, and some one after the other."""
    frames = [encode(msg) for msg in messages() if not isinstance(msg, (m.Stop, m.Failed))]
    one = [bytes([actor]) + struct.pack("<H", len(frame)) + frame for frame in frames for actor in range(5)]
    return [b"".join(one), b"".join(reversed(one)), *(b"".join(one[i : i + 10]) for i in range(0, len(one), 10))]


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

    Stop and Failed are left out: they end an actor, as they should.
    """
    from minisgl.actors.detokenizer import DetokenizerActor
    from minisgl.actors.runtime.local import LocalSystem
    from minisgl.actors.runtime.ring import RingWriter
    from minisgl.actors.runtime.shared_memory import close_arenas, create_arenas
    from minisgl.actors.scheduler.actor import SchedulerActor
    from minisgl.actors.tokenizer import TokenizerActor
    from minisgl.actors.worker import WorkerActor
    from minisgl.api.engine import TextPrompt, TokenPrompt
    from minisgl.api.gateway import Gateway
    from minisgl.model.fake_runner import FakeRunner

    config = _small_config()
    arenas, fds = create_arenas(config)
    system = LocalSystem(1)
    try:
        runner = FakeRunner(config, 40)
        gateway = system.spawn("api", lambda ctx: Gateway(ctx, config, arenas))
        system.spawn("scheduler", lambda ctx: SchedulerActor(ctx, config, arenas))
        system.spawn("worker0", lambda ctx: WorkerActor(ctx, 0, arenas, lambda: runner))
        system.spawn("detokenizer", lambda ctx: DetokenizerActor(ctx, config))
        system.spawn("tokenizer", lambda ctx: TokenizerActor(ctx, config, RingWriter(arenas.prompts[0])))
        names = list(system.actors)
        gateway._silent.clear()  # nobody says Hello
        system.run()
        heard: list[Any] = []
        for prompt in (TokenPrompt((1, 2, 3)), TextPrompt("abc"), TokenPrompt((5,) * 20)):
            gateway.open(prompt, SamplingParams(max_tokens=4, logprobs=1), lambda chunk: None)
        refused: Exception | None = None
        for actor, frame in _parts(raw):
            try:
                msg = decode(frame)
                if not isinstance(msg, (m.Stop, m.Failed)):
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
        close_arenas(fds)
        for actor in system.actors.values():
            actor.__dict__.clear()  # cycles, which would keep the arenas mapped


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
    "record": Target(_read_record, (ValueError,), _records),
    "body": Target(_check_body, (RequestError,), _bodies, change_json),
    "gguf": Target(_read_gguf, (UserError, RequestError), _ggufs, change_gguf),
    "safetensors": Target(_read_safetensors, (UserError,), _safetensors, change_safetensors),
    "tokenizer": Target(
        lambda raw: _with("tokenizer.json", raw, _use_tokenizer),
        (UserError, RequestError),
        _tokenizers,
        lambda raw, rng: change_json(b"x\n" + raw, rng)[2:],
    ),
    "directory": Target(_read_directory, (UserError, RequestError), _directories, change_json),
}


def clean_up() -> None:
    """Remove the files of the targets that were tried."""
    import shutil

    if _folder.cache_info().currsize:
        shutil.rmtree(_folder(), ignore_errors=True)
    _folder.cache_clear()
