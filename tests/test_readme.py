"""What the README says must be so."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import yaml

from jobs import cli, settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_measured_tables_are_those_of_the_committed_figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "tests" / "bench" / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    kept = json.loads(figures.FIGURES.read_text())
    assert set(kept) == set(figures.PARTS)
    for part in kept:
        begin, end = figures.marks(part)
        assert README.split(begin)[1].split(end)[0].strip() == figures.table(part, kept[part])


def test_every_file_it_names_exists():
    names = re.findall(r"\]\((?!http)([^)]+)\)", README) + re.findall(
        r"`((?:aisp_dist|actors|jobs|configs)/[\w./-]*)`", README
    )
    assert names and not [name for name in names if not (ROOT / name).exists()]


def test_every_command_it_shows_exists():
    verbs = set(re.findall(r"^(?:\S*/)?aisp ([\w-]+)", README, re.M)) | set(re.findall(r"`aisp ([\w-]+)", README))
    assert verbs and verbs <= set(cli.VERBS)


def test_its_configuration_is_valid():
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    settings.check(yaml.safe_load(block))


def test_its_columns_are_those_of_the_table():
    import pyarrow as pa

    from aisp_dist.output import schema

    table = README.split("| column | |")[1].split("\n\n")[0]
    data: pa.Schema = schema.schemas("chat", {}).data
    assert set(re.findall(r"`(\w+)`", table)) - {"keep", "format", "finish_reason"} == set(data.names) - {
        "finish_reason"
    }
