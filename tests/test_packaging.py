"""What is shipped: the wheel holds the three packages alone, and configs/ holds configurations alone."""

from __future__ import annotations

import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_wheel_holds_the_three_packages_alone():
    assert PYPROJECT["tool"]["hatch"]["build"] == {"targets": {"wheel": {"packages": ["aisp_dist", "actors", "jobs"]}}}


def test_configs_holds_configurations_and_the_functions_they_name():
    """A Python file is there only beside a configuration that names it as a reward."""
    named = set()
    for file in (ROOT / "configs").rglob("*.y*ml"):
        for part in yaml.safe_load_all(file.read_text()):
            named |= {file.parent / name.partition(":")[0] for name in functions(part)}
    found = [p for p in (ROOT / "configs").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    programs = {p for p in found if p.suffix not in (".yaml", ".yml", ".json", ".jsonl") and p.name != "Dockerfile"}
    assert programs == named


def functions(value) -> set[str]:
    """Everything that a configuration gives for a key `function`."""
    if isinstance(value, list):
        return set().union(*map(functions, value))
    if not isinstance(value, dict):
        return set()
    own = {value["function"]} if isinstance(value.get("function"), str) else set()
    return own.union(*map(functions, value.values()))
