"""Hub ids against a server on this machine that stands in for the hub: what is fetched, what never is, and what is said.

The client reads HF_ENDPOINT and HF_HOME when it is imported, so it runs in a process of its own, one for each test.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import save_llama

COMMITS = {"main": "a" * 40, "v2": "b" * 40}
RESOLVE = """
import json, sys
from minisgl.errors import UserError
from minisgl.model.checkpoint.resolve import resolve
for model, revision in json.loads(sys.argv[1]):
    try:
        spec = resolve(model, revision)
        print(json.dumps([spec.name, spec.path, spec.max_context]))
    except UserError as e:
        print(json.dumps(str(e)))
"""


class Hub:
    """Repositories by name: {commit: {file: bytes}}.  `asked`: the paths of all requests."""

    def __init__(self, folder: Path) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.asked: list[str] = []
        self.home = folder / "home"
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        self.asked.append(path)
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = info or tree or file
        if found is None:
            return self.send(request, 404, b"{}")
        repo, revision = found[1], found[2] or "main"
        if repo == "org/gated":
            return self.send(request, 403, b"{}", {"X-Error-Code": "GatedRepo"})
        if repo not in self.repos:
            return self.send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit = COMMITS.get(revision, revision)
        if commit not in self.repos[repo]:
            return self.send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = self.repos[repo][commit]
        if info:
            siblings = [{"rfilename": name} for name in files]
            return self.send(request, 200, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode())
        if tree:
            entries = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in files.items()
            ]
            return self.send(request, 200, json.dumps(entries).encode())
        if file and file[3] in files:
            body = files[file[3]]
            return self.send(request, 200, body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit})
        return self.send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"})

    @staticmethod
    def send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        request.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    def add(self, repo: str, folder: Path, revision: str = "main", **more: bytes) -> None:
        files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        self.repos.setdefault(repo, {})[COMMITS[revision]] = files | {n.replace("__", "/"): b for n, b in more.items()}

    def resolve(self, *models: tuple[str, str | None], **environment: str) -> list[Any]:
        """What `resolve` answers to each: [name, path, max_context], or its complaint; and the progress on stderr."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **environment,
        }
        done = subprocess.run(
            [sys.executable, "-c", RESOLVE, json.dumps(models)],
            env=env,
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        self.stderr = done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def fetched(self) -> set[str]:
        return {p.rpartition("/")[2] for p in self.asked if "/resolve/" in p}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(tmp_path)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_a_model_is_fetched_once_by_revision_and_found_offline(hub: Hub, tmp_path: Path) -> None:
    model = save_llama(tmp_path / "one")
    model.save_pretrained(tmp_path / "parts", max_shard_size="60KB")
    shards = {p.name for p in (tmp_path / "parts").glob("*.safetensors")}
    assert len(shards) > 1
    junk = {
        "pytorch_model.bin": b"pickle",
        "modeling_x.py": b"code",
        "consolidated.safetensors": b"other",
        "onnx__x.json": b"{}",
    }
    hub.add("org/name", tmp_path / "parts", **junk)
    config = json.loads((tmp_path / "parts" / "config.json").read_text())
    (tmp_path / "parts" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 99}))
    hub.add("org/name", tmp_path / "parts", "v2", **junk)
    (name, path, context), (_, other, context2) = hub.resolve(("org/name", None), ("org/name", "v2"))
    assert (name, context, context2) == ("org/name", 256, 99)
    assert path.endswith(COMMITS["main"])
    assert other.endswith(COMMITS["v2"])
    assert hub.fetched() == shards | {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert "100%" in hub.stderr  # a progress bar
    hub.asked.clear()
    assert hub.resolve(("org/name", None), ("org/name", "v2"), HF_HUB_OFFLINE="1") == [[name, path, 256], [name, other, 99]]
    assert hub.resolve(("org/name", COMMITS["v2"])) == [[name, other, 99]]
    assert not hub.fetched()
    for shard in shards:
        os.unlink(os.path.join(other, shard))
    (complaint,) = hub.resolve(("org/name", "v2"), HF_HUB_OFFLINE="1")
    assert re.search(r"--model org/name: cannot be downloaded \(.*\)\. Is this machine offline\?", complaint)


def test_what_cannot_be_served_is_refused_before_its_weights_are_fetched(hub: Hub, tmp_path: Path) -> None:
    save_llama(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for repo, change in (
        ("org/remote", {"architectures": ["XForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}}),
        ("org/other", {"architectures": ["GPT2LMHeadModel"]}),
    ):
        (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **change}))
        hub.add(repo, tmp_path / "m", **{"modeling_x.py": b"raise SystemExit(9)"})
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "model.safetensors").unlink()
    hub.add("org/pickled", tmp_path / "m", **{"pytorch_model.bin": b"pickle"})
    hub.repos["org/gguf"] = {COMMITS["main"]: {"m.gguf": b"GGUF", "README.md": b""}}
    asked = ["remote", "other", "pickled", "gguf", "gated", "nobody"]
    *answers, revision = hub.resolve(*((f"org/{name}", None) for name in asked), ("org/other", "v9"))
    said = dict(zip(asked, answers, strict=True))
    assert re.search(r"'XForCausalLM' is Python code in the checkpoint \(auto_map\), which is never run", said["remote"])
    assert "'GPT2LMHeadModel' is not supported" in said["other"]
    assert "--model org/pickled: has no *.safetensors" in said["pickled"]
    assert "are never read" in said["pickled"]
    assert "--model org/gguf: has no config.json" in said["gguf"]
    assert "--model org/gated: access is restricted" in said["gated"]
    assert "--model org/nobody: no such model on the hub" in said["nobody"]
    assert hub.fetched() == {"config.json", "generation_config.json"}
    assert revision == "--revision v9: org/other has no such branch, tag or commit."


def test_a_model_without_the_usual_file_name_is_found(hub: Hub, tmp_path: Path) -> None:
    save_llama(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    save_file({"x": torch.zeros(1)}, tmp_path / "m" / "weights.safetensors")
    hub.add("org/name", tmp_path / "m")
    ((name, path, _),) = hub.resolve(("org/name", None))
    assert name == "org/name"
    assert "weights.safetensors" in os.listdir(path)


def test_a_hub_that_does_not_answer_is_one_sentence(hub: Hub) -> None:
    (complaint,) = hub.resolve(("org/name", None), HF_HUB_OFFLINE="1")
    assert re.search(r"--model org/name: cannot be downloaded .*offline.*local copy", complaint)
    assert not hub.asked
