"""The README's measured parts, from files: `record` keeps a comparison, `table` writes it into the README, `picture`
draws a command's output as an SVG.

    aisp compare configs/quickstart.yaml --prompts 48 --seeds 3 --output OUT && python .github/figures.py record OUT
    aisp align configs/quickstart.yaml | python .github/figures.py picture
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
README, FIGURES = HERE.parent / "README.md", HERE / "figures.json"
BEGIN, END = "<!-- measured: .github/figures.json -->", "<!-- end of measured -->"


def table(figures: dict) -> str:
    arms = figures["comparison"]["arms"]
    held_out = list(arms[0]["held_out"])
    heads = [
        "",
        "samples",
        "reward",
        "AISP minus it",
        *(f"held-out {name}" for name in held_out),
        "NLL / token",
        "diversity",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for arm in arms:
        versus = "" if arm["name"] == "aisp" else interval(arm["versus"])
        cells = [arm["name"], f"{arm['samples']:g}", interval(arm["reward"]), versus]
        cells += [interval(arm["held_out"][name]) for name in held_out]
        lines.append("| " + " | ".join([*cells, interval(arm["nll"]), f"{arm['diversity'][0]:.2f}"]) + " |")
    where = (
        f"`{figures['command']}`, {arms[0]['prompts']} prompts, commit {figures['commit']}, {figures['date']}, "
        f"{figures['hardware']}. In brackets: 95 % bootstrap intervals over prompts."
    )
    return "\n".join([*lines, "", where])


def interval(values: list) -> str:
    mean, low, high = values
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def record(output: Path) -> None:
    run = json.loads((output / "compare" / "aisp" / "run.json").read_text())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout
    figures = {
        "command": "aisp compare "
        + " ".join(a for a in run["command"][1:] if str(output) not in a and a != "--output"),
        "date": datetime.date.today().isoformat(),
        "commit": commit.strip(),
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU",
        "versions": run["versions"],
        "comparison": json.loads((output / "compare" / "comparison.json").read_text()),
    }
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    write()


def write() -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    README.write_text(before + BEGIN + "\n" + table(json.loads(FIGURES.read_text())) + "\n" + END + rest.split(END)[1])


def picture() -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=112, file=io.StringIO())
    console.print(Text("$ aisp align configs/quickstart.yaml", style="bold"))
    for line in sys.stdin:
        console.print(Text(line.rstrip("\n")))
    (HERE / "quickstart.svg").write_text(console.export_svg(title="aisp-dist"))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["record", output]:
            record(Path(output).resolve())
        case ["table"]:
            write()
        case ["picture"]:
            picture()
        case _:
            sys.exit(__doc__)
