"""Training sets from finished outputs: which answers become examples, what filters take away, and the table that each
trainer reads. Streams: one part of an output is in memory at a time, and 8 bytes of a hash for every prompt where
duplicates are removed. What trainers accept is TRL 1.16's formats; never a column `margin`, which its RewardTrainer
would train on.

    data/ + candidates/ -> Example (chosen, rejected) -> filters -> rows of sft, dpo, kto, reward, prompts
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from aisp_dist.analysis.compare import words_of
from aisp_dist.analysis.evaluate.outputs import Output
from aisp_dist.analysis.metrics import repetition
from aisp_dist.config import ConfigError

Kind = Literal["sft", "dpo", "kto", "reward", "prompts", "alpaca_eval"]
KINDS: tuple[Kind, ...] = ("sft", "dpo", "kto", "reward", "prompts", "alpaca_eval")
PAIRED: tuple[Kind, ...] = ("dpo", "kto", "reward")
_DATA = ["id", "source_index", "prompt", "completion", "reward", "rewards", "base_completion", "base_reward"]
_DATA += ["base_rewards", "num_tokens", "finish_reason"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Rejected:
    """Which answer of a prompt is the rejected one: the base model's greedy one, or of the kept candidates the worst,
    the median, or the worst whose reward is at least `floor`."""

    rule: Literal["base", "worst", "median", "lowest-above"]
    floor: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Rejected:
        """Raises ConfigError."""
        rule, _, floor = text.partition(":")
        try:
            if rule == "lowest-above" and math.isfinite(float(floor)):
                return cls("lowest-above", float(floor))
            if rule in ("base", "worst", "median") and not floor:
                return cls(rule)  # type: ignore[arg-type]
        except ValueError:
            pass
        raise ConfigError(f"--rejected is {text!r}; give base, worst, median, or lowest-above:FLOOR with a number")


@dataclass(frozen=True)
class Filters:
    """None and False: off. min_gap: of chosen minus rejected reward. tokens, repetition (share of repeated 4-grams of
    words), finish: of the chosen answer. held_out: a reward that must prefer it too. dedup: of prompts that are equal
    but for white space the first is kept."""

    min_gap: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    max_repetition: float | None = None
    held_out: str | None = None
    finish: Literal["stop", "length"] | None = None
    dedup: bool = False


@dataclass(frozen=True)
class Example:
    """A prompt with its selected answer and one that is worse. rejected is None where the output kept none."""

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


def examples(output: Output, rejected: Rejected) -> Iterator[Example]:
    """One example for each row of data/, in its order. Raises ConfigError where the rule needs candidates that were not
    kept."""
    needs = rejected.rule != "base"
    if needs and output.run.save.candidates == "none":
        raise ConfigError(
            f"--rejected {rejected.rule} chooses among candidates, and {output} kept none (save.candidates: none); "
            "use --rejected base, or a run with save.candidates: {top_bottom: 4} or all"
        )
    for name in output.place.names("data"):
        kept: dict[int, list[Row]] = {}
        if needs and (file := output.place.open(f"candidates/{name}")) is not None:
            with file:
                table = pq.read_table(file, columns=["source_index", "candidates"])
            kept = {row["source_index"]: row["candidates"] for row in table.to_pylist()}
        file = output.place.open(f"data/{name}")
        assert file is not None, f"{name} went away while it was read"
        with file:
            for batch in pq.ParquetFile(file).iter_batches(columns=_DATA, batch_size=1024):
                for row in batch.to_pylist():
                    yield _example(row, rejected, kept.get(row["source_index"], []))


def _example(row: Row, rejected: Rejected, kept: Sequence[Row]) -> Example:
    text, reward, rewards = row["base_completion"], row["base_reward"], _named(row["base_rewards"])
    if rejected.rule != "base":
        text, reward, rewards = None, None, {}
        ranked = sorted(
            (c for c in kept if c["reward"] is not None), key=lambda c: c["reward"]
        )  # the earlier of equals
        if rejected.rule == "lowest-above":
            ranked = [c for c in ranked if c["reward"] >= rejected.floor]
        if ranked:
            at = statistics.median_low(range(len(ranked))) if rejected.rule == "median" else 0
            text, reward, rewards = ranked[at]["text"], ranked[at]["reward"], _named(ranked[at]["rewards"])
    own = row["id"], row["prompt"], words_of(row["completion"]), row["reward"], _named(row["rewards"])
    return Example(*own, row["num_tokens"], row["finish_reason"], text, reward, rewards)


def _named(scores: Sequence[Row]) -> dict[str, float | None]:
    return {score["name"]: score["value"] for score in scores}


class Sieve:
    """Filters with a memory: what has passed, and what each of them has removed. The first that objects counts."""

    def __init__(self, filters: Filters, paired: bool) -> None:
        self.filters, self.paired = filters, paired
        self.removed: Counter[str] = Counter()
        self.read = self.passed = 0
        self._seen: set[bytes] = set()

    def __call__(self, example: Example) -> bool:
        self.read += 1
        if reason := self._objection(example):
            self.removed[reason] += 1
            return False
        self.passed += 1
        return True

    def _objection(self, e: Example) -> str | None:
        f = self.filters
        if self.paired and (e.rejected is None or e.rejected_reward is None):
            return "no rejected answer"
        if self.paired and (fold(e.rejected or "") == fold(e.chosen) or e.rejected_reward >= e.chosen_reward):  # type: ignore[operator]
            return "rejected is not worse"
        if f.finish is not None and e.finish != f.finish:
            return "finish"
        if not (f.min_tokens or 0) <= e.tokens <= (e.tokens if f.max_tokens is None else f.max_tokens):
            return "tokens"
        if f.max_repetition is not None and repetition(e.chosen) > f.max_repetition:
            return "repetition"
        if f.min_gap is not None and (e.rejected_reward is None or e.chosen_reward - e.rejected_reward < f.min_gap):
            return "gap"
        if f.held_out is not None:
            ours, theirs = e.chosen_rewards.get(f.held_out), e.rejected_rewards.get(f.held_out)
            if ours is None or theirs is None or ours <= theirs:
                return "held-out reward"
        if f.dedup:
            key = hashlib.blake2b(fold(_text_of(e.prompt)).encode(), digest_size=8).digest()
            if key in self._seen:
                return "duplicate"
            self._seen.add(key)
        return None


def fold(text: str) -> str:
    return " ".join(text.split())


def _text_of(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def schema(kind: Kind, chat: bool, sft_messages: bool = False) -> pa.Schema:
    """Columns of a table: the trainer's, and beside them the id and rewards, under names that no trainer takes."""
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    said = messages if chat else pa.string()
    pair = [("chosen_reward", pa.float64()), ("rejected_reward", pa.float64())]
    own: dict[str, list[tuple[str, pa.DataType]]] = {
        "sft": [("prompt", said), ("completion", said), ("reward", pa.float64())],
        "dpo": [("prompt", said), ("chosen", said), ("rejected", said), *pair],
        "reward": [("chosen", said), ("rejected", said), *pair],
        "kto": [("prompt", said), ("completion", said), ("label", pa.bool_()), ("reward", pa.float64())],
        "prompts": [("prompt", said)],
    }
    if kind == "sft" and sft_messages:
        own["sft"] = [("messages", messages), ("reward", pa.float64())]
    return pa.schema([("id", pa.string()), *own[kind]])


