"""Real inputs of everything that reads foreign bytes, small ones: where a fuzzer begins.  See fuzz_targets.py."""

from __future__ import annotations

import json
import struct
from functools import cache
from typing import Any

import numpy as np

import minisgl.actors.messages as m
from minisgl.errors import UserError
from minisgl.plan import EXTRA, GRAMMAR, GRANT, JOIN, PREFILL, StepLogprobs, StepPlan, StepResult
from minisgl.sampling_params import RequestOptions, SamplingParams

LINE = b"\n"  # between the name of a file or a path and its content


# ---------------- messages
def messages() -> list[Any]:
    """At least one of every kind, as actors send them."""
    ids, one = np.arange(3, dtype=np.int32), np.ones(2, np.uint8)
    uids, none, f32 = np.array([1, 2]), np.zeros(2, np.uint8), np.zeros(3, np.float32)
    i32 = np.zeros(2, np.int32)
    greedy = SamplingParams(temperature=0.0, max_tokens=4, stop=("x",), logit_bias=((3, 1.0),), logprobs=2, seed=7)
    options = RequestOptions(priority=1, timeout=2.0, cache_salt="s", client=1, call=2)
    widths = np.array([1, 2], np.uint8)
    return [
        *(m.Hello("worker0", 5), m.Stop("x"), m.Stopped("worker0"), m.Failed("worker0", "x"), m.Wake(), m.WorkerLoaded(0, 40)),
        *(m.Capacity(40), m.WorkerArmed(0), m.MayCapture(), m.EngineReady(40, 1), m.Tokenized(1, 3, True), m.Cancel(1)),
        *(m.Tokenize(1, "abc", None, True, 0, ""), m.Tokenize(1, None, b'{"messages": []}', False, 2, "qwen3")),
        *(m.Detokenize(1, ids, True), m.Detokenized(1, "abc"), m.TokenizerInfo('{"a": 1}'), m.FlushCache()),
        *(m.CheckGrammar(1, 'start: "a"', "guided_choice"), m.GrammarChecked(1, 'start: "a"')),
        *(m.PrepareGrammar(1, 'start: "a"'), m.GrammarPrepared(1, 0), m.Rejected(1, 400, "x", "prompt", "c", None)),
        *(m.Generate(1, 3, 3, 4, 7, greedy, options), m.Generate(9, 3, 2, 4, 7, SamplingParams(), RequestOptions())),
        *(m.Stats(("a", "b"), np.array([1, 2])), m.Embedded(1, f32), m.Track(1, 2, ids, greedy, 0.5, ids), m.Started(1, 0.5)),
        m.Track(1, 0, ids, SamplingParams(echo=True, max_tokens=4, reasoning="qwen3", thinking=True, logprobs=1), 0.5, ids[:0]),
        *(m.ThoughtEnded(1, 2), m.Tokens(uids, one, ids[:2], none), m.BatchPing(), m.BatchPong(3), m.BatchRefused("x")),
        *(
            m.Forget(1),
            m.Reconnect("detokenizer"),
            m.Evicted(1, 0.5),
            m.Trace(True, 3, True),
            m.Traced("api", 1, b"x", True, True),
        ),
        *(m.Journal("j", True, False, 1.0), m.Journaled("j", True, ""), m.JournalBytes(b"x", True)),
        m.TokenLogprobs(uids, one, ids[:2], f32[:2], widths, ids, f32),
        m.Logprobs(uids, ids[:2], i32, f32[:2], widths, ids, f32, np.ones(5, np.int32), b"abcde"),
        m.Text(uids, one, ids[:2], none, i32, ("a", "b")),
        m.BatchSubmit("a", "/v1/completions", b'{"prompt": "x"}'),
        m.BatchResult("a", 200, "r", b"{}"),
    ]


# ---------------- records of rings
def records() -> list[bytes]:
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


# ---------------- bodies of requests
def bodies() -> list[bytes]:
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    }
    schema = {
        "type": "json_schema",
        "json_schema": {"name": "s", "schema": {"$defs": {"x": {"enum": [1]}}, "anyOf": [{"$ref": "#/$defs/x"}]}},
    }
    said: list[Any] = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    said += [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ]
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
        (
            "/v1/chat/completions",
            {"messages": said[:1], "response_format": schema, "stream": False, "chat_template": "{{ messages }}"},
        ),
        ("/v1/completions", {"prompt": ["a", "b"], "echo": True, "logprobs": 2, "guided_regex": "a+", **numbers}),
        (
            "/v1/completions",
            {"prompt": [1, 2], "guided_json": {"type": "array", "items": {"pattern": "^a{2,3}$"}}, "timeout": 5},
        ),
        ("/v1/completions", {"prompt": "a", "guided_grammar": 'root ::= "a" | [b-d]+ root?', "priority": 1, "cache_salt": "s"}),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}], "tools": [], "reasoning": {}},
        ),
        (
            "/v1/responses",
            {"input": "hi", "instructions": "x", "text": {"format": {"type": "json_object"}}, "max_output_tokens": 5},
        ),
        ("/v1/responses/input_tokens", {"input": "hi"}),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": blocks}], "max_tokens": 4, "system": blocks[:1], "stop_sequences": ["a"]},
        ),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64", "dimensions": 4}),
        (
            "/generate",
            {
                "text": ["a"],
                "sampling_params": {**numbers, "n": 1, "max_new_tokens": 3, "json_schema": "{}"},
                "return_logprob": True,
            },
        ),
        ("/generate", {"input_ids": [[1, 2]], "sampling_params": {"regex": "a|b"}}),
        ("/tokenize", {"messages": said, "add_generation_prompt": True}),
        ("/tokenize", {"prompt": "a", "add_special_tokens": False}),
        ("/detokenize", {"tokens": [1, 2]}),
    ]
    return [path.encode() + LINE + json.dumps(body).encode() for path, body in bodies]


# ---------------- files of models
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
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"rope_type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [2.0, 2.1], "original_max_position_embeddings": 16},
    {"type": "dynamic", "factor": 2.0},
]
_QUANTIZED: list[dict[str, Any]] = [
    {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "g": {
                "weights": {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group", "symmetric": True},
                "targets": ["Linear"],
            }
        },
    },
]
BESIDE: dict[str, Any] = {
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


def directories() -> list[bytes]:
    from minisgl.model.common.registry import HF_ARCHS

    more: dict[str, Any] = {
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "head_dim": 4,
    }
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
        *(name.encode() + LINE + json.dumps(content).encode() for name, content in BESIDE.items()),
    ]


@cache
def tokenizers_() -> list[bytes]:
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


def safetensors() -> list[bytes]:
    norm = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}
    tensors = {"model.norm.weight": norm, "lm_head.weight": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [32, 40]}}
    text = {"language_model.model.norm.weight": norm, "vision.x": {"dtype": "U8", "shape": [8], "data_offsets": [32, 40]}}
    heads = [json.dumps(t).encode() for t in ({"__metadata__": {"format": "pt"}, **tensors}, tensors, text)]
    return [struct.pack("<Q", len(head)) + head + bytes(40) for head in heads]


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
def ggufs() -> list[bytes]:
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
    llama: dict[str, Any] = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.5] * 300,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * 41,
    }
    llama |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True}
    fields: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "general.alignment": 32,
    }
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
