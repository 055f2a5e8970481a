#!/usr/bin/env bash
# Set up the environment and pass the tests: lint, types, test suite.  Arguments go to pytest (scripts/test.sh -k radix).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

ensure_env dev
cd "$root"
echo "== ruff" && "$venv/bin/ruff" check . && "$venv/bin/ruff" format --check .
echo "== mypy" && "$venv/bin/mypy"
echo "== pytest" && exec "$venv/bin/python" -m pytest "$@"
