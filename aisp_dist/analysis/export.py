"""Training sets from finished outputs: which answers become examples, what filters remove, and the tables that trainers
read. Streams: a batch of rows is in memory at a time, and about 25 bytes for every prompt where duplicates are removed
(seen.py). Tables are in TRL 1.16's formats; no column is called `margin`, since its RewardTrainer would train on it.

    data/ + candidates/ -> Example (chosen, rejected) -> filters -> rows of sft, dpo, kto, reward, prompts, alpaca_eval
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from aisp_dist.analysis.metrics import repetition
from aisp_dist.analysis.outputs import Output, Row, answer, batches
from aisp_dist.config import ConfigError
from aisp_dist.data.seen import Ids
from aisp_dist.output.kept_columns import ColumnType
from aisp_dist.output.schema import ARROW, ORIGINAL, TRAINERS

Kind = Literal["sft", "dpo", "kto", "reward", "prompts", "alpaca_eval"]
KINDS: tuple[Kind, ...] = ("sft", "dpo", "kto", "reward", "prompts", "alpaca_eval")
PAIRED: tuple[Kind, ...] = ("dpo", "kto", "reward")
_DATA = ["id", "source_index", "prompt", "completion", "reward", "rewards", "base_completion", "base_reward"]
_DATA += ["base_rewards", "num_tokens", "finish_reason"]
_CANDIDATE = [f"candidates.list.element.{name}" for name in ("text", "reward", "rewards")]
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


@dataclass(frozen=True)
class Rejected:
    """Which answer of a prompt is the rejected one: the base model's greedy one, the original that the dialogue came
    with, or of the kept candidates the worst, the median, or the worst whose reward is at least `floor`."""

    rule: Literal["base", "original", "worst", "median", "lowest-above"]
    floor: float = -math.inf

    @property
    def among_candidates(self) -> bool:
        """Whether it chooses among the kept candidates, which have no scores of held-out rewards."""
        return self.rule not in ("base", "original")

    @classmethod
    def parse(cls, text: str) -> Rejected:
        """Raises ConfigError."""
        rule, _, floor = text.partition(":")
        try:
            if rule == "lowest-above" and math.isfinite(float(floor)):
                return cls("lowest-above", float(floor))
            if rule in ("base", "original", "worst", "median") and not floor:
                return cls(rule)  # type: ignore[arg-type]
        except ValueError:
            pass
        raise ConfigError(
            f"--rejected is {text!r}; give base, original, worst, median, or lowest-above:FLOOR with a number"
        )


@dataclass(frozen=True)
class Filters:
    """None and False: off. min_gap: chosen minus rejected reward. tokens, repetition (share of repeated 4-grams of
    words) and finish are of the chosen answer. held_out: a reward that must prefer it too. dedup: of prompts that are
    equal but for white space the first is kept."""

    min_gap: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    max_repetition: float | None = None
    held_out: str | None = None
    finish: Literal["stop", "length"] | None = None
    dedup: bool = False


@dataclass(frozen=True)
class Example:
    """A prompt with its selected answer and a worse one. rejected is None where the output kept none."""

    id: str
    prompt: Any
    chosen: str
    chosen_reward: float
    chosen_rewards: Mapping[str, float | None]
    tokens: int
    finish: str
    rejected: str | None
    rejected_reward: float | None
    rejected_rewards: Mapping[str, float | None]
    kept: Mapping[str, Any] = field(default_factory=dict)


Columns = dict[str, ColumnType]


def kept_columns(found: Sequence[Output]) -> tuple[Columns, list[str]]:
    """The kept columns of all outputs, which every table carries, and the names of those that it cannot carry, since a
    trainer would take them for its own. Raises ConfigError where two outputs have a column of different types."""
    kept: Columns = {}
    left_out = []
    for output in found:
        for name, type_ in output.record["columns"].items():
            if name in TRAINERS:
                left_out.append(name)
            elif kept.setdefault(name, type_) != type_:
                raise ConfigError(
                    f"outputs: the kept column {name!r} is {kept[name]} in one of them and {type_} in {output}; export "
                    "them separately"
                )
    return kept, list(dict.fromkeys(left_out))


def examples(output: Output, rejected: Rejected) -> Iterator[Example]:
    """One example for each row of data/, in its order. Raises ConfigError where the rule needs answers that the output
    does not have."""
    needs = rejected.among_candidates
    if rejected.rule == "original" and ORIGINAL not in output.record["columns"]:
        raise ConfigError(
            f"--rejected original takes the answers that the dialogues came with, and {output} has none; use another "
            "rule, or a run with prompts.drop_last_answer: true"
        )
    if needs and output.run.save.candidates == "none":
        raise ConfigError(
            f"--rejected {rejected.rule} chooses among candidates, and {output} kept none (save.candidates: none); "
            "use --rejected base, or a run with save.candidates: {top_bottom: 4} or all"
        )
    kept = _rows(output, "candidates", ["source_index", *_CANDIDATE]) if needs else iter(())
    beside = next(kept, None)
    columns = [name for name in output.record["columns"] if name not in TRAINERS]
    side = rejected.rule
    beyond = [f"{side}_reward", f"{side}_rewards"] if side == "original" else []
    for row in _rows(output, "data", [*_DATA, *beyond, *columns]):
        while beside is not None and beside["source_index"] < row["source_index"]:
            beside = next(kept, None)
        if needs:
            mine = beside is not None and beside["source_index"] == row["source_index"]
            worse = _worse(rejected, beside["candidates"] if beside is not None and mine else [])
        else:
            worse = {n: row[f"{side}_{n}"] for n in ("reward", "rewards")} | {"text": row[f"{side}_completion"]}
        text, reward, rewards = (
            (worse["text"], worse["reward"], _named(worse["rewards"])) if worse else (None, None, dict[str, float]())
        )
        yield Example(
            row["id"],
            row["prompt"],
            answer(row["completion"]),
            row["reward"],
            _named(row["rewards"]),
            row["num_tokens"],
            row["finish_reason"],
            text,
            reward,
            rewards,
            {name: row[name] for name in columns},
        )


def _rows(output: Output, table: str, columns: Sequence[str]) -> Iterator[Row]:
    return (row for batch in batches(output.place, table, columns) for row in batch.to_pylist())


def _worse(rejected: Rejected, kept: Sequence[Row]) -> Row | None:
    """The candidate that the rule chooses, of equals the earlier; None where no candidate qualifies."""
    able = (c for c in kept if c["reward"] is not None and c["reward"] >= rejected.floor)
    ranked = sorted(able, key=lambda c: c["reward"])
    if not ranked:
        return None
    return ranked[statistics.median_low(range(len(ranked))) if rejected.rule == "median" else 0]


def _named(scores: Sequence[Row] | None) -> dict[str, float | None]:
    return {score["name"]: score["value"] for score in scores or ()}


class Sieve:
    """Filters that count: how many examples they read and passed, and how many each of them removed. An example that
    several would remove counts for the first."""

    def __init__(self, filters: Filters, paired: bool) -> None:
        self.filters, self.paired = filters, paired
        self.removed: Counter[str] = Counter()
        self.read = self.passed = 0
        self._seen = Ids()

    def __call__(self, example: Example) -> bool:
        self.read += 1
        if reason := self._objection(example):
            self.removed[reason] += 1
            return False
        self.passed += 1
        return True

    def _objection(self, e: Example) -> str | None:
        f = self.filters
        gap = None if e.rejected_reward is None else e.chosen_reward - e.rejected_reward
        if self.paired and (e.rejected is None or gap is None):
            return "no rejected answer"
        if self.paired and (fold(e.rejected or "") == fold(e.chosen) or (gap or 0.0) <= 0):
            return "rejected is not worse"
        if f.finish is not None and e.finish != f.finish:
            return "finish"
        if not (f.min_tokens or 0) <= e.tokens <= (e.tokens if f.max_tokens is None else f.max_tokens):
            return "tokens"
        if f.max_repetition is not None and repetition(e.chosen) > f.max_repetition:
            return "repetition"
        if f.min_gap is not None and (gap is None or gap < f.min_gap):
            return "gap"
        if f.held_out is not None:
            ours, theirs = e.chosen_rewards.get(f.held_out), e.rejected_rewards.get(f.held_out)
            if ours is None or theirs is None or ours <= theirs:
                return "held-out reward"
        if f.dedup:
            asked = fold(_text_of(e.prompt))
            if asked in self._seen:
                return "duplicate"
            self._seen.claim(asked, 0, "")
        return None


def fold(text: str) -> str:
    return " ".join(text.split())


def _text_of(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def schema(kind: Kind, chat: bool, kept: Columns, sft_messages: bool = False) -> pa.Schema:
    """Columns of a table: the trainer's, and beside them the id, rewards and kept columns, under names that no trainer
    takes."""
    said = _MESSAGES if chat else pa.string()
    types = {"messages": _MESSAGES, "label": pa.bool_()}
    types |= dict.fromkeys(("prompt", "completion", "chosen", "rejected"), said)
    names = {
        "sft": ["messages", "reward"] if sft_messages else ["prompt", "completion", "reward"],
        "dpo": ["prompt", "chosen", "rejected", "chosen_reward", "rejected_reward"],
        "reward": ["chosen", "rejected", "chosen_reward", "rejected_reward"],  # both begin with the prompt
        "kto": ["prompt", "completion", "label", "reward"],
        "prompts": ["prompt"],
    }[kind]
    own = [("id", pa.string()), *((name, types.get(name, pa.float64())) for name in names)]
    return pa.schema([*own, *((name, ARROW[type_]) for name, type_ in kept.items())])


def rows(kind: Kind, e: Example) -> list[Row]:
    """What one example is in a table of this kind; `schema` drops what a table does not have."""
    chat = not isinstance(e.prompt, str)

    def said(text: str | None) -> Any:
        return [{"role": "assistant", "content": text}] if chat else text

    chosen, rejected = said(e.chosen), said(e.rejected)
    row = {**e.kept, "id": e.id, "prompt": e.prompt, "completion": chosen, "reward": e.chosen_reward}
    if kind == "kto":
        return [row | {"label": True}, row | {"completion": rejected, "reward": e.rejected_reward, "label": False}]
    if kind == "reward":
        chosen, rejected = e.prompt + chosen, e.prompt + rejected
    pair = {"chosen": chosen, "rejected": rejected}
    rewards = {"chosen_reward": e.chosen_reward, "rejected_reward": e.rejected_reward}
    return [row | pair | rewards | ({"messages": e.prompt + said(e.chosen)} if chat else {})]


def write(kind: Kind, found: Iterator[Example], folder: Path, of: pa.Schema, rows_per_file: int) -> int:
    """Write all examples as Parquet files of about `rows_per_file` rows; how many rows."""
    count = shard = 0
    buffer: list[Row] = []

    def flush() -> None:
        nonlocal shard
        table = pa.Table.from_pylist(buffer, of)
        pq.write_table(table, folder / f"train-{shard:05d}.parquet", compression="zstd", compression_level=3)
        shard += 1
        buffer.clear()

    for example in found:
        new = rows(kind, example)
        buffer += new
        count += len(new)
        if len(buffer) >= rows_per_file:
            flush()
    if buffer:
        flush()
    return count


def alpaca_eval(row: Mapping[str, Any], generator: str) -> dict[str, str]:
    """A row of data/ (raw or chat) as a record of AlpacaEval (github.com/tatsu-lab/alpaca_eval), whose
    `alpaca_eval --model_outputs FILE` reads a JSON list of them. dataset: the kept column of that name, which
    AlpacaEval's own prompts have; `unknown` without it. AlpacaEval finds its reference answer by the instruction, so
    that is the prompt's own text. Raises ValueError for a prompt of several turns."""
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        turns = [message for message in prompt if message["role"] != "system"]
        if [message["role"] for message in turns] != ["user"]:
            roles = ", ".join(message["role"] for message in turns)
            raise ValueError(f"prompt {row['id']} has the turns {roles}; AlpacaEval takes one question of a user")
        prompt = str(turns[0]["content"])
    dataset, said = str(row.get("dataset") or "unknown"), answer(row["completion"])
    return {"dataset": dataset, "instruction": prompt, "output": said, "generator": generator}
