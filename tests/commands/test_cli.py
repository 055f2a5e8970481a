"""The command line: instant help, flags that agree with the configuration, errors that name the flag."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from minisgl.commands.flags import config_from
from minisgl.commands.serve import parser
from minisgl.config import AUTO_ITL, EngineConfig, ServerConfig, Setting, engine_config, flag, settings_of
from minisgl.errors import InvalidParam, UserError
from minisgl.model.checkpoint.resolve import resolve
from minisgl.sampling_params import SamplingParams
from minisgl.selfcheck.job import read_spec, with_tuples


@pytest.mark.parametrize("command", [["--help"], ["serve", "--help"], ["chat", "--help"], ["batch", "--help"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\nfrom minisgl.__main__ import main\n"
        f"try: main({command!r})\nexcept SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'transformers', 'aiohttp', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: minisgl" in done.stdout


def test_every_field_of_the_engine_has_a_flag_with_its_default() -> None:
    assert [name for name, *_ in settings_of(EngineConfig)] == [f.name for f in fields(EngineConfig)]
    args = vars(parser().parse_args([]))
    assert engine_config(args) == EngineConfig()


def test_every_flag_of_the_server_sets_the_field_that_declares_it(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a key of twenty characters\n")
    flags = "--host ::1 --port 9 --served-model-name a --served-model-name b --drain-seconds 0.5 --max-open-requests 7"
    flags += " --allow-origin HTTP://a --allow-origin http://b:1"
    flags += " --max-queue 6 --max-queued-tokens 5 --tool-call-parser none --num-tokenizers 3 --strict --any-model-name"
    args = parser().parse_args([*flags.split(), "--data-dir", "d", "--api-key-file", str(keys), "--device", "cpu"])
    assert config_from(args, resolve(None), ("hermes", "qwen3")).server == ServerConfig(
        host="::1",
        port=9,
        served_names=("a", "b"),
        drain_seconds=0.5,
        max_open_requests=7,
        max_queue=6,
        max_queued_tokens=5,
        tool_call_parser="",
        reasoning_parser="qwen3",  # auto: what the template shows
        num_tokenizers=3,
        strict=True,
        any_model_name=True,
        data_dir="d",
        api_keys=("a key of twenty characters",),
        allow_origins=("http://a", "http://b:1"),
    )
    spec = resolve(None)
    assert config_from(parser().parse_args([]), spec).server == ServerConfig(served_names=(spec.name,))


@pytest.mark.parametrize("config", [EngineConfig, ServerConfig])
def test_the_declaration_of_a_field_is_what_help_shows_and_what_is_checked(
    config: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # no line is broken within a word
    shown = " ".join(parser().format_help().split())
    for name, default, s in settings_of(config):
        on_gpu = "" if s.on_gpu is None else f", on a GPU {s.on_gpu}"
        stated = "" if s.options or default == "" or default is False else f" ({default}{on_gpu})"
        assert re.search(rf" {s.flag or flag(name)}( [^ ]+)? {re.escape(s.help + stated)} ", shown + " "), name
        if s.choices:
            with pytest.raises(UserError, match=f"^{flag(name)} must be one of {', '.join(s.choices)}, got 'tea'"):
                config(**{name: "tea"})
        if s.low is not None:
            for value in (s.low - 1, s.high + 1):
                with pytest.raises(UserError, match=f"^{flag(name)} must be between {int(s.low)} and {int(s.high)}, got"):
                    config(**{name: value})


def test_a_field_with_a_range_takes_both_ends_of_it() -> None:
    declared: list[tuple[str, Setting]] = [(name, s) for name, _, s in settings_of(EngineConfig) if s.low is not None]
    assert len(declared) == 10
    for name, s in declared:
        other = {"step_tokens": {"max_running": 1}, "max_running": {"step_tokens": 1 << 20}}.get(name, {})
        for value in (s.low, s.high):
            assert getattr(EngineConfig(**{name: value, **other}), name) == value


def test_a_visible_gpu_is_used_with_defaults_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisgl.config.gpu_count", lambda: 2)
    on_gpu = engine_config(vars(parser().parse_args(["--tp", "2", "--max-running", "9"])))
    assert (on_gpu.device, on_gpu.tp, on_gpu.max_running) == ("cuda", 2, 9)
    assert (on_gpu.step_tokens, on_gpu.memory_fraction) == (8192, 0.9)
    assert engine_config({"device": "cpu"}) == EngineConfig()


def test_the_fake_model_takes_no_gpu_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisgl.config.gpu_count", lambda: 1)
    assert engine_config(vars(parser().parse_args(["--tp", "2"])), "fake").device == "cpu"


@pytest.mark.parametrize(("gpus", "settings", "named"), [(0, {"device": "cuda"}, "--device cuda"), (1, {"tp": 2}, "--tp 2")])
def test_gpus_that_are_not_there_are_missed_before_anything_starts(
    gpus: int, settings: dict[str, object], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minisgl.config.gpu_count", lambda: gpus)
    with pytest.raises(UserError, match=named):
        engine_config(settings)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("attention_backend", "triton"), ("kv_cache_dtype", "fp8"), ("graphs", "off")],
)
def test_what_needs_a_gpu_is_refused_on_a_cpu(setting: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{flag(setting)} {value} needs a GPU"):
        EngineConfig(**{setting: value})
    assert EngineConfig(**{setting: value, "device": "cuda"}).device == "cuda"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("tp", 0),
        ("page_size", 0),
        ("max_running", 0),
        ("max_running", 70000),
        ("step_tokens", 128),  # not above max_running
        ("lag", 9),
        ("kv_tokens", -1),
        ("memory_fraction", 0.0),
        ("memory_fraction", 1.5),
        ("dtype", "float8"),
        ("device", "tpu"),
        ("attention_backend", "magic"),
        ("quantization", "int3"),
        ("kv_cache_dtype", "int8"),
        ("graphs", "perhaps"),
        ("cache", "magic"),
        ("threads", -1),
    ],
)
def test_a_setting_out_of_range_is_refused_by_the_name_of_its_flag(setting: str, value: object) -> None:
    with pytest.raises(UserError, match=flag(setting)):
        EngineConfig(**{setting: value})


@pytest.mark.parametrize(
    ("flags", "target"), [([], AUTO_ITL), (["--itl-target-ms", "0"], 0.0), (["--itl-target-ms", "50"], 50.0)]
)
def test_the_server_bounds_the_time_between_tokens_by_itself_unless_told_otherwise(flags: list[str], target: float) -> None:
    config = config_from(parser().parse_args(["--device", "cpu", *flags]), resolve(None))
    assert config.engine.itl_target_ms == target
    assert engine_config({}).itl_target_ms == 0.0, "offline nobody waits for the next token"


@pytest.mark.parametrize(("value", "lag"), [("1", 1), ("0", 2), ("", 2)])
def test_the_environment_can_switch_overlap_off(monkeypatch: pytest.MonkeyPatch, value: str, lag: int) -> None:
    monkeypatch.setenv("MINISGL_DISABLE_OVERLAP_SCHEDULING", value)
    assert engine_config({}).lag == lag


def test_a_model_spec_survives_json() -> None:
    spec = resolve(None)
    assert read_spec(json.loads(json.dumps(asdict(spec)), object_hook=with_tuples)) == spec


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_tokens", 1 << 31),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 10**400),
        ("temperature", "hot"),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 1 << 31),
        ("min_p", float("inf")),
        ("seed", 1 << 63),
        ("stop", ("",)),
        ("stop", (5,)),
        ("stop", ("x",) * 17),
        ("stop", ("x" * 257,)),
        ("stop", ("\ud83d",)),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (1,) * 129),
        ("presence_penalty", 2.5),
        ("frequency_penalty", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 101.0),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", ((1, 2.0), (1, 3.0))),
        ("logit_bias", (1, 2.0)),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("min_tokens", -1),
        ("logprobs", 21),
        ("logprobs", True),
    ],
)
def test_a_sampling_parameter_out_of_range_names_its_field(field: str, value: object) -> None:
    with pytest.raises(InvalidParam) as refused:
        SamplingParams(**{field: value})
    assert refused.value.param == field


def test_what_belongs_together_is_checked_together() -> None:
    with pytest.raises(InvalidParam, match=r"min_tokens \(5\) must not exceed max_tokens \(4\)"):
        SamplingParams(max_tokens=4, min_tokens=5)
    assert SamplingParams(max_tokens=0, echo=True).max_tokens == 0
    assert SamplingParams(logit_bias={3: 1, 2: -5.5}).logit_bias == ((3, 1), (2, -5.5))


def test_a_single_stop_string_may_be_written_as_one() -> None:
    assert SamplingParams(stop="\n").stop == ("\n",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
