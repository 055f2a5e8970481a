"""The whole system in real processes, with the fake engine: serve, fail clearly, end cleanly."""

from __future__ import annotations

import functools
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import openai
import process_actors
import pytest
from processes import REPOSITORY, alive, eventually, minisgl_command

from minisgl import LLM, SamplingParams
from minisgl.api.engine import Chunk, TokenPrompt
from minisgl.api.system import System
from minisgl.config import Config, EngineConfig, ServerConfig
from minisgl.errors import RequestError, UserError
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.fake_runner import alternatives, expected_tokens, logprob
from minisgl.model.text.tokenizer import load_tokenizer

ENGINE = {"tp": 2, "kv_tokens": 4096, "max_context": 512, "page_size": 16, "max_running": 8, "step_tokens": 64}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("fake", **ENGINE) as engine:
        yield engine


def expected(ids: list[int], n: int) -> list[int]:
    spec = resolve("fake")
    return expected_tokens(ids, n, spec.vocab_size, spec.eos_ids)


def test_many_requests_at_once_get_the_text_of_the_reference(llm: LLM) -> None:
    prompts = [[7 * i + j for j in range(1, 5 + 3 * i)] for i in range(40)]
    answers = llm.generate(prompts, SamplingParams(max_tokens=30))
    for ids, answer in zip(prompts, answers, strict=True):
        assert answer.token_ids == expected(ids, 30)
        assert answer.finish_reason in ("length", "stop")
        assert answer.prompt_tokens == len(ids)


def test_text_goes_through_the_real_tokenizer_and_comes_back_as_text(llm: LLM) -> None:
    first, second = (llm.generate(["one two three four five six " * 8], SamplingParams(max_tokens=9))[0] for _ in range(2))
    assert first.token_ids == second.token_ids
    assert first.text == second.text != ""
    assert first.cached_tokens == 0
    assert second.cached_tokens >= 32


def test_each_refused_request_says_why_and_the_others_are_served(llm: LLM) -> None:
    prompts = [[], list(range(1, 600)), [10**9], "half a \ud83d pair", [1, 2, 3]]
    empty, long, odd, half, good = llm.generate(prompts, SamplingParams(max_tokens=4), errors="return")
    assert half.error is not None
    assert half.error.param == "prompt"
    assert empty.error is not None
    assert "empty" in empty.error.message
    assert long.error is not None
    assert "maximum context length is 512 tokens" in long.error.message
    assert "603 tokens" in long.error.message
    assert odd.error is not None
    assert "1000000000 is not in the vocabulary" in odd.error.message
    assert good.token_ids == expected([1, 2, 3], 4)


def test_log_probabilities_of_prompt_and_answer_belong_to_their_tokens(llm: LLM) -> None:
    prompts = [[3 * i + j for j in range(1, 4 + 9 * i)] for i in range(5)]
    wanted = [SamplingParams(max_tokens=9, logprobs=i, echo=i != 2) for i in range(5)]
    for ids, p, answer in zip(prompts, wanted, llm.generate(prompts, wanted), strict=True):
        text = ids + answer.token_ids
        first = 0 if p.echo else len(ids)
        assert answer.token_ids == expected(ids, 9)
        assert [t.token_id for t in answer.logprobs] == text[first:]
        for at, t in enumerate(answer.logprobs, first):
            context = np.array(text[:at], np.int32)
            tops = alternatives(t.token_id, p.logprobs or 0, resolve("fake").vocab_size) if at else []
            assert t.logprob == (logprob(context, t.token_id) if at else None)
            assert [(i, x) for i, _, x in t.top] == [(i, logprob(context, i)) for i in tops]
        if p.echo:
            alone = llm.generate([ids], SamplingParams(max_tokens=0, logprobs=p.logprobs, echo=True))[0]
            assert alone.logprobs == answer.logprobs[: len(ids)]
            assert answer.text.startswith(alone.text)
            assert alone.token_ids == []


def test_tokens_that_are_not_in_the_vocabulary_are_refused_by_the_name_of_their_field(llm: LLM) -> None:
    for name, value in (("logit_bias", {10**6: 1.0}), ("stop_token_ids", (10**6,))):
        with pytest.raises(RequestError) as e:
            llm.generate([[1]], SamplingParams(max_tokens=1, **{name: value}))
        assert e.value.param == name


def test_max_tokens_is_the_rest_of_the_context_when_nothing_is_asked(llm: LLM) -> None:
    answer = llm.generate([[5] * 500], SamplingParams(ignore_eos=True))[0]
    assert len(answer.token_ids) == 12
    assert answer.finish_reason == "length"


