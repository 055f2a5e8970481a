"""The flags that people type from vLLM, SGLang and llama.cpp: what they are here.

A flag that is here, too, under another name is translated; one for what minisgl always does is taken, with a note; one for
something that it does otherwise, or not at all, is refused with a sentence that says what to write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Their flag -> ours, with the same meaning.
SAME = {
    # vLLM
    "--tensor-parallel-size": "--tp",
    "-tp": "--tp",
    "--max-model-len": "--max-context",
    "--max-num-seqs": "--max-running",
    "--max-num-batched-tokens": "--step-tokens",
    "--block-size": "--page-size",
    "--seed": "--sample-seed",
    "-q": "--quantization",
    "--otlp-traces-endpoint": "--otel-endpoint",
    # SGLang
    "--model-path": "--model",
    "--tp-size": "--tp",
    "--context-length": "--max-context",
    "--max-running-requests": "--max-running",
    "--max-queued-requests": "--max-queue",
    "--chunked-prefill-size": "--step-tokens",
    "--max-total-tokens": "--kv-tokens",
    "--schedule-policy": "--order",
    "--random-seed": "--sample-seed",
    "--tokenizer-worker-num": "--num-tokenizers",
    # llama.cpp
    "-m": "--model",
    "-hf": "--model",
    "-hfr": "--model",
    "--hf-repo": "--model",
    "-a": "--served-model-name",
    "--alias": "--served-model-name",
    "-c": "--max-context",
    "--ctx-size": "--max-context",
    "-np": "--max-running",
    "--parallel": "--max-running",
    "-t": "--threads",
    "-b": "--step-tokens",
    "--batch-size": "--step-tokens",
    "-s": "--sample-seed",
    "--chat-template-file": "--chat-template",
    "--ssl-key-file": "--ssl-keyfile",
    "--ssl-cert-file": "--ssl-certfile",
}

# Their flag without a value -> our words.
WORDS = {
    "--no-enable-prefix-caching": ("--cache", "none"),
    "--disable-radix-cache": ("--cache", "none"),
    "--disable-overlap-schedule": ("--lag", "1"),
    "--no-async-scheduling": ("--lag", "1"),
    "--enforce-eager": ("--graphs", "off"),
    "--disable-cuda-graph": ("--graphs", "off"),
}

# Our flag -> their word for a value -> ours.
VALUES: dict[str, dict[str, str]] = {
    "--dtype": {"half": "float16", "float": "float32", "fp16": "float16", "fp32": "float32", "bf16": "bfloat16"},
    "--device": {"gpu": "cuda"},
    "--kv-cache-dtype": {"fp8_e4m3": "fp8"},
    "--order": {"lpm": "prefix", "fcfs": "arrival"},
    "--generation-config": {"vllm": "none"},
    "--quantization": dict.fromkeys(("awq", "gptq", "gguf", "compressed-tensors", "mxfp4"), "auto"),
    "--sample-seed": {"-1": "0"},
    "--max-context": {"-1": "0"},
    "--threads": {"-1": "0"},
}

_ALWAYS, _SELF, _STEP = "always so here", "chosen by minisgl itself", "--step-tokens is the one bound of a step"

# Their flag -> (how many words follow, or those that may, why it is not needed).
NEEDLESS: dict[str, tuple[int | tuple[str, ...], str]] = {
    # vLLM
    "--trust-remote-code": (0, "code in a checkpoint is never run, and no model here needs it"),
    "--enable-prefix-caching": (0, f"{_ALWAYS} (--cache none switches it off)"),
    "--enable-chunked-prefill": (0, _ALWAYS),
    "--async-scheduling": (0, f"{_ALWAYS} (--lag 1 switches it off)"),
    "--enable-auto-tool-choice": (0, _ALWAYS),
    "--enable-prompt-tokens-details": (0, _ALWAYS),
    "--enable-force-include-usage": (0, "clients ask for it with stream_options"),
    "--disable-log-requests": (0, "requests are not logged"),
    "--no-enable-log-requests": (0, "requests are not logged"),
    "--disable-frontend-multiprocessing": (0, "minisgl is always several processes"),
    "--task": (1, "one server generates and embeds"),
    "--runner": (1, "one server generates and embeds"),
    "--swap-space": (1, "nothing is swapped out: a request that makes way is computed again"),
    "--guided-decoding-backend": (1, _SELF),
    "--structured-outputs-config": (1, _SELF),
    "--distributed-executor-backend": (1, _SELF),
    "--tokenizer-mode": (1, _SELF),
    "--uvicorn-log-level": (1, "there is no such log"),
    # SGLang
    "--max-prefill-tokens": (1, _STEP),
    "--grammar-backend": (1, _SELF),
    "--sampling-backend": (1, _SELF),
    "--enable-metrics": (0, f"{_ALWAYS}: GET /metrics"),
    "--enable-cache-report": (0, _ALWAYS),
    "--enable-mixed-chunk": (0, _ALWAYS),
    "--is-embedding": (0, "one server generates and embeds"),
    "--skip-server-warmup": (0, "there is nothing to skip"),
    "--stream-interval": (1, "every token is streamed"),
    # llama.cpp
    "-fa": (("on", "off", "auto", "0", "1"), _SELF),
    "--flash-attn": (("on", "off", "auto", "0", "1"), _SELF),
    "-ub": (1, _STEP),
    "--ubatch-size": (1, _STEP),
    "-tb": (1, "--threads holds for prompts, too"),
    "--threads-batch": (1, "--threads holds for prompts, too"),
    "-cb": (0, _ALWAYS),
    "--cont-batching": (0, _ALWAYS),
    "--jinja": (0, _ALWAYS),
    "--metrics": (0, f"{_ALWAYS}: GET /metrics"),
    "--slots": (0, "GET /server_info shows the statistics"),
    "--embedding": (0, _ALWAYS),
    "--embeddings": (0, _ALWAYS),
    "--no-mmap": (0, _SELF),
    "--mlock": (0, _SELF),
    "-ngl": (1, "on a GPU all layers are there"),
    "--gpu-layers": (1, "on a GPU all layers are there"),
    "--n-gpu-layers": (1, "on a GPU all layers are there"),
    "--load-format": (1, "the files say it"),
}

_MEMORY = (
    "did you mean --memory-fraction F? It is the share of the memory left after the weights that the KV cache takes, "
    "not the share of all memory"
)
_SERVERS = "minisgl splits a model by --tp only; for more throughput start several servers"
_REQUEST = "a request says that: the field {} of its body"
_SPECULATIVE = "speculative decoding is not supported"
_LORA = "LoRA adapters are not supported: merge them into the checkpoint"
_DEVICES = "did you mean the environment variable CUDA_VISIBLE_DEVICES? It names the GPUs that are used"
_KV_TYPE = "did you mean --kv-cache-dtype? It is auto or fp8 (GPU)"
_TEXT = "minisgl serves text only"

# Their flag -> what to write instead, or why there is nothing.
INSTEAD = {
    # vLLM
    "--gpu-memory-utilization": _MEMORY,
    "--tokenizer": "a model's own tokenizer is used: --model names a directory that holds both",
    "--download-dir": "did you mean the environment variable HF_HOME? Downloads go there",
    "--hf-token": "did you mean the environment variable HF_TOKEN?",
    "--no-enable-chunked-prefill": "prompts are always computed in chunks of at most --step-tokens",
    "--pipeline-parallel-size": _SERVERS,
    "-pp": _SERVERS,
    "--data-parallel-size": _SERVERS,
    "-dp": _SERVERS,
    "--enable-expert-parallel": "the experts are split by --tp",
    "--cpu-offload-gb": "a model has to fit: choose more ranks with --tp, --quantization fp8, or --device cpu",
    "--speculative-config": _SPECULATIVE,
    "--enable-lora": _LORA,
    "--lora-modules": _LORA,
    "--limit-mm-per-prompt": _TEXT,
    "--max-logprobs": "answers have up to 20 log probabilities for each token",
    "--config": "minisgl reads no file of flags: write them out",
    "--ssl-ca-certs": "clients are told apart by API keys, not by certificates: --api-key-file",
    # SGLang
    "--ssl-keyfile-password": "did you mean the environment variable MINISGL_SSL_KEYFILE_PASSWORD?",
    "--mem-fraction-static": _MEMORY,
    "--tokenizer-path": "a model's own tokenizer is used: --model names a directory that holds both",
    "--dp-size": _SERVERS,
    "--dp": _SERVERS,
    "--pp-size": _SERVERS,
    "--ep-size": "the experts are split by --tp",
    "--enable-torch-compile": "the kernels need no torch.compile; on a GPU steps are CUDA graphs",
    "--speculative-algorithm": _SPECULATIVE,
    "--lora-paths": _LORA,
    "--base-gpu-id": _DEVICES,
    # llama.cpp
    "-ctk": _KV_TYPE,
    "-ctv": _KV_TYPE,
    "--cache-type-k": _KV_TYPE,
    "--cache-type-v": _KV_TYPE,
    "-md": _SPECULATIVE,
    "--model-draft": _SPECULATIVE,
    "--lora": _LORA,
    "--mmproj": _TEXT,
    "-mu": "download the file, and name it with --model",
    "--model-url": "download the file, and name it with --model",
    "-hff": "download the file, and name it with --model",
    "--hf-file": "download the file, and name it with --model",
    "-n": _REQUEST.format("max_tokens"),
    "--predict": _REQUEST.format("max_tokens"),
    "--n-predict": _REQUEST.format("max_tokens"),
    "--temp": _REQUEST.format("temperature"),
    "--temperature": _REQUEST.format("temperature"),
    "--top-k": _REQUEST.format("top_k"),
    "--top-p": _REQUEST.format("top_p"),
    "--min-p": _REQUEST.format("min_p"),
    "--repeat-penalty": _REQUEST.format("repetition_penalty"),
    "-p": _REQUEST.format("messages or prompt"),
    "--prompt": _REQUEST.format("messages or prompt"),
    "--reasoning-format": "did you mean --reasoning-parser?",
    "-dev": _DEVICES,
    "-mg": _DEVICES,
    "--main-gpu": _DEVICES,
    "-sm": _SERVERS,
    "--split-mode": _SERVERS,
    "-ts": "did you mean --tp N? The ranks get equal parts",
    "--tensor-split": "did you mean --tp N? The ranks get equal parts",
}

_NO_LAYERS = "did you mean --device cpu? A model is on the GPU as a whole, or on the CPU"

# (flag, value) that is not what its NEEDLESS row says -> as in INSTEAD.
REFUSED = {(flag, "0"): _NO_LAYERS for flag in ("-ngl", "--gpu-layers", "--n-gpu-layers")} | {
    ("--load-format", "dummy"): "did you mean --model random:SHAPE? It has random weights; `random:` lists the shapes",
    ("--load-format", "pt"): "pickles can run code and are never loaded: convert them to safetensors",
    ("--load-format", "npcache"): "pickles can run code and are never loaded: convert them to safetensors",
}


# (flag as typed, value): what differs although the flag is the same.
DIFFERS = {(flag, "0"): "0 is a random seed here; with any other number answers can be repeated" for flag in ("--seed", "-s")}


def translate(words: Sequence[str], own: Mapping[str, bool]) -> tuple[list[str], dict[str, str], list[str]]:
    """The words of a command line in our flags, what was typed for each of them, and notes for the user.

    own: the flags of the command, and whether a value follows.  Flags that nobody knows stay as they are.  Raises ValueError
    with a sentence about one that has another form here, or none.
    """
    out: list[str] = []
    typed: dict[str, str] = {}
    notes: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*out, word, *rest], typed, notes
        flag, equals, value = word.partition("=")
        ours = flag if flag in own else SAME.get(flag, "")
        if ours in own:
            typed[ours] = flag
            if own[ours] and not equals and rest and (rest[0] in VALUES.get(ours, ()) or (flag, rest[0]) in DIFFERS):
                equals, value = "=", rest.pop(0)
            if (flag, value) in DIFFERS:
                notes.append(f"{flag} {value}: {DIFFERS[flag, value]}")
            out.append(ours + equals + VALUES.get(ours, {}).get(value, value))
        elif flag in WORDS and WORDS[flag][0] in own:
            typed[WORDS[flag][0]] = flag
            out += WORDS[flag]
        elif flag in NEEDLESS:
            follow, why = NEEDLESS[flag]
            if not equals and rest and (follow == 1 or (isinstance(follow, tuple) and rest[0] in follow)):
                value = rest.pop(0)
            if (flag, value) in REFUSED:
                raise ValueError(f"{flag} {value}: {REFUSED[flag, value]}")
            notes.append(f"{flag} is not needed: {why}")
        elif flag in INSTEAD:
            raise ValueError(f"{flag}: {INSTEAD[flag]}")
        else:
            out.append(word)
    return out, typed, notes
