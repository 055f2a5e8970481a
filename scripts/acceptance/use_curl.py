"""curl: a chat, a stream as it comes, an error."""

import json
import os
import subprocess

URL = os.environ["MINISGL_URL"] + "/v1/chat/completions"


def curl(body: str, *flags: str) -> str:
    command = ["curl", "-sS", *flags, URL, "-H", "Content-Type: application/json", "-d", body]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


ask = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
text = json.loads(curl(json.dumps(ask)))["choices"][0]["message"]["content"]
assert "Paris" in text
lines = [x for x in curl(json.dumps({**ask, "stream": True}), "-N").split("\n\n") if x]
assert all(x.startswith("data: ") for x in lines)
assert lines[-1] == "data: [DONE]"
deltas = [json.loads(x[6:])["choices"][0]["delta"] for x in lines[:-1]]
assert "".join(d.get("content", "") for d in deltas) == text
error = json.loads(curl('{"messages": ['))
assert error["error"]["type"] == "invalid_request_error"
print(f"chat, {len(lines)} events, error body")
