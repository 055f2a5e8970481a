"""Spans of requests: what is in them; and with the extra `otel`, what a collector gets, and what happens when it is down."""

from __future__ import annotations

import ast
import asyncio
import inspect
import itertools
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from processes import eventually
from test_server import CHAT, COMPLETION, OVERLOADED, USER, ScriptedEngine, Server, ask

from minisgl.api import telemetry as module
from minisgl.api.engine import Chunk, TextPrompt
from minisgl.api.http.exposition import Exposition
from minisgl.api.http.metrics import Metered
from minisgl.api.meters import measures, metrics_url
from minisgl.api.request_log import LEFT, Account, RequestLog
from minisgl.api.spans import OPERATIONS, Phase, attributes_of, failed, phases_of
from minisgl.api.telemetry import Telemetry, endpoint_of, telemetry, traces_url
from minisgl.commands.serve import parser
from minisgl.errors import RequestError, UserError
from minisgl.sampling_params import Finish, SamplingParams

SECRET = "a secret of the prompt"


# ---------------- what is in a span
def finished(params: SamplingParams, route: str = f"POST {CHAT}") -> tuple[Account, float]:
    """The account of a request of 10 seconds, and when it ended: 1 before its opening, queued from 2 to 3, first token at 5."""
    clock = [100.0]
    told: list[tuple[Account, float]] = []
    log = RequestLog(now=lambda: clock[0])
    log.on_end = lambda account, now: told.append((account, now))
    with log.request(route, "stream", "id-1") as account:
        clock[0] = 101.0
        watch = account.watch(TextPrompt(SECRET), lambda item: None, params)
        clock[0] = 105.0
        watch(Chunk(SECRET, (1,), Finish.NONE, 10, 4, queued=1.0, waited=2.0))
        clock[0] = 109.0
        watch(Chunk(SECRET, (2, 3), Finish.LENGTH, 10, 4, queued=1.0, waited=2.0, thought_tokens=2))
        account.status, clock[0] = 200, 110.0
    return told[0]


def test_the_attributes_of_a_request_have_the_names_of_the_conventions() -> None:
    account, _ = finished(SamplingParams(max_tokens=7, temperature=0.5, top_p=0.9, top_k=40, seed=3))
    assert attributes_of(account, "tiny") == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "minisgl",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.response.id": "id-1",
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 40,
        "gen_ai.request.seed": 3,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.response.time_to_first_chunk": 5.0,
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.reasoning.output_tokens": 2,
        "gen_ai.latency.time_in_queue": 1.0,
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
    }
    assert SECRET not in str(attributes_of(account, "tiny"))
    vectors = attributes_of(finished(SamplingParams(), "POST /v1/embeddings")[0], "tiny")
    assert "gen_ai.request.temperature" not in vectors
    plain = attributes_of(finished(SamplingParams())[0], "tiny")
    assert not {"gen_ai.request.seed", "gen_ai.request.max_tokens", "gen_ai.request.top_k"} & set(plain)


def test_the_phases_of_a_request_follow_one_another() -> None:
    phases = phases_of(*finished(SamplingParams()))
    assert phases == [
        Phase("prepare", 100, 102),
        Phase("queue", 102, 103),
        Phase("prefill", 103, 105),
        Phase("decode", 105, 109),
    ]


@pytest.mark.parametrize(("queued", "waited"), [(5.0, 1.0), (0.0, 0.0), (50.0, 50.0)])
def test_phases_lie_within_their_request_whatever_the_clocks_say(queued: float, waited: float) -> None:
    account, now = finished(SamplingParams())
    account.started_at = 101.0 + waited
    account.queued_at = account.started_at - queued
    times = [t for phase in phases_of(account, now) for t in phase[1:]]
    assert min(times) >= account.began
    assert max(times) <= now
    assert all(phase.begin <= phase.end or phase.name == "prefill" for phase in phases_of(account, now))


def test_a_request_that_is_refused_or_left_has_a_span_that_says_so() -> None:
    log, told = RequestLog(), list[Account]()
    log.on_end = lambda account, now: told.append(account)
    log.refuse(f"POST {CHAT}", "a", OVERLOADED)
    with log.request(f"POST {CHAT}", "http", "b"):
        pass  # its client has left
    with log.request(f"POST {CHAT}", "stream", "c") as account:
        account.status = 200
        account.fail(RequestError("it died", status=500, code="engine_error"))
    refused, left, broken = (attributes_of(account, "tiny") for account in told)
    assert (refused["http.response.status_code"], refused["error.type"]) == (429, "server_overloaded")
    assert (left["http.response.status_code"], left["gen_ai.response.finish_reasons"]) == (499, ["abort"])
    assert (broken["error.type"], broken["gen_ai.response.finish_reasons"]) == ("engine_error", ["error"])
    assert [failed(account) for account in told] == [False, False, True]
    assert all(phases_of(account, 1.0) == [] for account in told)


