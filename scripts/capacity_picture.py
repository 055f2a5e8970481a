"""Makes the picture of docs/capacity.md, from an hour of conversations (a Mooncake trace).

.venv/bin/python scripts/capacity_picture.py TRACE.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path

from minisgl.commands.simulate import run

PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "capacity.svg"
FLAGS = ("--limit", "1500", "--page-size", "64", "--slo", "ttft=2s,itl=30ms,share=0.9", "--price-per-hour", "3.5")

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit((__doc__ or "").strip())
    sys.exit(run([sys.argv[1], *FLAGS, "--plot", str(PICTURE)]))
