"""The command line: instant help, flags that agree with the configuration, errors that name the flag."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

from minisgl.commands.serve import parser
from minisgl.config import EngineConfig, ModelSpec, engine_config, flag, settings_of
from minisgl.errors import InvalidParam, UserError
from minisgl.model.checkpoint.resolve import resolve
from minisgl.sampling_params import SamplingParams


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


def test_a_visible_gpu_is_used_with_defaults_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisgl.config.gpu_count", lambda: 2)
    on_gpu = engine_config(vars(parser().parse_args(["--tp", "2", "--max-running", "9"])))
    assert (on_gpu.device, on_gpu.tp, on_gpu.max_running) == ("cuda", 2, 9)
    assert (on_gpu.step_tokens, on_gpu.memory_fraction) == (8192, 0.9)
    assert engine_config({"device": "cpu"}) == EngineConfig()


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


@pytest.mark.parametrize(("value", "lag"), [("1", 1), ("0", 2), ("", 2)])
def test_the_environment_can_switch_overlap_off(monkeypatch: pytest.MonkeyPatch, value: str, lag: int) -> None:
    monkeypatch.setenv("MINISGL_DISABLE_OVERLAP_SCHEDULING", value)
    assert engine_config({}).lag == lag


def test_a_model_spec_survives_json() -> None:
    spec = resolve(None)
    assert ModelSpec.from_json(spec.to_json()) == spec


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
        ("top_p", 0.0),
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
