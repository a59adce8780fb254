"""What a whole run will take, from a part of it that was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping

from actors import sizing
from actors.counts import Counts
from aisp_dist.config import Run
from aisp_dist.output.filesystem import Place


def text(run: Run, inputs: int, counts: Counts, seconds: float, actors: int, size: int, rows: int, each: float) -> str:
    """Time, replicas, GPU-hours and bytes of `inputs` prompts. counts, seconds: of what `actors` generators drew here;
    size: bytes of `rows` rows; each: samples that a prompt spent, which is used where method.spend decides."""
    wanted = round(inputs * (each if run.method.spend else run.method.num_samples * run.method.num_iterations))
    whole = f"full run: {inputs} prompts, {wanted} samples"
    if not counts.busy.get("generator") or not rows:
        return f"{whole}; nothing was drawn here to tell what they cost"
    pace = counts.samples / seconds
    busy = {role: spent / counts.samples for role, spent in counts.busy.items()}
    fit = sizing.suggest(busy.pop("generator"), busy, wanted, size / rows, inputs)
    return (
        f"{whole}, {wanted / pace / 3600:.2g} hours at the {pace:.0f} samples/s measured here with {actors} "
        f"generator{'s' * (actors > 1)}\nsuggested: {fit.line()}"
    )


def measured(pilot: Place) -> Mapping[str, float] | None:
    """Seconds that one replica of each role works for a sample, as `aisp compare` measured it; None without one."""
    try:
        busy = json.loads(pilot.read("comparison.json") or b"{}").get("busy")
    except ValueError:  # torn, or not ours
        return None
    return {str(role): float(seconds) for role, seconds in busy.items()} if busy else None
