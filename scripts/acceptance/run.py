"""Clients of other people, unmodified, against the embedded model.

    .venv/bin/python scripts/acceptance/run.py [CLIENT ...]

For each client: a virtual environment of its own under ~/.cache/minisgl-acceptance (made once), the client from PyPI in it (or
from npm, in a folder that MINISGL_NODE_MODULES names), then use_<client>.py of this directory there, with the server's address
in MINISGL_URL.  One line per client: its version, what
was seen, or the end of its output where it failed.  Exit code 1 if one failed.  Needs the network,
so it is not part of the tests.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1]))
from scripts.lib.live_server import live_server  # noqa: E402

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "minisgl-acceptance"
CLIENTS: dict[str, tuple[str, ...]] = {  # what is installed; the first names the version
    "curl": (),
    "openai": ("openai",),
    "anthropic": ("anthropic",),
    "langchain": ("langchain-openai",),
    "llm": ("llm",),
    "litellm": ("litellm",),
    "lm_eval": ("lm_eval[api]", "transformers"),
    "guidellm": ("guidellm",),
    "vllm_embeddings": (),
    "anthropic_js": ("npm:@anthropic-ai/sdk",),
    "codex": ("npm:@openai/codex",),
    "schemathesis": ("schemathesis",),
}


FLAGS: dict[str, tuple[str, ...]] = {
    "openai": ("--tool-call-parser", "hermes"),  # the embedded model's template knows no tools; a grammar makes it call
    "anthropic": ("--tool-call-parser", "hermes"),
    "anthropic_js": ("--tool-call-parser", "hermes"),
    "codex": ("--tool-call-parser", "hermes"),
    "vllm_embeddings": ("--max-context", "512"),  # a prompt that fills it is computed several times
    "schemathesis": ("--max-context", "192"),  # thousands of answers, of any length
}


def python_of(client: str) -> str:
    """The interpreter of a client's environment, which is made if it is not there."""
    if not CLIENTS[client]:
        return sys.executable
    home = CACHE / client
    if CLIENTS[client][0].startswith("npm:"):
        if not (home / "installed").exists():
            home.mkdir(parents=True, exist_ok=True)
            names = [name.removeprefix("npm:") for name in CLIENTS[client]]
            subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(home), *names], check=True)
            (home / "installed").touch()
        return sys.executable
    python = home / "bin" / "python"
    if not (home / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *CLIENTS[client]], check=True)
        (home / "installed").touch()
    return str(python)


def version_of(client: str, python: str) -> str:
    if not CLIENTS[client]:
        return ""
    name = CLIENTS[client][0].split("[")[0]
    if name.startswith("npm:"):
        package = CACHE / client / "node_modules" / name.removeprefix("npm:") / "package.json"
        return str(json.loads(package.read_text())["version"])
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def save_tokenizer(folder: Path) -> None:
    """The embedded model's tokenizer in Hugging Face's layout, for clients that count tokens themselves."""
    from minisgl.model.checkpoint.gguf_file import GGUFFile
    from minisgl.model.checkpoint.resolve import embedded_model
    from minisgl.model.text import gguf_tokenizer

    path = embedded_model()
    gguf_tokenizer.build(GGUFFile(path).fields, path).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def check_scores(told: dict[str, Any]) -> str:
    """lm-evaluation-harness's log likelihoods and answers through the server, against transformers on the same items."""
    import torch

    from minisgl.model.checkpoint.resolve import resolve
    from minisgl.model.text.tokenizer import load_tokenizer
    from scripts.lib.reference import greedy, load_transformers

    spec = resolve(None)
    model, tokenizer = load_transformers(spec, 2), load_tokenizer(spec)
    worst = 0.0
    for context, continuation, logprob, is_greedy in told["loglikelihood"]:
        start = len(tokenizer.encode(context, False))
        ids = torch.tensor(tokenizer.encode(context + continuation, False).tolist())
        with torch.inference_mode():
            rows = torch.log_softmax(model(ids[None]).logits[0, start - 1 : -1], -1)
        own = float(rows.gather(1, ids[start:, None]).sum())
        worst = max(worst, abs(own - logprob))
        assert bool((rows.argmax(-1) == ids[start:]).all()) == bool(is_greedy), (context, continuation)
    assert math.isfinite(worst), worst
    assert worst < 0.01, worst
    for prompt, stops, text in told["generate"]:
        out = greedy(model, [tokenizer.encode(prompt, False).tolist()], 24)[0]
        whole = tokenizer.decode(out, True)
        cut = min((whole.find(s) for s in stops if s in whole), default=len(whole))
        assert text == whole[:cut], (prompt, text, whole)
    return (
        f"against transformers: {len(told['loglikelihood'])} log likelihoods differ by at most {worst:.1e}, "
        f"{len(told['generate'])} answers are equal"
    )


def run(client: str, url: str, tokenizer: Path) -> tuple[bool, str]:
    """(whether it passed, what was seen)"""
    start = time.monotonic()
    try:
        python = python_of(client)
        version = version_of(client, python)
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        env |= {
            "MINISGL_URL": url,
            "MINISGL_TOKENIZER": str(tokenizer),
            "MINISGL_NODE_MODULES": str(CACHE / client / "node_modules"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with tempfile.TemporaryDirectory() as home:
            command = [python, str(HERE / f"use_{client}.py")]
            done = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=env, cwd=home, check=False)
        if done.returncode:
            return False, f"{client} {version}: FAILED: {(done.stdout + done.stderr)[-1500:]}"
        seen = done.stdout.strip().splitlines()[-1]
        if client == "lm_eval":
            seen = check_scores(json.loads(seen))
    except (subprocess.SubprocessError, AssertionError, IndexError) as e:
        return False, f"{client}: FAILED: {type(e).__name__}: {e}"
    return True, f"{client} {version}: passed: {seen} ({time.monotonic() - start:.0f} s)"


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"of {', '.join(CLIENTS)}; default: all")
    clients = parser.parse_args().clients or list(CLIENTS)
    if unknown := set(clients) - set(CLIENTS):
        parser.error(f"unknown client {', '.join(sorted(unknown))}")
    failed = 0
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as data:
        save_tokenizer(Path(folder))
        for flags in sorted({FLAGS.get(c, ()) for c in clients}):
            with live_server("--kv-tokens", "32768", "--data-dir", data, *flags) as url:
                for client in (c for c in clients if FLAGS.get(c, ()) == flags):
                    passed, line = run(client, url, Path(folder))
                    failed += not passed
                    print(line, flush=True)
    print(f"{len(clients) - failed} of {len(clients)} clients passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
