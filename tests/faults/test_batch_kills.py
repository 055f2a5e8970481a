"""Real servers with the fake engine: killed in the middle of a batch, twice on one directory, with files that must not grow."""

from __future__ import annotations

import functools
import json
import os
import random
import resource
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import pytest
from processes import REPOSITORY, eventually, minisgl_command
from test_system import ServerProcess

IDS = [f"q{i}" for i in range(240)]
CHAT = "/v1/chat/completions"
FLAGS = ("--kv-tokens", "4096", "--max-context", "512", "--max-running", "8")


def request_line(name: str) -> bytes:
    body = {"messages": [{"role": "user", "content": name}], "max_tokens": 24, "ignore_eos": True}
    return json.dumps({"custom_id": name, "method": "POST", "url": CHAT, "body": body}).encode() + b"\n"


def sdk(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def submit(client: openai.OpenAI) -> str:
    file = client.files.create(file=("in.jsonl", b"".join(map(request_line, IDS))), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h").id  # type: ignore[arg-type]


def check_answers(client: openai.OpenAI, name: str) -> None:
    """Every line has one answer, of status 200."""
    batch = eventually(lambda: (b := client.batches.retrieve(name)).status == "completed" and b)
    assert batch.request_counts.model_dump() == {"total": len(IDS), "completed": len(IDS), "failed": 0}
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert Counter(a["custom_id"] for a in answers) == Counter(IDS)
    assert {a["response"]["status_code"] for a in answers} == {200}
    assert (batch.errors, batch.error_file_id) == (None, None)


def has_lines(log: Path, n: int) -> bool:
    return log.exists() and log.read_bytes().count(b"\n") >= n


def end(server: ServerProcess, number: int) -> None:
    server.proc.send_signal(number)
    server.proc.communicate(timeout=60)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [("api", "api"), ("worker0", "stop")])
def test_a_server_killed_again_and_again_answers_every_line_once(tmp_path: Path, kills: tuple[str, ...]) -> None:
    """By SIGKILL, by SIGTERM, and by the death of its worker, each after a number of answers that is drawn."""
    rng, data, name, at = random.Random(7), tmp_path / "data", "", 0
    (tmp_path / "run").mkdir()
    for kill in kills:
        server = ServerProcess(tmp_path / "run", "--data-dir", str(data), *FLAGS)
        name = name or submit(sdk(server))
        at += rng.randrange(5, 60)
        log = data / "batches" / f"{name}.output"
        eventually(functools.partial(has_lines, log, at))
        if kill == "worker0":
            os.kill(server.children()["minisgl::worker0"], signal.SIGKILL)
        end(server, signal.SIGKILL if kill == "api" else signal.SIGTERM)  # also where the engine is started again
        assert not log.with_suffix(".errors").read_bytes(), "a line was answered with the end of the server"
        with open(log, "ab") as f:
            f.write(b'{"id": "batch_req_torn", "custom_id": "q0"')
    server = ServerProcess(tmp_path / "run", "--data-dir", str(data), *FLAGS)
    check_answers(sdk(server), name)
    if "api" in kills:
        command = minisgl_command("--model", "fake", "--port", "0", "--data-dir", str(data))
        env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert second.returncode == 2
        assert second.stderr.splitlines()[-1].endswith(f"--data-dir {data}: another server is using it")
    end(server, signal.SIGTERM)


@pytest.mark.timeout(600)
def test_a_server_whose_files_must_not_grow_says_so_and_goes_on_serving(tmp_path: Path) -> None:
    """RLIMIT_FSIZE, which is EFBIG and the signal SIGXFSZ: for an upload, and for the answers of a batch."""
    (tmp_path / "run").mkdir()
    server = ServerProcess(tmp_path / "run", "--data-dir", str(tmp_path / "data"), *FLAGS)
    client = sdk(server)
    name = submit(client)
    log = tmp_path / "data" / "batches" / f"{name}.output"
    eventually(lambda: log.exists() and log.stat().st_size > 0)
    _, most = resource.prlimit(server.proc.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.proc.pid, resource.RLIMIT_FSIZE, (12_000, most))
    batch: Any = eventually(lambda: (b := client.batches.retrieve(name)).errors and b)
    assert (batch.status, batch.errors.data[0].code) == ("in_progress", "disk_full")
    assert "File too large" in batch.errors.data[0].message
    with pytest.raises(openai.InternalServerError) as refused:
        client.files.create(file=("in.jsonl", b"x" * 20_000), purpose="batch")
    assert refused.value.status_code == 507
    assert "--data-dir" in refused.value.message
    client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "hi"}], max_tokens=2)
    resource.prlimit(server.proc.pid, resource.RLIMIT_FSIZE, (most, most))
    client.files.delete(client.files.create(file=b"x", purpose="user_data").id)  # there is room again
    check_answers(client, name)
    assert not list(tmp_path.rglob("*.part"))
    end(server, signal.SIGTERM)
