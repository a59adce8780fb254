"""The files beside the tables: run.json (configuration, fingerprint, versions), config.yaml, and README.md, the dataset
card by which `datasets.load_dataset(directory, name)` finds the tables. Knows no rows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from itertools import combinations
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from aisp_dist.config import ConfigError, Method, MethodSection, as_published, recorded
from aisp_dist.output.filesystem import PART, Place

TABLES = {"default": "data", "failed": "failed", "candidates": "candidates"}  # load_dataset name: directory
_NEEDED = {"config", "fingerprint", "components", "run_id", "rows_per_file"}  # of run.json
_HEADER = re.compile(r"---\n(.*?)---\n", re.DOTALL)
_SHORT: dict[str, Any] = {"mode": "json", "by_alias": True, "exclude_defaults": True}
_METHOD: TypeAdapter[Any] = TypeAdapter(Method)
_ABOUT = """
# Relabelled prompts

Written by aisp-dist. Method: `{method}`. Everything else is in `run.json` and `config.yaml`.

| table | holds |
|---|---|
"""
_HOLDS = {
    "data": "done rows: `prompt` and `completion` as TRL takes them, rewards, the greedy base answer",
    "failed": "inputs without an answer, with the reason",
    "candidates": "kept candidates with raw scores, and the trace of the search",
}
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
    except NotADirectoryError:
        raise ConfigError(f"output: {place} is a file; give the output directory of a run") from None
    except OSError as error:
        raise ConfigError(f"output: cannot read {place}/run.json: {' '.join(str(error).split())}") from None
    return None if data is None else _parse(place, data)


def _parse(place: Place, data: bytes) -> dict[str, Any]:
    try:
        run: dict[str, Any] = json.loads(data)
    except ValueError as error:
        raise ConfigError(
            f"output: {place}/run.json is not JSON ({error}); restore it, or give another output"
        ) from None
    missing = sorted(_NEEDED - run.keys() if isinstance(run, dict) else _NEEDED)
    if missing or not isinstance(run["config"], dict):
        raise ConfigError(
            f"output: {place}/run.json describes no run (it lacks {', '.join(missing) or 'a config'}); restore it, or "
            "give another output"
        )
    return run


def method_name(config: dict[str, Any]) -> str:
    """The method of a configuration: its name, whether its settings are the paper's, and those other than defaults."""
    section = recorded(config).get("method", {})
    try:
        method: MethodSection = _METHOD.validate_python(section)
        name, settings = method.name + " as published" * as_published(method), method.model_dump(**_SHORT)
    except ValidationError:  # another version's
        name, settings = section.get("kind", "unknown"), {key: v for key, v in section.items() if v is not None}
    settings.pop("kind", None)
    said = yaml.safe_dump(settings, default_flow_style=True, sort_keys=False, width=1 << 16, allow_unicode=True).strip()
    return f"{name} {said}" if settings else str(name)


def check_resume(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise ConfigError unless a run may resume the output of another: same `fingerprint` (both runs keep what it is
    taken of under `components`) and same `rows_per_file`."""
    theirs, ours = old["components"].get("engine"), new["components"].get("engine")
    if theirs != ours and any(isinstance(name, str) for name in (theirs, ours)):
        was, now = (name if isinstance(name, str) else "the local engine" for name in (theirs, ours))
        back = "set generator.engine back or install that version"
        if "endpoint" in (theirs, ours):
            back = f"{'put generator.endpoint back' if theirs == 'endpoint' else 'take generator.endpoint out'}"
        raise ConfigError(
            f"output: it was made with {was}, and this command would go on with {now}, which computes other rows; "
            f"{back}, or give another output"
        )
    if theirs != ours:
        made = old.get("versions", {}).get("aisp-dist")
        raise ConfigError(
            f"output: aisp-dist {made} made it, and this version may compute other rows for the same configuration; "
            f"give another output, or resume it with that version: pip install aisp-dist=={made}"
        )
    if old["fingerprint"] != new["fingerprint"]:
        keys = [key.removeprefix("digests.") for key in differing_keys(old["components"], new["components"])]
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
    """Write the dataset card for the tables that are there. What a user has added to it stays. Safe beside another
    writer: who writes last has looked last."""
    old = place.read("README.md")
    if old is None or _card(place, old) != old:
        place.update("README.md", lambda old: _card(place, old))


def tables_of_card(place: Place) -> set[str]:
    """Names of the tables that `datasets` finds by the dataset card."""
    configs = _header((place.read("README.md") or b"").decode("utf-8", "replace"))[0].get("configs")
    return {str(config.get("config_name")) for config in configs or () if isinstance(config, dict)}


def _card(place: Place, old: bytes | None) -> bytes:
    """The card that names the files that are there. `datasets` caches what it has read of a directory by the header of
    its card; `description` makes that another one with every change of the files."""
    run = read_run(place) or {}
    configs = []
    for name, folder in TABLES.items():
        sizes = {file: size for file, size in place.sizes(folder).items() if PART.fullmatch(file)}
        if sizes:  # `datasets` refuses a config without files
            known = json.dumps([run.get("fingerprint"), sorted(sizes.items())])
            digest = hashlib.blake2b(known.encode(), digest_size=8).hexdigest()
            files = f"{folder}/part-*.parquet"
            configs.append({"config_name": name, "data_files": files, "description": f"files {digest}"})
    header, text = _header((old or b"").decode("utf-8", "replace"))
    there = [config["data_files"].partition("/")[0] for config in configs]
    ours = [_about(run, folders) for n in range(4) for folders in combinations(_HOLDS, n)]
    text = _about(run, there) if not text or text in ours else text
    top = yaml.safe_dump(header | {"configs": configs}, sort_keys=False, allow_unicode=True)
    return f"---\n{top}---\n{text}".encode()


def _about(run: dict[str, Any], folders: Iterable[str]) -> str:
    """The text below a card's header, as long as no user has changed it."""
    tables = "".join(f"| `{folder}/` | {about} |\n" for folder, about in _HOLDS.items() if folder in folders)
    rescored = run.get("rescored")
    text = _ABOUT.replace("{method}", method_name(run.get("config", {})))
    return text + tables + (_RESCORED.format_map(rescored) if rescored else "")


def _header(card: str) -> tuple[dict[str, Any], str]:
    """The YAML header of a card, and the text below it."""
    found = _HEADER.match(card)
    if found is None:
        return {}, card
    try:
        header = yaml.safe_load(found[1])
    except yaml.YAMLError:
        header = None
    return header if isinstance(header, dict) else {}, card[found.end() :]
