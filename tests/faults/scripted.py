"""Models that say what a test wants, and real servers for them.

A scripted checkpoint is a Llama of one layer that adds nothing: every token has one successor, the row of the output matrix
that fits its embedding.  Whole pieces of text are single tokens, so that a script is a chain of pieces, begun by what the
prompt ends with.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from processes import REPOSITORY, minisgl_command

EOS = "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_scripted(
    path: Path,
    template: str,
    scripts: Mapping[str, Sequence[str]],
    *,
    special: Sequence[str] = (),
    tokens: Sequence[str] = (),
) -> str:
    """Write a checkpoint that says scripts[t] and then EOS when a prompt ends with the token t.

    Every piece is one token; a piece that stands in two scripts must go on alike in both.  `special`: pieces that the tokenizer
    marks as special; `tokens`: further pieces, of prompts.  Text that is no piece is one token a byte.
    """
    import tokenizers
    from safetensors.numpy import save_file
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    pieces = list(dict.fromkeys([EOS, "<|im_start|>", *tokens, *special, *(p for s, c in scripts.items() for p in (s, *c))]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    marked = {EOS, "<|im_start|>", *special}
    backend.add_tokens([AddedToken(p, special=p in marked, normalized=False) for p in pieces if len(p.encode()) > 1])
    vocab = -(-len(backend.get_vocab()) // 32) * 32

    def token(piece: str) -> int:
        [i] = backend.encode(piece, add_special_tokens=False).ids
        return int(i)

    successor: dict[int, int] = {}
    for start, chain in scripts.items():
        for a, b in zip([start, *chain], [*chain, EOS], strict=True):
            assert successor.setdefault(token(a), token(b)) == token(b), f"{a!r} goes on in two ways"
    head = np.zeros((vocab, vocab), np.float32)
    head[token(EOS), [i for i in range(vocab) if i not in successor]] = 1
    for a, b in successor.items():
        head[b, a] = 1
    heads, dim = 2, 16
    layer = {
        "self_attn.q_proj": (heads * dim, vocab),
        "self_attn.k_proj": (heads * dim, vocab),
        "self_attn.v_proj": (heads * dim, vocab),
        "self_attn.o_proj": (vocab, heads * dim),
        "mlp.gate_proj": (32, vocab),
        "mlp.up_proj": (32, vocab),
        "mlp.down_proj": (vocab, 32),
    }
    weights = {f"model.layers.0.{name}.weight": np.zeros(shape, np.float32) for name, shape in layer.items()}
    weights |= {
        f"model.layers.0.{n}.weight": np.ones(vocab, np.float32) for n in ("input_layernorm", "post_attention_layernorm")
    }
    weights |= {"model.norm.weight": np.ones(vocab, np.float32), "model.embed_tokens.weight": np.eye(vocab, dtype=np.float32)}
    weights["lm_head.weight"] = head
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, str(path / "model.safetensors"))
    backend.save(str(path / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": vocab,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": dim,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": token(EOS),
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": EOS}))
    return str(path)


class Server:
    """A real server on a free port."""

    def __init__(self, url: str, process: subprocess.Popen[str], said: list[str]) -> None:
        self.url, self.process, self.said = url, process, said

    def raw(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, seconds: float = 120
    ) -> tuple[int, bytes, Mapping[str, str]]:
        """(status, body, headers) of any answer."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        head = {"Content-Type": "application/json", **(headers or {})}
        request = urllib.request.Request(self.url + path, data, head, method=method)
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                return answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as e:
            return e.code, e.read(), e.headers

    def post(self, path: str, body: Any, **headers: str) -> dict[str, Any]:
        """The JSON body of a 200; an AssertionError shows any other answer."""
        status, raw, _ = self.raw("POST", path, body, headers)
        assert status == 200, f"{status}: {raw[:600].decode()}"
        return dict(json.loads(raw))

    def refused(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        """(status, body) of a refusal."""
        status, raw, _ = self.raw("POST", path, body, headers, 20)  # a refusal takes no time
        assert status >= 400, f"served: {raw[:300].decode()}"
        return status, dict(json.loads(raw))

    def chat(self, text: str = "hi", **fields: Any) -> dict[str, Any]:
        """The only choice of a greedy chat, after a look that a stream says the same."""
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 200, **fields}
        choice: dict[str, Any] = self.post("/v1/chat/completions", body)["choices"][0]
        streamed = self.streamed(body)
        message = choice["message"]
        for name in ("content", "reasoning_content"):
            assert streamed[name] == (message.get(name) or ""), f"a stream has another {name}: {streamed[name]!r}"
        return choice

    def streamed(self, body: Mapping[str, Any]) -> dict[str, str]:
        """content and reasoning_content of a streamed chat."""
        status, raw, _ = self.raw("POST", "/v1/chat/completions", {**body, "stream": True})
        assert status == 200, raw[:300]
        out = {"content": "", "reasoning_content": ""}
        for line in raw.decode().splitlines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:]).get("choices", ()):
                    for name in out:
                        out[name] += choice["delta"].get(name) or ""
        return out


@contextlib.contextmanager
def serve(*flags: str) -> Iterator[Server]:
    """A server with these flags, on one thread unless they say otherwise."""
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        minisgl_command("--port", "0", "--kv-tokens", "32768", *flags),
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    assert process.stderr is not None
    said: list[str] = []
    try:
        for line in process.stderr:
            said.append(line)
            if line.startswith("ready"):
                break
        else:
            raise AssertionError("".join(said))
        stderr = process.stderr
        threading.Thread(target=lambda: said.extend(stderr), daemon=True).start()
        yield Server(line.split()[4].removesuffix("/v1"), process, said)
    finally:
        process.terminate()
        process.wait(60)
