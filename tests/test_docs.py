"""What README.md and docs/ say must be so."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import texts
import yaml

from aisp_dist.analysis.compare import Arm, Comparison
from aisp_dist.analysis.metrics import Interval
from aisp_dist.config import load
from aisp_dist.output import schema
from jobs import cli
from tests.bench import figures

ROOT = texts.ROOT
WHOLE = {path.relative_to(ROOT).as_posix(): path.read_text() for path in texts.TEXTS}
TEXTS = {name: texts.BLOCK.sub("", text) for name, text in WHOLE.items()}  # as written by hand
README, OUTPUT = TEXTS["README.md"], TEXTS["docs/output.md"]


def fenced(language: str) -> list[tuple[str, str]]:
    """Every code block of a language, with its text's name."""
    found = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(name, block) for name, text in TEXTS.items() for block in found.findall(text)]


def commands() -> list[str]:
    """Every shell command, of code blocks and in the running text."""
    lines = [line.partition(" #")[0] for _, block in fenced("bash") for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    inline = [code for text in TEXTS.values() for code in re.findall(r"`((?:aisp|python) [^`]+)`", text)]
    return list(dict.fromkeys([part for part in parts if part] + [" ".join(code.split()) for code in inline]))


AISP = [words[1:] for words in map(shlex.split, commands()) if words[0].rpartition("/")[2] == "aisp"]


def test_the_readme_is_short():
    assert len(WHOLE["README.md"].splitlines()) <= 150


def test_ci_finds_the_test_line():
    """.ci/run takes the lines between the mark and the end of the block."""
    assert re.search(r"^<!-- test line -->\n```bash\n.* -m pytest\n```$", README, re.MULTILINE)


def test_generated_parts_are_up_to_date():
    """Run `python -m tests.texts` where they are not."""
    made = texts.blocks()
    found = [block for text in WHOLE.values() for block in texts.BLOCK.findall(text)]
    assert sorted(name for name, _ in found) == sorted(made), "each generated part stands in one text, once"
    assert [name for name, text in found if text != f"{made[name]}\n"] == [], "run: python -m tests.texts"


def test_a_comparison_can_be_recorded(tmp_path):
    cell = Interval(1.0, 0.5, 1.5)
    known = {"prompts": 24, "reward": cell, "versus": cell, "won": 0.5, "nll": cell, "nll_versus": cell}
    known |= {"diversity": cell, "num_tokens": 20.0, "held_out": {"judge": cell}, "held_out_versus": {"judge": cell}}
    known |= {"std": None, "auc": None, "seconds": None}
    base = Arm(name="base", samples=1.0, model_tokens=None, reward_calls=None, **known)
    main = Arm(name="aisp", samples=128.0, model_tokens=3907.6, reward_calls=128.0, **known)
    (tmp_path / "demo").mkdir()
    result = Comparison("aisp", (base, main), None, 0)
    (tmp_path / "demo" / "comparison.json").write_text(json.dumps(result.json()))
    about = {"command": "aisp compare", "commit": "c", "date": "d", "hardware": "h"}
    lines = figures.markdown(about | {"tables": figures.mini(tmp_path)}).splitlines()
    cell = "1.00 [0.50, 1.50]"
    assert lines[4] == f"| base | 1 | {cell} | {cell} | {cell} | {cell} | 1.00 |  |  |"
    assert lines[5] == f"| aisp | 128 | {cell} |  | {cell} | {cell} | 1.00 | 3,908 | 128 |"


def test_a_protocol_on_a_real_model_can_be_recorded(tmp_path):
    """A table of a task, at equal samples; the greedy answer stands once, and best-of-n beside itself nowhere."""
    measures = ("reward", "strict", "nll", "diversity", "copied")
    measured = {m: [1.0, 0.5, 1.5] for m in measures} | {f"{m}, less best-of-n": [0.25, 0.0, 0.5] for m in measures}
    rows = [
        {"task": "ifeval", "equal": equal, "budget": n, "arm": arm, "prompts": 24, "mean samples": spent} | measured
        for equal in ("samples", "tokens")
        for n in (8, 64)
        for arm, spent in (("greedy", 1.0), ("best-of-n", float(n)), ("qalign", float(n)))
    ]
    (tmp_path / "report.json").write_text(json.dumps([row | {"mean tokens": 59.6} for row in rows]))
    (table,) = figures.real_model(tmp_path)
    one, beside = [1.0, 0.5, 1.5], [0.25, 0.0, 0.5]
    shown = [["greedy", 1], ["best-of-n", 64], ["qalign", 64]]
    assert table["title"] == "ifeval, 24 prompts" and [row[:2] for row in table["rows"]] == shown
    assert table["rows"][1] == ["best-of-n", 64, one, None, one, one, None, one, None, one, 60]
    assert table["rows"][2] == ["qalign", 64, one, beside, one, one, beside, one, beside, one, 60]


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXTS[name]) if not link.startswith("http")]
    for link in links:
        file, _, anchor = link.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text()), link