def test_the_measures_of_a_request_are_those_of_its_account() -> None:
    account, now = finished(SamplingParams())  # opened at 100, three tokens from 105 to 109, over at 110
    names = [f"gen_ai.server.{name}" for name in ("request.duration", "time_to_first_token", "time_per_output_token")]
    assert measures(account, now) == dict(zip(names, (10.0, 5.0, 2.0), strict=True))
    account.answers = 2  # of which nobody knows who has waited for which token
    assert list(measures(account, now)) == names[:2]
    account.fail(RequestError("it died", status=500, code="engine_error"))
    assert list(measures(account, now)) == names[:1]
    account, now = finished(SamplingParams())
    account.status = LEFT
    assert list(measures(account, now)) == names[:1]
    assert list(measures(finished(SamplingParams(), "POST /v1/embeddings")[0], now)) == names[:1]


def test_metrics_go_where_spans_go_unless_the_environment_says_otherwise() -> None:
    general, own = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b/"}, {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://m/x"}
    for base in ("http://a:4318", "http://a:4318/", "http://a:4318/v1/traces"):
        assert metrics_url(base, {}) == "http://a:4318/v1/metrics"
    assert metrics_url("https://a/otlp", {}) == "https://a/otlp/v1/metrics"
    assert metrics_url("", general) == "http://b/v1/metrics"
    assert metrics_url("", general | own) == "http://m/x"
    assert metrics_url("http://a", general | own) == "http://a/v1/metrics"
    assert metrics_url("", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/x"}) == "", "that address is for spans alone"
    assert metrics_url("http://a", {"OTEL_METRICS_EXPORTER": "none"}) == ""


def test_every_route_that_the_engine_works_for_has_an_operation() -> None:
    from minisgl.api.endpoints.table import ENDPOINTS

    assert set(OPERATIONS) == {f"POST {path}" for path, endpoint in ENDPOINTS.items() if endpoint.generates}


# ---------------- whether anybody wants them
def test_the_flag_or_the_environment_says_where_spans_go() -> None:
    general, traces = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
    assert endpoint_of("", {}) == ""
    assert endpoint_of("http://a", {general: "http://b"}) == "http://a"
    assert endpoint_of("", {general: "http://b"}) == "http://b"
    assert endpoint_of("", {general: "http://b", traces: "http://c/x"}) == "http://c/x"
    assert endpoint_of("", {general: "http://b", "OTEL_TRACES_EXPORTER": "none"}) == ""
    assert endpoint_of("http://a", {"OTEL_SDK_DISABLED": "true"}) == ""
    assert traces_url("http://a:4318") == traces_url("http://a:4318/") == traces_url("http://a:4318/v1/traces")
    assert traces_url("https://a/otlp") == "https://a/otlp/v1/traces"
    assert parser().parse_args(["--otel-endpoint", "http://a"]).otel_endpoint == "http://a"
    assert parser().parse_args(["--otlp-traces-endpoint", "http://a"]).otel_endpoint == "http://a"


@pytest.mark.parametrize("flag", ["localhost:4318", "grpc://a:4317", "http://", "http://a b", "http://a?x=1"])
def test_what_is_no_address_is_refused(flag: str) -> None:
    with pytest.raises(UserError, match="--otel-endpoint must be an address"):
        telemetry(flag, "tiny", {})


def test_without_the_packages_the_flag_says_what_to_install_and_the_environment_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(UserError, match=r"--otel-endpoint http://a: .*pip install opentelemetry-sdk"):
        telemetry("http://a", "tiny", {})
    with caplog.at_level("WARNING", "minisgl"):
        assert telemetry("", "tiny", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b"}) is None
    assert "no spans are sent to http://b" in caplog.text


def test_nothing_is_imported_and_no_chunk_is_watched_where_nobody_wants_spans() -> None:
    assert telemetry("", "tiny", {}) is None
    log = RequestLog()
    assert not log.watches
    with log.request("POST /x", "http", "id") as account:
        assert account.watch(TextPrompt("x"), print, SamplingParams()) is print
    assert b"minisgl_otel" not in asyncio.run(Exposition(Metered(ScriptedEngine())).render())[0]
    heads = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [head for head in heads if "opentelemetry" in ast.unparse(head)]


# ---------------- with the packages
class Collector:
    """An OTLP collector over HTTP that keeps what it gets; `status`: what it answers; `gate`: it waits for this before."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        outer, self.status, self.gate = self, 200, threading.Event()
        self.gate.set()
        self.paths: list[str] = []
        self.requests: list[Any] = []
        self.sums: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                outer.gate.wait(20)
                outer.paths.append(self.path)
                if outer.status == 200 and self.path == "/v1/metrics":
                    outer.sums.append(ExportMetricsServiceRequest.FromString(raw))
                elif outer.status == 200:
                    outer.requests.append(ExportTraceServiceRequest.FromString(raw))
                self.send_response(outer.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def spans(self) -> list[Any]:
        scopes = (s for r in list(self.requests) for resource in r.resource_spans for s in resource.scope_spans)
        return list(itertools.chain.from_iterable(scope.spans for scope in scopes))

    def close(self) -> None:
        self.gate.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")
    monkeypatch.setattr(module, "SECONDS", 0.02)
    server = Collector()
    yield server
    server.close()


def sender(url: str) -> Telemetry:
    made = telemetry(url, "tiny", {})
    assert made is not None
    return made


def told(span: Any) -> dict[str, Any]:
    """The attributes of a span as Python has them."""
    kinds = {"string_value", "int_value", "double_value", "bool_value"}
    out: dict[str, Any] = {}
    for a in span.attributes:
        kind = a.value.WhichOneof("value")
        out[a.key] = getattr(a.value, kind) if kind in kinds else [v.string_value for v in a.value.array_value.values]
    return out


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def served(spans: Telemetry, *asks: tuple[str, dict[str, Any], dict[str, str]]) -> list[int]:
    """Statuses of requests to a server that sends spans."""

    async def main() -> list[int]:
        engine = ScriptedEngine()
        http = Server(engine)
        http.request_log.on_end = spans.ended
        await http.start()
        try:
            return [(await ask(http, path, body, headers=headers))[0] for path, body, headers in asks]
        finally:
            await http.close()

    return asyncio.run(main())


def test_a_collector_gets_a_span_for_each_request_within_the_trace_of_its_client(collector: Collector) -> None:
    spans = sender(collector.url)
    body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 9}
    statuses = served(
        spans,
        (CHAT, body, {"traceparent": PARENT, "x-request-id": "mine"}),
        (CHAT, body | {"stream": True}, {"traceparent": "nonsense"}),
        (COMPLETION, {"prompt": ["a", "b"], "temperature": 9}, {}),
        ("/tokenize", {"prompt": "a"}, {}),
    )
    assert statuses == [200, 200, 400, 200]
    spans.close()
    assert set(collector.paths) == {"/v1/traces", "/v1/metrics"}
    found = collector.spans()
    roots = [s for s in found if s.kind == 2]
    assert [s.name for s in roots] == ["chat tiny", "chat tiny", "text_completion tiny"]
    first, second, refused = roots
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (PARENT[3:35], PARENT[36:52])
    assert not second.parent_span_id
    assert told(first)["gen_ai.response.id"] == "mine"
    assert told(first)["gen_ai.usage.output_tokens"] == 4
    assert told(first)["gen_ai.response.finish_reasons"] == ["stop"]
    assert [told(s)["gen_ai.request.stream"] for s in roots] == [False, True, False]
    assert told(refused)["error.type"]
    assert refused.status.code == 0  # the client is at fault
    for root, n in ((first, 4), (second, 4), (refused, 0)):
        parts = [s for s in found if s.parent_span_id == root.span_id]
        assert [s.name for s in parts] == ["prepare", "queue", "prefill", "decode"][:n]
        assert all(root.start_time_unix_nano <= s.start_time_unix_nano <= s.end_time_unix_nano for s in parts)
        assert all(s.end_time_unix_nano <= root.end_time_unix_nano for s in parts)
        assert all(s.trace_id == root.trace_id for s in parts)
    assert spans.counts() == {"exported": 11, "lost": 0}
    resource = {a.key: a.value.string_value for a in collector.requests[0].resource_spans[0].resource.attributes}
    assert resource["service.name"] == "minisgl"
    assert SECRET.encode() not in b"".join(r.SerializeToString() for r in collector.requests)


def test_a_collector_gets_the_metrics_of_the_conventions(collector: Collector) -> None:
    spans = sender(collector.url)
    body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 9}
    asks = [
        (CHAT, body, {}),
        (CHAT, body | {"stream": True}, {}),
        (CHAT, body | {"n": 2}, {}),
        (COMPLETION, {"prompt": 3.5}, {}),
    ]
    assert served(spans, *asks, ("/tokenize", {"prompt": "a"}, {})) == [200, 200, 200, 400, 200]  # type: ignore[arg-type]
    spans.close()
    resource, last = (got := collector.sums[-1].resource_metrics[0]).resource, got.scope_metrics[0].metrics
    found = {
        m.name: {(told(p)["gen_ai.operation.name"], "error.type" in told(p)): p for p in m.histogram.data_points} for m in last
    }
    chat, refused = ("chat", False), ("text_completion", True)
    assert {name: {key: p.count for key, p in points.items()} for name, points in found.items()} == {
        "gen_ai.server.request.duration": {chat: 3, refused: 1},
        "gen_ai.server.time_to_first_token": {chat: 3},
        "gen_ai.server.time_per_output_token": {chat: 2},
    }
    assert {m.unit for m in last} == {"s"}
    [point] = found["gen_ai.server.time_per_output_token"].values()
    assert told(point) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "minisgl",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
    }
    assert point.explicit_bounds[0] == 0.01
    assert {a.key: a.value.string_value for a in resource.attributes}["service.name"] == "minisgl"
    assert SECRET.encode() not in b"".join(r.SerializeToString() for r in collector.sums)


def test_a_client_that_does_not_want_to_be_traced_is_not(collector: Collector) -> None:
    spans = sender(collector.url)
    served(spans, (CHAT, {"messages": USER}, {"traceparent": PARENT[:-1] + "0"}))
    spans.close()
    assert collector.spans() == []
    assert spans.counts() == {"exported": 0, "lost": 0}


def test_a_collector_that_fails_loses_spans_which_are_counted_and_said_once(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    collector.status = 400
    spans = sender(collector.url)
    with caplog.at_level("INFO", "minisgl"):
        for _ in range(2):
            before = spans.counts()["lost"]
            assert served(spans, (CHAT, {"messages": USER}, {})) == [200]
            eventually(lambda before=before: spans.counts()["lost"] == before + 5)
        collector.status = 200
        served(spans, (CHAT, {"messages": USER}, {}))
        eventually(lambda: spans.counts()["exported"] == 5)
    lines = [r.message for r in caplog.records if "collector" in r.message]
    assert [("takes no spans" in line, "takes spans again" in line) for line in lines] == [(True, False), (False, True)]
    engine = Metered(ScriptedEngine())
    engine.metrics.spans = spans.counts
    text = asyncio.run(Exposition(engine).render())[0]
    assert b'minisgl_otel_spans_total{outcome="exported"} 5.0' in text
    assert b'minisgl_otel_spans_total{outcome="lost"} 10.0' in text
    spans.close()


def test_a_collector_that_is_slow_holds_up_no_request_and_no_more_than_so_many_spans(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST", 12)
    monkeypatch.setattr(module, "BATCH", 5)
    collector.gate.clear()
    spans = sender(collector.url)
    assert served(spans, *[(CHAT, {"messages": USER}, {})] * 8) == [200] * 8  # 40 spans
    lost = spans.counts()["lost"]
    assert 40 - 12 - 5 <= lost <= 40 - 12
    collector.gate.set()
    eventually(lambda: spans.counts()["exported"] == 40 - lost)
    spans.close()


def test_a_span_that_cannot_be_made_is_lost_and_its_request_is_not(collector: Collector) -> None:
    spans = sender(collector.url)
    spans._propagator = None
    assert served(spans, (CHAT, {"messages": USER}, {})) == [200]
    assert spans.counts() == {"exported": 0, "lost": 1}
    spans.close()


def test_nobody_at_the_address_holds_up_no_end(collector: Collector) -> None:
    collector.close()
    spans = sender(collector.url)
    assert served(spans, (CHAT, {"messages": USER}, {})) == [200]
    spans.close()  # within seconds: the exporter's own patience is cut off
    assert not spans.outbox._thread.is_alive() or spans.outbox._thread.daemon
