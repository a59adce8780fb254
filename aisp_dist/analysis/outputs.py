"""The one reader of finished outputs: the configuration in run.json, all done rows as columns of numbers, and whole
rows of a few prompts. Refuses outputs that are unfinished or do not hold the same prompts. One batch of rows is in
memory at a time; what grows with the number of prompts P is numbers and ids. No torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from aisp_dist.analysis.metrics import diversity
from aisp_dist.config import ConfigError, Run, readable
from aisp_dist.output import kept_columns, manifest, parts, verify
from aisp_dist.output.filesystem import Place
from aisp_dist.output.schema import ORIGINAL
from aisp_dist.records import Prompt

_ABOUT = ["id", "source_index", "prompt", "finish_reason", "samples_spent", "quarantined", "curve"]
_NUMBERS = {"reward": "reward", "nll": "nll", "tokens": "num_tokens"}  # measure: column, of the base answer base_*
Row = dict[str, Any]
Measure = Callable[[str], float]


@dataclass(frozen=True)
class Output:
    """record: its run.json."""

    place: Place
    record: Mapping[str, Any]

    def __str__(self) -> str:
        return str(self.place)

    @cached_property
    def run(self) -> Run:
        """The configuration in run.json. Raises ConfigError where this version cannot read it."""
        try:
            return Run.model_validate(readable(self.record["config"]))
        except (KeyError, ValidationError) as error:
            raise ConfigError(f"output: {self}/run.json was written by another version ({error!r})") from None

    @property
    def method_name(self) -> str:
        """The method that ran, and its settings other than defaults."""
        return manifest.method_name(self.record["config"])

    @property
    def model_name(self) -> str:
        """The base model as the rows name it."""
        return str(self.record.get("model", self.run.generator.model))

    @property
    def held_out(self) -> tuple[str, ...]:
        """The rewards that never select."""
        return tuple(name for name, reward in self.run.rewards.items() if reward.use == "report")

    @property
    def budget(self) -> int:
        """Samples that a prompt may have by num_samples and num_iterations."""
        return self.run.method.num_samples * self.run.method.num_iterations

    @property
    def most_iterations(self) -> int:
        """Iterations that a prompt may have, those of `spend` included."""
        method = self.run.method
        return max(method.num_iterations, (method.spend and method.spend.max_iterations) or 0)

    def prompt(self, row: Row) -> Prompt:
        """The prompt of a row, as rewards and templates take it."""
        content = row["prompt"]
        if not isinstance(content, str):
            content = tuple((message["role"], message["content"]) for message in content)
        return Prompt(row["id"], row["source_index"], content, kept_columns.of_row(row, self.record["columns"]))


@dataclass(frozen=True)
class Columns:
    """All done rows of an output as numbers, NaN where a row has none.

    rows: indexed by id. Its columns are pairs: ("selected", measure) and ("base", measure) for reward, nll, tokens,
    `reward NAME` of every reward and the measures of texts that were asked for; ("original", measure) for the rewards
    of the answers that dialogues came with (prompts.drop_last_answer); and ("about", name) for source_index,
    prompt (a hash of what was asked), finish_reason, samples_spent, quarantined and area (the best reward so far,
    averaged over the iterations that the prompt may have). failed: ids without an answer.
    """

    output: Output
    rows: Any  # pandas.DataFrame
    failed: Any  # pandas.Index

    def values(self, measure: str, ids: Any, base: bool = False) -> np.ndarray:
        """[P] at these ids; all NaN for a measure that the output does not have."""
        column = "base" if base else "selected", measure
        if column not in self.rows:
            return np.full(len(ids), np.nan)
        values: np.ndarray = self.rows[column].loc[ids].to_numpy(dtype=np.float64)
        return values

    def about(self, name: str, ids: Any) -> Any:
        return self.rows["about", name].loc[ids]


def open_output(place: Place) -> Output:
    """Raises ConfigError where there is no run, or one that this version cannot read."""
    record = manifest.read_run(place)
    if record is None:
        raise ConfigError(f"output: {place} holds no run (no run.json); name the directory of a finished run")
    output = Output(place, record)
    _ = output.run
    return output


def answer(completion: Any) -> str:
    """The text of a completion: itself, or its last turn."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def batches(place: Place, table: str, columns: Sequence[str] | None, rows: int = 1024) -> Iterator[pa.RecordBatch]:
    """Rows of a table in input order, of these columns (dotted ones too) or of all."""
    for name in place.parts(table):
        file = place.open(f"{table}/{name}")
        if file is not None:
            with file:
                yield from pq.ParquetFile(file).iter_batches(rows, columns=None if columns is None else list(columns))


