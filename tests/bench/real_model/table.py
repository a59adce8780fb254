"""From the lines that a run of the protocol leaves to its tables: means over prompts with 95 % bootstrap intervals, and
paired differences from best-of-n, at equal samples, tokens and seconds."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from aisp_dist.analysis.metrics import interval
from tests.bench.real_model.tasks import BEST

Record = dict[str, Any]
Arm = dict[tuple[str, int], Record]  # by prompt and seed
MEASURES = ("reward", "followed", "strict", "relevant", "copied", "alike", "lexicon", "nll", "diversity", "words")
GREEDY = "greedy"
EQUAL = ("samples", "tokens", "seconds")


def read(file: Path) -> list[Record]:
    """The whole lines of a file; one that was cut off when a run died is removed, so that the next line can follow."""
    if not file.exists():
        return []
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        file.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def best_trial(files: Iterable[Path]) -> int:
    """The setting with the largest mean reward over the prompts that all settings have; the first of equals. Raises
    ValueError where there is no such prompt."""
    files = list(files)
    found = [{r["id"]: r["best"][-1]["reward"] for r in read(file) if "failed" not in r} for file in files]
    shared = set.intersection(*(set(of) for of in found))
    if not shared:
        raise ValueError(f"{files[0].parent.parent}: no prompt has every setting; run --stage tune first")
    means = [sum(of[one] for one in sorted(shared)) / len(shared) for of in found]
    return means.index(max(means))


def finished(out: Path, task: str, name: str) -> int:
    return sum(len(read(file)) for file in (out / "report" / task / name).glob("*.jsonl"))


def arms(out: Path, task: str, stage: str = "report") -> dict[str, Arm]:
    found: dict[str, Arm] = {}
    for file in sorted((out / stage / task).glob("*/*.jsonl")):
        of = found.setdefault(file.parent.name, {})
        of |= {(r["id"], int(file.stem)): r for r in read(file) if "failed" not in r}
    return found


def whole(found: dict[str, Arm]) -> dict[str, Arm]:
    """The arms on the prompts and seeds that all of them have finished."""
    shared = set.intersection(*(set(of) for of in found.values())) if found else set()
    return {name: {key: of[key] for key in sorted(shared)} for name, of in found.items()}


def greedy(of: Arm) -> Arm:
    """The base answers of an arm's prompts, as an arm of one sample."""
    made = {}
    for key, record in of.items():
        base = record["base"]
        one = {"best": [base | {"at": 0}], "drawn": [base["tokens"]], "rewards": [base["reward"]], "seconds": [0.0]}
        made[key] = record | one
    return made


def spent(record: Record, equal: str, limit: float) -> int:
    """How many samples an arm has drawn within a limit of samples, generated tokens or seconds: at least one, and of
    seconds the first iteration."""
    if equal == "samples":
        return min(int(limit), len(record["rewards"]))
    if equal == "tokens":
        return max(1, bisect_right(list(accumulate(record["drawn"])), limit))
    return max(record["seconds"].count(record["seconds"][0]), bisect_right(record["seconds"], limit))


def best(record: Record, samples: int) -> Record:
    """The best answer of the first samples."""
    found: Record = next((b for b in reversed(record["best"]) if b["at"] < samples), record["base"])
    return found


def cost(record: Record, equal: str, samples: int) -> float:
    """What an arm spent on its first samples."""
    if equal == "samples":
        return float(samples)
    return float(sum(record["drawn"][:samples]) if equal == "tokens" else record["seconds"][samples - 1])


def rows(task: str, found: dict[str, Arm], budgets: Iterable[int]) -> Iterator[Record]:
    """A row for each arm, budget and kind of equality: what best-of-n spent on a prompt with so many samples is what
    each arm may spend on it. Prompts are those that the arm and best-of-n both have."""
    peer = found[BEST]
    found = {GREEDY: greedy(peer)} | found
    for equal in EQUAL:
        for budget in budgets if equal == "samples" else list(budgets)[:-1]:  # no arm has more than the last
            for name, arm in found.items():
                shared = sorted(arm.keys() & peer.keys())
                if equal == "seconds":
                    shared = [key for key in shared if arm[key]["together"] == peer[key]["together"] == 1]
                if not shared:
                    continue
                limits = [cost(peer[key], equal, budget) for key in shared]
                used = [spent(arm[key], equal, limit) for key, limit in zip(shared, limits, strict=True)]
                mine = [best(arm[key], n) for key, n in zip(shared, used, strict=True)]
                other = [best(peer[key], budget) for key in shared]
                row: Record = {"task": task, "equal": equal, "budget": budget, "arm": name}
                row |= {"prompts": len({one for one, _ in shared}), "seeds": len({seed for _, seed in shared})}
                row |= _spending([(arm[key], n) for key, n in zip(shared, used, strict=True)])
                for measure in (m for m in MEASURES if m in mine[0]):
                    ids = [one for one, _ in shared]
                    row[measure] = interval(_by_prompt(ids, mine, lambda a, _, m=measure: a[m], other))
                    row[f"{measure}, less {BEST}"] = interval(
                        _by_prompt(ids, mine, lambda a, b, m=measure: a[m] - b[m], other)
                    )
                yield row


def _by_prompt(
    ids: list[str], mine: list[Record], value: Callable[[Record, Record], float], other: list[Record]
) -> list[float]:
    """The mean over seeds for each prompt: prompts are what an interval is over."""
    values: dict[str, list[float]] = {}
    for one, a, b in zip(ids, mine, other, strict=True):
        values.setdefault(one, []).append(value(a, b))
    return [sum(of) / len(of) for of in values.values()]


def _spending(of: list[tuple[Record, int]]) -> Record:
    whole = [(n, sum(r["drawn"][:n]), r["seconds"][n - 1]) for r, n in of]
    return {
        f"mean {name}": sum(column) / len(column) for name, column in zip(EQUAL, zip(*whole, strict=True), strict=True)
    }


def tables(out: Path, samples: int, stage: str, names: Collection[str]) -> list[Record]:
    """The rows of a stage. names: the arms of the report; an arm without a line yet is left out."""
    budgets = [n for n in (8, 16, 32, 64, 128, 256) if n <= samples] if stage == "report" else [samples]
    rows_of = []
    for task in sorted((out / stage).glob("*")):
        found = arms(out, task.name, stage)
        found = whole({name: of for name, of in found.items() if stage != "report" or name in names})
        if BEST in found:
            rows_of += list(rows(task.name, found, budgets))
    return rows_of


def markdown(found: list[Record]) -> str:
    """The rows as tables of two figures each: the mean, and the paired difference from best-of-n."""
    lines: list[str] = []
    for key in dict.fromkeys((row["task"], row["equal"], row["budget"]) for row in found):
        of = [row for row in found if (row["task"], row["equal"], row["budget"]) == key]
        names = [measure for measure in MEASURES if measure in of[0]]
        lines += ["", f"{key[0]}, at the {key[1]} of {BEST} with {key[2]} samples", ""]
        lines += ["| " + " | ".join(["arm", "prompts", *(f"mean {e}" for e in EQUAL), *names]) + " |"]
        lines += ["|" + "---|" * (2 + len(EQUAL) + len(names))]
        for row in of:
            cells = [row["arm"], f"{row['prompts']} x {row['seeds']}", *(f"{row[f'mean {e}']:.1f}" for e in EQUAL)]
            for name in names:
                mean, low, high = row[f"{name}, less {BEST}"]
                cells.append(f"{row[name][0]:.3f} ({mean:+.3f} [{low:+.3f}, {high:+.3f}])")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
