"""Says at the start of a server what it serves, where, and what was adjusted.  Runs in the api process."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from minisgl import logs
from minisgl.commands.access import page_url, url_of
from minisgl.commands.adjusted import adjusted
from minisgl.config import Config


def sampling_line(config: Config) -> str:
    """The line at the start about requests that set no sampling parameters."""
    values = ", ".join(f"{name} {value:g}" for name, value in config.sampling_defaults.items())
    source = "--generation-config none" if config.engine.generation_config == "none" else config.model.generation.source
    return f"sampling: {values or 'temperature 1'}" + (f" ({source})" if source else "")


def announce(
    config: Config, num_pages: int, address: tuple[str, int], start: float, *, tls: bool, given: Mapping[str, Any]
) -> None:
    """Print the lines of a server that is ready.

    `num_pages`: of the KV cache.  `address`: host and port.  `start`: when the program was started.  `given`: what its user has
    set, see minisgl.commands.adjusted.
    """
    from minisgl.model.common.host import usable_cores

    engine = config.engine
    kv_tokens = num_pages * engine.page_size
    for change in adjusted(given, config, kv_tokens, usable_cores()):
        logs.say("adjusted", f"minisgl: {change}", logging.WARNING, **change._asdict())
    host, port = address
    scheme = "https" if tls else "http"
    url = url_of(host, port, scheme)
    seconds = time.monotonic() - start
    logs.say("sampling", sampling_line(config), sampling_defaults=config.sampling_defaults)
    text = (
        f"ready in {seconds:.1f} s: {url}/v1   "
        f"(tp {engine.tp}, context {config.max_context}, KV cache {kv_tokens} tokens, "
        f"EOS {', '.join(map(str, config.model.eos_ids)) or 'none'})"
    )
    logs.say(
        "ready",
        text,
        url=f"{url}/v1",
        seconds=round(seconds, 2),
        tp=engine.tp,
        context=config.max_context,
        kv_tokens=kv_tokens,
        sampling_defaults=config.sampling_defaults,
    )
    page = page_url(host, port, scheme)
    logs.say("page", f"chat and documentation in a browser: {page}", url=page)
