"""`aisp tune CONFIG`: search every method's settings on a few prompts, with the same budget for each, and write a
configuration with what was found. Every trial is an ordinary output under tune/, so the same command resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import yaml

from aisp_dist import arms, metrics, prompts, tuning
from aisp_dist.config import Aisp, ConfigError, Method, Run
from aisp_dist.place import Place
from jobs import cli, compare, prepare, settings
from jobs.progress import say


def main(args: Sequence[str]) -> int:
    parse = settings.parser("tune", cli.VERBS["tune"])
    for name, about in (("prompts", "of a trial"), ("trials", "of each arm")):
        parse.add_argument(f"--{name}", type=int, help=f"{about} (tune.{name})")
    parse.add_argument("--search", choices=("grid", "tpe"), help="tune.search")
    parse.add_argument("--arms", help="names of the arms to tune, with commas (all of compare's with settings to tune)")
    options, run, base_dir = settings.read(parse, args)
    given = {n: v for n in ("prompts", "trials", "search") if (v := getattr(options, n)) is not None}
    secrets = {"runtime": {"storage_options"}}
    values = settings.anchored(run, base_dir).model_dump(mode="json", by_alias=True, exclude=secrets)
    run = settings.check(values | {"tune": values["tune"] | given}).model_copy(update={"runtime": run.runtime})
    if run.compare.cases:
        raise ConfigError("compare.cases: one case is tuned at a time; give a configuration without cases")
    wanted = _arms(run, options.arms)
    for method in wanted.values():
        for point, _ in tuning.grid_points(tuning.grids(method, run.tune), run.tune.trials, run.seed):
            tuning.placed(method, point)
    run = _tuning_prompts(run, base_dir)
    output = Place.at(run.output, run.runtime.storage_options) / "tune"
    with compare.Filling() as filling:
        found = {arm: _search(run, base_dir, output, arm, method, filling) for arm, method in wanted.items()}
    _write(output, values, run, wanted, found)
    for arm, search in found.items():
        best = search.best
        at = ", ".join(f"{name} {value:.4g}" for name, value in best.point.items())
        print(f"{arm:24}{at:44}reward {metrics.Interval(*best.reward)}, NLL {best.nll:.3f} (base {best.base_nll:.3f})")
    print(f"\ntuned: {output}/tuned.yaml; next: aisp compare {output}/tuned.yaml")
    return 0


def _arms(run: Run, names: str | None) -> dict[str, Method]:
    found = {arm: m for arm, m in arms.arms(run).items() if not (isinstance(m, Aisp) and m.shuffle_rewards)}
    found = {arm: m for arm, m in found.items() if arm != arms.RANDOM}
    chosen = names.split(",") if names else list(found)
    if unknown := [name for name in chosen if name not in found]:
        raise ConfigError(f"--arms: {unknown[0]!r} is not among {', '.join(found)}")
    return {arm: found[arm] for arm in chosen}


def _tuning_prompts(run: Run, base_dir: Path) -> Run:
    """The run on the tuning prompts: those after the ones that compare takes. Raises ConfigError for too few."""
    after = run.prompts.model_copy(update={"skip": run.prompts.skip + run.compare.prompts, "limit": run.tune.prompts})
    there = prompts.count(prepare.check(run.model_copy(update={"prompts": after}), base_dir).prompts)
    if there < run.tune.prompts:
        raise ConfigError(
            f"tune.prompts: {run.tune.prompts}, but after the first {run.compare.prompts} inputs, which compare takes, "
            f"there are {there}; lower compare.prompts or tune.prompts, or give more prompts"
        )
    return run.model_copy(update={"prompts": after})


def _search(
    run: Run, base_dir: Path, output: Place, arm: str, method: Method, filling: compare.Filling
) -> tuning.Search:
    search = tuning.Search(method, run.tune, run.seed)
    for k, (point, seed) in enumerate(search):
        trial = run.model_copy(update={"seed": run.seed + seed})
        name = f"{arm}-trial{k:03}"
        plans = compare.prepare_all(trial, base_dir, output, {name: tuning.placed(method, point)}, run.tune.prompts, 1)
        (prepared,) = plans[name]
        filling.fill(f"{arm} {k + 1}/{run.tune.trials}", prepared)
        search.tell(_trial(prepared.output, point, seed))
        say(f"{arm} {k + 1}/{run.tune.trials}: reward {search.told[-1].reward[0]:.3f} at {point}")
    return search


def _trial(output: Place, point: tuning.Point, seed: int) -> tuning.Trial:
    rows = output.dataset("data").to_table(columns=["reward", "nll", "base_nll", "samples_spent"])
    if not rows.num_rows:
        raise cli.Exit(1, f"no prompt of {output} has an answer; the reasons are in its failed/")
    reward, nll, base_nll, spent = (rows[name].to_numpy() for name in rows.column_names)
    means = float(np.mean(nll)), float(np.mean(base_nll))
    return tuning.Trial(point, seed, metrics.interval(reward), *means, int(spent.sum()))


def _write(
    output: Place,
    values: Mapping[str, object],
    run: Run,
    methods: Mapping[str, Method],
    found: Mapping[str, tuning.Search],
) -> None:
    """trials.json and tuned.yaml, a configuration for `aisp compare` with every tuned arm."""
    trials = [
        {"arm": arm, "trials": [asdict(t) | {"settings": t.point} for t in search.told], "best": search.best.point}
        for arm, search in found.items()
    ]
    output.write("trials.json", json.dumps({"tune": run.tune.model_dump(by_alias=True), "arms": trials}).encode())
    tuned = {arm: tuning.placed(method, found[arm].best.point) for arm, method in methods.items()}
    main = arms.main_arm(run, tuned)
    if isinstance(search := tuned[main], Aisp):
        tuned[arms.SHUFFLED] = search.model_copy(update={"shuffle_rewards": True})
    if (nucleus := tuned.get(arms.TOP_P)) is not None:
        tuned[arms.RANDOM] = nucleus.model_copy(update={"num_samples": 1, "num_iterations": 1, "spend": None})
    dumped = {arm: method.model_dump(mode="json", by_alias=True) for arm, method in tuned.items()}
    changed = {"method": dumped[main], "compare": {**run.compare.model_dump(mode="json"), "arms": dumped}}
    output.write("tuned.yaml", yaml.safe_dump({**values, **changed}, sort_keys=False, allow_unicode=True).encode())


if __name__ == "__main__":
    cli.run("tune")
