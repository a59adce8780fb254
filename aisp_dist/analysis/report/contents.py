"""What a report is made of: the arms with their finished outputs, their comparison, and the curves of their searches.
Refuses outputs that cannot stand side by side. No torch; one batch of rows is in memory at a time.

Shapes: P prompts that every arm finished; P' of them whose traces are read; K iterations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from aisp_dist.analysis import outputs
from aisp_dist.analysis.compare import Comparison, compare
from aisp_dist.analysis.outputs import Columns, Output
from aisp_dist.config import ConfigError, Method
from aisp_dist.output.filesystem import Place

GROWING = ("so far", "samples", "tokens")  # curves that keep their last value where a search stops early
_TRACED = 20_000  # prompts whose traces the curves average; of a larger run every n-th
_STEP = {"mean": "mean_reward", "best": "best_reward", "ess": "ess", "kl": "kl"}  # curve: field of a trace entry
Json = dict[str, Any]


@dataclass(frozen=True)
class Contents:
    """ids: the P prompts. curves: by arm, [P', K] averaged over seeds: `so far`, the best reward so far; mean and best
    of the iteration, ess, kl; samples and tokens up to it; NaN where a prompt has none. evaluations: evaluation.json of
    the first seeds that have one."""

    comparison: Comparison
    arms: Mapping[str, Sequence[Columns]]
    ids: Any
    curves: Mapping[str, Mapping[str, np.ndarray]]
    evaluations: Mapping[str, Json]

    @property
    def main(self) -> str:
        return self.comparison.main

    @property
    def shuffled(self) -> list[str]:
        """Arms whose search saw shuffled rewards."""
        return sorted(name for name in self.arms if getattr(self.method(name), "shuffle_rewards", False))

    def output(self, arm: str) -> Output:
        return self.arms[arm][0].output

    def method(self, arm: str) -> Method:
        return self.output(arm).run.method

    def values(self, arm: str, measure: str, base: bool = False) -> np.ndarray:
        """[P], averaged over seeds."""
        mean: np.ndarray = np.mean([c.values(measure, self.ids, base) for c in self.arms[arm]], axis=0)
        return mean


def read(places: Sequence[Place]) -> Contents:
    """The outputs and comparisons at these places, side by side. Raises ConfigError for what is neither, for unfinished
    outputs and for those that have other prompts, rewards or numbers of samples than the first."""
    comparisons = {place: _comparison(place) for place in places}
    found: dict[str, list[Output]] = {}
    limits: dict[str, int | None] = {}
    for place, (root, there) in comparisons.items():
        folder = place.uri.rsplit("/", 1)[-1]
        for arm, seeds in there.get("outputs", {folder: [place.uri]}).items():
            name = arm if arm not in found else f"{arm} ({folder})"
            if name in found:
                raise ConfigError(f"two of the outputs would be called {name!r}; rename one's folder")
            remote = ("/", "s3://")
            seeds = [Place(seed, root.options) if seed.startswith(remote) else root / seed for seed in seeds]
            found[name] = [outputs.open_output(seed) for seed in seeds]
            limits[name] = there.get("limit")
    _check(found)
    arms = {name: [outputs.read(one, limit=limits[name]) for one in seeds] for name, seeds in found.items()}
    everything = [columns for seeds in arms.values() for columns in seeds]
    for columns in everything[1:]:
        outputs.check_prompts(everything[0], columns)
    mains = [there["main"] for _, there in comparisons.values() if "main" in there]
    mains += [name for name, (first, *_) in found.items() if first.run.method.kind == "aisp"]
    comparison, ids = compare(arms, [*mains, *found][0]), outputs.in_all(everything)
    traced = ids[:: -(-len(ids) // _TRACED)]
    return Contents(
        comparison,
        arms,
        ids,
        {name: _curves(seeds, traced) for name, seeds in arms.items()},
        {n: json.loads(data) for n, (first, *_) in found.items() if (data := first.place.read("evaluation.json"))},
    )


def _comparison(place: Place) -> tuple[Place, Json]:
    """comparison.json and the place it lies in; empty for the output of a run, also where a comparison lies in it: that
    one is named by its own folder."""
    if place.read("run.json") is not None:
        return place, {}
    for root in (place, place / "compare"):
        if (data := root.read("comparison.json")) is None:
            continue
        try:
            there = json.loads(data)
            if there["main"] not in there["outputs"]:
                raise ValueError("its main arm is not among its outputs")
            return root, there
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{root}/comparison.json cannot be read by this version ({error!r}); `aisp compare` writes it again"
            ) from None
    raise ConfigError(
        f"{place} holds neither run.json nor comparison.json; name the output of a finished `aisp align` or "
        "`aisp compare`"
    )


def _check(found: Mapping[str, Sequence[Output]]) -> None:
    """Raise ConfigError unless all are finished, have the same rewards and the same samples or one a prompt."""
    first_name, (first, *_) = next(iter(found.items()))
    sizes = {name: seeds[0].budget for name, seeds in found.items()}
    if other := {name: n for name, n in sizes.items() if n not in (1, max(sizes.values()))}:
        most = max(sizes, key=lambda name: sizes[name])
        told = ", ".join(f"{name} has {n}" for name, n in other.items())
        raise ConfigError(
            f"outputs are shown side by side at equal samples: {most} has {sizes[most]} a prompt, but {told}; they "
            "differ in method.num_samples or method.num_iterations"
        )
    for name, seeds in found.items():
        for output in seeds:
            outputs.check_finished(output, None)
            mine, theirs = (
                {r: x.weight for r, x in o.run.rewards.items() if x.use == "select"} for o in (first, output)
            )
            if mine != theirs or first.run.combine != output.run.combine:
                raise ConfigError(
                    f"{name} was selected by {theirs} ({output.run.combine}), {first_name} by {mine} "
                    f"({first.run.combine}): their rewards differ; give outputs with the same rewards"
                )


def _curves(seeds: Sequence[Columns], ids: Any) -> dict[str, np.ndarray]:
    lists: dict[str, list[Sequence[float | None] | np.ndarray]] = {name: [] for name in (*GROWING, *_STEP)}
    columns = [f"trace.list.element.{name}" for name in (*_STEP.values(), "lengths", "given")]
    for seed in seeds:
        lists["so far"] += [row["curve"] or [] for row in outputs.rows(seed, ids, ["curve"])]
        traces = {row["source_index"]: row["trace"] for row in outputs.rows(seed, ids, columns, "candidates")}
        for ordinal in seed.about("source_index", ids):
            trace = traces.get(ordinal, [])
            lists["samples"].append(np.cumsum([len(step["lengths"]) for step in trace]))
            lists["tokens"].append(np.cumsum([sum(step["lengths"]) - sum(step["given"]) for step in trace]))
            for name, field in _STEP.items():
                lists[name].append([step[field] for step in trace])
    prompts = np.tile(np.arange(len(ids)), len(seeds))
    found = {}
    for name, rows in lists.items():
        table = pd.DataFrame(rows).astype(float)
        found[name] = (table.ffill(axis=1) if name in GROWING else table).groupby(prompts).mean().to_numpy()
    return found
