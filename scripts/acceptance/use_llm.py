"""The `llm` command, configured as its manual says: extra-openai-models.yaml."""

import os
import subprocess
import sys
from pathlib import Path

os.environ["LLM_USER_PATH"] = str(Path.cwd())
Path("extra-openai-models.yaml").write_text(
    f"- model_id: here\n  model_name: SmolLM2-135M-Instruct\n  api_base: {os.environ['MINISGL_URL']}/v1\n"
)
for flags in ([], ["--no-stream"]):
    command = [sys.executable, "-m", "llm", "-m", "here", "-o", "temperature", "0", *flags, "What is the capital of France?"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert "Paris" in done.stdout, done
logs = subprocess.run([sys.executable, "-m", "llm", "logs", "--json"], capture_output=True, text=True, check=True).stdout
assert '"output_tokens"' in logs, logs
print("prompt streamed and whole, usage in its log")
