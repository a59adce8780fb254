"""Finished outputs as evaluation reads them: all rows as columns of numbers, some rows whole. Refuses what cannot be
compared. No torch; one batch of rows is in memory at a time.

Shapes: P prompts of an output.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from aisp_dist.analysis.compare import words_of
from aisp_dist.analysis.evaluate.texts import immediate_repeat
from aisp_dist.analysis.metrics import diversity, repetition
from aisp_dist.config import ConfigError, Generator, Run
from aisp_dist.engine import checkpoints
from aisp_dist.output import manifest, parts, verify
from aisp_dist.output.filesystem import Place
from aisp_dist.output.schema import kept_columns
from aisp_dist.records import Prompt, Round, TopP, Weights

_BOTH = ("reward", "rewards", "nll", "num_tokens")  # columns that the base answer has too, as base_*
_COLUMNS = ["id", "source_index", "prompt", "completion", "base_completion", "finish_reason"]
_COLUMNS += [prefix + name for name in _BOTH for prefix in ("", "base_")]
_TRACE = [f"trace.list.element.{name}" for name in ("weights", "lengths", "sigma2", "top_p", "given")]
_CANDIDATE = [f"candidates.list.element.{name}" for name in ("iteration", "sample", "token_ids")]
Row = dict[str, Any]


@dataclass(frozen=True)
class Output:
    """record: its run.json. run: the configuration in it."""

    place: Place
    record: Mapping[str, Any]
    run: Run

    def __str__(self) -> str:
        return str(self.place)

    def round(self, row: Row, prompt_tokens: tuple[int, ...]) -> Round:
        """What its search was after the last iteration; without trace where the output keeps none."""
        trace = tuple(Weights(*(tuple(step[n]) for n in ("weights", "lengths", "given"))) for step in row["trace"])
        trace = trace if any(entry.weights for entry in trace) else ()
        sampling = self.run.method.sampling()
        if row["trace"]:  # what a flip rate leaves open is the prompt's own
            step = row["trace"][0]
            sampling = replace(sampling, sigma2=step["sigma2"])
            if sampling.decode is None and step["top_p"] is not None:
                sampling = replace(sampling, decode=TopP(step["top_p"], 1.0))
        return Round(self.run.seed, row["id"], prompt_tokens, len(trace), 0, 1, sampling, trace)

    def prompt(self, row: Row) -> Prompt:
        """The prompt of a row, as rewards and templates take it."""
        content = row["prompt"]
        if not isinstance(content, str):
            content = tuple((message["role"], message["content"]) for message in content)
        return Prompt(row["id"], row["source_index"], content, kept_columns(row, self.record["columns"]))


@dataclass
class Table:
    """All done rows: ids with their place, and [P] values by measure, NaN where a row has none. prompts: hashes of what
    was asked. failed: ids without an answer."""

    ids: dict[str, int] = field(default_factory=dict)
    ordinals: array[int] = field(default_factory=lambda: array("q"))
    prompts: list[int] = field(default_factory=list)
    selected: dict[str, array[float]] = field(default_factory=dict)
    base: dict[str, array[float]] = field(default_factory=dict)
    finish: Counter[str] = field(default_factory=Counter)
    failed: set[str] = field(default_factory=set)

    def values(self, name: str, ids: Sequence[str], base: bool = False) -> np.ndarray:
        """Values of a measure at these ids."""
        column: np.ndarray = np.frombuffer((self.base if base else self.selected)[name], dtype=np.float64)
        return column[[self.ids[id] for id in ids]]


def open_output(place: Place) -> Output:
    """Raises ConfigError where there is no run, or none that this version reads."""
    record = manifest.read_run(place)
    if record is None:
        raise ConfigError(f"output: {place} holds no run (no run.json); name the directory of a finished run")
    try:
        return Output(place, record, Run.model_validate(record["config"]))
    except (KeyError, ValidationError) as error:
        raise ConfigError(f"output: {place}/run.json was written by another version ({error!r})") from None


def check_finished(output: Output, inputs: int | None) -> None:
    """Raise ConfigError where rows are missing. inputs: how many it should have, None if that cannot be told."""
    now = verify.status(output.place)
    there = now["done"] + now["failed"]
    if missing := now["staged"] if inputs is None else max(inputs - there, now["staged"]):
        of = "" if inputs is None else f" of {inputs}"
        raise ConfigError(
            f"output: {output} is unfinished, {missing}{of} rows are missing; the command that made it computes them"
        )
    if not now["done"]:
        raise ConfigError(f"output: {output} has no done row, so there is nothing to measure; see its failed/")


def check_trials(outputs: Sequence[Output]) -> None:
    """Raise ConfigError unless the outputs are of one run with different seeds."""
    first = dict(outputs[0].record["components"], seed=None)
    for other in outputs[1:]:
        if keys := manifest.differing_keys(first, dict(other.record["components"], seed=None)):
            raise ConfigError(
                f"{other} is no trial of {outputs[0]}: they differ in {', '.join(keys)}; trials differ in seed alone "
                "(another method goes into --against)"
            )
    seeds = Counter(output.run.seed for output in outputs)
    if repeated := [str(seed) for seed, times in seeds.items() if times > 1]:
        raise ConfigError(f"seed {', '.join(repeated)}: two of the outputs have it; trials need seeds of their own")


def check_prompts(a: Output, table_a: Table, b: Output, table_b: Table) -> None:
    """Raise ConfigError unless both outputs asked the same. Inputs that failed in one of them may differ."""
    ids_a, ids_b = table_a.ids.keys() | table_a.failed, table_b.ids.keys() | table_b.failed
    shared = ids_a & ids_b
    both = [id for id in table_a.ids if id in table_b.ids]
    other = sum(table_a.prompts[table_a.ids[id]] != table_b.prompts[table_b.ids[id]] for id in both)
    if other or len(shared) < max(len(ids_a), len(ids_b)):
        keys = manifest.differing_keys(a.record["config"]["prompts"], b.record["config"]["prompts"])
        raise ConfigError(
            f"{b} has other prompts than {a}: {len(shared)} ids are shared ({other} of them with another prompt), "
            f"{len(ids_a) - len(shared)} are missing there, {len(ids_b) - len(shared)} are only there; "
            f"{'they differ in ' + ', '.join('prompts.' + key for key in keys) if keys else 'the input has changed'}"
        )
    if not both:
        raise ConfigError(f"{a} and {b} have no done prompt in common; see their failed/")


def read(output: Output, batch_rows: int = 4096) -> Table:
    """The whole table. batch_rows: read together; no value depends on it."""
    table = Table()
    for batch in output.place.dataset("data").to_batches(columns=_COLUMNS, batch_size=batch_rows):
        for row in batch.to_pylist():
            _add(table, row)
    if output.place.names("failed"):
        table.failed = set(output.place.dataset("failed").to_table(columns=["id"])["id"].to_pylist())
    return table


def rows(output: Output, table: Table, ids: Sequence[str]) -> list[Row]:
    """Whole rows of data/ in the order of ids, with `trace` (empty if not kept) and `tokens`, the selected answer's ids
    (None if not kept)."""
    wanted = [table.ordinals[table.ids[id]] for id in ids]
    data = {row["source_index"]: row for row in _pick(output, "data", wanted, None)}
    for row in data.values():
        row |= {"trace": [], "tokens": None}
    for kept in _pick(output, "candidates", wanted, ["source_index", *_CANDIDATE, *_TRACE]):
        row = data[kept["source_index"]]
        best = row["best_iteration"], row["best_sample"]
        found = (c["token_ids"] for c in kept["candidates"] if (c["iteration"], c["sample"]) == best)
        row |= {"trace": kept["trace"], "tokens": next(found, None)}
    return [data[ordinal] for ordinal in wanted]


def left_out(reasons: Sequence[str], count: int, what: str = "prompts") -> str:
    return f"{len(reasons)} of {count} {what} are left out; the first: {reasons[0]}"


def generator(output: Output) -> Generator:
    """The base model's section with places that can be opened. Raises ConfigError unless the files there now are those
    that the run read."""
    settings, digests = output.run.generator, output.record["components"]["digests"]
    known = ("generator", settings.model) in checkpoints.EMBEDDED
    near = Path(output.record["directory"], settings.model)  # relative to where the run was started
    name = str(near) if not known and near.is_dir() else settings.model
    place = checkpoints.locate("generator.model", name, "generator")
    now = {"generator.model": checkpoints.digest("generator.model", place, settings.revision)}
    template = settings.chat_template and Path(output.record["base_dir"], settings.chat_template)
    if template:
        found = template.read_bytes() if template.is_file() else b""
        now["generator.chat_template"] = hashlib.blake2b(found, digest_size=16).hexdigest()
    if changed := [f"{key} (now {now[key]}, then {digests.get(key)})" for key in now if now[key] != digests.get(key)]:
        raise ConfigError(
            f"{output} was made with other files than are there now: {', '.join(changed)}; put those back, or give "
            "--no-model"
        )
    return settings.model_copy(update={"model": place, "chat_template": template and str(template)})


def _add(table: Table, row: Row) -> None:
    said, base = words_of(row["completion"]), row["base_completion"]
    texts = {"diversity": diversity, "repetition": repetition, "immediate_repeat": immediate_repeat}
    found: dict[str, tuple[Any, Any]] = {name: (measure(said), measure(base)) for name, measure in texts.items()}
    for name, column in (("reward", "reward"), ("nll", "nll"), ("tokens", "num_tokens")):
        found[name] = row[column], row[f"base_{column}"]
    scores, base_scores = ({s["name"]: s["value"] for s in row[c]} for c in ("rewards", "base_rewards"))
    found |= {f"reward {name}": (value, base_scores.get(name)) for name, value in scores.items()}
    for name, pair in found.items():
        for columns, value in zip((table.selected, table.base), pair, strict=True):
            columns.setdefault(name, array("d")).append(float("nan") if value is None else value)
    table.ids[row["id"]] = len(table.ids)
    table.ordinals.append(row["source_index"])
    digest = hashlib.blake2b(json.dumps(row["prompt"]).encode(), digest_size=8).digest()
    table.prompts.append(int.from_bytes(digest, "little"))
    table.finish[row["finish_reason"]] += 1


def _pick(output: Output, table: str, ordinals: Sequence[int], columns: list[str] | None) -> Iterator[Row]:
    """Rows of these inputs, from the parts that hold them alone."""
    wanted = pa.array(ordinals, pa.int64())
    for part in sorted({ordinal // output.record["rows_per_file"] for ordinal in ordinals}):
        file = output.place.open(parts.name(table, part))
        if file is None:
            continue  # a part that keeps no candidates
        with file:
            for batch in pq.ParquetFile(file).iter_batches(64, columns=columns):
                yield from batch.filter(pc.is_in(batch["source_index"], wanted)).to_pylist()