def anchors(text: str) -> set[str]:
    """As GitHub makes them of the headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_files_and_functions_that_are_named_exist(name):
    files = re.findall(r"`((?:aisp_dist|actors|jobs|configs|tests)/[\w./-]*)(?::([\w.]+))?`", TEXTS[name])
    for file, function in files:
        assert (ROOT / file).exists(), file
        for part in filter(None, function.split(".")):
            assert re.search(rf"\b(?:def|class) {part}\b|^{part}\b", (ROOT / file).read_text(), re.M), (file, function)


@pytest.mark.parametrize("words", AISP, ids=" ".join)
def test_a_command_and_its_flags_exist(words):
    verb, *rest = words
    assert verb in cli.VERBS
    what = [rest[0]] if verb == "bench" else []
    page = io.StringIO()
    with contextlib.redirect_stdout(page), pytest.raises(SystemExit) as ended:
        cli.run(verb, [*what, "--help"])
    assert not ended.value.code
    flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
    assert [flag for flag in flags if not re.search(rf"{flag}\b", page.getvalue())] == []


def test_programs_that_are_named_exist():
    programs = [words for words in map(shlex.split, commands()) if words[0].startswith("python")]
    assert programs
    for words in programs:
        if words[1] == "-m":
            assert words[2] == "venv" or importlib.util.find_spec(words[2]), words
        else:
            assert (ROOT / words[1]).is_file(), words


@pytest.mark.parametrize(("name", "block"), fenced("yaml"))
def test_a_configuration_is_valid(name, block):
    load.check(yaml.safe_load(block))


@pytest.mark.parametrize(("name", "block"), fenced("python"))
def test_python_compiles(name, block):
    compile(block, name, "exec")


def test_the_python_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = {"output": "unused", "prompts": {"source": "demo", "limit": 2}, "generator": {"model": "demo"}}
    run |= {"rewards": {"main": {"kind": "model", "model": "demo"}}}
    run |= {"method": {"kind": "best_of_n", "num_samples": 2, "num_iterations": 1}}
    Path("run.yaml").write_text(yaml.safe_dump(run))
    (example,) = (block for name, block in fenced("python") if "aisp_dist.relabel" in block)
    names: dict[str, Any] = {}
    exec(example, names)
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert [row["prompt"][0]["content"] for row in names["rows"]] == ["How do I save money?", "What is a bicycle for?"]
    assert all(row["reward"] is not None for row in names["rows"])
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def columns(text: str) -> set[str]:
    """Names in the first column of a text's table of columns."""
    rows = text.split("| column | |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])} - {"keep"}


def test_columns_are_those_of_the_table():
    data = set(schema.schemas("chat", {}).data.names)
    assert columns(OUTPUT) == data
    assert columns(README) <= data
