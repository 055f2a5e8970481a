"""Declares the configuration: frozen values, built once in the root process and passed to every actor at spawn.

Nothing here is mutated after start, and no actor reads the environment.  What only the running engine can know (how many
pages fit) travels back as a message, so that "configured" and "discovered" are never confused.

A field that a user may set is declared once, by `setting`: its flag, its help, its range or choices and its default.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from minisgl.errors import UserError
from minisgl.reasoning import CALL_STYLES, STYLES
from minisgl.sampling_params import MAX_PRIORITY

AUTO_ITL = -1.0  # itl_target_ms that follows the measured time of decodes


# ---------------- what a checkpoint says
@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the rotary frequencies are stretched over a longer context; minisgl.model.common.rope applies it.

    The fields have the names of config.json.  Each kind uses some of them.
    """

    rope_type: str  # "linear" | "dynamic" | "llama3" | "yarn" | "longrope" | "divisors" (one per frequency, in GGUF files)
    factor: float = 1.0
    original_max_position_embeddings: float = 0.0  # tokens of the context before it was stretched
    attention_factor: float = 1.0  # multiplies cos and sin
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    beta_fast: float = 0.0
    beta_slow: float = 0.0
    truncate: bool = True  # YaRN: the ramp begins and ends at whole dimensions
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How quantised safetensors store their linear layers; minisgl.model.checkpoint.quantized reads them."""

    method: str  # "scaled" | "gptq" | "awq" | "packed"
    scale: str = ""  # scaled: suffix of the scales' tensor
    block: tuple[int, int] | None = None  # scaled: rows and columns per scale; None: the scales' shape decides
    bits: int = 0
    group_size: int = -1  # inputs per scale; -1: all inputs
    zero_offset: int = 0  # gptq: added to the stored zero points


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """The sampling parameters of requests that set none; None: as SamplingParams has it.

    minisgl.model.checkpoint.metadata fills it.  `source`: who recommends them, for the line at the start.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The architecture and sizes of a checkpoint, read from its metadata without loading weights (and without torch).

    `resolve` of minisgl.model.checkpoint.resolve makes it, or `random_shape` of .presets for random weights.
    Sizes are in elements; `max_context` is in tokens.
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
    rope_scaling: RopeScaling | None
    tie_embeddings: bool
    bos_id: int | None
    eos_ids: tuple[int, ...]  # generation_config and tokenizer together
    qk_norm: bool = False  # every query and key head is normalised over head_dim before it is rotated
    generation: SamplingDefaults = SamplingDefaults()
    weight_format: WeightFormat | None = None  # of safetensors; None: not quantised
    qkv_bias: bool = False  # the projections to queries, keys and values add a bias
    o_bias: bool = False  # the output projection of the attention adds a bias
    activation: str = "silu"  # of the MLP's gate: "silu" | "gelu_tanh" | "clamped_swiglu" (gpt-oss)
    rotary_dim: int = 0  # leading dimensions of a head that are rotated; 0: all
    local_rope_theta: float = 0.0  # of sliding-window layers that rotate by a theta of their own, unscaled; 0: by rope_theta
    nope_layers: tuple[int, ...] = ()  # layers without rotary positions
    windows: tuple[int, ...] = ()  # by layer: tokens that a query sees, its own included; 0: all.  (): 0 for every layer
    attn_scale: float = 0.0  # multiplies queries times keys; 0: head_dim ** -0.5
    attn_softcap: float = 0.0  # c: scores become c * tanh(scores / c); 0: no cap
    logit_softcap: float = 0.0  # the same for the logits
    sinks: bool = False  # attention sinks: every head has a score without a value that takes part in its softmax
    num_experts: int = 0  # of a mixture of experts; 0: the MLPs are dense
    experts_per_token: int = 0
    expert_size: int = 0  # inner columns of one expert
    norm_topk: bool = False  # the weights of a token's experts are scaled to add up to one
    dense_layers: tuple[int, ...] = ()  # layers with a dense MLP in a mixture of experts
    expert_format: str = ""  # storage of the experts' weights: "" plain | "mxfp4"
    weight_prefix: str = ""  # prefix of the model's tensor names; tensors without it are not read

    @property
    def scale(self) -> float:
        """The factor of queries times keys."""
        return self.attn_scale or self.head_dim**-0.5

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return bool(self.num_experts) and layer not in self.dense_layers

    def window(self, layer: int) -> int:
        """Tokens that a query of `layer` sees, its own included; 0: all."""
        return self.windows[layer] if self.windows else 0


