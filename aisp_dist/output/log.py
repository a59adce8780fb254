"""metrics.jsonl: every few seconds one JSON line from each command that fills the output. Several commands may write to
one file, at the same time (`--shard`) or one after the other (resume). Owns what their lines say together; knows no
rows.

A line has `time` (end of what it reports, in seconds since the epoch), `seconds` (since its command began to fill the
output), `command` (a random name, the same in every line of a command), `shard` ([i, n]; [0, 1] without `--shard`) and
sums over the command and its output (actors/counts.py). Lines of 0.1.0 have no `command` and no `shard`; there a line
continues the command whose last line began at the same moment, `time - seconds`, give or take _DRIFT.
"""

from __future__ import annotations

import json
from typing import Any

from aisp_dist.output.filesystem import Place

_FILE = "metrics.jsonl"
_DRIFT = 1.0  # seconds by which `time` and `seconds` of a command drift apart between two lines
_SUMMED = ("total", "done", "failed", "committed", "fresh", "in_flight", "iterations", "samples", "tokens")
Line = dict[str, Any]


def append(place: Place, line: Line) -> None:
    """Raises OSError."""
    place.append(_FILE, f"{json.dumps(line)}\n".encode())


def read(place: Place) -> list[Line]:
    """All whole lines, oldest first. A kill may have torn one; it is passed over."""
    found = []
    for text in (place.read(_FILE) or b"").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        found += [line] if isinstance(line, dict) else []
    return found


def commands(place: Place) -> list[Line]:
    """The last line of every command, in the order in which they began to write."""
    last: dict[str, Line] = {}
    for line in read(place):
        if "time" in line and "seconds" in line:
            last[line.get("command") or _continued(line, last)] = line
    return list(last.values())


def seconds(place: Place) -> float | None:
    """Wall time during which at least one command was filling the output; None without metrics. The clocks of machines
    that share an output must agree."""
    total, reached = 0.0, float("-inf")
    for began, ended in sorted((line["time"] - line["seconds"], line["time"]) for line in commands(place)):
        total += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
    return total or None


def latest(place: Place) -> Line | None:
    """Where the output stands: its last line, or the sum over the last lines of all shards where `--shard` split it
    (`total` is None while one of them has not counted its inputs). None without metrics."""
    lines = read(place)
    if not lines:
        return None
    _, count = lines[-1].get("shard", (0, 1))
    shards = {line["shard"][0]: line for line in lines if line.get("shard", (0, 1))[1] == count > 1}
    if not shards:
        return lines[-1]
    values: dict[str, list[Any]] = {name: [line.get(name) for line in shards.values()] for name in _SUMMED}
    sums = {name: None if None in found else sum(found) for name, found in values.items()}
    if len(shards) < count:
        sums["total"] = None  # the others have not counted theirs
    return lines[-1] | sums | {"shard": [0, 1], "shards": sorted(shards)}


def _continued(line: Line, last: dict[str, Line]) -> str:
    """The command of a line that names none."""
    began = line["time"] - line["seconds"]
    for name, other in last.items():
        if "command" not in other and abs(other["time"] - other["seconds"] - began) <= _DRIFT:
            return name
    return f"began at {began}"
