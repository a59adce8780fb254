"""What a report is made of: arms with their finished outputs, every number of them that a figure needs, and the figures
of the table. Refuses outputs that cannot stand side by side. No torch; one batch of rows is in memory at a time.

Shapes: P prompts, K iterations.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from aisp_dist.analysis import compare
from aisp_dist.analysis.arms import BASE
from aisp_dist.analysis.evaluate import outputs
from aisp_dist.analysis.evaluate.outputs import Output, Table
from aisp_dist.analysis.metrics import interval, spread
from aisp_dist.config import ConfigError, Method
from aisp_dist.methods.limit import within
from aisp_dist.output import log
from aisp_dist.output.filesystem import Place

CURVES = ("mean", "best", "so far", "ess", "kl", "samples", "tokens")  # the last two are sums up to an iteration
LIMITS = np.linspace(0, 1, 21)  # nats per token above the base answer
_TRACED = 20_000  # prompts whose traces the curves average; of a larger run every n-th
Json = dict[str, Any]


@dataclass(frozen=True)
class Seed:
    """One finished output. curves: [P', K] by name of CURVES, NaN where a prompt has none. frontier: [P', L] reward of
    the best answer within each of LIMITS, of those that were kept; None where candidates have no likelihood. metrics:
    the last entry of metrics.jsonl. evaluation: evaluation.json."""

    output: Output
    table: Table
    curves: Mapping[str, np.ndarray]
    frontier: np.ndarray | None
    spent: float
    metrics: Json | None
    evaluation: Json | None


@dataclass(frozen=True)
class Source:
    """figures: of each arm, as in compare.json, which they are where one comparison is shown. main: the arm that all
    are compared with. shared: prompts that every arm finished."""

    arms: Mapping[str, Sequence[Seed]]
    figures: Sequence[Json]
    main: str
    shared: Sequence[str]
    left_out: int
    trials: Json | None

    @property
    def controls(self) -> set[str]:
        """Arms whose search saw shuffled rewards."""
        return {name for name, seeds in self.arms.items() if getattr(self.method(name), "shuffle_rewards", False)}

    def method(self, arm: str) -> Method:
        return self.arms[arm][0].output.run.method

    def budget(self, arm: str) -> int:
        """Samples that a prompt may have."""
        return self.method(arm).num_samples * self.method(arm).num_iterations

    def values(self, arm: str, name: str, base: bool = False) -> np.ndarray:
        """[P] of a measure at the shared prompts, averaged over seeds."""
        seeds = self.arms[arm]
        mean: np.ndarray = np.mean([s.table.values(name, self.shared, base=base) for s in seeds], axis=0)
        return mean


def read(places: Sequence[Place]) -> Source:
    """The outputs and comparisons at these places, side by side. Raises ConfigError for what is neither, for unfinished
    outputs and for those that have other prompts, rewards or samples than the first."""
    comparisons = {place: _comparison(place) for place in places}
    found: dict[str, list[Output]] = {}
    for place, there in comparisons.items():
        folder = place.uri.rsplit("/", 1)[-1]
        arms = (
            {folder: [place]} if there is None else {arm: _all(there[0], f) for arm, f in there[1]["outputs"].items()}
        )
        for arm, seeds in arms.items():
            name = arm if arm not in found else f"{arm} ({folder})"
            if name in found:
                raise ConfigError(f"two of the outputs would be called {name!r}; rename one's folder")
            found[name] = [outputs.open_output(seed) for seed in seeds]
    _check(found)
    arms_read = {name: [_read(output) for output in seeds] for name, seeds in found.items()}
    first = next(iter(arms_read.values()))[0]
    everything = [seed for seeds in arms_read.values() for seed in seeds]
    for seed in everything[1:]:
        outputs.check_prompts(first.output, first.table, seed.output, seed.table)
    shared = [id for id in first.table.ids if all(id in seed.table.ids for seed in everything)]
    if not shared:
        raise ConfigError("no prompt was finished by every arm: nothing to show; the reasons are in each one's failed/")
    left_out = len(set().union(*(seed.table.ids for seed in everything))) - len(shared)
    known = [there[1] for there in comparisons.values() if there is not None]
    main = known[0]["main"] if known else next((n for n, s in found.items() if s[0].run.method.kind == "aisp"), None)
    source = Source(arms_read, (), main or next(iter(found)), shared, left_out, _trials(places))
    figures = known[0]["arms"] if len(known) == len(places) == 1 else _figures(source)
    return Source(arms_read, figures, source.main, shared, left_out, source.trials)


def _comparison(place: Place) -> tuple[Place, Json] | None:
    """comparison.json and the place it lies in; None for the output of a run, also where a comparison lies in it: that
    is named by its own folder."""
    a_run = place.read("run.json") is not None
    for root in (place, place / "compare"):
        if (data := root.read("comparison.json")) is None or (a_run and root != place):
            continue
        try:
            there = json.loads(data)
            if not (there["arms"] and there["main"] in there["outputs"]):
                raise ValueError("its main arm is not among its outputs")
            names = {figure.name for figure in fields(compare.Arm)}
            if missing := {name for arm in there["arms"] for name in names - arm.keys()}:
                raise ValueError(f"its arms have no {', '.join(sorted(missing))}")
            return root, there
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{root}/comparison.json is none that this version reads ({error!r}); `aisp compare` writes it again"
            ) from None
    if not a_run:
        raise ConfigError(
            f"{place} holds neither run.json nor compare.json; name the output of a finished `aisp align` or "
            "`aisp compare`"
        )
    return None


def _all(root: Place, folders: Sequence[str]) -> list[Place]:
    return [Place(folder, root.options) if folder.startswith(("/", "s3://")) else root / folder for folder in folders]


def _trials(places: Sequence[Place]) -> Json | None:
    for place in places:
        for root in (place, Place(place.uri.rpartition("/")[0], place.options)):
            if data := root.read("tune/trials.json"):
                found: Json = json.loads(data)
                return found
    return None


def _check(found: Mapping[str, Sequence[Output]]) -> None:
    """Raise ConfigError unless all are finished, have the same rewards and the same samples or one a prompt."""
    first_name, (first, *_) = next(iter(found.items()))
    sizes = {n: s[0].run.method.num_samples * s[0].run.method.num_iterations for n, s in found.items()}
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


def _read(output: Output) -> Seed:
    table, place = outputs.read(output), output.place
    step = -(-len(table.ids) // _TRACED)
    wanted = {id for id, at in table.ids.items() if at % step == 0}
    rows: dict[str, dict[str, list[float]]] = {id: {} for id in wanted}
    bases: dict[str, tuple[float, float | None]] = {}
    frontier = []
    spent = 0
    for row in batches(place, "data", ["id", "samples_spent", "curve.list.element", "base_nll", "base_reward"]):
        spent += row["samples_spent"]
        if row["id"] in wanted:
            rows[row["id"]]["so far"] = row["curve"] or []
            bases[row["id"]] = row["base_nll"], row["base_reward"]
    names = {"mean": "mean_reward", "best": "best_reward", "ess": "ess", "kl": "kl"}
    columns = [f"trace.list.element.{n}" for n in (*names.values(), "lengths")]
    limit = output.run.method.limit  # without one no candidate has a likelihood
    columns += [f"candidates.list.element.{n}" for n in ("nll", "reward", "text") if limit]
    other = limit and limit.model_copy(update={"nll": None})  # likelihood is what the frontier is over
    for row in batches(place, "candidates", ["id", *columns]):
        if limit and row["id"] in wanted:
            frontier.append(
                _frontier(*bases[row["id"]], [c for c in row["candidates"] if within(other, c["text"], None, None)])
            )
        if row["id"] in wanted and row["trace"]:
            mine = {name: [step[column] for step in row["trace"]] for name, column in names.items()}
            lengths = [step["lengths"] for step in row["trace"]]
            sums = {"samples": np.cumsum([*map(len, lengths)]), "tokens": np.cumsum([*map(sum, lengths)])}
            rows[row["id"]] |= mine | {name: found.tolist() for name, found in sums.items()}
    curves = {name: _padded([row.get(name, []) for row in rows.values()], name) for name in CURVES}
    evaluation = place.read("evaluation.json")
    measured = None if evaluation is None else json.loads(evaluation)
    limited = np.array([best for best in frontier if best is not None])
    return Seed(
        output, table, curves, limited if len(limited) else None, spent / len(table.ids), log.latest(place), measured
    )


def _frontier(base_nll: float, base_reward: float | None, candidates: Sequence[Json]) -> list[float] | None:
    """Best reward within each of LIMITS, the base answer's where no candidate is; None without likelihoods."""
    known = [(c["nll"] - base_nll, c["reward"]) for c in candidates if None not in (c["nll"], c["reward"])]
    if not known or base_reward is None:
        return None
    return [max((r for excess, r in known if excess <= limit), default=base_reward) for limit in LIMITS]