def test_an_engine_that_cannot_be_started_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    errors: list[BaseException] = []

    def start() -> None:
        try:
            LLM("fake", **ENGINE)
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=start)  # children would die with the thread that spawned them
    thread.start()
    thread.join()
    assert isinstance(errors[0], UserError)
    assert "main thread" in str(errors[0])
    assert list(tmp_path.iterdir()) == []


def test_unknown_settings_are_named() -> None:
    with pytest.raises(UserError, match="'paeg_size'"):
        LLM(paeg_size=4)
    with pytest.raises(UserError, match="--tp 10"):
        LLM(tp=10)


@pytest.mark.parametrize("victim", ["worker1", "scheduler", "tokenizer", "checker", "detokenizer"])
def test_without_restarts_a_dead_child_fails_every_open_request_at_once_and_leaves_nothing(victim: str) -> None:
    system = System(Config(resolve("fake"), EngineConfig(**ENGINE), ServerConfig(max_restarts=0)))
    system.wait_ready()
    pids = system.supervisor.pids
    run_dir = Path(system.run_dir)
    news: list[Chunk | RequestError] = []
    for i in range(5):
        system.gateway.open(TokenPrompt((i + 1, 2, 3)), SamplingParams(max_tokens=400, ignore_eos=True), news.append)
    os.kill(pids["worker0"], signal.SIGSTOP)  # so that they are still open when it happens
    os.kill(pids[victim], signal.SIGKILL)

    def failed() -> bool:
        system.pump(0.05)
        return sum(isinstance(n, RequestError) for n in news) == 5

    eventually(failed)
    error = next(n for n in news if isinstance(n, RequestError))
    assert (error.status, error.code) == (500, "engine_error")
    assert victim in error.message
    assert system.gateway.state == "dead"
    with pytest.raises(RequestError) as refused:
        system.gateway.open(TokenPrompt((1,)), SamplingParams(), news.append)
    assert refused.value.status == 503
    system.close()
    eventually(lambda: not any(map(alive, pids.values())))
    assert not run_dir.exists()


def test_a_worker_that_dies_while_loading_is_an_error_with_its_name() -> None:
    config = Config(resolve(None), EngineConfig(**ENGINE), ServerConfig(max_restarts=2))
    system = System(config, process_actors.make_dying_worker)
    with pytest.raises(UserError, match=r"worker\d was killed by signal 9, after 2 restarts within 60 s \(--max-restarts 2\)"):
        system.wait_ready()
    system.close()


class ServerProcess:
    """A server with the fake engine, as a user would start it."""

    def __init__(self, tmp: Path, *flags: str) -> None:
        env = os.environ | {"PYTHONPATH": str(REPOSITORY), "XDG_RUNTIME_DIR": str(tmp)}
        self.proc = subprocess.Popen(
            minisgl_command("--model", "fake", "--port", "0", *flags),
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            start_new_session=True,
        )
        self.lines: list[str] = []
        assert self.proc.stderr is not None
        for line in self.proc.stderr:
            self.lines.append(line)
            if line.startswith("ready"):
                self.url = line.split()[4].removesuffix("/v1")
                break

    def children(self) -> dict[str, int]:
        """Title -> pid."""
        out = subprocess.run(["ps", "-eo", "ppid=,pid=,args="], capture_output=True, text=True, check=True).stdout
        rows = [line.split(None, 2) for line in out.splitlines()]
        return {args: int(pid) for ppid, pid, args in rows if int(ppid) == self.proc.pid}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_seven_named_processes(tmp_path: Path, number: signal.Signals) -> None:
    server = ServerProcess(tmp_path, "--tp", "2", "--num-tokenizers", "2")
    children = server.children()
    named = {name for name in children if name.startswith("minisgl::")}
    assert named == {
        f"minisgl::{n}" for n in ("tokenizer", "tokenizer1", "checker", "detokenizer", "scheduler", "worker0", "worker1")
    }
    assert Path(f"/proc/{server.proc.pid}/cmdline").read_bytes().startswith(b"minisgl::api")
    assert len(list(tmp_path.iterdir())) == 1
    os.killpg(server.proc.pid, number)  # the terminal signals the whole group
    assert server.proc.wait(timeout=60) == 0
    eventually(lambda: not any(map(alive, children.values())))
    assert list(tmp_path.iterdir()) == []


