"""vLLM's benchmark of embeddings, by its wire format: `vllm bench serve --backend openai-embeddings[-chat]`."""

import json
import os
import time
import urllib.request

url = os.environ["MINISGL_URL"] + "/v1/embeddings"
long = "a word " * 20000  # far more than the context: the benchmark asks for truncation to lose no request
CHAT = [{"type": "text", "text": "a cat"}]
BODIES = {
    "openai-embeddings": [{"input": text} for text in ("a cat", ["a cat", "a dog"], [9, 8, 7], [[9, 8], [7]], long)],
    "openai-embeddings-chat": [
        {"messages": [{"role": "user", "content": content}]} for content in (CHAT, [{"type": "text", "text": long}], "a cat")
    ],
}
with urllib.request.urlopen(os.environ["MINISGL_URL"] + "/v1/models") as answer:
    model = json.load(answer)["data"][0]
done, tokens = 0, 0
for bodies in BODIES.values():
    for body in bodies:
        payload = {"model": model["id"], **body, "truncate_prompt_tokens": -1}
        request = urllib.request.Request(url, json.dumps(payload).encode(), {"Content-Type": "application/json"})
        start = time.perf_counter()
        with urllib.request.urlopen(request) as answer:
            data = json.load(answer)
        assert time.perf_counter() > start
        prompt_tokens = data["usage"]["prompt_tokens"]  # the only thing that the benchmark reads
        assert 0 < prompt_tokens <= model["max_model_len"] * len(data["data"]), prompt_tokens
        done, tokens = done + 1, tokens + prompt_tokens
print(f"{done} requests, {tokens} prompt tokens")
