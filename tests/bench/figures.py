"""The README's measured parts, from files: `record` keeps figures and writes them into the README, `picture` draws a
command's output as an SVG.

    python tests/bench/figures.py record mini outputs/mini/compare "aisp compare configs/paper/mini.yaml"
    python tests/bench/figures.py record auto outputs/auto "python tests/bench/population/measure.py ..."
    python tests/bench/figures.py record students outputs/distill "python tests/bench/distill/proof.py"
    aisp align configs/quickstart.yaml | python tests/bench/figures.py picture
"""

import datetime
import io
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
README, FIGURES = HERE.parent.parent / "README.md", HERE / "figures.json"


def mini(folder: Path) -> dict:
    return {case.name: json.loads((case / "comparison.json").read_text()) for case in sorted(folder.iterdir())}


def mini_table(cases: dict) -> list[str]:
    out = []
    for name, case in cases.items():
        (held_out,) = {n for arm in case["arms"] for n in arm["held_out"]}
        heads = [name, "samples", "reward", "AISP minus it", f"held-out {held_out}", "NLL / token", "diversity"]
        heads += ["tokens drawn", "reward calls"]
        out += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for arm in case["arms"]:
            versus = "" if arm["name"] == case["main"] else interval(arm["versus"])
            costs = ["" if arm[n] is None else f"{arm[n]:,.0f}" for n in ("model_tokens", "reward_calls")]
            cells = [arm["name"], f"{arm['samples']:g}", interval(arm["reward"]), versus]
            cells += [interval(arm["held_out"][held_out]), interval(arm["nll"]), f"{arm['diversity'][0]:.2f}", *costs]
            out.append("| " + " | ".join(cells) + " |")
        out.append("")
    return out[:-1]


def students(folder: Path) -> list:
    return json.loads((folder / "students.json").read_text())["rows"]


def students_table(rows: list) -> list[str]:
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [v if isinstance(v, str) else interval(v) if isinstance(v, list) else f"{v:.2f}" for v in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


SHOWN = (128, 512)  # samples whose rows are whole; of the others the curve has the reward


def auto(folder: Path) -> list:
    rows = json.loads((folder / "table.json").read_text())
    kept = []
    for row in rows:
        names = [
            n for n in row if n != "method" and (row["samples"] in SHOWN or n in ("case", "arm", "samples", "reward"))
        ]
        kept.append({n: [round(x, 4) for x in row[n]] if isinstance(row[n], list) else row[n] for n in names})
    return kept


def auto_table(rows: list) -> list[str]:
    peer, out = "less best-of-512", []
    for case in dict.fromkeys(row["case"] for row in rows):
        heads = [case, "samples", "seeds", "reward", peer, "held-out", "NLL / token", peer, "diversity", peer]
        out += ["| " + " | ".join([*heads, "tokens drawn"]) + " |", "|---" * 11 + "|"]
        for row in rows:
            own = row["case"] == case and row["samples"] in (SHOWN if "shuffled" not in row["arm"] else SHOWN[1:])
            if own:
                cells = [row["arm"], f"{row['samples']}", f"{row['seeds']}"]
                for name in ("reward", "held-out", "nll", "diversity"):
                    cells.append(f"{row[name][0]:.2f}" if name != "reward" else interval(row[name]))
                    cells += [] if name == "held-out" else [interval(row[f"{name}, {peer}"])]
                out.append("| " + " | ".join([*cells, f"{row['drawn'][0]:,.0f}"]) + " |")
        out.append("")
    sizes = sorted({row["samples"] for row in rows})
    out += ["| reward at samples | " + " | ".join(map(str, sizes)) + " |", "|---" * (1 + len(sizes)) + "|"]
    for case, arm in dict.fromkeys((row["case"], row["arm"]) for row in rows):
        values = {row["samples"]: row["reward"][0] for row in rows if (row["case"], row["arm"]) == (case, arm)}
        out.append(f"| {case}: {arm} | " + " | ".join(f"{values[size]:.2f}" for size in sizes) + " |")
    return out


PARTS = {"auto": (auto, auto_table), "mini": (mini, mini_table), "students": (students, students_table)}


def interval(values: list) -> str:
    mean, low, high = values
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def marks(part: str) -> tuple[str, str]:
    return f"<!-- measured: {part} -->", f"<!-- end of {part} -->"


def table(part: str, kept: dict) -> str:
    where = f"`{kept['command']}`, commit {kept['commit']}, {kept['date']}, {kept['hardware']}."
    where += " In brackets: 95 % bootstrap intervals over prompts."
    return "\n".join([*PARTS[part][1](kept["figures"]), "", where])


def record(part: str, folder: Path, command: str) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    figures[part] = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": commit.strip(),
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU",
        "figures": PARTS[part][0](folder),
    }
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    write()


def write() -> None:
    text = README.read_text()
    for part, kept in json.loads(FIGURES.read_text()).items():
        begin, end = marks(part)
        before, rest = text.split(begin)
        text = before + begin + "\n" + table(part, kept) + "\n" + end + rest.split(end)[1]
    README.write_text(text)


def picture() -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=112, file=io.StringIO())
    console.print(Text("$ aisp align configs/quickstart.yaml", style="bold"))
    for line in sys.stdin:
        console.print(Text(line.rstrip("\n")))
    (HERE.parent.parent / ".github" / "quickstart.svg").write_text(console.export_svg(title="aisp-dist"))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["record", part, folder, command] if part in PARTS:
            record(part, Path(folder).resolve(), command)
        case ["table"]:
            write()
        case ["picture"]:
            picture()
        case _:
            sys.exit(__doc__)