def count(place: Place, table: str) -> int:
    return sum(batch.num_rows for batch in batches(place, table, ["source_index"], 1 << 16))


def read(
    output: Output,
    texts: Mapping[str, Measure] | None = None,
    limit: int | None = None,
    batch_rows: int = 4096,
) -> Columns:
    """texts: measures of an answer's text (diversity where None). limit: only the first so many inputs. batch_rows:
    read together; no value depends on it."""
    measures = {"diversity": diversity} if texts is None else dict(texts)
    names = [*_ABOUT, *(["completion"] if measures else []), *_NUMBERS.values(), "rewards"]
    names += [f"base_{name}" for name in names[len(_ABOUT) :]]
    names += ["original_reward", "original_rewards"] if ORIGINAL in output.record.get("columns", {}) else []
    frames = [
        _frame(batch, measures, output.most_iterations) for batch in batches(output.place, "data", names, batch_rows)
    ]
    rows = pd.concat(frames) if frames else _empty(output, measures)
    failed = [batch.to_pandas() for batch in batches(output.place, "failed", ["id", "source_index"])]
    lost = pd.concat(failed) if failed else pd.DataFrame({"id": [], "source_index": []})
    if limit is not None:
        rows, lost = rows[rows["about", "source_index"] < limit], lost[lost["source_index"] < limit]
    return Columns(output, rows, pd.Index(lost["id"]))


