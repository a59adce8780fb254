"""The files beside the tables: run.json (configuration, fingerprint, versions), config.yaml, and README.md, the dataset
card by which `datasets.load_dataset(directory, name)` finds the tables. Knows no rows."""

from __future__ import annotations

import json
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from aisp_dist.config import ConfigError, Method, Section
from aisp_dist.output.filesystem import Place

TABLES = {"default": "data", "failed": "failed", "candidates": "candidates"}  # load_dataset name: directory
_METHOD: TypeAdapter[Any] = TypeAdapter(Method)
_ABOUT = """
# Relabelled prompts

Written by aisp-dist. Method: `{method}`. Everything else is in `run.json` and `config.yaml`.

| table | holds |
|---|---|
| `data/` | done rows: `prompt` and `completion` as TRL takes them, rewards, the greedy base answer |
| `failed/` | inputs without an answer, with the reason |
| `candidates/` | kept candidates with raw scores, and the trace of the search |
"""
_RESCORED = """
Rescored: the answers of run {run_id} are selected again, by the rewards in `config.yaml`, among the {candidates} kept
of {samples} candidates. `nll` is null where another answer than before is selected.
"""


def write_run(place: Place, run: dict[str, Any]) -> None:
    """Write run.json, and its `config` entry as config.yaml. run.json comes last: with it the output exists.

    Raises ConfigError where another run's is there, as `check_resume`.
    """

    def change(old: bytes | None) -> bytes:
        if old is not None:
            check_resume(_parse(place, old), run)
        place.write("config.yaml", yaml.safe_dump(run["config"], sort_keys=False, allow_unicode=True).encode())
        return (json.dumps(run, indent=2) + "\n").encode()

    place.update("run.json", change)


def read_run(place: Place) -> dict[str, Any] | None:
    """run.json, or None where there is no output yet. Raises ConfigError where it cannot be read."""
    try:
        data = place.read("run.json")
    except OSError as error:
        raise ConfigError(f"output: cannot read {place}/run.json: {' '.join(str(error).split())}") from None
    return None if data is None else _parse(place, data)


def _parse(place: Place, data: bytes) -> dict[str, Any]:
    try:
        run = json.loads(data)
    except ValueError as error:
        raise ConfigError(
            f"output: {place}/run.json is not JSON ({error}); restore it, or give another output"
        ) from None
    if not isinstance(run, dict):
        raise ConfigError(f"output: {place}/run.json holds no run; restore it, or give another output")
    return run


def method_name(config: dict[str, Any]) -> str:
    """The method of a configuration as run.json has it: its kind, and its settings other than defaults."""
    section = config.get("method", {})
    try:
        method: Section = _METHOD.validate_python(section)
    except ValidationError:  # another version's
        return str(section.get("kind", "unknown"))
    settings = method.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    settings.pop("kind", None)
    named = yaml.safe_dump(settings, default_flow_style=True, sort_keys=False, width=1 << 16, allow_unicode=True)
    return f"{section['kind']} {named.strip()}" if settings else str(section["kind"])


def check_resume(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise ConfigError unless a run may resume the output of another: same `fingerprint` (both runs keep what it is
    taken of under `components`) and same `rows_per_file`."""
    if old["components"].get("engine") != new["components"].get("engine"):
        made = old.get("versions", {}).get("aisp-dist")
        raise ConfigError(
            f"output: aisp-dist {made} made it, and this version may compute other rows for the same configuration; "
            f"give another output, or resume it with that version: pip install aisp-dist=={made}"
        )
    if old["fingerprint"] != new["fingerprint"]:
        keys = differing_keys(old["components"], new["components"])
        raise ConfigError(
            f"output: it holds rows of another run, which differs in {', '.join(keys)}; "
            "give another output, or set these back"
        )
    if old["rows_per_file"] != new["rows_per_file"]:
        raise ConfigError(
            f"save.rows_per_file: {new['rows_per_file']}, but the output has parts of {old['rows_per_file']}, and a "
            f"part's name says which lines it covers; set it to {old['rows_per_file']}, or give another output"
        )


def differing_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted names of the values that differ between nested dicts, in sorted order."""
    keys: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        if key not in old or key not in new:
            keys.append(key)
        elif isinstance(old[key], dict) and isinstance(new[key], dict):
            keys += [f"{key}.{inner}" for inner in differing_keys(old[key], new[key])]
        elif old[key] != new[key]:
            keys.append(key)
    return keys


def write_card(place: Place) -> None:
    """Write the dataset card for the tables that are there. Safe beside another writer: who writes last has looked
    last."""
    if place.read("README.md") != _card(place):
        place.update("README.md", lambda _: _card(place))


def _card(place: Place) -> bytes:
    configs = "".join(
        f"- config_name: {name}\n  data_files: {folder}/*.parquet\n"
        for name, folder in TABLES.items()
        if any(file.endswith(".parquet") for file in place.names(folder))  # `datasets` refuses a config without files
    )
    run = read_run(place) or {}
    rescored = run.get("rescored")
    about = _ABOUT.replace("{method}", method_name(run.get("config", {})))
    about += _RESCORED.format_map(rescored) if rescored else ""
    return f"---\nconfigs:\n{configs}---\n{about}".encode()
