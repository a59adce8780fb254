"""The summary at the end of a run: how many rows, what ran, rewards with intervals, fluency, signs of reward hacking
and an example. Reads only the tables."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from aisp_dist.analysis import guard, outputs
from aisp_dist.analysis.metrics import interval, repetition
from aisp_dist.analysis.outputs import Columns, Output
from aisp_dist.config import Guard
from aisp_dist.output.filesystem import Place
from aisp_dist.output.kept_columns import MISFITS


def read(place: Place) -> Columns:
    """What `text` and `tally` need of an output. Raises ConfigError where there is none."""
    return outputs.read(outputs.open_output(place), {"repetition": repetition})


def text(columns: Columns, seconds: float = 0.0, samples: int = 0, bounds: Guard | None = None) -> str:
    """seconds, samples: of the command that has just ended, for its speed. bounds: in place of those in run.json."""
    output, done, failed = columns.output, len(columns.rows), len(columns.failed)
    out = ["", f"{done} rows done, {failed} failed, in {output}", *(_reasons(output) if failed else [])]
    if not done + failed:
        out.append("the input is empty, so the table has no rows")
    if done:
        out += [*_rewards(columns), *_originals(columns), *_search(columns)]
        measures = tally(columns).measures()
        out += [str(measures), *(f"warning: {what}" for what in guard.broken(bounds or output.run.guard, measures))]
    out += _misfits(output)
    if done:
        out += _example(columns)
    if (engine := output.run.generator.engine) in ("vllm", "endpoint"):
        by = "vLLM" if engine == "vllm" else "a server"
        out.append(f"decoded by {by}: a row that is computed again may differ")
    if seconds and samples:
        out.append(f"{samples} samples in {seconds:.0f} s, {samples / seconds:.0f} samples/s")
    out.append(f"rows: {output}/data" + (f"   failed: {output}/failed" if failed else ""))
    return "\n".join(out)


def tally(columns: Columns) -> guard.Tally:
    """All done rows as the guard counts them."""
    found = guard.Tally(columns.output.held_out)
    selected, base, about = (columns.rows[side] for side in ("selected", "base", "about"))
    gains = selected - base
    scores = gains.reindex(columns=[f"reward {name}" for name in found.held_out]).to_numpy()
    rows = zip(
        about["finish_reason"], selected["repetition"], base["repetition"], gains["reward"], gains["tokens"], scores,
        strict=True,
    )  # fmt: skip
    for finish, ours, theirs, gain, longer, held_out in rows:
        found.add(finish, (ours, theirs), gain, longer, dict(zip(found.held_out, held_out, strict=True)))
    return found


def _reasons(output: Output, shown: int = 3) -> list[str]:
    """The most frequent reasons of failed rows."""
    batches = outputs.batches(output.place, "failed", ["reason"], 1 << 16)
    found = Counter(reason for batch in batches for reason in batch["reason"].to_pylist())
    most = found.most_common(shown)
    others = found.total() - sum(count for _, count in most)
    out = [f"  {count} failed: {one_line(reason)}" for reason, count in most]
    return out + [f"  {others} failed for other reasons, which their rows have"] * (others > 0)


def _rewards(columns: Columns) -> list[str]:
    ids = columns.rows.index
    out = _beside(columns, "base")
    if unknown := int(np.isnan(columns.values("nll", ids)).sum()):
        out.append(f"{unknown} rows without NLL: rescoring selected another answer, and the base model has not read it")
    if quarantined := int(columns.about("quarantined", ids).sum()):
        out.append(f"{quarantined} candidates without a finite reward were set aside")
    return out


def _originals(columns: Columns) -> list[str]:
    """Whether the selected answers are better than those that the dialogues came with."""
    if ("original", "reward") not in columns.rows:
        return []
    gains = (columns.rows["selected", "reward"] - columns.rows["original", "reward"]).dropna()
    if gains.empty:
        return ["no prompt came with an answer that has a reward"]
    better, equal = (gains > 0).mean(), (gains == 0).mean()
    found = (
        f"{len(gains)} prompts came with an answer: the selected one is better for {better:.1%}, equal for {equal:.1%}"
    )
    return [*_beside(columns, "original"), found]


def _beside(columns: Columns, side: str) -> list[str]:
    """A table of the answers of that side and the selected ones: means over the prompts that have both."""
    run, other, selected = columns.output.run, columns.rows[side], columns.rows["selected"]
    out = [f"{'':24}{side:>28}{'selected':>28}{'difference':>28}"]

    def line(name: str, measure: str) -> None:
        if measure in other and (both := np.isfinite(other[measure]) & np.isfinite(selected[measure])).any():
            before, after = other[measure][both].to_numpy(), selected[measure][both].to_numpy()
            cells = (interval(before), interval(after), interval(after - before))
            out.append(f"{name:24}" + "".join(f"{cell!s:>28}" for cell in cells))

    line("reward", "reward")
    for name, reward in run.rewards.items():
        if reward.use == "report":
            line(f"held out: {name}", f"reward {name}")
        elif len(run.rewards) - len(columns.output.held_out) > 1:
            line(f"  part {name}", f"reward {name}")
    line("base-model NLL / token", "nll")
    return out


def _search(columns: Columns) -> list[str]:
    output, method = columns.output, columns.output.run.method
    out = [f"method: {output.method_name}"]
    if method.spend:
        spent = columns.about("samples_spent", columns.rows.index).mean()
        out.append(f"samples spent: mean {spent:.1f} of {method.num_samples * output.most_iterations} a prompt")
    if old := output.record.get("rescored"):
        out.append(
            f"rescored: selected among the {old['candidates']} kept of {old['samples']} candidates of {old['output']}"
        )
    return out


def _misfits(output: Output) -> list[str]:
    """Kept values that the rows hold as JSON text, since they do not fit their column."""
    types = output.record.get("columns", {})
    found: Counter[str] = Counter()
    for table in ("data", "failed") if MISFITS in types else ():
        for batch in outputs.batches(output.place, table, [MISFITS], 1 << 16):
            found.update(score["name"] for score in batch[MISFITS].flatten().to_pylist())
    return [
        f"kept column {name}: {count} values are not {types[name]} and are null there; {MISFITS} holds them"
        for name, count in found.items()
    ]


def _example(columns: Columns) -> list[str]:
    """The row of median gain: neither the luckiest nor the worst."""
    ids = columns.rows.index
    gains = columns.values("reward", ids) - columns.values("reward", ids, base=True)
    place = int(np.argsort(gains, kind="stable")[np.isfinite(gains).sum() // 2])  # nan sorts last
    (row,) = outputs.rows(columns, [ids[place]], ["prompt", "completion", "base_completion", "reward", "base_reward"])
    base = "none" if row["base_reward"] is None else f"{row['base_reward']:.3f}"
    return [
        "",
        f"prompt    {one_line(row['prompt'])}",
        f"base      {one_line(row['base_completion'])}   [{base}]",
        f"selected  {one_line(row['completion'])}   [{row['reward']:.3f}]",
        "",
    ]


def one_line(content: Any, width: int = 400) -> str:
    """A prompt or completion in one line; of a chat its last turn."""
    line = " ".join(outputs.answer(content).split())
    return line if len(line) <= width else line[: width - 1] + "…"
