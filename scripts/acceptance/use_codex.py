"""OpenAI's Codex: one turn of `codex exec` through the Responses API, with all the tools and instructions that it sends.

The embedded model is far too small to be of use in it: what counts is that its requests are served and its events understood.
"""

import json
import os
import subprocess
from pathlib import Path

home = Path("home")
home.mkdir()
(home / "config.toml").write_text(f"""
model = "SmolLM2-135M-Instruct"
model_provider = "minisgl"
model_context_window = 8192
[model_providers.minisgl]
name = "minisgl"
base_url = "{os.environ["MINISGL_URL"]}/v1"
wire_api = "responses"
stream_max_retries = 0
request_max_retries = 0
""")
codex = Path(os.environ["MINISGL_NODE_MODULES"]) / ".bin" / "codex"
command = [str(codex), "exec", "--skip-git-repo-check", "--sandbox", "read-only", "--json", "Say hi."]
env = os.environ | {"CODEX_HOME": str(home.absolute())}
done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=900, env=env, check=False)
events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
failed = [e for e in events if e["type"] in ("error", "turn.failed")]
assert not failed, failed
[end] = [e for e in events if e["type"] == "turn.completed"]
assert end["usage"]["input_tokens"] > 1000, end
print(f"a turn with {end['usage']['input_tokens']} input and {end['usage']['output_tokens']} output tokens")
