"""What belongs to the model, through a real server: recommended sampling parameters, EOS, a chat template from a file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from processes import REPOSITORY, minisgl_command
from tiny_models import save_byte_tokenizer, save_llama

FLAGS = ["--port", "0", "--kv-tokens", "1024", "--threads", "1"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_llama(tmp_path / "tiny")
    save_byte_tokenizer(tmp_path / "tiny")
    generation = {"temperature": 0.25, "top_k": 1, "eos_token_id": [2, 7], "do_sample": True}
    (tmp_path / "tiny" / "generation_config.json").write_text(json.dumps(generation))
    return tmp_path / "tiny"


def command(checkpoint: Path, *flags: str) -> list[str]:
    return minisgl_command(*FLAGS, "--model", str(checkpoint), *flags)


@contextmanager
def serving(checkpoint: Path, *flags: str) -> Iterator[tuple[str, str]]:
    """A server: its URL, and what it says until it is ready."""
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "XDG_RUNTIME_DIR": str(checkpoint.parent)}
    server = subprocess.Popen(command(checkpoint, *flags), stderr=subprocess.PIPE, text=True, env=env)
    assert server.stderr is not None
    try:
        lines = []
        while not (lines and lines[-1].startswith("ready")):
            lines.append(server.stderr.readline())
            assert lines[-1], f"it ended: {lines}"
        threading.Thread(target=server.stderr.read, daemon=True).start()  # keep the pipe empty
        yield re.findall(r"http://\S+(?=/v1)", lines[-1])[0], "".join(lines)
    finally:
        server.terminate()
        assert server.wait(timeout=60) == 0


def ask(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    request = Request(url, None if body is None else json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as answer:
        return dict(json.load(answer))


def test_what_the_checkpoint_recommends_is_shown_and_used_and_a_template_file_replaces_its_own(checkpoint: Path) -> None:
    template = checkpoint.parent / "mine.jinja"
    template.write_text("{% for m in messages %}[{{ m.content }}|{{ mood }}]{% endfor %}")
    with serving(checkpoint, "--chat-template", str(template)) as (url, said):
        assert "EOS 2, 7)" in said
        assert "\nsampling: temperature 0.25, top_k 1 (generation_config.json)\n" in said
        info = ask(f"{url}/server_info")
        assert (info["eos_ids"], info["sampling_defaults"]) == ([2, 7], {"temperature": 0.25, "top_k": 1})
        body: dict[str, Any] = {"prompt": "abc", "max_tokens": 12, "ignore_eos": True}
        texts = {ask(f"{url}/v1/completions", body | {"seed": seed})["choices"][0]["text"] for seed in range(3)}
        assert len(texts) == 1  # top_k 1
        free = {"temperature": 2, "top_k": -1}
        texts = {ask(f"{url}/v1/completions", body | free | {"seed": seed})["choices"][0]["text"] for seed in range(3)}
        assert len(texts) > 1
        chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "chat_template_kwargs": {"mood": "good"}}
        assert ask(f"{url}/v1/chat/completions", chat)["usage"]["prompt_tokens"] == len("[hello|good]")


def test_a_template_that_cannot_be_used_ends_the_start_with_a_sentence(checkpoint: Path) -> None:
    template = checkpoint.parent / "bad.jinja"
    template.write_text("{% for %}")
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "XDG_RUNTIME_DIR": str(checkpoint.parent)}
    done = subprocess.run(
        command(checkpoint, "--chat-template", str(template)), capture_output=True, text=True, env=env, timeout=60, check=False
    )
    assert done.returncode == 2
    assert re.search(r"minisgl: --chat-template \S+bad\.jinja: cannot be used: ", done.stderr)
    assert "Traceback" not in done.stderr
