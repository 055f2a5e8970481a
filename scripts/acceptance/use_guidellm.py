"""guidellm: a short benchmark of synthetic chats; every request must be completed."""

import json
import os
import subprocess
import sys
from pathlib import Path

url, tokenizer = os.environ["MINISGL_URL"], os.environ["MINISGL_TOKENIZER"]
command = [Path(sys.executable).with_name("guidellm"), "run", "--backend", f"kind=openai_http,target={url}"]
command += ["--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=4", "--disable-progress"]
command += ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8", "--output", "kind=json,path=out.json"]
command += ["--tokenizer", f"kind=huggingface_auto,model={tokenizer}"]
done = subprocess.run(command, capture_output=True, text=True, check=False)
assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
totals = json.loads(Path("out.json").read_text())["benchmarks"][0]["metrics"]["request_totals"]
assert (totals["successful"], totals["errored"]) == (4, 0), totals
print(f"{totals['successful']} requests completed, none failed")