# ---------------- what a user may set
@dataclass(frozen=True, slots=True)
class Setting:
    """The declaration of a field that a user may set: what argparse shows and what `check_settings` checks."""

    help: str
    metavar: str | None = None
    low: float | None = None  # the smallest value
    high: float = 0
    choices: tuple[str, ...] = ()
    on_gpu: Any = None  # the default on a GPU, where it is another
    needs_gpu: bool = False  # on a CPU the default is the only value
    flag: str = ""  # where it does not follow from the field's name
    options: Mapping[str, Any] = field(default_factory=dict)  # further arguments of argparse's add_argument


def setting(default: Any, *about: Any, **more: Any) -> Any:
    """A dataclass field with a default, and a Setting of the other arguments."""
    return field(default=default, metadata={"setting": Setting(*about, **more)})


def settings_of(config: Any) -> Iterator[tuple[str, Any, Setting]]:
    """(name, default, Setting) of the declared fields of a dataclass, or of an instance."""
    return ((f.name, f.default, f.metadata["setting"]) for f in fields(config) if "setting" in f.metadata)


def flag(name: str) -> str:
    """The flag of a field: max_running -> --max-running."""
    return "--" + name.replace("_", "-")


def check_settings(config: Any) -> None:
    """Compare the fields of a dataclass instance with their ranges and choices.  Raises UserError naming the flag."""
    for name, _, s in settings_of(config):
        value = getattr(config, name)
        if s.low is not None and not s.low <= value <= s.high:
            low, high, found = (f"{n:g}" if isinstance(n, float) else n for n in (s.low, s.high, value))
            raise UserError(f"{flag(name)} must be between {low} and {high}, got {found}")
        if s.choices and value not in s.choices:
            raise UserError(f"{flag(name)} must be one of {', '.join(s.choices)}, got {value!r}")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the engine runs: everything that scheduler and workers must agree on."""

    tp: int = setting(1, "tensor-parallel degree: one worker process per rank", "N", 1, 1024)
    device: str = setting(
        "cpu", "auto (a GPU where there is one), cpu or cuda", "KIND", choices=("cpu", "cuda"), options={"default": "auto"}
    )
    dtype: str = setting(
        "auto",
        "auto, float32, bfloat16 or float16; auto: float32 on a CPU, the checkpoint's on a GPU",
        "TYPE",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    page_size: int = setting(16, "tokens per page of the KV cache", "TOKENS", 1, 1024)
    # A GPU holds more requests, and its steps only pay with many tokens; its memory has no other use.
    max_running: int = setting(128, "requests that may run at the same time", "N", 1, 65535, on_gpu=256)
    step_tokens: int = setting(
        256, "token budget of a step; decodes come first, prompts fill the rest", "TOKENS", 2, 1 << 20, on_gpu=8192
    )
    lag: int = setting(2, "plans in flight; 1 switches overlap off, as MINISGL_DISABLE_OVERLAP_SCHEDULING=1 does", "N", 1, 8)
    kv_tokens: int = setting(0, "size of the KV cache; 0: from --memory-fraction", "TOKENS", 0, 1 << 31)
    memory_fraction: float = setting(  # on a GPU the largest step is subtracted, too
        0.4, "share of the memory left after the weights that the KV cache may take", "F", on_gpu=0.9
    )
    max_context: int = setting(0, "longest prompt plus completion; 0: the model's own limit", "TOKENS", 0, 1 << 31)
    cache: str = setting("radix", "prefix cache: radix, or none", "KIND", choices=("radix", "none"))
    order: str = setting(
        "prefix", "who starts first: prefix (longest cached prefix), or arrival", "KIND", choices=("prefix", "arrival")
    )
    itl_target_ms: float = setting(
        0.0,
        "longest wait between two tokens of an answer while prompts of others are computed beside it, whose chunks shrink to "
        "that; 0: no bound; -1, the server's default: prompts at most double the wait",
        "MS",
        AUTO_ITL,
        60_000.0,
    )
    threads: int = setting(0, "CPU threads over all ranks; 0: as many as this process may use", "N", 0, 4096)
    attention_backend: str = setting(
        "auto",
        "auto, triton, flashinfer or torch (GPU)",
        "NAME",
        choices=("auto", "triton", "flashinfer", "torch"),
        needs_gpu=True,
    )
    quantization: str = setting(
        "auto",
        "of the linear layers: none; fp8 (GPU); int8 or q4, on weights of 8 or 4 bits (CPU); auto: on a GPU, 4 and 8 bits "
        "where the checkpoint has them; on a CPU, without --dtype, 4 bits where a GGUF file has them and 8 for the rest",
        "KIND",
        choices=("auto", "none", "fp8", "int8", "q4"),
    )
    weight_format: str = setting(
        "auto",
        "of the layers of --model random:SHAPE: auto (16 bits), or packed as awq, gptq, q4_k or q8_0 checkpoints are (GPU)",
        "KIND",
        choices=("auto", "awq", "gptq", "q4_k", "q8_0"),
        needs_gpu=True,
    )
    kv_cache_dtype: str = setting("auto", "auto (the model's), or fp8 (GPU)", "TYPE", choices=("auto", "fp8"), needs_gpu=True)
    graphs: str = setting(
        "on", "on, or off: no CUDA graphs, for comparisons (GPU)", "STATE", choices=("on", "off"), needs_gpu=True
    )
    chat_template: str = setting("", "a Jinja chat template to use instead of the model's own", "FILE")
    generation_config: str = setting(
        "auto",
        "sampling parameters of requests that do not say: auto (as the model recommends), or none (temperature 1)",
        "KIND",
        choices=("auto", "none"),
    )
    sample_seed: int = setting(0, "base for the seeds of requests that bring none; 0: random", "SEED", 0, (1 << 63) - 1)

    @property
    def eight_bits(self) -> bool:
        """Whether linear layers compute with numbers of 8 bits or fewer."""
        if self.quantization == "auto":
            return self.device == "cpu" and self.dtype == "auto"
        return self.quantization != "none"

    @property
    def packed(self) -> str:
        """How a GPU opens weights, see `open_weights`: the format of random ones, "auto", or "" to dequantise them."""
        return self.weight_format if self.quantization == "auto" else ""

    def __post_init__(self) -> None:
        """Raises UserError naming the flag (the LLM class takes the same names as keywords)."""
        check_settings(self)
        self._check_device()
        self._check_sizes()

    def _check_device(self) -> None:
        """What only a GPU or only a CPU can do."""
        if self.device == "cuda":
            if self.weight_format != "auto" and self.quantization != "auto":
                raise UserError(f"--weight-format {self.weight_format} is for packed weights: leave out --quantization")
            if self.quantization in ("int8", "q4"):
                raise UserError(f"--quantization {self.quantization} needs --device cpu: on a GPU choose fp8, none or auto")
            return
        for name, default, s in settings_of(self):
            if s.needs_gpu and (value := getattr(self, name)) != default:
                raise UserError(f"{flag(name)} {value} needs a GPU: --device cuda (this server runs on the CPU)")
        if self.quantization == "fp8":
            raise UserError("--quantization fp8 needs a GPU: on a CPU choose int8, q4, none or auto")
        if self.quantization in ("int8", "q4") and self.dtype not in ("auto", "float32"):
            raise UserError(
                f"--quantization {self.quantization} adds up in float32: leave out --dtype {self.dtype}, "
                "or use --quantization none"
            )

    def _check_sizes(self) -> None:
        if not 0.0 < self.memory_fraction <= 1.0:
            raise UserError(f"--memory-fraction must be above 0 and at most 1, got {self.memory_fraction:g}")
        if self.step_tokens <= self.max_running:
            raise UserError(
                f"--step-tokens ({self.step_tokens}) must be larger than --max-running ({self.max_running}): a step "
                "gives every running request one token first, and a prompt could never be started"
            )


_LIST: dict[str, Any] = {"type": str, "default": None}  # a flag whose value is not yet that of the field
_MANY = _LIST | {"action": "append"}
_ALONE: dict[str, Any] = {"nargs": "?", "const": "on", "metavar": "STATE"}  # the flag alone means on


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How the api process behaves towards its clients."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port to listen on; 0 picks a free one")
    served_names: tuple[str, ...] = setting(  # accepted `model` values; the first is the one reported
        (), "name clients may use; may be repeated", "NAME", flag="--served-model-name", options=_MANY
    )
    drain_seconds: float = setting(2.0, "grace for running requests at the end", "S", 0.0, 86_400.0)
    max_restarts: int = setting(5, "restarts of processes that died, in --restart-window; more end the server", "N", 0, 1 << 31)
    restart_window: float = setting(60.0, "see --max-restarts", "S", 1.0, 86_400.0)
    hang_seconds: float = setting(60.0, "a process that stands still so long is started again; 0: never", "S", 0.0, 86_400.0)
    max_body_bytes: int = 8 << 20
    default_max_tokens: int = 0  # of an answer whose request does not say; 0: what is left of the context
    max_open_requests: int = setting(4096, "more are answered 429", "N", 1, 1 << 31)
    max_choices: int = setting(512, "answers that one request may ask for: n times its prompts", "N", 1, 1 << 20)
    max_priority: int = setting(0, "highest priority that requests may ask for; higher ones are refused", "N", 0, MAX_PRIORITY)
    max_queue: int = setting(2048, "waiting requests; more are answered 429; 0: no bound", "N", 0, 1 << 31)
    max_queued_tokens: int = setting(2_000_000, "prompt tokens of waiting requests; 0: no bound", "N", 0, 1 << 40)
    # "" switches a parser off.
    tool_call_parser: str = setting(
        "",
        "how the model writes calls of tools; auto: as its chat template shows",
        options={"choices": ("auto", "none", *CALL_STYLES), "default": "auto"},
    )
    reasoning_parser: str = setting(
        "",
        "how the model writes thoughts; auto: as its chat template shows",
        options={"choices": ("auto", "none", *STYLES), "default": "auto"},
    )
    trust_request_chat_template: bool = setting(False, "let a request bring a chat_template of its own; default: refused")
    num_tokenizers: int = setting(  # a prompt goes to the tokenizer with the least to do
        1, "tokenizer processes: with more than one, short prompts do not wait for long ones", "N", 1, 64
    )
    strict: bool = setting(False, "refuse unknown fields of a request; default: report them")
    any_model_name: bool = setting(False, "serve requests for whatever model they name")
    data_dir: str = setting("", "keep /v1/files and /v1/batches here; default: off", "DIR")
    data_dir_gb: float = setting(10.0, "GiB that uploads and results may take in --data-dir", "GB", 1, 100_000)
    journal: str = setting("", "keep a journal of the scheduler here, for `minisgl journal`; default: off", "FILE")
    journal_mb: float = setting(256.0, "MB that a journal may take; its oldest parts go first", "MB", 1, 1 << 20)
    journal_tokens: bool = setting(False, "a journal has token ids and grammars; default: keyed hashes, and no texts")
    kv_events: str = setting("", "tell routers what the prefix cache holds, over ZMQ; default: off", "tcp://HOST:PORT")
    kv_events_replay: str = setting("", "where they ask for events that they missed; default: nowhere", "tcp://HOST:PORT")
    kv_events_format: str = setting("map", "of an event: map, or array, for older routers", "KIND", choices=("map", "array"))
    kv_events_topic: str = setting("", "topic of the messages, as kv@POD@MODEL; default: none", "TOPIC")
    kv_events_salted: bool = setting(False, "tell of prompts with a cache_salt or a key's own salt, too; default: not")
    trace: str = setting("", "write a timeline of the whole run here, for ui.perfetto.dev; default: off", "FILE")
    trace_mb: float = setting(64.0, "MB that it may have; then it ends", "MB", 1, 1 << 12)
    no_page: bool = setting(False, "no page at GET /, and no /debug/live; default: both")
    log_requests: bool = setting(False, "print a line for every request when it ends; default: a summary of refusals")
    log_format: str = setting("text", "what stderr gets: text, or json, an object a line", "KIND", choices=("text", "json"))
    otel_endpoint: str = setting("", "send spans to this OpenTelemetry collector (OTLP over HTTP); default: off", "URL")
    api_keys: tuple[str, ...] = setting(  # a request must bring one of them; (): no key is needed
        (), "keys, one a line: a request must bring one; default: none", "FILE", flag="--api-key-file", options=_LIST
    )
    admin_api_keys: tuple[str, ...] = setting(
        (), "administrators' keys, for /flush_cache and everybody's files", "FILE", flag="--admin-api-key-file", options=_LIST
    )
    salt_by_key: str = setting("on", "each key has cached prefixes of its own: on, off", choices=("on", "off"), options=_ALONE)
    ssl_certfile: str = setting("", "serve https: the certificate and those that sign it, PEM; default: http", "FILE")
    ssl_keyfile: str = setting("", "its private key, PEM; default: in --ssl-certfile", "FILE")
    batch_socket: str = setting("", "serve `minisgl batch` through a network, too, with --batch-keys", "tcp://HOST:PORT")
    batch_keys: str = setting("", "who may use --batch-socket, see `minisgl batch-keys DIR`", "DIR")
    allow_origins: tuple[str, ...] = setting(  # as browsers send them; "*": all
        (), "web pages that may use the API (CORS); '*': all; may be repeated", "ORIGIN", flag="--allow-origin", options=_MANY
    )

    def __post_init__(self) -> None:
        """Raises UserError naming the flag."""
        check_settings(self)


RENDEZVOUS = "tp"  # the file of the run directory through which ranks find each other


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration of everything: model, engine and server."""

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
        """The dtype that the model computes in."""
        if self.engine.dtype != "auto":
            return self.engine.dtype
        return self.model.dtype if self.engine.device == "cuda" else "float32"

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """Fields of SamplingParams for requests that do not set them: the checkpoint's recommendation, unless switched off."""
        found = {name: getattr(self.model.generation, name) for name in SamplingDefaults.__slots__ if name != "source"}
        return {k: v for k, v in found.items() if v is not None} if self.engine.generation_config == "auto" else {}


