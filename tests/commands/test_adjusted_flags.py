"""What is not served as it was given is said before the server is ready: one line a flag, with the value served and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from minisgl.commands.adjusted import Adjusted, adjusted
from minisgl.commands.flags import config_from, given_of
from minisgl.commands.serve import parser
from minisgl.config import ServerConfig, settings_of
from minisgl.errors import UserError
from minisgl.model.checkpoint.resolve import resolve

SPEC = resolve(None)  # 8,192 tokens of context
KV = 65_536


def found(flags: str, kv: int = KV, cores: int = 2, model: Any = SPEC) -> dict[str, Adjusted]:
    """The adjustments of a command line, by flag."""
    flags += " --device cpu" if "--device" not in flags else ""
    args = parser().parse_args(flags.split())
    changes = adjusted(given_of(args), config_from(args, model), kv, cores)
    assert all(str(change).isprintable() for change in changes)
    return {change.flag: change for change in changes}


@pytest.mark.parametrize(
    ("flags", "how", "flag", "served", "text"),
    [
        ("--max-context 100000", {}, "--max-context", 8192, "8192 is served, the limit of SmolLM2-135M-Instruct"),
        ("--max-context 8192", {"kv": 1024}, "--max-context", 1024, "1024 is served, all that the KV cache holds"),
        ("--kv-tokens 10", {"kv": 16}, "--kv-tokens", 16, "16 is served, in whole pages of 16 tokens"),
        ("--kv-tokens 65", {"kv": 128}, "--kv-tokens", 128, "whole pages"),
        ("--kv-tokens 1024", {"kv": 1024}, "--max-context", 1024, "8192: 1024 is served, since a request is at most as long"),
        ("--threads 500", {}, "--threads", 500, "500 is served, but this process may use 2 cores: more threads slow it"),
        ("--tp 3", {}, "--tp", 3, "3 is served, but this process may use 2 cores: more ranks slow it down"),
        ("--tp 2", {"cores": 1}, "--tp", 2, "1 core:"),
        ("--threads 3", {"cores": 1}, "--threads", 3, "1 core:"),
        ("--threads 3 --tp 2", {"cores": 4}, "--threads", 2, "2 is served, the same number for each of 2 ranks"),
        ("--threads 1 --tp 2", {}, "--threads", 2, "the same number for each of 2 ranks"),
        ("--memory-fraction 0.5 --kv-tokens 64", {"kv": 64}, "--memory-fraction", None, "no effect, --kv-tokens says"),
        ("--memory-fraction 0.9", {"kv": 262_144}, "--memory-fraction", "a KV cache of 262144 tokens", "a CPU is fast enough"),
        (
            "--memory-fraction 0.9 --max-running 2",
            {"kv": 16_384},
            "--memory-fraction",
            "a KV cache of 16384 tokens",
            "can fill",
        ),
        ("--max-running 100", {"kv": 320}, "--max-running", 20, "20 is served, since every request needs a page"),
        ("--max-running 100 --max-open-requests 7", {}, "--max-running", 7, "open at a time (--max-open-requests)"),
        ("--max-queue 100 --max-open-requests 7", {}, "--max-queue", 7, "open at a time"),
        ("--max-choices 100 --max-open-requests 7", {}, "--max-choices", 7, "open at a time"),
        ("--step-tokens 1000", {"kv": 512}, "--step-tokens", 512, "all that the KV cache holds"),
        ("--itl-target-ms -0.5", {}, "--itl-target-ms", -1, "-1 is served, any negative number"),
        (
            "--quantization auto --dtype bfloat16",
            {},
            "--quantization",
            "none",
            "none is served, since --dtype bfloat16",
        ),
        ("--order prefix --cache none", {}, "--order", "arrival", "since --cache none has no cached prefixes"),
        ("--data-dir-gb 5", {}, "--data-dir-gb", None, "5: has no effect, without --data-dir nothing is kept"),
    ],
)
def test_a_value_that_is_not_served_as_given_is_said(flags: str, how: Any, flag: str, served: Any, text: str) -> None:
    change = found(flags, **how)[flag]
    assert change.served == served
    assert text in str(change)
    assert str(change).startswith(f"{flag} ")


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--max-context 8192",
        "--max-context 100",
        "--kv-tokens 65536",
        "--kv-tokens 65536 --max-running 128",
        "--threads 2",
        "--threads 1",
        "--threads 4 --tp 2 --max-context 9",
        "--memory-fraction 0.1",
        "--max-running 100",
        "--max-open-requests 7",  # nobody has asked for the queue's length
        "--itl-target-ms -1",
        "--itl-target-ms 0",
        "--cache none",
        "--order prefix",
        "--order arrival --cache none",
        "--lag 2",
        "--data-dir-gb 5 --data-dir /tmp",
        "--quantization int8",
        "--quantization auto",
        "--dtype bfloat16",
        "--num-tokenizers 3",
    ],
)
def test_a_value_that_is_served_as_given_is_not_said(flags: str) -> None:
    assert not found(flags, cores=4 if "--tp" in flags else 2)


def test_the_environment_outranks_the_lag_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINISGL_DISABLE_OVERLAP_SCHEDULING", "1")
    assert str(found("--lag 2")["--lag"]) == "--lag 2: 1 is served, as MINISGL_DISABLE_OVERLAP_SCHEDULING says"
    assert not found("--lag 1")
    assert not found("")


def test_the_fake_engine_names_what_needs_a_model() -> None:
    flags = "--dtype float32 --quantization none --threads 500 --memory-fraction 0.5 --itl-target-ms 5 --max-running 9"
    changes = found(flags, model=resolve("fake"))
    assert set(changes) == {
        "--dtype", "--quantization", "--threads", "--memory-fraction", "--itl-target-ms"
    }  # fmt: skip
    assert {change.served for change in changes.values()} == {None}
    both = found("--memory-fraction 0.5 --kv-tokens 64", kv=64, model=resolve("fake"))
    assert "--kv-tokens says" in str(both["--memory-fraction"])


@pytest.mark.parametrize("backend", ["torch", "flashinfer", "triton", "auto"])
def test_graphs_that_a_backend_cannot_capture_are_said(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisgl.config.gpu_count", lambda: 1)
    changes = found(f"--device cuda --graphs on --attention-backend {backend}")
    assert ("--graphs" in changes) is (backend in ("torch", "flashinfer"))
    assert "--memory-fraction" not in found("--device cuda --memory-fraction 0.95", kv=1 << 30)


def test_a_line_reads_as_a_sentence() -> None:
    assert str(found("--max-context 100000")["--max-context"]) == (
        "--max-context 100000: 8192 is served, the limit of SmolLM2-135M-Instruct"
    )
    small = replace(SPEC, name="tiny", max_context=64)
    assert "the limit of tiny" in str(found("--max-context 100", model=small)["--max-context"])


def test_every_field_that_is_given_is_known_and_a_default_is_not_given() -> None:
    assert given_of(parser().parse_args([])) == {}
    flags = "--max-queue 2048 --max-choices 3 --strict --tool-call-parser hermes --tp 1"
    given = given_of(parser().parse_args(flags.split()))
    assert given == {"tp": 1, "max_choices": 3, "strict": True, "tool_call_parser": "hermes"}


@pytest.mark.parametrize("revision", ["main", "v1"])
@pytest.mark.parametrize("model", [None, "fake", "random:qwen3-0.6b"])
def test_a_revision_of_what_has_none_is_refused(model: str | None, revision: str) -> None:
    with pytest.raises(UserError, match=f"--revision {revision}: only a hub id has revisions"):
        resolve(model, revision)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("drain_seconds", -1.0),
        ("drain_seconds", float("nan")),
        ("max_open_requests", 0),
        ("max_queue", -1),
        ("max_queued_tokens", -1),
    ],
)
def test_a_number_without_a_meaning_is_refused_by_the_name_of_its_flag(name: str, value: float) -> None:
    with pytest.raises(UserError, match="--" + name.replace("_", "-")):
        ServerConfig(**{name: value})
    assert name in {n for n, *_ in settings_of(ServerConfig)}