def rows(kind: Kind, e: Example, sft_messages: bool = False) -> list[Row]:
    """What one example is in a table of this kind."""
    chat = not isinstance(e.prompt, str)

    def said(text: str | None) -> Any:
        return [{"role": "assistant", "content": text}] if chat else text

    pair = {"chosen_reward": e.chosen_reward, "rejected_reward": e.rejected_reward}
    match kind:
        case "sft" if sft_messages:
            return [{"id": e.id, "messages": e.prompt + said(e.chosen), "reward": e.chosen_reward}]
        case "sft":
            return [{"id": e.id, "prompt": e.prompt, "completion": said(e.chosen), "reward": e.chosen_reward}]
        case "dpo":
            return [{"id": e.id, "prompt": e.prompt, "chosen": said(e.chosen), "rejected": said(e.rejected), **pair}]
        case "reward":  # the prompt is implicit: what both begin with
            return [{"id": e.id, "chosen": e.prompt + said(e.chosen), "rejected": e.prompt + said(e.rejected), **pair}]
        case "kto":
            both = ((e.chosen, True, e.chosen_reward), (e.rejected, False, e.rejected_reward))
            return [
                {"id": e.id, "prompt": e.prompt, "completion": said(text), "label": label, "reward": reward}
                for text, label, reward in both
            ]
    return [{"id": e.id, "prompt": e.prompt}]


def written(
    kind: Kind, found: Iterator[Example], chat: bool, open_shard: Callable[[int], Any], per_shard: int, **how: Any
) -> int:
    """Write all examples as Parquet shards of at most `per_shard` rows; how many rows."""
    of, count, shard = schema(kind, chat, **how), 0, 0
    buffer: list[Row] = []

    def flush() -> None:
        nonlocal shard
        with open_shard(shard) as stream:
            pq.write_table(pa.Table.from_pylist(buffer, of), stream, compression="zstd", compression_level=3)
        shard += 1
        buffer.clear()

    for example in found:
        new = rows(kind, example, **how)
        buffer += new
        count += len(new)
        if len(buffer) >= per_shard:
            flush()
    if buffer:
        flush()
    return count
