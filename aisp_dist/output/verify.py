"""Checks an output from its files: whether every input has exactly one row and every row is sound (`verify`), and how
far a run is (`status`). Needs no cluster and no model, and changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from aisp_dist.config import ConfigError
from aisp_dist.output import lease, log, parts, staging
from aisp_dist.output.filesystem import Place
from aisp_dist.output.manifest import TABLES, read_run, tables_of_card
from aisp_dist.output.parts import Header
from aisp_dist.output.schema import ORIGINAL, Row, as_utf8
from aisp_dist.records import Input

_FOLDERS = (*TABLES.values(), ".staging")
_NAME = re.compile(r"part-(\d{6,})(\.parquet)?")
_DATA = ["source_index", "id", "completion", "reward", "base_reward", "reward_difference", "curve", "samples_spent"]
_DATA += ["best_iteration", "best_sample", "nll", "base_nll", "run_id"]
_FAILED = ["source_index", "id", "reason", "run_id"]
_CANDIDATES = ["source_index", "id", "trace.list.element.lengths"]
_CANDIDATES += [f"candidates.list.element.{name}" for name in ("iteration", "sample", "text", "reward", "within")]


@dataclass(frozen=True)
class Verdict:
    """violations: one sentence each, none if the output is whole. done, failed, staged: inputs with such a row; those
    staged have no committed one, and are among the inputs where these are given."""

    violations: tuple[str, ...]
    done: int
    failed: int
    staged: int
    parts: int


def verify(place: Place, inputs: Iterable[Input] | None = None) -> Verdict:
    """Check a whole output, against its inputs where they are given. One part is in memory at a time.

    Raises ConfigError where there is no output.
    """
    run = _run(place)
    size = run["rows_per_file"]
    files = {folder: place.names(folder) for folder in _FOLDERS}
    violations = _beside(place, run) + _strangers(files)
    numbers = _numbers(files)
    lines = None if inputs is None else iter(inputs)
    schemas: dict[str, pa.Schema] = {}
    done = failed = waiting = part = 0
    while True:
        chunk = None if lines is None else list(islice(lines, size))
        if not chunk and part > max(numbers, default=0):
            break
        staged = _staged(place, part, files)
        check = _Part(place, part, run, schemas)
        check.files(chunk, full=chunk is None and part < max(numbers, default=0))
        violations += check.violations
        done += len(check.done)
        failed += len(check.failed)
        if chunk is not None:  # beyond a smaller limit than they were drawn for, they wait for a larger one
            staged = {ordinal for ordinal in staged if ordinal < part * size + len(chunk)}
        if left := staged - check.done - check.failed:
            violations.append(f"unfinished: {len(left)} prompts of part {part} are staged; run the same command again")
            waiting += len(left)
        part += 1
    return Verdict(tuple(violations), done, failed, waiting, len(numbers))


def status(place: Place) -> dict[str, Any]:
    """How far the run is: inputs `done`, `failed` and `staged` (those without a committed row), `parts`; `owners`, each
    with process, host, shard (i, n) and whether it lives (None for unknown); `metrics`, what metrics.jsonl says last
    (log.latest), or None.

    Raises ConfigError where there is no output.
    """
    _run(place)
    counts = {"done": 0, "failed": 0, "staged": 0, "parts": 0}
    files = {folder: place.names(folder) for folder in _FOLDERS}
    for part in _numbers(files):
        standing = parts.read_standing(place, part)
        end = 0
        if standing is not None:
            end = standing.header.end
            counts["parts"] += 1
            counts["done"] += standing.num_done
            counts["failed"] += end - standing.header.start - standing.num_done
        counts["staged"] += sum(ordinal >= end for ordinal in _staged(place, part, files))
    owners = [
        {"process": owner.pid, "host": owner.host, "shard": list(owner.shard), "alive": owner.alive()}
        for owner in lease.read_owners(place)
    ]
    return counts | {"owners": owners, "metrics": log.latest(place)}


class _Part:
    """The checks of one part: fills `violations`, and the ordinals of its rows into `done` and `failed`."""

    def __init__(self, place: Place, part: int, run: dict[str, Any], schemas: dict[str, pa.Schema]) -> None:
        self.place, self.part, self.run, self.schemas = place, part, run, schemas
        self.violations: list[str] = []
        self.done: set[int] = set()
        self.failed: set[int] = set()

    def files(self, chunk: Sequence[Input] | None, full: bool) -> None:
        """Check the part's files. chunk: the inputs of its range, if known; full: whether it must cover its range."""
        start, size = self.part * self.run["rows_per_file"], self.run["rows_per_file"]
        originals = ORIGINAL in self.run.get("columns", {})
        data = self._read("data", [*_DATA, *([ORIGINAL, "original_rewards"] if originals else [])])
        if data is None:
            if not self.violations:  # it is not unreadable
                count = "the" if chunk is None else len(chunk)
                self._say(
                    "data",
                    f"is missing: {count} inputs from line {start} on have no committed row; the same command resumes",
                )
            return
        header, rows = data
        end = header.end
        if header.start != start or not start <= end <= start + size:
            self._say("data", f"covers lines {header.start} to {end - 1}, its name says {start} to {start + size - 1}")
        if full and end < start + size:
            self._say("data", f"ends with line {end - 1}, yet parts follow it")
        if (header.fingerprint, header.run_id) != (self.run["fingerprint"], self.run["run_id"]):
            self._say("data", f"is of run {header.run_id}, the output is of run {self.run['run_id']}")
        failed, candidates = self._beside("failed", _FAILED, header), self._beside("candidates", _CANDIDATES, header)
        self.done, self.failed = {row["source_index"] for row in rows}, {row["source_index"] for row in failed}
        for table, found in (("data", rows), ("failed", failed), ("candidates", candidates)):
            ordinals = [row["source_index"] for row in found]
            if ordinals != sorted(set(ordinals)):
                self._say(table, "its rows are not in input order, each once")
        self._broken("data", "a done and a failed row", self.done & self.failed)
        covered = set(range(start, end))
        self._broken("data", "no row", covered - self.done - self.failed)
        self._broken("data", "outside of the range of the part", (self.done | self.failed) - covered)
        self._law("failed", failed, "no reason", lambda row: bool(row["reason"]))
        for table, found in (("data", rows), ("failed", failed)):
            self._law(table, found, "of another run", lambda row: row["run_id"] == self.run["run_id"])
        if header.candidates is not None and len(candidates) != header.candidates and not self._said("candidates"):
            gone = "is missing: the commit wrote" if not candidates else f"has {len(candidates)} rows, the commit wrote"
            self._say("candidates", f"{gone} {header.candidates}")
        self._rows(rows)
        if originals:
            same = "an original_completion without its scores, or scores without it"
            self._law("data", rows, same, lambda row: (row[ORIGINAL] is None) == (row["original_rewards"] is None))
        self._candidates({row["source_index"]: row for row in rows}, candidates)
        if chunk is not None:
            self._inputs(header, chunk, {row["source_index"]: row["id"] for row in (*rows, *failed)})

    def _inputs(self, header: Header, chunk: Sequence[Input], ids: dict[int, str]) -> None:
        length = header.end - header.start
        if len(chunk) > length:
            self._say("data", f"unfinished: {len(chunk) - length} inputs from line {header.end} on have no row")
        if len(chunk) < length:
            self._say("data", f"has rows of {length} inputs, but the input has {len(chunk)} there")
        elif parts.range_digest(chunk[:length]) != header.digest:
            self._say("data", "was computed from other inputs (the digest of its range differs)")
        given = {line.source_index: as_utf8(line.id) for line in chunk}
        self._broken("data", "the id is not the input's", [n for n, id_ in ids.items() if given.get(n, id_) != id_])

    def _rows(self, rows: Sequence[Row]) -> None:
        def answered(row: Row) -> bool:
            turns = row["completion"]
            return isinstance(turns, str) or (bool(turns) and all(turn["content"] is not None for turn in turns))

        def difference(row: Row) -> bool:
            base = row["base_reward"]
            return bool(row["reward_difference"] == (None if base is None else row["reward"] - base))

        def curve(row: Row) -> bool:
            seen = [value for value in row["curve"] if value is not None]
            return seen == sorted(seen) and (seen[-1:] or [row["reward"]]) == [row["reward"]]

        self._law("data", rows, "no completion", answered)
        self._law("data", rows, "a reward_difference other than reward - base_reward", difference)
        self._law("data", rows, "a reward other than the end of its curve", curve)
        self._law("data", rows, "no base_nll", lambda row: row["base_nll"] is not None)
        if "parent" not in self.run["components"]:  # rescoring knows only the likelihood of the answer selected before
            self._law("data", rows, "no nll, which only a rescored output may lack", lambda row: row["nll"] is not None)

    def _candidates(self, rows: dict[int, Row], candidates: Sequence[Row]) -> None:
        self._law("candidates", candidates, "no done row", lambda kept: kept["source_index"] in rows)
        both = [
            {"source_index": k["source_index"], "kept": k, "row": rows[k["source_index"]]}
            for k in candidates
            if k["source_index"] in rows
        ]

        def best(pair: Row) -> bool:
            able = [c["reward"] for c in pair["kept"]["candidates"] if c["within"] and c["reward"] is not None]
            return all(reward <= pair["row"]["reward"] for reward in able)

        def selected(pair: Row) -> list[Row]:
            where = (pair["row"]["best_iteration"], pair["row"]["best_sample"])
            return [c for c in pair["kept"]["candidates"] if (c["iteration"], c["sample"]) == where]

        def same_text(pair: Row) -> bool:
            turns = pair["row"]["completion"]
            text = turns if isinstance(turns, str) or not turns else turns[-1]["content"]
            return all(c["text"] == text for c in selected(pair))

        def spent(pair: Row) -> bool:
            drawn = sum(len(iteration["lengths"]) for iteration in pair["kept"]["trace"])
            return drawn in (0, pair["row"]["samples_spent"])

        self._law("candidates", both, "another id than its data row", lambda p: p["kept"]["id"] == p["row"]["id"])
        self._law("candidates", both, "a better candidate than the one selected", best)
        self._law("candidates", both, "no best candidate", lambda p: bool(selected(p)) or not p["kept"]["candidates"])
        self._law("candidates", both, "another text for the best candidate than the completion", same_text)
        self._law("candidates", both, "a trace of another number of samples than samples_spent", spent)

    def _read(self, table: str, columns: Sequence[str]) -> tuple[Header, list[Row]] | None:
        data = self.place.read(parts.name(table, self.part))
        if data is None:
            return None
        try:
            file = pq.ParquetFile(pa.BufferReader(data))
            header = parts.header(file.metadata)
            schema = file.schema_arrow.remove_metadata()
            rows: list[Row] = parts.read_table(file, columns).to_pylist()
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            self._say(table, f"cannot be read: {error}")
            return None
        if schema != self.schemas.setdefault(table, schema):
            self._say(table, f"has another schema than {table}'s first part")
        return header, rows

    def _beside(self, table: str, columns: Sequence[str], header: Header) -> list[Row]:
        found = self._read(table, columns)
        if found is None:
            return []
        if found[0] != header:
            self._say(table, "is of another commit than the data beside it (its metadata differs)")
        return found[1]

    def _law(self, table: str, rows: Sequence[Row], law: str, holds: Callable[[Row], bool]) -> None:
        self._broken(table, law, [row["source_index"] for row in rows if not holds(row)])

    def _broken(self, table: str, law: str, ordinals: Iterable[int]) -> None:
        if found := sorted(ordinals):
            self._say(table, f"line {found[0]}{f' and {len(found) - 1} others' if found[1:] else ''}: {law}")

    def _said(self, table: str) -> bool:
        return any(violation.startswith(f"{table}/") for violation in self.violations)

    def _say(self, table: str, what: str) -> None:
        self.violations.append(f"{table}/part-{self.part:06d}: {what}")


