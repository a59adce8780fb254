"""What a finished output says, in a screenful: counts, rewards with intervals, fluency, an example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds

from aisp_dist import manifest
from aisp_dist.metrics import interval

_COLUMNS = ("id", "reward", "base_reward", "rewards", "base_rewards", "nll", "base_nll", "samples_spent", "quarantined")


def text(output: Path, seconds: float, samples: int) -> str:
    """The summary of an output. seconds, samples: of the command that has just ended, for its speed."""
    run = manifest.read_run(output)
    if run is None:
        raise FileNotFoundError(f"{output} holds no run.json")
    failed = ds.dataset(output / "failed").count_rows() if (output / "failed").is_dir() else 0
    data = ds.dataset(output / "data")
    rows = data.to_table(columns=list(_COLUMNS)).to_pydict()
    done = len(rows["id"])
    out = ["", f"{done} rows done, {failed} failed, in {output}"]
    if not done + failed:
        out.append("the input is empty, and so is the table")
    if done:
        out += _rewards(rows, run["config"]["rewards"])
        out += _example(data, rows)
    if seconds and samples:
        out.append(f"{samples} samples in {seconds:.0f} s, {samples / seconds:.0f} samples/s")
    out.append(f"rows: {output / 'data'}" + (f"   failed: {output / 'failed'}" if failed else ""))
    return "\n".join(out)


def _rewards(rows: dict[str, list[Any]], rewards: dict[str, Any]) -> list[str]:
    out = [f"{'':24}{'base':>28}{'selected':>28}{'difference':>28}"]

    def line(name: str, base: list[float | None], best: list[float | None]) -> None:
        pairs = [(b, s) for b, s in zip(base, best, strict=True) if b is not None and s is not None]
        if pairs:
            b, s = np.array(pairs).T
            cells = (interval(b), interval(s), interval(s - b))
            out.append(f"{name:24}" + "".join(f"{cell!s:>28}" for cell in cells))

    line("reward", rows["base_reward"], rows["reward"])
    for name, settings in rewards.items():
        values = [
            [next((x["value"] for x in scores if x["name"] == name), None) for scores in rows[column]]
            for column in ("base_rewards", "rewards")
        ]
        if settings["use"] == "report":
            line(f"held out: {name}", *values)
        elif len([r for r in rewards.values() if r["use"] == "select"]) > 1:
            line(f"  of it {name}", *values)
    line("base-model NLL / token", rows["base_nll"], rows["nll"])
    if quarantined := sum(rows["quarantined"]):
        out.append(f"{quarantined} candidates without a finite reward were set aside")
    return out


def _example(data: ds.Dataset, rows: dict[str, list[Any]]) -> list[str]:
    """The row of median gain: neither the luckiest nor the worst."""
    gains = [
        (s - b, i) for i, (s, b) in enumerate(zip(rows["reward"], rows["base_reward"], strict=True)) if b is not None
    ]
    place = sorted(gains)[len(gains) // 2][1] if gains else 0
    wanted = ["prompt", "completion", "base_completion", "reward", "base_reward"]
    row = data.take([place], columns=wanted).to_pylist()[0]
    base = "none" if row["base_reward"] is None else f"{row['base_reward']:.3f}"
    return [
        "",
        f"prompt    {words(row['prompt'])}",
        f"base      {words(row['base_completion'])}   [{base}]",
        f"selected  {words(row['completion'])}   [{row['reward']:.3f}]",
        "",
    ]


def words(content: Any, limit: int = 400) -> str:
    """A prompt or completion in one line; chats by their last turn."""
    said = content if isinstance(content, str) else content[-1]["content"]
    line = " ".join(said.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
