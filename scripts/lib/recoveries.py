"""What the log of a server and the kills of an attacker tell about recoveries.  Imported by other scripts."""

from __future__ import annotations

import statistics
from datetime import datetime
from typing import Any

from scripts.lib import attacks


def summary(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"n": len(values), "median": round(statistics.median(values), 4), "worst": round(max(values), 4)}


def notices(log: list[attacks.Kill], lines: list[dict[str, Any]]) -> list[float]:
    """Seconds from each kill to the server's line about it; of those at one time, the first."""
    said = [
        (datetime.fromisoformat(str(e["time"]).replace("Z", "+00:00")).timestamp(), e)
        for e in lines
        if e.get("event") == "restart"
    ]
    found = []
    for kill in log:
        times = [at - kill.at for at, e in said if at >= kill.at - 0.002 and e.get("process") in kill.names]
        if kill.how == "kill" and times:
            found.append(max(0.0, times[0]))
    return found


def restarts(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The parts of recoveries by process, from the server's log.

    All numbers of its lines with the events "restart", which names the process, and "recovered", which belongs to the last one.
    """
    parts: dict[str, dict[str, list[float]]] = {}
    process = ""
    for line in lines:
        if line.get("event") in ("restart", "recovered"):
            process = str(line.get("process", process))
            for name, value in {**line, **line.get("parts", {})}.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    parts.setdefault(process, {}).setdefault(name, []).append(value)
    return {process: {name: summary(v) for name, v in found.items()} for process, found in sorted(parts.items())}