def test_people_can_talk_to_the_fake_engine_and_stop_it(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path)
    assert server.lines[0].endswith(": loading fake engine (no model: tokens are hashes of their context)\n")
    assert server.proc.stderr is not None
    printed = re.findall(r"http://\S+", server.lines[-1] + server.proc.stderr.readline())
    assert printed == [f"{server.url}/v1", f"{server.url}/"]
    for url in printed:
        with urlopen(Request(url, headers={"Accept": "text/html,*/*;q=0.8"})) as answer:
            assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
            assert b"KV cache" in answer.read()
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["fake"]
    create = functools.partial(client.chat.completions.create, model="fake", max_tokens=20)
    messages = [{"role": "user", "content": "Hello"}]
    text = create(messages=messages).choices[0].message.content
    chunks = list(create(messages=messages, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len(text.split()) > 5, "the text reads as text"
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, 22]}}}
    assert create(messages=messages, response_format=form).choices[0].message.content in ("1", "22")
    plain = client.completions.create(model="fake", prompt=[1, 2, 3], max_tokens=9)
    assert plain.choices[0].text == load_tokenizer(resolve("fake")).decode(expected([1, 2, 3], 9), skip_special=True)
    os.killpg(server.proc.pid, signal.SIGINT)
    assert server.proc.wait(timeout=60) == 0
    assert list(tmp_path.iterdir()) == []


def test_without_the_embedded_model_the_fake_engine_reads_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise UserError("not installed")

    monkeypatch.setattr("minisgl.model.checkpoint.resolve.embedded_model", missing)
    spec = resolve("fake")
    with LLM(spec, **ENGINE) as engine:
        answer = engine.chat([[{"role": "user", "content": "a"}]], SamplingParams(max_tokens=5))[0]
    prompt = "user: a\nassistant: "
    ids = load_tokenizer(spec).encode(prompt, False).tolist()
    assert answer.prompt_tokens == len(ids) == len(prompt)
    assert answer.token_ids == expected_tokens(ids, 5, spec.vocab_size, spec.eos_ids)


def test_the_same_engine_in_one_thread_gives_the_same_text(llm: LLM) -> None:
    prompts = [[i + 1, 2, 3] for i in range(5)]
    with LLM("fake", processes=False, **{**ENGINE, "tp": 1}) as alone:
        answers = alone.generate(prompts, SamplingParams(max_tokens=9))
        refused = alone.generate([[]], errors="return")[0]
    assert [a.text for a in answers] == [a.text for a in llm.generate(prompts, SamplingParams(max_tokens=9))]
    assert refused.error is not None
    with pytest.raises(UserError, match="one rank"):
        LLM("fake", processes=False, **ENGINE)


def test_a_killed_server_leaves_no_process_and_no_socket(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path)
    children = server.children()
    assert len(children) >= 4
    assert len(list(tmp_path.iterdir())) == 1
    server.proc.kill()
    server.proc.wait()
    eventually(lambda: not any(map(alive, children.values())))
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_dies_too_often_ends_the_server_with_a_sentence_and_an_exit_code(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, "--max-restarts", "0")
    os.kill(server.children()["minisgl::worker0"], signal.SIGKILL)
    assert server.proc.wait(timeout=60) == 70
    assert server.proc.stderr is not None
    assert "the process worker0 was killed by signal 9" in server.proc.stderr.read()
    assert list(tmp_path.iterdir()) == []


def test_a_busy_port_and_a_missing_model_are_one_sentence_before_anything_is_loaded(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path)
    port = server.url.rpartition(":")[2]
    bad = tmp_path / "broken.gguf"
    bad.write_bytes(b"GGUF" + b"\xff" * 60)
    cases = {
        ("--port", port): "already in use",
        ("--port", "0", "--model", "./nowhere/model.gguf"): "no such file",
        ("--port", "0", "--model", str(bad)): "broken.gguf",
        ("--port", "0", "--tp", "10"): "--tp 10",
        ("--port", "0", "--lag", "0"): "--lag",
        ("--port", "99999"): "--port",
        ("--host", "256.1.1.1"): "--host",
        ("frobnicate",): "unknown command",
    }
    for flags, text in cases.items():
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = subprocess.run(
            [sys.executable, "-m", "minisgl", *flags], capture_output=True, text=True, cwd=REPOSITORY, timeout=30, check=False
        )
        assert done.returncode == 2, done
        assert text in done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.2  # seconds; with torch 1.5
    bad.unlink()
    server.proc.terminate()
    assert server.proc.wait(timeout=60) == 0
