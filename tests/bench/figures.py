"""The measured tables of README.md and docs/: kept in figures.json, from the files that a measurement leaves.

    python -m tests.bench.figures record mini outputs/mini/compare "aisp compare configs/paper/mini.yaml"
    python -m tests.bench.figures record population outputs/population "python -m tests.bench.population.measure ..."
    python -m tests.bench.figures record real_model outputs/real_model "python -m tests.bench.real_model ..."
    python -m tests.bench.figures record shp outputs/shp "python -m tests.bench.real_model ... --task shp ..."
    python -m tests.bench.figures record sensitivity outputs/real_model "python -m tests.bench.real_model ..."
    python -m tests.bench.figures record real_students outputs/real_model "python -m tests.bench.real_model.student ..."
    python -m tests.bench.figures record students outputs/distill "python -m tests.bench.distill.proof"
    python -m tests.bench.figures record run outputs/bench "aisp bench run configs/smollm2/quick.yaml ..."
    aisp align configs/quickstart.yaml | python -m tests.bench.figures picture

A note may follow the command. `python -m tests.texts` then writes them into the texts. `picture` draws what a command
prints as .github/quickstart.svg.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FIGURES = HERE / "figures.json"
PICTURE = HERE.parent.parent / ".github" / "quickstart.svg"
PEER = "less best-of-512"  # the paired difference to best-of-n with 512 samples
CHOICE = ("best-of-n top-p", "aisp", "population")  # the arms of the README's table
SHOWN = (16, 32, 64)  # samples a prompt of the real model's table
WHOLE = (128, 512)  # samples a prompt whose rows are shown whole; the curve has the reward at the others

Cell = str | float | list[float] | None  # a list: mean and both ends of its interval
Table = dict[str, Any]  # title, columns, rows of cells


def mini(folder: Path) -> list[Table]:
    """From `aisp compare`: a table for each case."""
    cases = sorted(folder.iterdir())
    return [_comparison(case.name, json.loads((case / "comparison.json").read_text())) for case in cases]


def _comparison(title: str, case: dict[str, Any]) -> Table:
    (held_out,) = {name for arm in case["arms"] for name in arm["held_out"]}
    columns = ["method", "samples", "reward", f"{case['main']} minus it", f"held out: {held_out}"]
    columns += ["NLL per token", "diversity", "tokens drawn", "reward calls"]
    rows = []
    for arm in case["arms"]:
        versus = None if arm["name"] == case["main"] else arm["versus"]
        costs = [None if arm[name] is None else round(arm[name]) for name in ("model_tokens", "reward_calls")]
        measured = [arm["held_out"][held_out], arm["nll"], arm["diversity"][0]]
        rows.append([arm["name"], round(arm["samples"]), arm["reward"], versus, *measured, *costs])
    return {"title": title, "columns": columns, "rows": rows}


def population(folder: Path) -> list[Table]:
    """From tests/bench/population/measure.py: a table for each case, and the reward at every number of samples."""
    found = json.loads((folder / "table.json").read_text())
    columns = ["method", "samples", "seeds", "reward", PEER, "held-out reward", "NLL per token", PEER]
    columns += ["diversity", PEER, "tokens drawn"]
    tables = []
    for case in dict.fromkeys(row["case"] for row in found):
        rows = []
        for row in found:
            if row["case"] == case and row["samples"] in (WHOLE[1:] if "shuffled" in row["arm"] else WHOLE):
                measured = [row["reward"], row[f"reward, {PEER}"], row["held-out"], row["nll"], row[f"nll, {PEER}"]]
                measured += [row["diversity"], row[f"diversity, {PEER}"], round(row["drawn"][0])]
                rows.append([row["arm"], row["samples"], row["seeds"], *measured])
        tables.append({"title": case, "columns": columns, "rows": rows})
    sizes = sorted({row["samples"] for row in found})
    curves: dict[str, dict[int, float]] = {}
    for row in found:
        curves.setdefault(f"{row['case']}: {row['arm']}", {})[row["samples"]] = row["reward"][0]
    rows = [[name, *(curve[size] for size in sizes)] for name, curve in curves.items()]
    return [*tables, {"title": "reward at so many samples", "columns": ["method", *map(str, sizes)], "rows": rows}]


def real_model(folder: Path, file: str = "report.json") -> list[Table]:
    """From tests/bench/real_model: a table for each task, at equal samples. The greedy answer has one."""
    found = [row for row in json.loads((folder / file).read_text()) if row["equal"] == "samples"]
    tables = []
    for task in dict.fromkeys(row["task"] for row in found):
        of = [row for row in found if row["task"] == task]
        other = _OTHER[task]  # what this task alone measures, beside the rewards
        columns = ["method", "samples", "reward", "less best-of-n", other[1], "NLL per token"]
        columns += ["less best-of-n", "diversity", "less best-of-n", "copied", "tokens drawn"]
        rows = []
        for row in of:
            samples = round(row["mean samples"])
            if samples in SHOWN or (samples == 1 and row["budget"] == max(r["budget"] for r in of)):
                reward, nll, diversity = (_beside(row, measure) for measure in ("reward", "nll", "diversity"))
                measured = [*reward, row[other[0]], *nll, *diversity]
                rows.append([row["arm"], samples, *measured, row["copied"], round(row["mean tokens"])])
        tables.append(
            {"title": f"{task}, {min(row['prompts'] for row in of)} prompts", "columns": columns, "rows": rows}
        )
    return tables


_OTHER = {"ifeval": ("strict", "all instructions followed"), "shp": ("lexicon", "VADER's score")}


def _beside(row: dict[str, Any], measure: str) -> list[Cell]:
    """Its mean and its paired difference from best-of-n."""
    return [row[measure], None if row["arm"] == "best-of-n" else row[f"{measure}, less best-of-n"]]


def sensitivity(folder: Path) -> list[Table]:
    """From tests/bench/real_model: AISP over its settings, on tuning prompts."""
    return real_model(folder, "sensitivity.json")


def students(folder: Path) -> list[Table]:
    """From tests/bench/distill/proof.py or tests/bench/real_model/student.py."""
    rows = json.loads((folder / "students.json").read_text())["rows"]
    return [{"title": "", "columns": list(rows[0]), "rows": [list(row.values()) for row in rows]}]


def run(folder: Path) -> list[Table]:
    """From documents of `aisp bench run`, one a method. A spread over repetitions is text: median (least to most)."""
    rows: list[list[Cell]] = []
    shares: list[list[Cell]] = []
    for document in (json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))):
        for name, one in document["contenders"].items():
            ratios = [_spread(one[key]) if key in one else None for key in ("ratio", "cpu_ratio")]
            reward = sum(one["mean_reward"]) / len(one["mean_reward"])
            rate = f"{one['tokens_per_second']['median']:.0f}"
            rows.append([document["method"], document["prompts"], name, rate, *ratios, reward])
        parts = {name.removeprefix("generator "): f"{share:.0%}" for name, share in document["time"].items()}
        shares.append([document["method"], document["prompts"], *(parts[part] for part in _SHARES)])
    columns = ["method", "prompts", "contender", "tokens/s", "ours over it", "in CPU seconds", "mean best reward"]
    return [
        {"title": "", "columns": columns, "rows": rows},
        {"title": "where a generator's time goes", "columns": ["method", "prompts", *_SHARES], "rows": shares},
    ]


_SHARES = ("busy", "prefill", "decoder", "control", "head", "draw", "likelihood", "record")


def _spread(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


PARTS: dict[str, Callable[[Path], list[Table]]] = {
    "mini": mini,
    "population": population,
    "real_model": real_model,
    "shp": real_model,
    "sensitivity": sensitivity,
    "real_students": students,
    "students": students,
    "run": run,
}


def blocks() -> dict[str, str]:
    """Every measured part as Markdown, by the name of its block in the texts."""
    kept = json.loads(FIGURES.read_text())
    choice = {**kept["population"], "tables": [_choice(kept["population"]["tables"])]}
    return {f"measured: {name}": markdown(part) for name, part in {**kept, "choice": choice}.items()}


def _choice(tables: Sequence[Table]) -> Table:
    """The README's table: the methods at the smaller number of samples, on every pair of model and reward."""
    shown = ["method", "reward", "NLL per token", "diversity"]
    rows: list[list[Cell]] = []
    for table in tables[:-1]:
        of = {row[0]: row for row in table["rows"] if row[table["columns"].index("samples")] == WHOLE[0]}
        rows += [[table["title"], *(of[arm][table["columns"].index(name)] for name in shown)] for arm in CHOICE]
    return {"title": "", "columns": ["model and reward", *shown], "rows": rows}


