"""The product as its users meet it: the embedded model behind a real server at TP 2, the openai SDK, the batch client, LLM.

And LLM with tiny models of other kinds.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openai
import pytest
from processes import REPOSITORY, eventually, minisgl_command
from pydantic import BaseModel, Field
from tiny_models import save_byte_tokenizer, save_qwen3

from minisgl import LLM, BatchClient, SamplingParams, grammar
from minisgl.__main__ import main
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.text.tokenizer import load_tokenizer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TOPICS = ("the sea", "bread", "a red bicycle", "winter", "the number 12", "chess")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server on a free port, as `scripts/launch.sh --tp 2` starts it."""
    run = tmp_path_factory.mktemp("run")
    env = os.environ | {"XDG_RUNTIME_DIR": str(run), "PYTHONPATH": str(REPOSITORY)}
    flags = ["--port", "0", "--tp", "2", "--kv-tokens", "16384"]
    server = subprocess.Popen(minisgl_command(*flags), stderr=subprocess.PIPE, text=True, env=env)
    assert server.stderr is not None
    lines: list[str] = []
    address = ""
    for line in server.stderr:
        lines.append(line)
        if line.startswith("ready"):
            address = line.split()[4].removesuffix("/v1")
            break
    assert address, "".join(lines)
    threading.Thread(target=server.stderr.read, daemon=True).start()  # keep the pipe empty
    yield address
    server.terminate()
    assert server.wait(timeout=60) == 0
    assert list(run.iterdir()) == []


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(kv_tokens=8192, threads=1) as engine:
        yield engine


def info(url: str) -> dict[str, object]:
    with urllib.request.urlopen(f"{url}/server_info") as answer:
        return dict(json.load(answer))


def test_a_streamed_answer_says_paris_and_the_second_time_the_prompt_is_cached(client: openai.OpenAI) -> None:
    cached = []
    for _ in range(2):
        text, reason, usage = "", None, None
        for chunk in client.chat.completions.create(
            model="SmolLM2-135M-Instruct",
            messages=QUESTION,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        ):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
        assert "Paris" in text
        assert reason == "stop"
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (31, 8, 39)
        assert usage.completion_tokens_details.reasoning_tokens == 0
        assert 0 <= chunk.timings["queue_ms"] < chunk.timings["ttft_ms"]
        cached.append(usage.prompt_tokens_details.cached_tokens)
    assert cached[1] == 16 >= cached[0]


def test_two_ranks_give_the_answers_of_one(client: openai.OpenAI, llm: LLM) -> None:
    chats = [[{"role": "user", "content": f"Write two sentences about {topic}."}] for topic in TOPICS]
    alone = [a.text for a in llm.chat(chats, SamplingParams(temperature=0, max_tokens=40))]
    create = functools.partial(client.chat.completions.create, model="SmolLM2-135M-Instruct", temperature=0, max_tokens=40)
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda chat: create(messages=chat).choices[0].message.content, chats))
    assert answers == alone


MODEL = "SmolLM2-135M-Instruct"


class City(BaseModel):
    name: str = Field(max_length=30)
    inhabitants: int = Field(ge=0, le=100_000_000)
    continent: Literal["Africa", "America", "Asia", "Europe", "Oceania"]


def test_answers_have_the_form_that_was_asked_for_and_neighbours_do_not_notice(client: openai.OpenAI, llm: LLM) -> None:
    ask = [{"role": "user", "content": "Describe Paris as JSON with name, inhabitants and continent."}]
    free = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 8}
    alone = client.chat.completions.create(**free).choices[0].message.content
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(client.chat.completions.create, **free) for _ in range(1)]
        forms: list[Any] = [{"guided_regex": r"[A-Z][a-z]{2,8}, [0-9]{4}"}, {"guided_choice": ["north", "south"]}]
        bound = [
            pool.submit(
                client.chat.completions.create, model=MODEL, messages=ask, seed=i, n=2 - i, max_tokens=30, extra_body=form
            )
            for i, form in enumerate(forms)
        ]
        parsed = client.chat.completions.parse(model=MODEL, messages=ask, response_format=City, temperature=0, logprobs=True)
    city = parsed.choices[0].message.parsed
    assert isinstance(city, City)
    told = parsed.choices[0].logprobs
    assert told is not None
    assert "".join(t.token for t in told.content or ()).startswith(parsed.choices[0].message.content or "?")
    assert all(f.result().choices[0].message.content == alone for f in others)
    for choice in bound[0].result().choices:
        assert re.fullmatch(forms[0]["guided_regex"], choice.message.content or "")
    assert {c.message.content for c in bound[1].result().choices} <= {"north", "south"}
    schema = grammar.json_schema(City.model_json_schema())
    offline = llm.chat([ask], SamplingParams(temperature=0, max_tokens=100, grammar=schema))[0]
    assert City.model_validate_json(offline.text) == city  # one rank or two
    broken = llm.generate("x", SamplingParams(grammar=grammar.regex("[")), errors="return")[0]
    assert getattr(broken.error, "param", None) == "grammar"
    ambiguous = SamplingParams(temperature=0, max_tokens=80, grammar=grammar.lark("start: e\ne: e e | /[a-zA-Z ]/"))
    assert getattr(llm.generate("x", ambiguous, errors="return")[0].error, "code", None) == "grammar_too_complex"