def batches(place: Place, table: str, columns: Sequence[str], rows: int = 1024) -> Iterator[Json]:
    """Rows of a table, these columns (dotted ones too) alone; in memory is one batch."""
    for name in place.names(table):
        file = place.open(f"{table}/{name}") if name.endswith(".parquet") else None
        if file is not None:
            with file:
                for batch in pq.ParquetFile(file).iter_batches(rows, columns=list(columns)):
                    yield from batch.to_pylist()


def _padded(rows: Sequence[Sequence[float | None]], name: str) -> np.ndarray:
    """[P, K]. A search that stopped early keeps what it has reached and spent, and has no mean after its end."""
    out = np.full((len(rows), max((len(row) for row in rows), default=0)), np.nan)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
        if row and name in ("so far", "samples", "tokens"):
            out[i, len(row) :] = out[i, len(row) - 1]
    return out


def _figures(source: Source) -> list[Json]:
    """As compare.compare has them, from columns of numbers alone."""
    main, arms, shared = source.main, source.arms, source.shared
    run = arms[main][0].output.run
    held_out = {n: f"reward {n}" for n, r in run.rewards.items() if r.use == "report"}
    found = []
    for name in (BASE, *arms):
        of, base = (main, True) if name == BASE else (name, False)
        columns = {m: source.values(of, m, base) for m in ("reward", "nll", "diversity", "tokens")}
        ours = {m: source.values(main, m) for m in columns}
        there = arms[of][0].table.base if base else arms[of][0].table.selected
        scores = {n: source.values(of, m, base) for n, m in held_out.items() if m in there}
        finite = np.isfinite(columns["reward"])
        by_seed = [s.table.values("reward", shared, base=base)[finite].mean() for s in arms[of]]
        won = (ours["reward"] > columns["reward"]) + (ours["reward"] == columns["reward"]) / 2
        ends = {m: [s.curves[m][:, -1] for s in arms[of] if s.curves[m].size] for m in ("samples", "tokens")}
        curve = [s.curves["so far"] for s in arms[of] if s.curves["so far"].shape[1] > 1]
        seconds = [t for s in arms[of] if (t := log.seconds(s.output.place)) is not None]
        method = source.method(of)
        calls = None if base or not ends["samples"] or method.kind == "args" else _mean(ends["samples"])
        arm = compare.Arm(
            name=name,
            prompts=int(finite.sum()),
            samples=1.0 if base else float(np.mean([seed.spent for seed in arms[of]])),
            reward=spread(columns["reward"]),
            versus=spread(ours["reward"] - columns["reward"]),
            won=float(won[finite].mean()) if finite.any() else None,
            nll=spread(columns["nll"]),
            nll_versus=spread(ours["nll"] - columns["nll"]),
            diversity=interval(columns["diversity"]),
            num_tokens=float(columns["tokens"].mean()),
            held_out={n: cell for n, v in scores.items() if (cell := spread(v)) is not None},
            held_out_versus={
                n: cell for n, v in scores.items() if (cell := spread(source.values(main, held_out[n]) - v)) is not None
            },
            std=float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 and finite.any() else None,
            auc=None if base or not curve else _mean(curve),
            model_tokens=None if base or not ends["tokens"] else _mean(ends["tokens"]),
            reward_calls=calls,
            seconds=None if base or not seconds else float(np.mean(seconds)),
        )
        found.append(asdict(arm))
    return found


def _mean(values: Sequence[np.ndarray]) -> float:
    return float(np.mean([np.nanmean(one) for one in values]))
