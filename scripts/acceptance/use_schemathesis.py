"""schemathesis over /openapi.json: no answer may be a 5xx or break what the document promises."""

import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

url = os.environ["MINISGL_URL"] + "/openapi.json"
try:
    urllib.request.urlopen(url).read()
except urllib.error.HTTPError as e:
    sys.exit(f"GET /openapi.json is answered {e.code}: nothing to test")
command = [Path(sys.executable).with_name("schemathesis"), "run", url, "--max-examples", "20", "--workers", "1", "--checks"]
done = subprocess.run([*command, "not_a_server_error,response_schema_conformance"], capture_output=True, text=True, check=False)
assert done.returncode == 0, done.stdout[-3000:]
print(done.stdout.strip().splitlines()[-1].strip("= "))
