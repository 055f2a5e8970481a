"""Configuration: frozen values, built once in the root process and handed to every actor at spawn.

Nothing here is mutated after start, and no actor reads the environment.  What only the running engine can know (how many
pages fit) travels back as a message, so that "configured" and "discovered" are never confused.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from minisgl.errors import UserError


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a checkpoint says about itself, read from its metadata without loading weights (and without torch).

    Produced by `resolve` of minisgl.model.checkpoint.resolve, or by `random_shape` of .presets for random weights.
    Sizes are in elements; `max_context` in tokens.
    """

    name: str  # served name, e.g. "SmolLM2-135M-Instruct"
    path: str  # the .gguf file, or the directory with config.json; "" for random weights
    format: str  # "gguf" | "safetensors" | "random" | "fake"
    architecture: str  # Hugging Face class name, e.g. "LlamaForCausalLM"
    dtype: str  # dtype the weights are stored in or were trained in: "float32" | "float16" | "bfloat16"
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: str  # JSON of the checkpoint's rope scaling, "" for none
    tie_embeddings: bool
    bos_id: int | None
    eos_ids: tuple[int, ...]  # generation_config and tokenizer together
    qk_norm: bool = False  # every query and key head is normalised over head_dim before it is rotated
    generation: str = ""  # JSON of the sampling parameters that the checkpoint recommends (generation_config.json), "" for none
    weight_format: str = ""  # JSON of how quantised safetensors store linear layers (checkpoint/quant_spec.py), "" if plain
    qkv_bias: bool = False  # the products that make queries, keys and values add a bias
    o_bias: bool = False  # and so does the one behind the attention
    activation: str = "silu"  # of the MLP's gate: "silu" | "gelu_tanh" | "clamped_swiglu" (gpt-oss)
    rotary_dim: int = 0  # leading dimensions of a head that are rotated; 0: all
    local_rope_theta: float = 0.0  # of the layers with a window, if they rotate otherwise than the rest (and unscaled)
    nope_layers: tuple[int, ...] = ()  # layers that do not rotate at all
    windows: tuple[int, ...] = ()  # by layer: tokens that a query sees, its own included; 0: all.  (): 0 for every layer
    attn_scale: float = 0.0  # of queries times keys; 0: head_dim ** -0.5
    attn_softcap: float = 0.0  # c: scores become c * tanh(scores / c); 0: they do not
    logit_softcap: float = 0.0  # the same for the logits
    sinks: bool = False  # every head has a score without a value that takes part in its softmax
    num_experts: int = 0  # of a mixture of experts; 0: the MLPs are dense
    experts_per_token: int = 0
    expert_size: int = 0  # inner columns of one expert
    norm_topk: bool = False  # the weights of a token's experts are scaled to add up to one
    dense_layers: tuple[int, ...] = ()  # layers whose MLP is dense nevertheless
    expert_format: str = ""  # how the weights of experts are stored: "" plain | "mxfp4"
    weight_prefix: str = ""  # of the names of all tensors that belong to the model; others are not read

    @property
    def scale(self) -> float:
        """What queries times keys are multiplied by."""
        return self.attn_scale or self.head_dim**-0.5

    def window(self, layer: int) -> int:
        """Tokens that a query of `layer` sees, its own included; 0: all."""
        return self.windows[layer] if self.windows else 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, raw: str) -> ModelSpec:
        d: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(raw).items()}
        return cls(**d)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the engine runs: everything that scheduler and workers must agree on."""

    tp: int = 1  # tensor-parallel degree: one worker process per rank
    device: str = "cpu"  # "cpu" | "cuda"
    dtype: str = "auto"  # "auto" | "float32" | "bfloat16" | "float16"; auto: float32 on a CPU, the checkpoint's on a GPU
    page_size: int = 16  # tokens of KV per page
    max_running: int = 128  # slots: requests that can be in the running batch
    step_tokens: int = 256  # token budget of one step: decodes first, prefill chunks fill the rest
    lag: int = 2  # plans in flight; 1 = no overlap
    kv_tokens: int = 0  # size of the KV cache in tokens; 0 = sized from memory_fraction
    memory_fraction: float = 0.4  # share of the memory left by weights (and, on a GPU, the largest step) for the KV cache
    max_context: int = 0  # tokens per request; 0 = the model's own limit
    cache: str = "radix"  # "radix" | "none"
    order: str = "prefix"  # who starts first among equal priorities: "prefix" = longest cached prefix, "arrival"
    itl_target_ms: float = 0.0  # prefill chunks shrink so that running requests get a token this often; 0 = fixed budget
    threads: int = 0  # CPU threads over all ranks; 0 = the cores this process may use
    attention_backend: str = "auto"  # of a GPU: "auto" | "triton" | "flashinfer" | "torch"
    quantization: str = "auto"  # of the linear layers: "auto" | "none" | "fp8" (GPU) | "int8" | "q4" (CPU); see --quantization
    kv_cache_dtype: str = "auto"  # of a GPU: "auto" (the model's) | "fp8"
    graphs: str = "on"  # CUDA graphs on a GPU: "on" | "off" (every step is launched kernel by kernel)
    chat_template: str = ""  # file of a chat template that replaces the checkpoint's; "" = the checkpoint's
    generation_config: str = "auto"  # sampling parameters of requests that do not say: "auto" = the checkpoint's | "none"
    sample_seed: int = 0  # base of the seeds given to requests without one; 0 = drawn from the operating system

    @property
    def eight_bits(self) -> bool:
        """Whether linear layers compute with numbers of 8 bits or fewer."""
        if self.quantization == "auto":
            return self.device == "cpu" and self.dtype == "auto"
        return self.quantization != "none"

    def __post_init__(self) -> None:
        """Raises UserError naming the flag (the LLM class takes the same names as keywords)."""
        for flag, value, low, high in (
            ("--tp", self.tp, 1, 1024),
            ("--page-size", self.page_size, 1, 1024),
            ("--max-running", self.max_running, 1, 65535),
            ("--step-tokens", self.step_tokens, 2, 1 << 20),
            ("--lag", self.lag, 1, 8),
            ("--kv-tokens", self.kv_tokens, 0, 1 << 31),
            ("--max-context", self.max_context, 0, 1 << 31),
            ("--threads", self.threads, 0, 4096),
            ("--sample-seed", self.sample_seed, 0, (1 << 63) - 1),
        ):
            if not low <= value <= high:
                raise UserError(f"{flag} must be between {low} and {high}, got {value}")
        for flag, name, known in (
            ("--device", self.device, ("cpu", "cuda")),
            ("--attention-backend", self.attention_backend, ("auto", "triton", "flashinfer", "torch")),
            ("--quantization", self.quantization, ("auto", "none", "fp8", "int8", "q4")),
            ("--kv-cache-dtype", self.kv_cache_dtype, ("auto", "fp8")),
            ("--graphs", self.graphs, ("on", "off")),
            ("--generation-config", self.generation_config, ("auto", "none")),
            ("--dtype", self.dtype, ("auto", "float32", "bfloat16", "float16")),
            ("--cache", self.cache, ("radix", "none")),
            ("--order", self.order, ("prefix", "arrival")),
        ):
            if name not in known:
                raise UserError(f"{flag} must be one of {', '.join(known)}, got {name!r}")
        if self.device == "cpu":
            for flag, name, off in (
                ("--attention-backend", self.attention_backend, "auto"),
                ("--kv-cache-dtype", self.kv_cache_dtype, "auto"),
                ("--graphs", self.graphs, "on"),
            ):
                if name != off:
                    raise UserError(f"{flag} {name} needs a GPU: --device cuda (this server runs on the CPU)")
            if self.quantization == "fp8":
                raise UserError("--quantization fp8 needs a GPU: on a CPU choose int8, q4, none or auto")
            if self.quantization in ("int8", "q4") and self.dtype not in ("auto", "float32"):
                raise UserError(
                    f"--quantization {self.quantization} adds up in float32: leave out --dtype {self.dtype}, "
                    "or use --quantization none"
                )
        elif self.quantization in ("int8", "q4"):
            raise UserError(f"--quantization {self.quantization} needs --device cpu: on a GPU choose fp8, none or auto")
        if not 0.0 < self.memory_fraction <= 1.0:
            raise UserError(f"--memory-fraction must be above 0 and at most 1, got {self.memory_fraction:g}")
        if not 0.0 <= self.itl_target_ms <= 60_000:
            raise UserError(f"--itl-target-ms must be between 0 and 60000, got {self.itl_target_ms:g}")
        if self.step_tokens <= self.max_running:
            raise UserError(
                f"--step-tokens ({self.step_tokens}) must be larger than --max-running ({self.max_running}): a step "
                "gives every running request one token first, and a prompt could never be started"
            )


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How the api process behaves towards its clients."""

    host: str = "127.0.0.1"
    port: int = 8000
    served_names: tuple[str, ...] = ()  # accepted `model` values; the first is the one reported
    drain_seconds: float = 2.0  # how long running requests may go on after SIGTERM or ^C
    max_body_bytes: int = 8 << 20
    max_open_requests: int = 4096  # admission bound: more are answered 429
    max_queue: int = 2048  # requests waiting to be started: more are answered 429; 0 = no bound
    max_queued_tokens: int = 2_000_000  # prompt tokens of the waiting requests, likewise
    tool_call_parser: str = ""  # how the model writes calls of tools: "hermes" | "llama3" | "mistral", "" not at all
    reasoning_parser: str = ""  # how it writes thoughts: "qwen3" | "deepseek_r1", "" not at all
    num_tokenizers: int = 1  # tokenizer processes: a prompt goes to the one with the least to do
    strict: bool = False  # unknown fields of a request are refused instead of reported
    any_model_name: bool = False  # `model` may be anything
    data_dir: str = ""  # where files and batches are kept; "": there are none
    api_keys: tuple[str, ...] = ()  # one of them must come with every request; none: everybody may ask

    def __post_init__(self) -> None:
        """Raises UserError naming the flag."""
        if not 1 <= self.num_tokenizers <= 64:
            raise UserError(f"--num-tokenizers must be between 1 and 64, got {self.num_tokenizers}")


