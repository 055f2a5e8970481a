"""Lists the flags whose values are not served as they were given: bounded, rounded, or without effect beside others.

What cannot be served at all is refused by minisgl.config and by the workers.  No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from minisgl.config import AUTO_ITL, Config, flag
from minisgl.model.common.host import MAX_KV_TOKENS

_MODEL_ONLY = ("dtype", "quantization", "threads", "memory_fraction", "itl_target_ms", "attention_backend", "graphs")
_WITHOUT_GRAPHS = ("flashinfer", "torch")  # attention backends whose kernels cannot be captured


class Adjusted(NamedTuple):
    """A flag, the value that was given, the one that is served (None: it has no effect), and why, as the end of a sentence."""

    flag: str
    asked: Any
    served: Any
    why: str

    def __str__(self) -> str:
        served = "has no effect" if self.served is None else f"{_show(self.served)} is served"
        return f"{self.flag} {_show(self.asked)}: {served}, {self.why}"


def adjusted(given: Mapping[str, Any], config: Config, kv_tokens: int, cores: int) -> list[Adjusted]:
    """The list for a server.

    `given`: the values that were given, by field of EngineConfig and ServerConfig.  `kv_tokens`: what the KV cache holds.
    `cores`: what this process may use.
    """
    sizes = (part(given, config, kv_tokens) for part in (_lengths, _memory, _counts))
    parts = chain(*sizes, _modes(given, config, cores))
    found = [Adjusted(flag(name), given[name], served, why) for name, served, why in parts]
    if "max_context" not in given and kv_tokens < config.max_context:
        why = f"since a request is at most as long as the KV cache ({flag('kv_tokens')})"
        found.append(Adjusted(flag("max_context"), config.max_context, kv_tokens, why))
    return found


_Found = Iterator[tuple[str, Any, str]]  # field, value served, why


def _lengths(given: Mapping[str, Any], config: Config, kv_tokens: int) -> _Found:
    if given.get("max_context", 0) > (served := min(config.max_context, kv_tokens)):
        least = kv_tokens < config.max_context
        yield "max_context", served, "all that the KV cache holds" if least else f"the limit of {config.model.name}"
    if given.get("step_tokens", 0) > kv_tokens:
        yield "step_tokens", kv_tokens, "all that the KV cache holds"


def _memory(given: Mapping[str, Any], config: Config, kv_tokens: int) -> _Found:
    engine = config.engine
    if given.get("kv_tokens"):
        if kv_tokens != engine.kv_tokens:
            yield "kv_tokens", kv_tokens, f"in whole pages of {engine.page_size} tokens"
        if "memory_fraction" in given:
            yield "memory_fraction", None, f"{flag('kv_tokens')} says how large the KV cache is"
    elif "memory_fraction" in given and engine.device == "cpu" and config.model.format != "fake":
        all_running = engine.max_running * config.max_context
        if kv_tokens >= min(all_running, MAX_KV_TOKENS):
            most = "all running requests can fill" if all_running <= MAX_KV_TOKENS else "a CPU is fast enough for"
            yield "memory_fraction", f"a KV cache of {kv_tokens} tokens", f"as much as {most}"


def _counts(given: Mapping[str, Any], config: Config, kv_tokens: int) -> _Found:
    engine, most = config.engine, config.server.max_open_requests
    if given.get("max_running", 0) > (pages := kv_tokens // engine.page_size):
        yield "max_running", pages, "since every request needs a page of the KV cache"
    for name in ("max_running", "max_queue", "max_choices"):
        if given.get(name, 0) > most:
            yield name, most, f"since no more requests are open at a time ({flag('max_open_requests')})"


def _modes(given: Mapping[str, Any], config: Config, cores: int) -> _Found:
    engine, server = config.engine, config.server
    if config.model.format == "fake":
        if given.get("device") == "cuda":
            yield "device", None, "the fake engine has no model"
        for name in _MODEL_ONLY:
            if name in given and not (name == "memory_fraction" and given.get("kv_tokens")):
                yield name, None, "the fake engine has no model"
    elif threads := given.get("threads", 0):
        if (served := max(threads // engine.tp, 1) * engine.tp) != threads:
            yield "threads", served, f"the same number for each of {engine.tp} ranks"
        if served > cores:
            yield "threads", served, f"but this process may use {cores} core{'s' * (cores > 1)}: more threads slow it down"
    if "lag" in given and engine.lag != given["lag"]:
        yield "lag", engine.lag, "as MINISGL_DISABLE_OVERLAP_SCHEDULING says"
    if given.get("quantization") == "auto" and engine.device == "cpu" and engine.dtype != "auto":
        yield "quantization", "none", f"since {flag('dtype')} {engine.dtype} is given"
    if AUTO_ITL < given.get("itl_target_ms", 0.0) < 0:
        yield "itl_target_ms", AUTO_ITL, "any negative number being the server's own choice"
    if "order" in given and given["order"] == "prefix" and engine.cache == "none":
        yield "order", "arrival", f"since {flag('cache')} none has no cached prefixes"
    if given.get("graphs") == "on" and engine.attention_backend in _WITHOUT_GRAPHS:
        yield "graphs", "off", f"for decodes, which {flag('attention_backend')} {engine.attention_backend} cannot capture"
    if "data_dir_gb" in given and not server.data_dir:
        yield "data_dir_gb", None, f"without {flag('data_dir')} nothing is kept"
    for name in ("journal_mb", "journal_tokens"):
        if given.get(name) and not server.journal and not server.data_dir:
            yield name, None, f"without {flag('journal')} or {flag('data_dir')} no journal is kept"


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
