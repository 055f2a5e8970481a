"""What one model would use here: numbers, attention, ranks, context, memory, templates; and why not what is faster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from minisgl.commands.doctor.driver import Driver
from minisgl.commands.doctor.gpu import backends
from minisgl.commands.doctor.rows import GIB, Check, Fact, Missing
from minisgl.commands.fit.estimate import estimate
from minisgl.commands.fit.hardware import Hardware
from minisgl.config import Config, EngineConfig, ModelSpec, settings_of
from minisgl.errors import UserError
from minisgl.model.common.memory import STORED_BITS, can_attend


class Plan:
    """A model and the engine that would serve it."""

    def __init__(self, model: str, tp: int, driver: Driver) -> None:
        """Raises UserError for a model that cannot be served."""
        from minisgl.model.checkpoint.resolve import resolve

        self.spec: ModelSpec = resolve(model, weights=False)
        self.driver, device = driver, "cuda" if driver.gpus else "cpu"
        usual = {name: s.on_gpu for name, _, s in settings_of(EngineConfig) if s.on_gpu is not None} if driver.gpus else {}
        self.engine = EngineConfig(tp=tp, device=device, **usual)
        self.dtype = Config(self.spec, self.engine).dtype


def checks(model: str, tp: int, driver: Driver) -> Iterator[Check]:
    """The rows, in their order; one alone where the model cannot be served at all."""
    try:
        plan = Plan(model, tp, driver)
    except UserError as e:
        why = str(e)

        def refused() -> Fact:
            raise Missing(why, means="this model cannot be served")

        yield Check(f"model {model}", True, refused)
        return
    yield Check(f"model {plan.spec.name}", True, lambda: shape(plan))
    yield Check("model: numbers", False, lambda: numbers(plan))
    yield Check("model: attention", False, lambda: attention(plan))
    yield Check("model: ranks", True, lambda: ranks(plan))
    yield Check("model: memory and context", True, lambda: memory(plan))
    yield Check("model: chat template", False, lambda: template(plan))
    yield Check("model: tools and thoughts", False, lambda: parsers(plan))


def shape(plan: Plan) -> Fact:
    s = plan.spec
    experts = f", {s.experts_per_token} of {s.num_experts} experts" if s.num_experts else ""
    heads = f"{s.num_heads} heads on {s.num_kv_heads} of keys and values, of {s.head_dim}"
    return Fact(f"{s.architecture}, {s.num_layers} layers of {s.hidden_size}, {heads}{experts}, from {s.format}")


def numbers(plan: Plan) -> Fact:
    """Dtype and bits of the weights, and why not fewer."""
    s, stored = plan.spec, plan.spec.weight_format
    if plan.driver.gpus:
        how = f"{plan.dtype}"
        if stored is not None or s.format == "gguf" or s.expert_format:
            means = "matrices that the checkpoint has in 4 or 8 bits by groups stay packed; the rest is dequantised as it loads"
        else:
            means = "as the checkpoint has it"
        fp8 = plan.driver.gpus[0].capability >= 89 and not s.num_experts and plan.dtype == "bfloat16"
        return Fact(how, f"{means}; float8 halves the linear layers" if fp8 else means, "--quantization fp8" if fp8 else "")
    from minisgl.model.cpu.build import NoKernels, load_kernels

    try:
        load_kernels()
    except NoKernels as e:
        return Fact("float32 in torch", f"several times slower than 8 bits on C kernels: {e}", "apt install gcc", "better")
    experts = "; experts stay in float32" if s.num_experts else ""
    if s.format == "gguf":
        types = gguf_types(s)
        taken = sum(n for kind, n in types.items() if kind in STORED_BITS)
        others = sum(types.values()) - taken
        means = f"{taken} matrices are computed with as the file stores them (Q4_0, Q4_1, Q8_0)"
        if others:
            means += f", {others} of other types are rounded to 8 bits"
        return Fact(f"4 and 8 bits on C kernels{experts}" if any(STORED_BITS.get(k) == 4 for k in types) else "8 bits", means)
    why = "q4 is faster and rounds more"
    return Fact(f"8 bits on C kernels{experts}", f"rounded from the checkpoint's; {why}", "--quantization q4")


def gguf_types(spec: ModelSpec) -> Counter[int]:
    """ggml's number of a type -> matrices of it."""
    from minisgl.model.checkpoint.gguf_file import GGUFFile

    return Counter(t.kind for t in GGUFFile(spec.path).tensors.values() if len(t.shape) == 2)


