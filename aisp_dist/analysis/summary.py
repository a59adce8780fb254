"""What a finished output says, in a screenful: counts, rewards with intervals, fluency, signs of reward hacking, an
example."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from aisp_dist.analysis import guard
from aisp_dist.analysis.metrics import interval
from aisp_dist.config import Guard
from aisp_dist.output import manifest
from aisp_dist.output.filesystem import Place
from aisp_dist.output.schema import MISFITS, ColumnType

_COLUMNS = ("reward", "base_reward", "rewards", "base_rewards", "nll", "base_nll", "quarantined", "samples_spent")
_TALLIED = ["completion", "base_completion", "finish_reason", "reward", "base_reward", "num_tokens", "base_num_tokens"]
_TALLIED += ["rewards", "base_rewards"]


def text(output: Place, seconds: float, samples: int, bounds: Guard | None = None) -> str:
    """The summary of an output. seconds, samples: of the command that has just ended, for its speed. bounds: in place
    of those in run.json."""
    run = manifest.read_run(output)
    if run is None:
        raise FileNotFoundError(f"{output} holds no run.json")
    failed = output.dataset("failed").count_rows() if output.names("failed") else 0
    data = output.dataset("data")
    rows = data.to_table(columns=list(_COLUMNS))
    out = ["", f"{rows.num_rows} rows done, {failed} failed, in {output}"]
    if not rows.num_rows + failed:
        out.append("the input is empty, and so is the table")
    if rows.num_rows:
        out += _rewards(rows, run["config"]["rewards"])
        out += _search(rows, run)
        out += _guard(data, run["config"], bounds)
    out += _misfits(output, run.get("columns", {}))
    if rows.num_rows:
        out += _example(data, rows)
    if seconds and samples:
        out.append(f"{samples} samples in {seconds:.0f} s, {samples / seconds:.0f} samples/s")
    out.append(f"rows: {output}/data" + (f"   failed: {output}/failed" if failed else ""))
    return "\n".join(out)


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """fp64 values, nan for null."""
    values: np.ndarray = column.to_numpy().astype(np.float64)
    return values


def _by_name(column: pa.ChunkedArray) -> dict[str, np.ndarray]:
    """Raw scores by reward name; every row lists all names in one order."""
    scores = column.combine_chunks().flatten()
    names = [score["name"] for score in column[0].as_py()]
    values = _numbers(pa.chunked_array([scores.field("value")])).reshape(-1, len(names))
    return dict(zip(names, values.T, strict=True))


def _rewards(rows: pa.Table, rewards: dict[str, Any]) -> list[str]:
    out = [f"{'':24}{'base':>28}{'selected':>28}{'difference':>28}"]

    def line(name: str, base: np.ndarray, best: np.ndarray) -> None:
        both = np.isfinite(base) & np.isfinite(best)
        if both.any():
            cells = (interval(base[both]), interval(best[both]), interval((best - base)[both]))
            out.append(f"{name:24}" + "".join(f"{cell!s:>28}" for cell in cells))

    line("reward", _numbers(rows["base_reward"]), _numbers(rows["reward"]))
    base, best = _by_name(rows["base_rewards"]), _by_name(rows["rewards"])
    selecting = [name for name, settings in rewards.items() if settings["use"] == "select"]
    for name in rewards:
        if name not in selecting:
            line(f"held out: {name}", base[name], best[name])
        elif len(selecting) > 1:
            line(f"  of it {name}", base[name], best[name])
    nll = _numbers(rows["nll"])
    line("base-model NLL / token", _numbers(rows["base_nll"]), nll)
    if unknown := int(np.isnan(nll).sum()):
        out.append(
            f"{unknown} rows without NLL: rescoring has selected another answer, which the base model has not read"
        )
    if quarantined := int(_numbers(rows["quarantined"]).sum()):
        out.append(f"{quarantined} candidates without a finite reward were set aside")
    return out


def _search(rows: pa.Table, run: dict[str, Any]) -> list[str]:
    out = []
    method = run["config"].get("method", {})
    if spend := method.get("spend"):
        most = method["num_samples"] * (spend["max_iterations"] or method["num_iterations"])
        out.append(f"samples spent: mean {_numbers(rows['samples_spent']).mean():.1f} of {most} a prompt")
    if old := run.get("rescored"):
        out.append(
            f"rescored: selected among the {old['candidates']} kept of {old['samples']} candidates of {old['output']}"
        )
    return out


def tally(data: ds.Dataset, config: dict[str, Any]) -> guard.Tally:
    """The accumulator of guard.py over all rows of data/, a batch at a time."""
    found = guard.Tally(tuple(name for name, reward in config["rewards"].items() if reward["use"] == "report"))
    for batch in data.to_batches(columns=_TALLIED):
        for row in batch.to_pylist():
            said = row["completion"] if isinstance(row["completion"], str) else row["completion"][-1]["content"]
            scores = [[(s["name"], s["value"]) for s in row[column]] for column in ("rewards", "base_rewards")]
            found.add(
                (said, row["base_completion"]),
                row["finish_reason"],
                (row["reward"], row["base_reward"]),
                (row["num_tokens"], row["base_num_tokens"]),
                (scores[0], scores[1]),
            )
    return found


def _misfits(output: Place, columns: dict[str, ColumnType]) -> list[str]:
    """Kept values that the rows hold as JSON text, since they do not fit their column."""
    found: Counter[str] = Counter()
    for table in ("data", "failed") if MISFITS in columns else ():
        if output.names(table):
            for batch in output.dataset(table).to_batches(columns=[MISFITS]):
                found.update(batch[MISFITS].flatten().field("name").to_pylist())
    return [
        f"kept column {name}: {count} values are not {columns[name]} and are null there; {MISFITS} holds them"
        for name, count in found.items()
    ]


def _guard(data: ds.Dataset, config: dict[str, Any], bounds: Guard | None) -> list[str]:
    found = tally(data, config).measures()
    bounds = bounds or Guard.model_validate(config.get("guard", {}))
    return [str(found), *(f"warning: {what}" for what in guard.broken(bounds, found))]


def _example(data: ds.Dataset, rows: pa.Table) -> list[str]:
    """The row of median gain: neither the luckiest nor the worst."""
    gains = _numbers(rows["reward"]) - _numbers(rows["base_reward"])
    place = int(np.argsort(gains, kind="stable")[np.isfinite(gains).sum() // 2])  # nan sorts last
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
