"""`aisp tune CONFIG`: search the settings of every method on a few prompts, with the same budget for each, and write a
configuration with the best ones. Every trial is an ordinary output under tune/, so the same command resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from aisp_dist.analysis import arms, metrics, tune
from aisp_dist.config import ConfigError, Method, Run, load
from aisp_dist.data import prompts
from aisp_dist.output.filesystem import Place
from jobs import cli, compare, prepare, settings
from jobs.progress import say


def main(args: Sequence[str]) -> int:
    parse = settings.parser("tune", cli.VERBS["tune"])
    for name, about in (("prompts", "prompts of a trial"), ("trials", "trials of each arm")):
        parse.add_argument(f"--{name}", type=int, help=f"{about} (tune.{name})")
    parse.add_argument("--search", choices=("grid", "tpe"), help="how to search (tune.search)")
    parse.add_argument("--arm", action="append", help="an arm to tune; may be repeated (default: every arm of compare)")
    options, run, base_dir = settings.read(parse, args)
    given = {n: v for n in ("prompts", "trials", "search") if (v := getattr(options, n)) is not None}
    secrets = {"runtime": {"storage_options"}}
    values = settings.anchored(run, base_dir).model_dump(mode="json", by_alias=True, exclude=secrets)
    run = load.check(values | {"tune": values["tune"] | given}).model_copy(update={"runtime": run.runtime})
    if run.compare.cases:
        raise ConfigError("compare.cases: one case is tuned at a time; give a configuration without cases")
    wanted = _arms(run, options.arm)
    if unknown := sorted(set(run.tune.grids) - set(arms.arms(run))):
        raise ConfigError(f"tune.grids: {unknown[0]!r} is no arm; the arms are {'; '.join(arms.arms(run))}")
    for arm, method in wanted.items():
        for point, _ in tune.grid_points(tune.spaces(arm, method, run.tune), run.tune.trials, run.seed):
            tune.placed(method, point)
    run = _tuning_prompts(run, base_dir)
    output = Place.at(run.output, run.runtime.storage_options) / "tune"
    with compare.Filling() as filling:
        found = {arm: _search(run, base_dir, output, arm, method, filling) for arm, method in wanted.items()}
    _write(output, values, run, found)
    for arm, search in found.items():
        print(_told(arm, search.best))
    first = run.compare.prompts
    print(f"\nnext, on the first {first} prompts (those after were tuned on): aisp compare {output}/tuned.yaml")
    return 0


def _told(arm: str, best: tune.Trial) -> str:
    at = ", ".join(f"{name} {value:.4g}" for name, value in best.point.items())
    reward = f"reward {metrics.Interval(*best.reward)}, NLL {best.nll:.3f} (base {best.base_nll:.3f})"
    return f"{arm:24} {at:44} {reward}"


def _arms(run: Run, names: Sequence[str] | None) -> dict[str, Method]:
    """The arms to tune by name. Arms with shuffled rewards and the random pick follow the arms that they belong to."""
    found = {arm: m for arm, m in arms.arms(run).items() if not m.is_shuffled and arm != arms.RANDOM}
    chosen = names or list(found)
    if unknown := [name for name in chosen if name not in found]:
        raise ConfigError(f"--arm: {unknown[0]!r} is not among {'; '.join(found)}")
    return {arm: found[arm] for arm in chosen}


def _tuning_prompts(run: Run, base_dir: Path) -> Run:
    """The run on the tuning prompts: those after the prompts of compare. Raises ConfigError for too few."""
    after = run.prompts.model_copy(update={"skip": run.prompts.skip + run.compare.prompts, "limit": run.tune.prompts})
    there = prompts.count(prepare.check(run.model_copy(update={"prompts": after}), base_dir).prompts)
    if there < run.tune.prompts:
        raise ConfigError(
            f"tune.prompts: {run.tune.prompts}, but after the first {run.compare.prompts} inputs, which compare takes, "
            f"there are {there}; lower compare.prompts or tune.prompts, or give more prompts"
        )
    return run.model_copy(update={"prompts": after})


def _search(run: Run, base_dir: Path, output: Place, arm: str, method: Method, filling: compare.Filling) -> tune.Search:
    search = tune.Search(tune.spaces(arm, method, run.tune), run.tune, run.seed)
    for k, (point, seed) in enumerate(search):
        trial = run.model_copy(update={"seed": run.seed + seed})
        told = json.dumps([point, seed, run.prompts.skip, run.tune.prompts], sort_keys=True)
        name = f"{arm}-{hashlib.blake2b(told.encode(), digest_size=4).hexdigest()}"  # the same for every kind of search
        plans = compare.prepare_all(trial, base_dir, output, {name: tune.placed(method, point)}, run.tune.prompts, 1)
        (prepared,) = plans[name]
        filling.fill(f"{arm} {k + 1}/{run.tune.trials}", prepared)
        search.tell(_trial(prepared.output, point, seed))
        say(f"{arm} {k + 1}/{run.tune.trials}: reward {search.told[-1].reward[0]:.3f} at {point}")
    return search


def _trial(output: Place, point: tune.Point, seed: int) -> tune.Trial:
    rows = output.dataset("data").to_table(columns=["reward", "nll", "base_nll", "samples_spent"])
    if not rows.num_rows:
        raise cli.Exit(1, f"no prompt of {output} has an answer; the reasons are in its failed/")
    reward, nll, base_nll, spent = (rows[name].to_numpy() for name in rows.column_names)
    means = float(np.mean(nll)), float(np.mean(base_nll))
    return tune.Trial(point, seed, metrics.interval(reward), *means, int(spent.sum()))


def _write(
    output: Place,
    values: Mapping[str, Any],
    run: Run,
    found: Mapping[str, tune.Search],
) -> None:
    """Write trials.json, and tuned.yaml: the configuration with every tuned arm in its place, for `aisp compare` into
    an output of its own. Other arms stay as they are, null too; arms that an earlier call tuned by the same section
    `tune` stay tuned."""
    way = run.tune.model_dump(mode="json", by_alias=True)
    before = json.loads(output.read("trials.json") or "{}")
    kept = [one for one in before.get("arms", ()) if before["tune"] == way and one["arm"] not in found]
    trials = kept + [
        {"arm": arm, "trials": [asdict(t) for t in search.told], "best": search.best.point}
        for arm, search in found.items()
    ]
    output.write("trials.json", json.dumps({"tune": way, "arms": trials}).encode())
    there = arms.arms(run)
    best = {one["arm"]: one["best"] for one in trials if one["arm"] in there}
    tuned = {arm: tune.placed(there[arm], point) for arm, point in best.items()}
    method = next((tuned[arm] for arm in tuned if there[arm] == run.method), run.method)
    named: dict[str, Method | None] = {arm: None for arm, method in run.compare.arms.items() if method is None}
    named |= there | tuned
    for arm, other in there.items():
        true = next((tuned[name] for name in tuned if there[name] == other.shuffled(False)), None)
        if other.is_shuffled and true is not None:
            named[arm] = true.shuffled(True)
    if arms.RANDOM in there and arms.TOP_P in tuned:
        named[arms.RANDOM] = arms.one_answer(tuned[arms.TOP_P])
    dumped = {arm: m and m.model_dump(mode="json", by_alias=True) for arm, m in named.items()}
    changed = {
        "output": f"{run.output}/tuned",
        "method": method.model_dump(mode="json", by_alias=True),
        "compare": {**values["compare"], "arms": dumped},
    }
    output.write("tuned.yaml", yaml.safe_dump({**values, **changed}, sort_keys=False, allow_unicode=True).encode())


if __name__ == "__main__":
    cli.run("tune")