# ---------------- from what was given to an EngineConfig
def engine_config(values: Mapping[str, Any], model_format: str = "") -> EngineConfig:
    """EngineConfig from the `values` that were given, by field; None and absent: the default of the device.

    `model_format`: ModelSpec.format; the fake model needs no GPU, so it takes none by itself.
    MINISGL_DISABLE_OVERLAP_SCHEDULING is the one environment variable of the interface.  Raises UserError.
    """
    chosen = {name: values[name] for name, _, _ in settings_of(EngineConfig) if values.get(name) is not None}
    if (form := chosen.get("weight_format", "auto")) != "auto" and model_format not in ("", "random"):
        raise UserError(f"--weight-format {form} makes random weights, and is for --model random:SHAPE only. Leave it out.")
    device = chosen.get("device", "auto")
    if device == "auto" and model_format == "fake":
        chosen["device"] = device = "cpu"
    gpus = gpu_count() if device in ("auto", "cuda") else 0
    if device == "auto":
        chosen["device"] = device = "cuda" if gpus else "cpu"
    if device == "cuda":
        _check_gpus(gpus, chosen.get("tp", 1))
        chosen = {name: s.on_gpu for name, _, s in settings_of(EngineConfig) if s.on_gpu is not None} | chosen
    if os.environ.get("MINISGL_DISABLE_OVERLAP_SCHEDULING", "") not in ("", "0"):
        chosen["lag"] = 1
    return EngineConfig(**chosen)


def gpu_count() -> int:
    """NVIDIA GPUs that the driver shows to this process, without loading torch.  0 where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


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
