"""Serves what routers look for by names of SGLang: /v1/loads, /model_info, and fields of /server_info.

Runs in the api process.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

from aiohttp import web

from minisgl.api.http.body import json_handler
from minisgl.api.http.metrics import Metered, kv_shares
from minisgl.api.requests.openai import served_names
from minisgl.config import Config
from minisgl.version import __version__

RATE_SECONDS = 1.0  # a rate is of at least so long


class Rate:
    """Tokens a second between two looks, at least RATE_SECONDS apart."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since, self._tokens, self._value = clock(), 0, 0.0

    def __call__(self, tokens: int) -> float:
        """The rate, given all tokens since the start."""
        now = self._clock()
        if (seconds := now - self._since) >= RATE_SECONDS:
            self._value = max(tokens - self._tokens, 0) / seconds
            self._since, self._tokens = now, tokens
        return self._value


class RouterRoutes:
    """The handlers."""

    def __init__(self, engine: Metered) -> None:
        self._engine, self._rate = engine, Rate()

    def add_to(self, router: web.UrlDispatcher) -> None:
        router.add_get("/v1/loads", json_handler(self.loads))
        for path in ("/model_info", "/get_model_info"):
            router.add_get(path, json_handler(lambda _: model_info(self._engine.config)))

    def loads(self, _: web.Request) -> dict[str, Any]:
        """One entry, as there is one rank of data parallelism."""
        stats, config = defaultdict(int, self._engine.stats), self._engine.config
        used, tokens = kv_shares(stats)[1], stats["total_pages"] * config.engine.page_size
        load = {
            "dp_rank": 0,
            "num_running_reqs": stats["running_requests"],
            "num_waiting_reqs": stats["waiting_requests"] + stats["compiling_requests"],
            "num_used_tokens": round(used * tokens),
            "max_total_num_tokens": tokens,
            "token_usage": used,
            "gen_throughput": round(self._rate(self._engine.metrics.generation_tokens), 2),
            "cache_hit_rate": stats["cached_tokens"] / (stats["prompt_tokens"] or 1),
            "utilization": stats["running_requests"] / config.engine.max_running,
            "max_running_requests": config.engine.max_running,
        }
        return {"timestamp": datetime.now(timezone.utc).isoformat(), "version": __version__, "loads": [load]}


def model_info(config: Config) -> dict[str, Any]:
    """The model, without the place of its files."""
    model = config.model
    return {
        "model_path": model.name,
        "tokenizer_path": model.name,
        "served_model_name": served_names(config)[0],
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "architectures": [model.architecture],
        "max_model_len": config.max_context,
        "vocab_size": model.vocab_size,
    }


def sizes(config: Config, stats: Mapping[str, int]) -> dict[str, Any]:
    """Fields of /server_info under the names that smg looks for."""
    return {
        "model_path": config.model.name,
        "served_model_name": served_names(config)[0],
        "tp_size": config.engine.tp,
        "dp_size": 1,
        "context_length": config.max_context,
        "max_total_tokens": stats.get("total_pages", 0) * config.engine.page_size,
        "max_running_requests": config.engine.max_running,
    }