def test_tools_are_refused_in_a_sentence_where_the_template_knows_none(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(openai.BadRequestError, match="--tool-call-parser"):
        client.chat.completions.create(model=MODEL, messages=QUESTION, tools=[tool])


def test_an_evaluation_harness_gets_the_log_probabilities_of_its_prompts(client: openai.OpenAI, llm: LLM) -> None:
    """The request of lm-evaluation-harness's local-completions, and how it reads the answer."""
    tokenizer = load_tokenizer(resolve(None))
    contexts = [tokenizer.encode(c, True).tolist() for c in ("The capital of France is", "Two plus two is")]
    ends = [tokenizer.encode(c, False).tolist() for c in (" Paris", " purple")]
    prompts = [c + e for c, e in zip(contexts, ends, strict=True)]
    answer = client.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1, echo=True)
    sums, greedy = [], []
    for context, prompt, choice in zip(contexts, prompts, sorted(answer.choices, key=lambda c: c.index), strict=True):
        told = choice.logprobs
        assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(prompt) + 1
        assert told.token_logprobs[0] is told.top_logprobs[0] is None
        values = told.token_logprobs[len(context) : -1]
        tops = told.top_logprobs[len(context) : -1]
        sums.append(sum(values))
        greedy.append(all(v == max(top.values()) for v, top in zip(values, tops, strict=True)))
        for offset, token, after in zip(told.text_offset, told.tokens, [*told.text_offset[1:], None], strict=True):
            assert choice.text[offset:after] == token
    assert greedy == [True, False]
    assert sums[0] > -0.5 > -5 > sums[1]
    for prompt, end, total in zip(prompts, ends, sums, strict=True):  # the same, from a worker alone and step by step
        forced = SamplingParams(temperature=0, max_tokens=1, logprobs=20, logit_bias={end[0]: 100.0})
        (step,) = llm.generate([prompt[: -len(end)]], forced)[0].logprobs
        assert step.token_id == end[0]
        if len(end) == 1:
            assert step.logprob == pytest.approx(total, abs=1e-3)
    alone = client.completions.create(model=MODEL, prompt=prompts[0], max_tokens=0, logprobs=0, echo=True)
    assert alone.choices[0].text == "The capital of France is Paris"
    assert alone.choices[0].logprobs.token_logprobs == answer.choices[0].logprobs.token_logprobs[:-1]
    assert alone.usage.completion_tokens == 0


def test_every_parameter_of_sampling_works_through_the_server(client: openai.OpenAI) -> None:
    def say(**change: object) -> list[str]:
        ask = {"model": MODEL, "prompt": "1, 2, 1, 2, 1, 2, 1,", "max_tokens": 12, "temperature": 0, **change}
        return [c.text for c in client.completions.create(**ask).choices]

    (plain,) = say()
    assert plain.startswith(" 2, 1, 2, 1,")
    others = [say(frequency_penalty=2)[0], say(extra_body={"repetition_penalty": 1.8})[0], say(logit_bias={"34": -100})[0]]
    assert len({plain, *others}) == 4
    many = say(n=3, temperature=2, seed=11)
    assert len(set(many)) == 3
    assert say(temperature=2, seed=12) == many[1:2]
    stop = client.completions.create(
        model=MODEL, prompt="Say hi", max_tokens=4, temperature=0, extra_body={"min_tokens": 4}, logit_bias={"2": 100}
    )
    assert (stop.usage.completion_tokens, stop.choices[0].finish_reason) == (4, "length")
    chat = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3)
    content = chat.choices[0].logprobs.content
    assert bytes(b for t in content[:-1] for b in t.bytes).decode() == chat.choices[0].message.content
    assert len(content) == chat.usage.completion_tokens  # the end token is among them
    assert all(t.logprob == t.top_logprobs[0].logprob and len(t.top_logprobs) == 3 for t in content)