def markdown(part: dict[str, Any]) -> str:
    """A part's tables, and below them what a reader needs to judge and to repeat them."""
    told = f"`{part['command']}` at commit {part['commit']}, {part['date']}, {part['hardware']}."
    if any(isinstance(cell, list) for table in part["tables"] for row in table["rows"] for cell in row):
        told += " Brackets: 95 % bootstrap intervals over prompts."
    return "\n\n".join([*map(_table, part["tables"]), " ".join(filter(None, [told, part.get("note")]))])


def _table(table: Table) -> str:
    columns = table["columns"]
    lines = [f"**{table['title']}**", ""] if table["title"] else []
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in table["rows"])])


def _cell(value: Cell) -> str:
    match value:
        case None:
            return ""
        case str():
            return value
        case list():
            mean, low, high = value
            return f"{mean:.2f} [{low:.2f}, {high:.2f}]"
        case int():
            return f"{value:,}"
    return f"{value:.2f}"


def record(part: str, folder: Path, command: str, note: str = "") -> None:
    git = ["git", "rev-parse", "--short", "HEAD"]
    kept = json.loads(FIGURES.read_text())
    tables = PARTS[part](folder)
    for table in tables:
        table["rows"] = [[_rounded(value) for value in row] for row in table["rows"]]
    kept[part] = {
        "command": command,
        "commit": subprocess.run(git, capture_output=True, text=True, check=True, cwd=HERE).stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU",
        "tables": tables,
    } | ({"note": note} if note else {})
    FIGURES.write_text(json.dumps(kept, indent=1) + "\n")


def _rounded(value: Cell) -> Cell:
    if isinstance(value, list):
        return [round(number, 4) for number in value]
    return round(value, 4) if isinstance(value, float) else value


def picture() -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=112, file=io.StringIO())
    console.print(Text("$ aisp align configs/quickstart.yaml", style="bold"))
    for line in sys.stdin:
        console.print(Text(line.rstrip("\n")))
    PICTURE.write_text(console.export_svg(title="aisp-dist"))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["record", part, folder, command, *note] if part in PARTS and len(note) <= 1:
            record(part, Path(folder), command, *note)
        case ["picture"]:
            picture()
        case _:
            sys.exit(__doc__)
