"""The prompts, their split, and the arms. The split is by a hash of the key, once and for all.

Prompts are read from the directory that AISP_TEST_DATA names, and written, as they are used, below the output alone."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]
SPLITS = {
    "ifeval": {"tune": 30, "report": 48, "student": 128, "student-test": 100},
    "shp": {"tune": 30, "report": 48},
}
REWARDS: dict[str, Any] = {
    "ifeval": {
        "followed": {"kind": "function", "function": "rewards.py:followed"},
        "relevant": {"kind": "function", "function": "rewards.py:relevant", "weight": 0.1},
    },
    "shp": {"alike": {"kind": "function", "function": "rewards.py:alike"}},
}


def lines(task: str, data: Path) -> list[Line]:
    """All prompts of a task: id, prompt, and what its rewards need."""
    if task == "ifeval":
        rows = [json.loads(line) for line in (data / "ifeval.jsonl").read_text(encoding="utf-8").splitlines()]
        checks = [json.dumps(list(zip(row["instruction_id_list"], row["kwargs"], strict=True))) for row in rows]
        return [
            {"id": str(row["key"]), "prompt": row["prompt"], "checks": of} for row, of in zip(rows, checks, strict=True)
        ]
    with gzip.open(data / "shp_test_500.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [{"id": row["post_id"], "prompt": row["history"], "preferred": row["preferred"]} for row in rows]


def split(task: str, rows: Iterable[Line]) -> dict[str, list[Line]]:
    """The prompts of each part, in the order of a hash of their ids."""

    def rank(row: Line) -> str:
        return hashlib.blake2b(f"{task}\0{row['id']}".encode()).hexdigest()

    ordered = iter(sorted(rows, key=rank))
    return {part: [next(ordered) for _ in range(size)] for part, size in SPLITS[task].items()}


def run_values(task: str, source: Path, model: str, tokens: int, dtype: str) -> dict[str, Any]:
    """The configuration of a task but its method and seed."""
    return {
        "output": "unused",
        "prompts": {"source": str(source), "id_column": "id", "keep": ["checks" if task == "ifeval" else "preferred"]},
        "generator": {"model": model, "max_new_tokens": tokens, "batch_rows": 64, "dtype": dtype},
        "rewards": REWARDS[task],
    }


def all_rewards() -> dict[str, Any]:
    """The part of a configuration that has the rewards of all tasks."""
    keep = ["checks", "preferred"]
    return {"rewards": {k: v for of in REWARDS.values() for k, v in of.items()}, "prompts": {"keep": keep}}


@dataclass(frozen=True)
class Arm:
    """A method and the settings that tuning tries. together: samples of an iteration."""

    section: dict[str, Any]
    points: tuple[dict[str, Any], ...]
    together: int = 8

    def method(self, point: dict[str, Any], samples: int) -> dict[str, Any]:
        """Its section with `samples` samples. Raises ValueError where they are not whole iterations."""
        if samples % self.together:
            raise ValueError(f"--samples: {samples} is not a multiple of {self.together}; all arms spend the same")
        name = "chains" if self.section["kind"] == "qalign" else "num_samples"
        size = {name: self.together, "num_iterations": samples // self.together}
        return self.section | point | size


def _nuclei(*points: tuple[float, float]) -> tuple[dict[str, Any], ...]:
    return tuple({"sampling": {"top_p": p, "temperature": t}} for p, t in points)


_QALIGN = tuple(
    {"beta": {"sd": sd}, "sampling": {"top_p": p}} for sd, p in ((0.1, 0.9), (0.25, 0.9), (0.5, 0.9), (0.25, 0.8))
)
BEST = "best-of-n"
ARMS = {
    BEST: Arm({"kind": "best_of_n"}, _nuclei((0.8, 1.0), (0.9, 1.0), (0.95, 1.0), (0.9, 0.8))),
    "population": Arm(
        {"kind": "population"},
        (
            *({"sampling": {"flip_rate": rate}} for rate in (0.2, 0.28, 0.4)),
            {"sampling": {"flip_rate": 0.28}, "fresh": "ties"},
        ),
    ),
    "qalign, 16 chains": Arm({"kind": "qalign"}, _QALIGN, together=16),
    "qalign, 1 chain": Arm({"kind": "qalign"}, _QALIGN, together=1),
    "aisp as published": Arm(
        {"kind": "aisp"},
        tuple({"sigma2": s, "lambda": value} for s, value in ((0.1, 0.1), (0.3, 0.1), (0.7, 0.1), (0.5, 0.3))),
    ),
    "aisp, ess": Arm(
        {"kind": "aisp"},
        tuple(
            {"sigma2": {"flip_rate": rate}, "lambda": {"ess": ess}}
            for rate, ess in ((0.1, 0.1), (0.1, 0.25), (0.1, 0.5), (0.2, 0.25))
        ),
    ),
}
CONTROLS = {f"{name}, rewards shuffled": name for name in ("population", "qalign, 16 chains", "aisp, ess")}

# Arms that are not tuned and run only when they are asked for: population's defaults, then ablations.
FIXED = {
    "population, defaults": Arm({"kind": "population"}, ({},)),
    "population, fresh by ties": Arm({"kind": "population"}, ({"fresh": "ties"},)),
    "population, half of the answers are parents": Arm({"kind": "population"}, ({"ess": 1e6},)),
    "population, noise beside draws": Arm({"kind": "population"}, ({"noise_rate": 0.05},)),
    "qalign, beta near 0": Arm({"kind": "qalign"}, ({"beta": {"sd": 1e-6}, "sampling": {"top_p": 0.9}},), together=16),
    "qalign, beta large": Arm({"kind": "qalign"}, ({"beta": {"sd": 1e6}, "sampling": {"top_p": 0.9}},), together=16),
}
CONTROLS |= {f"{name}, rewards shuffled": name for name in list(FIXED)[:2]}

# AISP over its two settings, with noise that is independent and noise that is correlated over time, beside best-of-n.
SENSITIVITY = {BEST: Arm({"kind": "best_of_n"}, _nuclei((0.9, 1.0)))} | {
    f"{noise if isinstance(noise, str) else 'ar1 0.8'}, flip rate {rate}, ess {ess}": Arm(
        {"kind": "aisp", "noise": noise}, ({"sigma2": {"flip_rate": rate}, "lambda": {"ess": ess}},)
    )
    for noise in ("independent", {"ar1": 0.8})
    for rate in (0.05, 0.1, 0.2)
    for ess in (0.1, 0.25, 0.5)
}