def test_max_tokens_ends_by_length_and_a_stop_string_ends_before_it(client: openai.OpenAI) -> None:
    first = client.completions.create(model="SmolLM2-135M-Instruct", prompt="1, 2, 3, 4,", max_tokens=12, temperature=0)
    assert first.choices[0].finish_reason == "length"
    assert first.usage is not None
    assert first.usage.completion_tokens == 12
    cut = first.choices[0].text[4:7]
    second = client.completions.create(
        model="SmolLM2-135M-Instruct", prompt="1, 2, 3, 4,", max_tokens=12, temperature=0, stop=[cut]
    )
    assert second.choices[0].finish_reason == "stop"
    assert second.choices[0].text == first.choices[0].text.partition(cut)[0]


def test_a_seed_makes_a_sampled_answer_repeatable_whatever_runs_beside_it(llm: LLM) -> None:
    seeded = SamplingParams(temperature=1.0, top_p=0.95, seed=7, max_tokens=24)
    alone = llm.generate(["Once upon a time"], seeded)[0]
    others = SamplingParams(temperature=1.0, seed=1, max_tokens=24)
    crowd = llm.generate(["Once upon a time", *[f"{t} is" for t in TOPICS]], [seeded, *[others] * len(TOPICS)])[0]
    assert alone.token_ids == crowd.token_ids
    different = llm.generate(["Once upon a time"], SamplingParams(temperature=1.0, top_p=0.95, seed=8, max_tokens=24))[0]
    assert different.token_ids != alone.token_ids


def test_a_client_that_leaves_mid_stream_frees_the_engine(client: openai.OpenAI, url: str) -> None:
    stream = client.completions.create(
        model="SmolLM2-135M-Instruct", prompt="Count:", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert info(url)["open_requests"] == 1
    stream.close()
    eventually(lambda: info(url)["open_requests"] == 0)


def test_a_deadline_ends_a_request_with_an_error_that_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match=r"timeout of 0\.3 s"):
        client.completions.create(
            model="SmolLM2-135M-Instruct", prompt="Count:", max_tokens=4000, extra_body={"ignore_eos": True, "timeout": 0.3}
        )


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, openai.BadRequestError, "messages"),
        ({"max_tokens": 9000}, openai.BadRequestError, "messages"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": "many"}, openai.BadRequestError, "max_tokens"),
    ],
)
def test_bad_requests_are_refused_and_the_server_goes_on(client: openai.OpenAI, change: dict, error: type, param: str) -> None:
    good = {"model": "SmolLM2-135M-Instruct", "messages": QUESTION, "temperature": 0, "max_tokens": 8}
    with pytest.raises(error) as refused:
        client.chat.completions.create(**{**good, **change})
    assert refused.value.body["param"] == param
    answer = client.chat.completions.create(**good)
    assert "Paris" in (answer.choices[0].message.content or "")


def test_a_batch_over_the_socket_answers_every_prompt(url: str) -> None:
    with BatchClient(url) as batch:
        answers = batch.chat(
            [QUESTION, *[[{"role": "user", "content": f"Say {t}."}] for t in TOPICS]], temperature=0, max_tokens=8
        )
    assert len(answers) == 1 + len(TOPICS)
    assert "Paris" in answers[0]


def test_the_batch_command_resumes_where_it_ended(url: str, tmp_path: Path) -> None:
    requests, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    def line(i: int) -> str:
        body = {"prompt": f"{i} + 1 =", "max_tokens": 2, "temperature": 0}
        return json.dumps({"custom_id": f"q{i}", "method": "POST", "url": "/v1/completions", "body": body}) + "\n"

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "minisgl", "batch", str(requests), str(results), "--url", url]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=100, check=False)

    requests.write_text("".join(map(line, range(10))))
    assert run().returncode == 0
    with results.open("a") as f:
        f.write('{"id": "batch_req_torn')  # as if the machine had gone down in the middle of a line
    requests.write_text("".join(map(line, range(30))))
    done = run()
    assert done.returncode == 0, done.stderr
    assert "10 of 30 requests are answered" in done.stderr
    ids = [json.loads(row)["custom_id"] for row in results.read_text().splitlines()]
    assert sorted(ids) == sorted(f"q{i}" for i in range(30))


# ---------------------------------------------------------------- other models
@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str], list[list[int]]]:
    """The directory of a random Qwen3, prompts, and the 60 tokens that transformers continues each with."""
    import torch

    path = tmp_path_factory.mktemp("qwen3")
    model = save_qwen3(path, heads=15, kv_heads=3)
    save_byte_tokenizer(path)
    prompts = ["Hi", "The quick brown fox jumps over the lazy dog, and back again. " * 2, "Say", "Hello world, this is"]
    answers = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt.encode())])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
        answers.append(out[0, ids.shape[1] :].tolist())
    assert sum(len(set(a)) > 15 for a in answers) >= 2  # loops of a few tokens would show less
    return str(path), prompts, answers


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_qwen3_gives_the_greedy_text_of_transformers_on_any_number_of_ranks(
    tp: int, qwen3: tuple[str, list[str], list[list[int]]]
) -> None:
    path, prompts, expected = qwen3
    tokenizer = load_tokenizer(resolve(path))
    # The file has no bits that the default would keep: float32 is what transformers computes.
    size = {"kv_tokens": 2048, "page_size": 4, "max_running": 4, "step_tokens": 24}
    with LLM(path, tp=tp, processes=tp > 1, quantization="none", **size) as engine:
        got = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=60))
    assert [a.token_ids for a in got] == expected
    assert [a.text for a in got] == [tokenizer.decode(ids, skip_special=True) for ids in expected]