@dataclass(frozen=True, slots=True)
class Config:
    """The whole tree."""

    model: ModelSpec
    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerConfig = field(default_factory=ServerConfig)

    @property
    def max_context(self) -> int:
        """Prompt plus completion of one request, in tokens."""
        limit = self.engine.max_context
        return min(limit, self.model.max_context) if limit else self.model.max_context

    @property
    def dtype(self) -> str:
        """What the model computes in."""
        if self.engine.dtype != "auto":
            return self.engine.dtype
        return self.model.dtype if self.engine.device == "cuda" else "float32"

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """Fields of SamplingParams for requests that do not set them: what the checkpoint recommends, unless switched off."""
        found: dict[str, Any] = json.loads(self.model.generation or "{}")
        return found if self.engine.generation_config == "auto" else {}


# A GPU holds more requests, and its steps only pay with many tokens; its memory has no other use.
GPU_DEFAULTS: dict[str, Any] = {"max_running": 256, "step_tokens": 8192, "memory_fraction": 0.9}


def gpu_count() -> int:
    """NVIDIA GPUs that the driver shows to this process, without loading torch.  0 where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def _check_gpus(gpus: int, tp: int) -> None:
    if gpus == 0:
        raise UserError(
            "--device cuda: no NVIDIA GPU is visible. Check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES, "
            "or use --device cpu."
        )
    if tp > gpus:
        raise UserError(
            f"--tp {tp}: every rank needs a GPU of its own, and {gpus} {'is' if gpus == 1 else 'are'} visible. "
            f"Use --tp {gpus} or less, or --device cpu."
        )
