"""How far the loading of a model is: nothing where it takes a second, lines or a bar where it takes longer."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from minisgl import logs
from minisgl.actors import loading, spawn
from minisgl.actors.loading import LoadingBar, LoadingLines, show_loading
from minisgl.config import Config, EngineConfig
from minisgl.model.checkpoint.loader import open_weights
from minisgl.model.checkpoint.presets import random_shape
from minisgl.model.checkpoint.progress import observed


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def said() -> Iterator[list[logging.LogRecord]]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logs.LOGGER.addHandler(handler)
    logs.LOGGER.setLevel(logging.INFO)
    yield records
    logs.LOGGER.removeHandler(handler)
    logs.LOGGER.setLevel(logging.NOTSET)


def timed(layers: int, each: float) -> None:
    """Load `layers` layers that take `each` seconds."""
    now = 50.0
    observer = LoadingLines("big", layers, lambda: now)
    for i in range(layers + 1):
        observer(i)
        now += each


def test_a_short_load_says_nothing(said: list[Any]) -> None:
    timed(30, 0.05)
    assert not said


def test_a_long_load_is_a_line_every_five_seconds_and_one_at_its_end(said: list[Any]) -> None:
    timed(40, 0.6)
    texts = [record.getMessage() for record in said]
    assert texts == [
        "minisgl: loading big: 22 %, 9 of 40 layers in 5 s",
        "minisgl: loading big: 45 %, 18 of 40 layers in 11 s",
        "minisgl: loading big: 67 %, 27 of 40 layers in 16 s",
        "minisgl: loading big: 90 %, 36 of 40 layers in 22 s",
        "minisgl: loading big: 100 %, 40 of 40 layers in 24 s",
    ]
    assert said[0].fields == {"layers": 40, "loaded": 9, "seconds": 5.4}


def test_layers_are_counted_as_a_model_takes_them() -> None:
    seen: list[int] = []
    spec = random_shape("qwen3-0.6b")
    weights = observed(open_weights, seen.append)(spec, torch.float32)
    for name in ("model.embed_tokens.weight", *(f"model.layers.{i}.{part}" for i in range(3) for part in "qk"), "model.norm"):
        weights.take(name, (2,))
    assert seen == [0, 1, 2]
    weights.finish()
    assert seen == [0, 1, 2, spec.num_layers]


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_rank_0_of_a_real_model_reports_every_layer(quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(spawn, "show_loading", lambda name, layers, _: lambda done: seen.append((name, done)))
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "vocab_size": 256}
    spec = replace(random_shape("qwen3-0.6b"), **sizes, num_layers=3)
    spawn.make_runner(Config(spec, EngineConfig(kv_tokens=64, quantization=quantization)), 0, "").close()
    assert seen == [(spec.name, done) for done in range(spec.num_layers + 1)]


def test_a_bar_is_for_terminals_and_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for stream, log_format, expected in (
        (Terminal(), "text", LoadingBar),
        (Terminal(), "json", LoadingLines),
        (io.StringIO(), "text", LoadingLines),
    ):
        monkeypatch.setattr("sys.stderr", stream)
        assert type(show_loading("m", 2, log_format)) is expected
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stderr", Terminal())
    assert type(show_loading("m", 2, "text")) is LoadingLines


@pytest.mark.parametrize(("delay", "shown"), [(0.0, True), (1000.0, False)])
def test_the_bar_of_a_short_load_is_never_drawn(delay: float, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    monkeypatch.setattr("sys.stderr", out)
    monkeypatch.setattr(loading, "_DELAY", delay)
    bar = LoadingBar("m", 4)
    for done in range(5):
        bar(done)
    assert ("loading m" in out.getvalue()) is shown