def post(url: str, path: str, body: dict[str, object]) -> dict[str, Any]:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return dict(json.load(answer))


def test_the_other_endpoints_answer_with_the_real_model(url: str, client: openai.OpenAI) -> None:
    ask = {"model": MODEL, "temperature": 0, "max_output_tokens": 20}
    answer = client.responses.create(input="What is the capital of France?", **ask)
    assert "Paris" in answer.output_text
    assert answer.status == "completed"
    with client.responses.stream(input=QUESTION, **ask) as stream:  # type: ignore[arg-type]
        assert "".join(e.delta for e in stream if e.type == "response.output_text.delta") == answer.output_text
        assert stream.get_final_response().usage.output_tokens == answer.usage.output_tokens
    message = post(url, "/v1/messages", {"max_tokens": 20, "temperature": 0, "messages": QUESTION})
    assert (message["content"][0]["text"], message["stop_reason"]) == (answer.output_text, "end_turn")
    counted = post(url, "/v1/messages/count_tokens", {"messages": QUESTION})["input_tokens"]
    assert counted == message["usage"]["input_tokens"] + message["usage"]["cache_read_input_tokens"] == 31
    prompt = "The capital of France is"
    tokens = post(url, "/tokenize", {"prompt": prompt})["tokens"]
    assert post(url, "/detokenize", {"tokens": tokens})["prompt"] == prompt
    native = post(url, "/generate", {"input_ids": tokens, "sampling_params": {"max_new_tokens": 1, "temperature": 0}})
    assert native["text"] == " Paris" == post(url, "/detokenize", {"tokens": native["output_ids"]})["prompt"]
    scored = {"return_logprob": True, "logprob_start_len": 0, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
    meta = post(url, "/generate", {"text": prompt, **scored})
    assert meta["text"] == " Paris"
    assert [t for _, t, _ in meta["meta_info"]["input_token_logprobs"]] == tokens
    with urllib.request.urlopen(f"{url}/tokenizer_info") as info_answer:
        assert json.load(info_answer)["eos_token"] == "<|im_end|>"
    with urllib.request.urlopen(f"{url}/metrics") as metrics:
        assert 'minisgl_request_success_total{finished_reason="stop"}' in metrics.read().decode()


def test_metrics_and_top_show_every_process_of_the_server(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    processes = {"api", "tokenizer", "checker", "detokenizer", "scheduler", "worker0", "worker1"}
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    for what in ("cpu_seconds_total", "resident_memory_bytes", "threads", "open_fds"):
        found = dict(re.findall(rf'minisgl_process_{what}{{process="(\w+)"}} (\S+)', text))
        assert found.keys() == processes
        assert all(float(value) > 0 for value in found.values())
    beats = dict(re.findall(r'minisgl_process_heartbeat_age_seconds{process="(\w+)"} (\S+)', text))
    assert beats.keys() == processes - {"api"}
    assert all(0 <= float(age) < 30 for age in beats.values())
    assert main(["top", url, "--once", "--seconds", "0.1"]) == 0
    shown = capsys.readouterr().out
    assert {line.split()[0] for line in shown.splitlines() if " MB " in line} == processes
    assert "of 1,024 pages" in shown


def test_vectors_of_two_ranks_are_the_same_however_they_are_asked_for(url: str, client: openai.OpenAI) -> None:
    texts = ["A cat sat on the mat.", "A kitten lay on the rug.", "Interest rates rose by a quarter point."]
    for pooling in ("mean", "last"):
        create = functools.partial(client.embeddings.create, model=MODEL, extra_body={"pooling": pooling})
        vectors = [np.array(d.embedding) for d in create(input=texts).data]
        assert [round(float(np.linalg.norm(v)), 5) for v in vectors] == [1, 1, 1]
        again = [np.array(create(input=text, encoding_format="float").data[0].embedding) for text in texts]
        assert max(np.abs(a - b).max() for a, b in zip(vectors, again, strict=True)) < 1e-4  # in one batch, alone, cached
        ids = post(url, "/tokenize", {"prompt": texts[0]})["tokens"]
        assert np.abs(np.array(create(input=ids).data[0].embedding) - vectors[0]).max() < 1e-4
        if pooling == "mean":
            assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
