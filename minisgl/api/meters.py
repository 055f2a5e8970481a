"""Sends the metrics of OpenTelemetry's conventions for generative models to the collector that gets the spans (telemetry.py).

Each request that ends is measured once; the package adds up and sends the sums from a thread of its own.  No text of a prompt
or an answer is in them.  Runs in the api process.  Names and bounds: open-telemetry/semantic-conventions-genai.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from minisgl.api.request_log import LEFT, Account
from minisgl.api.spans import OPERATIONS, PROVIDER
from minisgl.version import __version__

_ENDPOINT = "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"
_END_MS = 2000  # for the last sums
_BOUNDS = {  # name -> bounds in seconds
    "gen_ai.server.request.duration": [0.01 * 2**i for i in range(14)],
    "gen_ai.server.time_to_first_token": [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10],
    "gen_ai.server.time_per_output_token": [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5],
}
_TEXTS = {
    "gen_ai.server.request.duration": "From a request to the end of its answer.",
    "gen_ai.server.time_to_first_token": "From a request to the first token of its answer, if there is no error.",
    "gen_ai.server.time_per_output_token": "Between tokens behind the first, on average; of requests with one answer.",
}


def metrics_url(flag: str, environ: Mapping[str, str]) -> str:
    """Where metrics go, "" if nobody wants them.  The flag, of spans and metrics, is stronger than the environment."""
    if environ.get("OTEL_METRICS_EXPORTER") == "none":
        return ""
    if not flag and environ.get(_ENDPOINT):
        return environ[_ENDPOINT]
    base = flag or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    return f"{base.rstrip('/').removesuffix('/v1/traces')}/v1/metrics" if base else ""


def measures(account: Account, now: float) -> dict[str, float]:
    """The values of a request that has ended, in seconds, by the names of their metrics."""
    out = {"gen_ai.server.request.duration": now - account.began}
    good = account.first and account.failure is None and account.status != LEFT
    if good and OPERATIONS[account.route] != "embeddings":
        out["gen_ai.server.time_to_first_token"] = account.first - account.began
        if account.answers == 1 and account.completion_tokens > 1:
            out["gen_ai.server.time_per_output_token"] = (account.last - account.first) / (account.completion_tokens - 1)
    return out


class Meters:
    """Adds up the measures of requests.  `exporter`: a MetricExporter; `resource`: the Resource of the spans."""

    def __init__(self, exporter: Any, resource: Any, model: str) -> None:
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        self._model = model
        reader = PeriodicExportingMetricReader(exporter)  # as often as OTEL_METRIC_EXPORT_INTERVAL says
        self._provider = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        meter = self._provider.get_meter("minisgl", __version__)
        self._histograms = {
            name: meter.create_histogram(name, "s", _TEXTS[name], explicit_bucket_boundaries_advisory=bounds)
            for name, bounds in _BOUNDS.items()
        }

    def ended(self, account: Account, now: float) -> None:
        """A request whose route is in OPERATIONS has ended."""
        facts = {"gen_ai.operation.name": OPERATIONS[account.route], "gen_ai.provider.name": PROVIDER}
        facts |= {"gen_ai.request.model": self._model, "gen_ai.response.model": self._model}
        if account.failure is not None:
            facts["error.type"] = account.failure.code
        for name, value in measures(account, now).items():
            self._histograms[name].record(value, facts)

    def close(self) -> None:
        """Send the last sums, for a moment."""
        with contextlib.suppress(Exception):  # a collector that is down
            self._provider.shutdown(_END_MS)
