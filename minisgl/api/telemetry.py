"""Sends a span for every request to an OpenTelemetry collector, with --otel-endpoint or OTEL_* in the environment.

Spans are made when a request has ended, and leave in batches from a thread of their own: a collector that is slow or down
loses spans, which are counted, and delays nothing.  The packages (the extra `otel`) are imported only where this is wanted.
Runs in the api process.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from minisgl.api.meters import Meters, metrics_url
from minisgl.api.request_log import Account
from minisgl.api.spans import OPERATIONS, attributes_of, failed, phases_of
from minisgl.errors import UserError
from minisgl.logs import say
from minisgl.version import __version__

MOST, BATCH = 8192, 512  # spans that may wait, and that leave together
SECONDS = 1.0  # until fewer leave, too
_END_SECONDS = 2.0  # for the last ones
INSTALL = "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
_ADDRESS = re.compile(r"https?://[^\s/?#]+(/[^\s?#]*)?")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def endpoint_of(flag: str, environ: Mapping[str, str] = os.environ) -> str:
    """Where spans go, "" if nobody wants them: the flag, or what OpenTelemetry's variables say."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return ""
    if environ.get("OTEL_TRACES_EXPORTER") == "none":
        return flag
    return flag or next((environ[name] for name in _ENDPOINTS if environ.get(name)), "")


def traces_url(base: str) -> str:
    """The address for spans at a collector that is named with or without the path."""
    return base if urlsplit(base).path.rstrip("/").endswith("/v1/traces") else f"{base.rstrip('/')}/v1/traces"


def telemetry(flag: str, model: str, environ: Mapping[str, str] = os.environ) -> Telemetry | None:
    """The sender of spans, None where nobody wants them.  Raises UserError: the flag is no address, or packages lack."""
    endpoint = endpoint_of(flag, environ)
    if not endpoint:
        return None
    if flag and not _ADDRESS.fullmatch(flag):
        raise UserError(f"--otel-endpoint must be an address like http://127.0.0.1:4318, got {flag[:200]!r}")
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider  # noqa: F401
    except ImportError as e:
        text = f"the packages of OpenTelemetry are not installed ({e.name}): {INSTALL}"
        if flag:
            raise UserError(f"--otel-endpoint {flag}: {text}") from e
        say("otel", f"minisgl: no spans are sent to {endpoint}: {text}", logging.WARNING)
        return None
    # It logs each attempt; one line when it begins to fail is enough, which `Outbox` prints.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    specific = not flag and environ.get(_ENDPOINTS[0])
    exporter = OTLPSpanExporter(endpoint=endpoint if specific else traces_url(endpoint))
    metrics = metrics_url(flag, environ)
    return Telemetry(exporter, endpoint, model, environ, OTLPMetricExporter(endpoint=metrics) if metrics else None)


class Outbox:
    """The spans that wait to be sent.  A span processor of OpenTelemetry: `on_end` gets each span, on the event loop."""

    def __init__(self, exporter: Any, endpoint: str) -> None:
        self._exporter, self._endpoint = exporter, re.sub(r"//[^/@]*@", "//", endpoint)  # without a password
        self._waiting: deque[Any] = deque()
        self._wake, self._closed = threading.Event(), False
        self._no_room = self._failed = self.exported = self.unmade = 0  # each is written by one thread
        self._reaches = True
        self._thread = threading.Thread(target=self._run, name="otel", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        return self._no_room + self._failed + self.unmade

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        """Nothing is done with a span that has not ended."""

    def _on_ending(self, span: Any) -> None:
        """Called by newer packages before `on_end`."""

    def on_end(self, span: Any) -> None:
        if self._closed or len(self._waiting) >= MOST:
            self._no_room += 1
            return
        self._waiting.append(span)
        if len(self._waiting) >= BATCH:
            self._wake.set()

    def shutdown(self) -> None:
        """Send what waits, for a moment."""
        self._closed = True
        self._wake.set()
        self._thread.join(_END_SECONDS)
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 0) -> bool:
        self._wake.set()
        return True

    def _run(self) -> None:
        while True:
            self._wake.wait(SECONDS)
            self._wake.clear()
            closing = self._closed
            while self._waiting:
                self._send([self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))])
            if closing:
                return

    def _send(self, batch: list[Any]) -> None:
        try:
            reaches = self._exporter.export(batch).name == "SUCCESS"
        except Exception:  # whatever a collector answers, it must not end the thread
            reaches = False
        if reaches:
            self.exported += len(batch)
        else:
            self._failed += len(batch)
        if reaches != self._reaches:
            self._reaches = reaches
            text = "takes spans again" if reaches else "takes no spans: they are lost until it does"
            say("otel", f"minisgl: the collector at {self._endpoint} {text}", logging.INFO if reaches else logging.WARNING)


class Telemetry:
    """Makes the spans.  `ended` is RequestLog.on_end.  `metrics`: exports metrics, None for none.

    `now`: the clock of the accounts.
    """

    def __init__(  # noqa: PLR0917
        self,
        exporter: Any,
        endpoint: str,
        model: str,
        environ: Mapping[str, str] = os.environ,
        metrics: Any = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        facts = {"service.version": __version__}
        if "OTEL_SERVICE_NAME" not in environ and "service.name=" not in environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
            facts["service.name"] = "minisgl"
        self._model, self._now, self._trace = model, now, trace
        self.outbox = Outbox(exporter, endpoint)
        resource = Resource.create(facts)
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(self.outbox)
        self._tracer = self._provider.get_tracer("minisgl", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._meters = Meters(metrics, resource, model) if metrics is not None else None

    def counts(self) -> dict[str, int]:
        """Spans by what has become of them."""
        return {"exported": self.outbox.exported, "lost": self.outbox.lost}

    def ended(self, account: Account, now: float) -> None:
        """A request has ended: make its spans.  Whatever goes wrong with them is not the request's."""
        if account.route in OPERATIONS:
            try:
                self._make_spans(account, now)
                if self._meters is not None:
                    self._meters.ended(account, now)
            except Exception:
                self.outbox.unmade += 1

    def _make_spans(self, account: Account, now: float) -> None:
        """One for the request, and one for each of its phases."""
        offset, trace = time.time() - self._now(), self._trace
        root = self._tracer.start_span(
            f"{OPERATIONS[account.route]} {self._model}",
            context=self._propagator.extract(account.caller),
            kind=trace.SpanKind.SERVER,
            attributes=attributes_of(account, self._model),
            start_time=_ns(account.began + offset),
        )
        if failed(account):
            root.set_status(trace.Status(trace.StatusCode.ERROR))
        if root.is_recording():
            inside = trace.set_span_in_context(root)
            for name, begin, end in phases_of(account, now):
                self._tracer.start_span(name, context=inside, start_time=_ns(begin + offset)).end(_ns(end + offset))
        root.end(_ns(now + offset))

    def close(self) -> None:
        """Send what waits, for a moment."""
        closing = threading.Thread(target=self._meters.close if self._meters is not None else int, daemon=True)
        closing.start()
        self._provider.shutdown()
        closing.join(_END_SECONDS)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
