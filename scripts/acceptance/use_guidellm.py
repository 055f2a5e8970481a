"""guidellm: a short benchmark of synthetic chats; every request must be completed."""

import json
import os
import subprocess
import sys
from pathlib import Path

command = [Path(sys.executable).with_name("guidellm"), "benchmark", "run", "--target", os.environ["MINISGL_URL"]]
command += ["--profile", "synchronous", "--max-requests", "4", "--data", "prompt_tokens=32,output_tokens=8"]
command += ["--processor", os.environ["MINISGL_TOKENIZER"], "--output-path", "out.json"]
done = subprocess.run(command, capture_output=True, text=True, check=False)
assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
totals = json.loads(Path("out.json").read_text())["benchmarks"][0]["metrics"]["request_totals"]
assert (totals["successful"], totals["errored"]) == (4, 0), totals
print(f"{totals['successful']} requests completed, none failed")