def attention(plan: Plan) -> Fact:
    s = plan.spec
    if plan.driver.gpus:
        return Fact(*backends(s.head_dim, plan.dtype, plan.driver.gpus[0].capability, sinks=s.sinks))
    if can_attend(s, plan.engine.page_size):
        return Fact("C kernel, KV cache in half precision")
    means = f"the C kernel needs heads and pages that are multiples of 16; heads are {s.head_dim}"
    return Fact("torch", means, state="better")


def ranks(plan: Plan) -> Fact:
    """Whether --tp can split the model, and evenly."""
    from minisgl.model.common.shard import check_tp

    s, tp = plan.spec, plan.engine.tp
    try:
        check_tp(s, tp)
    except UserError as e:
        raise Missing(str(e), f"--tp {s.num_heads}") from e
    even = [n for n in (1, 2, 4, 8, 16) if s.num_kv_heads % n == 0 and s.intermediate_size % n == 0]
    found = f"--tp {tp}; evenly with {', '.join(map(str, even))}"
    if tp > s.num_kv_heads:
        return Fact(found, f"{s.num_kv_heads} heads of keys and values: ranks keep copies of the same ones", state="better")
    if tp not in even:
        return Fact(found, "one rank has more than another, and all wait for it", state="better")
    return Fact(found)


def memory(plan: Plan) -> Fact:
    """Whether weights and a request of full length fit, by the ledger of `minisgl fit`."""
    s, gpus = plan.spec, plan.driver.gpus
    if gpus:
        if plan.engine.tp > len(gpus):
            raise Missing(f"--tp {plan.engine.tp}, and {len(gpus)} GPUs", f"--tp {len(gpus)}")
        hardware = Hardware(gpus[0].name, min(g.gib for g in gpus), 0, 0, 0, gpus[0].capability, "the driver")
    else:
        from minisgl.model.common.host import available_bytes

        hardware = Hardware("CPU", available_bytes() / GIB, 0, 0, 0, 0, "this machine")
    found = estimate(s, plan.engine, hardware)
    weights = sum(found.weights.values()) / GIB
    more = f"minisgl fit {s.path or 'random:' + s.name} shows the ledger"
    if not found.pages:
        raise Missing(f"{weights:.1f} GiB of weights do not fit {hardware.gib:.1f} GiB", more, found.refused)
    each = " a rank" if plan.engine.tp > 1 else ""
    text = f"{weights:.2f} GiB of weights{each}, KV cache of {found.kv_tokens} tokens; context {s.max_context}"
    if found.kv_tokens < s.max_context:
        return Fact(text, f"a request may have {found.kv_tokens} tokens instead of {s.max_context}", more, "better")
    return Fact(text, f"{found.users_at(s.max_context)} requests of full length at the same time")


def template(plan: Plan) -> Fact:
    from minisgl.model.text.chat_format import chat_templates

    found = chat_templates(plan.spec)
    if found:
        return Fact(f"found ({', '.join(found)})")
    return Fact("none", "chat, responses and messages are refused; completions work", "--chat-template FILE", "missing")


def parsers(plan: Plan) -> Fact:
    from minisgl.model.text.chat_format import chat_templates, guess

    templates = chat_templates(plan.spec)
    calls, thoughts = guess(templates)
    found = f"calls of tools: {calls or 'none'}; thoughts: {thoughts or 'none'}"
    if calls:
        return Fact(found)
    if any("tools" in text for text in templates.values()):
        return Fact(found, "the template takes tools, but shows no format that is known", "--tool-call-parser NAME", "better")
    return Fact(found, "its template does not know tools", state="absent")
