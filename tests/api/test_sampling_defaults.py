"""How requests that set no sampling parameters are sampled: by the checkpoint, its card, or one choice for all models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import fake_spec
from test_resolve import checkpoint

from minisgl import LLM, SamplingParams
from minisgl.api.endpoints.anthropic import parse_messages
from minisgl.api.endpoints.responses import parse_responses
from minisgl.api.endpoints.sglang import parse_generate
from minisgl.api.requests.openai import parse_chat, parse_completion
from minisgl.commands.announcement import sampling_line
from minisgl.config import Config, EngineConfig, SamplingDefaults
from minisgl.model.checkpoint.metadata import GGUF_SAMPLING, HF_SAMPLING, Metadata, sampling_defaults
from minisgl.model.checkpoint.resolve import embedded_model, resolve

CARD = {"temperature": 0.2, "top_p": 0.9}
SANE = {"temperature": 0.8, "top_p": 0.95}
USER = [{"role": "user", "content": "What is the capital of Germany?"}]


def sampled(params: SamplingParams) -> dict[str, float]:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return {name: getattr(params, name) for name in names if getattr(params, name) != getattr(SamplingParams(), name)}


def test_the_embedded_model_has_the_defaults_of_its_card_whatever_its_file_is_called(tmp_path: Path) -> None:
    renamed = tmp_path / "model.gguf"
    renamed.symlink_to(embedded_model())
    for name in (None, embedded_model(), str(renamed)):
        assert Config(resolve(name)).sampling_defaults == CARD
    assert Config(resolve(None), EngineConfig(generation_config="none")).sampling_defaults == {}


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, SANE),
        ({"eos_token_id": 2, "max_length": 50}, SANE),
        ({"do_sample": True}, SANE),
        ({"repetition_penalty": 1.1}, SANE | {"repetition_penalty": 1.1}),
        ({"temperature": 0.6}, {"temperature": 0.6}),
        ({"temperature": 1.0}, {"temperature": 1.0}),
        ({"top_p": 0.8}, {"top_p": 0.8}),  # a choice of its author's: nothing is added to it
        ({"top_k": 20}, {"top_k": 20}),
        ({"do_sample": False}, {"temperature": 0.0}),
    ],
)
def test_a_directory_that_recommends_nothing_has_sane_defaults(
    generation: dict[str, Any] | None, expected: dict[str, Any], tmp_path: Path
) -> None:
    assert Config(resolve(checkpoint(tmp_path, generation=generation))).sampling_defaults == expected


def test_the_keys_of_a_gguf_file_come_before_the_card_of_its_model() -> None:
    def read(fields: dict[str, Any], *names: object) -> SamplingDefaults:
        return sampling_defaults(Metadata("/models/a.gguf", fields), GGUF_SAMPLING, "general.sampling.", names)

    assert read({}, "Qwen2-0.5B", None, 5) == SamplingDefaults(0.8, top_p=0.95, source=read({}).source)
    assert read({}, "a", "SmolLM2-360M-Instruct").temperature == 0.2
    assert read({"general.sampling.temp": 0.5}, "SmolLM2-360M-Instruct") == SamplingDefaults(0.5, source="a.gguf")
    assert read({"general.sampling.min_p": 0.1}) == SamplingDefaults(min_p=0.1, source="a.gguf")
    hub = sampling_defaults(Metadata("generation_config.json", {}), HF_SAMPLING, model=("HuggingFaceTB/SmolLM2-1.7B-Instruct",))
    assert (hub.temperature, hub.top_p) == (0.2, 0.9)


PARSERS: dict[str, tuple[Callable[..., Any], dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "chat": (lambda c, b: parse_chat(c, b).params, {"messages": USER}, dict),
    "completions": (lambda c, b: parse_completion(c, b).params, {"prompt": "Hi"}, dict),
    "responses": (lambda c, b: parse_responses(c, b).chat.params, {"input": "Hi"}, dict),
    "messages": (lambda c, b: parse_messages(c, b).params, {"messages": USER, "max_tokens": 5}, dict),
    "generate": (lambda c, b: parse_generate(c, b).params, {"text": "Hi"}, lambda given: {"sampling_params": given}),
}


@pytest.mark.parametrize("route", PARSERS)
def test_on_every_route_defaults_hold_field_by_field_and_what_a_request_says_always_wins(route: str) -> None:
    parse, body, place = PARSERS[route]
    config = Config(replace(fake_spec(), generation=SamplingDefaults(**CARD, source="model card")))

    def ask(**given: float) -> dict[str, float]:
        return sampled(parse(config, body | place(given)))

    assert ask() == CARD
    assert ask(temperature=0.7) == {"temperature": 0.7, "top_p": 0.9}
    assert ask(top_p=0.5) == {"temperature": 0.2, "top_p": 0.5}
    assert ask(temperature=1, top_p=1) == {}  # the model's own distribution is in reach of every client
    assert ask(temperature=0) == {"temperature": 0.0, "top_p": 0.9}


class Recorder:
    """Stands in for the engine and its gateway: keeps the parameters of every request, and answers none."""

    open_requests, failure, state = 0, None, "ready"

    def __init__(self, *_: object) -> None:
        self.gateway = self
        self.seen: list[SamplingParams] = []

    def wait_ready(self) -> None: ...

    def open(self, prompt: object, params: SamplingParams, on_chunk: object) -> int:
        self.seen.append(params)
        return 0

    def close(self, uid: int = 0) -> None: ...


def test_offline_requests_without_parameters_have_the_same_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisgl.llm.InProcessSystem", Recorder)
    with LLM(processes=False) as llm:
        llm.generate(["a"])
        llm.chat([USER])
        llm.generate(["a"], SamplingParams(max_tokens=3))  # given parameters are the request's own, as in vLLM
        seen = cast(Recorder, llm.system).seen
    assert [sampled(p) for p in seen] == [CARD, CARD, {}]


def test_the_start_line_shows_the_defaults_and_who_chose_them(tmp_path: Path) -> None:
    assert sampling_line(Config(resolve(None))) == "sampling: temperature 0.2, top_p 0.9 (model card)"
    none = EngineConfig(generation_config="none")
    assert sampling_line(Config(resolve(None), none)) == "sampling: temperature 1 (--generation-config none)"
    assert sampling_line(Config(resolve("random:qwen3-0.6b"))) == "sampling: temperature 1"
    line = sampling_line(Config(resolve(checkpoint(tmp_path))))
    assert line == "sampling: temperature 0.8, top_p 0.95 (minisgl's choice; the model recommends none)"
    line = sampling_line(Config(resolve(checkpoint(tmp_path, generation={"temperature": 0.6, "top_k": 20}))))
    assert line == "sampling: temperature 0.6, top_k 20 (generation_config.json)"