def _run(place: Place) -> dict[str, Any]:
    run = read_run(place)
    if run is None:
        raise ConfigError(f"output: {place} holds no run (there is no run.json); give the output directory of a run")
    return run


def _beside(place: Place, run: dict[str, Any]) -> list[str]:
    """The files beside the tables that a run writes."""
    found = []
    if (config := place.read("config.yaml")) is None:
        found.append("config.yaml: is missing; run.json holds the configuration too")
    else:
        try:
            same = yaml.safe_load(config) == run["config"]
        except yaml.YAMLError:
            same = False
        if not same:
            found.append("config.yaml: is not the configuration in run.json")
    there = [name for name, folder in TABLES.items() if place.parts(folder)]
    if there and place.read("README.md") is None:
        found.append("README.md: is missing; the command that wrote the output writes it again")
    elif unnamed := sorted(set(there) - tables_of_card(place)):
        found.append(f"README.md: its `configs` lack {', '.join(unnamed)}, so that `datasets` does not find them")
    return found


def _numbers(files: dict[str, list[str]]) -> list[int]:
    """Parts that have any file."""
    return sorted({int(match[1]) for names in files.values() for name in names if (match := _NAME.fullmatch(name))})


def _staged(place: Place, part: int, files: dict[str, list[str]]) -> set[int]:
    """Ordinals that have a row in a segment."""
    if f"part-{part:06d}" not in files[".staging"]:
        return set()
    return {ordinal for segment in staging.read(place, part) for ordinal in segment.digests}


def _strangers(files: dict[str, list[str]]) -> list[str]:
    return [
        f"{table}/{name}: is no part of this output"
        for table in sorted(TABLES.values())
        for name in files[table]
        if not name.startswith(".") and not _NAME.fullmatch(name)
    ]
