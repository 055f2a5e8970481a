"""The Grafana dashboard asks for metrics and labels that a server has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_metrics import families, scraped

DASHBOARD = Path(__file__).parents[1] / "docs/grafana/minisgl.json"
OURS_BY_PROMETHEUS = {"instance", "job"}  # labels that every sample gets when it is scraped
WORDS = {"sum", "max", "by", "rate", "increase", "histogram_quantile", "label_values"}
TOKEN = re.compile(r'\s+|"[^"]*"|\[[^\]]*\]|\$?[A-Za-z_:][\w:]*|[\d.]+|=~|!~|!=|[-+*/(),{}=]')


def tokens(expression: str) -> list[str]:
    found = TOKEN.findall(expression)
    assert "".join(found) == expression, expression
    return [token for token in found if token.strip()]


def asked(expression: str) -> tuple[dict[str, set[str]], set[str]]:
    """The metrics of a PromQL expression with the labels that select their samples, and the labels that it groups by."""
    words, metrics, grouped, at = tokens(expression), dict[str, set[str]](), set[str](), 0
    assert words.count("(") == words.count(")")
    while at < len(words):
        word = words[at]
        at += 1
        if word == "by":
            end = words.index(")", at)
            grouped |= set(words[at + 1 : end]) - {","}
            at = end
        elif word == "{":
            end = words.index("}", at)
            labels = {words[i - 1] for i in range(at, end) if words[i] in ("=", "=~", "!=", "!~")}
            metrics[words[at - 2]] |= labels
            at = end
        elif re.match(r"[A-Za-z_]", word) and word not in WORDS:
            metrics.setdefault(word, set())
    return metrics, grouped


def problems(expression: str, legend: str = "") -> list[str]:
    """What of an expression, or the legend of its lines, the live server does not have."""
    labels: dict[str, set[str]] = {}
    for family in families().values():
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    metrics, grouped = asked(expression)
    out = [f"no metric {name}" for name in metrics if name not in labels]
    for name, selected in metrics.items():
        wanted = selected | grouped
        out += [f"{name} has no label {label}" for label in wanted - labels.get(name, set()) - OURS_BY_PROMETHEUS]
    shown = set(re.findall(r"{{(\w+)}}", legend))
    return out + [f"the legend shows {label}, which the sum drops" for label in shown - grouped]


def targets(panels: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for panel in panels:
        yield from targets(panel.get("panels", []))
        for target in panel.get("targets", []):
            yield panel["title"], target


def test_every_expression_of_the_dashboard_names_metrics_and_labels_of_a_live_server() -> None:
    board = json.loads(DASHBOARD.read_text())
    found = list(targets(board["panels"]))
    assert len(found) > 30
    for title, target in found:
        assert not problems(target["expr"], target["legendFormat"]), title
    (query,) = (v["query"]["query"] for v in board["templating"]["list"] if v["type"] == "query")
    inside = re.fullmatch(r"label_values\((\w+), instance\)", query)
    assert inside is not None
    assert inside[1] in families()


@pytest.mark.parametrize(
    ("expression", "legend"),
    [
        ("sum(minisgl_num_request_running)", ""),
        ("sum(rate(minisgl_prompt_tokens[1m]))", ""),  # a counter's samples end with _total
        ('minisgl_restarts_total{proces="api"}', ""),
        ("sum by (reasons) (minisgl_num_requests_waiting_by_reason)", ""),
        ("sum by (process) (minisgl_restarts_total)", "{{reason}}"),
        ("sum(minisgl_restarts_total)", "{{process}}"),
        ("rate(minisgl_time_to_first_token_seconds[1m])", ""),
    ],
)
def test_a_metric_or_label_that_is_not_there_is_noticed(expression: str, legend: str) -> None:
    assert problems(expression, legend)


def test_a_panel_is_drawn_with_the_source_that_its_reader_chooses() -> None:
    board = json.loads(DASHBOARD.read_text())
    panels = [p for p in board["panels"] if p["type"] != "row"]
    assert {p["datasource"]["uid"] for p in panels} == {"${datasource}"}
    assert [v["name"] for v in board["templating"]["list"]] == ["datasource", "instance"]
    assert all("instance" in labels for _, t in targets(panels) for labels in asked(t["expr"])[0].values())
    assert len({p["id"] for p in board["panels"]}) == len(board["panels"])
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(places)) == len(places)


def test_the_example_for_prometheus_reads_the_path_and_port_that_a_server_has() -> None:
    (job,) = yaml.safe_load((DASHBOARD.parent / "prometheus.yml").read_text())["scrape_configs"]
    assert job.get("metrics_path", "/metrics") == "/metrics"
    assert job["static_configs"][0]["targets"] == ["127.0.0.1:8000"]
    assert scraped()["text"][0] == 200