def rows(columns: Columns, ids: Iterable[str], names: Sequence[str] | None = None, table: str = "data") -> list[Row]:
    """Rows of a table in the order of ids, of these columns or whole; without those that the table does not have."""
    places = columns.about("source_index", list(ids))
    wanted = pa.array(places, pa.int64())
    size = columns.output.record["rows_per_file"]
    found: dict[int, Row] = {}
    for part in sorted({int(ordinal) // size for ordinal in places}):
        file = columns.output.place.open(parts.name(table, part))
        if file is None:
            continue  # a part that keeps no candidates
        with file:
            chosen = None if names is None else ["source_index", *names]
            for batch in pq.ParquetFile(file).iter_batches(64, columns=chosen):
                kept = batch.filter(pc.is_in(batch["source_index"], wanted)).to_pylist()
                found |= {row["source_index"]: row for row in kept}
    return [found[ordinal] for ordinal in places if ordinal in found]


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


def check_prompts(a: Columns, b: Columns) -> None:
    """Raise ConfigError unless both outputs asked the same. Inputs that failed in one of them may differ."""
    ids_a, ids_b = a.rows.index.union(a.failed), b.rows.index.union(b.failed)
    shared, both = ids_a.intersection(ids_b), a.rows.index.intersection(b.rows.index)
    other = int((a.about("prompt", both) != b.about("prompt", both)).sum())
    if other or len(shared) < max(len(ids_a), len(ids_b)):
        keys = manifest.differing_keys(*(one.output.record["config"]["prompts"] for one in (a, b)))
        raise ConfigError(
            f"{b.output} has other prompts than {a.output}: {len(shared)} ids are shared ({other} of them with another "
            f"prompt), {len(ids_a) - len(shared)} are missing there, {len(ids_b) - len(shared)} are only there; "
            f"{'they differ in ' + ', '.join('prompts.' + key for key in keys) if keys else 'the input has changed'}"
        )
    if both.empty:
        raise ConfigError(f"{a.output} and {b.output} have no done prompt in common; see their failed/")


def in_all(columns: Sequence[Columns]) -> Any:
    """Ids that are done in every one of them, in the order of the first, as a pandas.Index."""
    found = columns[0].rows.index
    for other in columns[1:]:
        found = found[found.isin(other.rows.index)]
    return found


def in_any(ids: Sequence[Any]) -> Any:
    """The union of several pandas.Index."""
    return reduce(lambda a, b: a.union(b), ids)


def joined(columns: Sequence[Columns]) -> Columns:
    """The rows of several outputs that have no id in common, as one."""
    rows = pd.concat([one.rows for one in columns])
    return Columns(columns[0].output, rows, pd.Index(np.concatenate([one.failed for one in columns])))


def _frame(batch: pa.RecordBatch, texts: Mapping[str, Measure], iterations: int) -> Any:
    found: dict[tuple[str, str], Any] = {}
    for side, prefix in (("selected", ""), ("base", "base_")):
        said = [answer(text) for text in batch[f"{prefix}completion"].to_pylist()] if texts else []
        found |= {(side, name): [measure(text) for text in said] for name, measure in texts.items()}
        found |= {(side, name): _floats(batch[f"{prefix}{column}"]) for name, column in _NUMBERS.items()}
        scores = batch[f"{prefix}rewards"]
        names = [score["name"] for score in scores[0].as_py()]  # every row lists all of them, in one order
        values = _floats(pc.struct_field(scores.flatten(), "value")).reshape(-1, len(names)).T
        found |= {(side, f"reward {name}"): column for name, column in zip(names, values, strict=True)}
    if "original_reward" in batch.schema.names:
        scores = [{s["name"]: s["value"] for s in row or ()} for row in batch["original_rewards"].to_pylist()]
        found["original", "reward"] = _floats(batch["original_reward"])
        found |= {("original", f"reward {n}"): np.array([s.get(n) for s in scores], np.float64) for n in names}
    for name in ("source_index", "finish_reason", "samples_spent", "quarantined"):
        found["about", name] = batch[name].to_pandas()
    found["about", "prompt"] = [_hash(prompt) for prompt in batch["prompt"].to_pylist()]
    found["about", "area"] = [_area(curve, iterations) for curve in batch["curve"].to_pylist()]
    return pd.DataFrame(found).set_index(pd.Index(batch["id"].to_pandas(), name="id"))


def _empty(output: Output, texts: Mapping[str, Measure]) -> Any:
    measures = [*texts, *_NUMBERS, *(f"reward {name}" for name in output.run.rewards)]
    about = ("source_index", "finish_reason", "samples_spent", "quarantined", "prompt", "area")
    names = [(side, name) for side in ("selected", "base") for name in measures] + [("about", name) for name in about]
    return pd.DataFrame(columns=pd.MultiIndex.from_tuples(names), index=pd.Index([], dtype="str"), dtype="float64")


def _floats(column: pa.Array) -> np.ndarray:
    """NaN for null."""
    values: np.ndarray = column.to_numpy(zero_copy_only=False).astype(np.float64)
    return values


def _hash(prompt: Any) -> np.uint64:
    digest = hashlib.blake2b(json.dumps(prompt).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _area(curve: Sequence[float | None] | None, iterations: int) -> float:
    """Mean of the best reward so far over the iterations that have one. A prompt that stopped early keeps its last."""
    so_far = curve or []
    rest = [so_far[-1]] * (iterations - len(so_far)) if so_far else []
    known = [reward for reward in (*so_far, *rest) if reward is not None]
    return math.fsum(known) / len(known) if known else math.nan
