"""`aisp compare CONFIG --prompts 64`: the pilot before spending. Every arm is an ordinary output under compare/, so an
interrupted comparison resumes, and each arm's table can be read like any other."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from actors.counts import Counts
from aisp_dist.analysis import arms, compare, outputs
from aisp_dist.config import ConfigError, Method, Run
from aisp_dist.output import manifest
from aisp_dist.output.filesystem import Place
from jobs import cli, cost, prepare, session, settings
from jobs.prepare import Prepared
from jobs.progress import Progress, Total, say


def main(args: Sequence[str]) -> int:
    parse = settings.parser("compare", cli.VERBS["compare"])
    parse.add_argument("--prompts", type=int, help="prompts, from the first on (compare.prompts, 64)")
    parse.add_argument("--seeds", type=int, help="seeds that every arm is repeated with (compare.seeds, 1)")
    parse.add_argument("--case", action="append", help="run only this one of compare.cases; may be repeated")
    options, run, base_dir = settings.read(parse, args)
    for name in ("prompts", "seeds"):
        if (value := getattr(options, name)) is not None:
            if value < 1:
                raise ConfigError(f"--{name} is {value}; it must be at least 1")
            run = run.model_copy(update={"compare": run.compare.model_copy(update={name: value})})
    cases = settings.cases(run)
    if unknown := sorted(set(options.case or ()) - set(cases)):
        raise ConfigError(f"--case {unknown[0]!r} is not among compare.cases ({', '.join(cases) or 'none'})")
    wanted = {name: case for name, case in cases.items() if not options.case or name in options.case}
    taken: dict[str, str] = {}
    for name, case in wanted.items():  # refuse whatever can be refused before the first run
        prepare.check(case, base_dir)
        for arm in arms.arms(case):
            for seed in range(case.compare.seeds):
                place = f"{folder(name)}/" * bool(name) + _output(arm, seed)
                if place in taken:
                    other = f"compare.cases {taken[place]} {name}" if name else f"compare.arms {taken[place]}, {arm}"
                    raise ConfigError(f"{other}: two would be written to compare/{place}; give them other names")
                taken[place] = f"{name}: {arm}" if name else arm
    for name, case in wanted.items():
        if name:
            print(f"\n{name}")
        _compare(case, base_dir, _root(run) / folder(name) if name else _root(run))
    return 0


def _root(run: Run) -> Place:
    return Place.at(run.output, run.runtime.storage_options) / "compare"


def _compare(run: Run, base_dir: Path, output: Place) -> None:
    found = arms.arms(run)
    plans = prepare_all(run, base_dir, output, found, run.compare.prompts, run.compare.seeds)
    everything = Total(prepare.check(run, base_dir))
    with Filling() as filling:
        for arm, seeds in plans.items():
            for plan in seeds:
                filling.fill(arm, plan)
    limit, main = _limit(run, run.compare.prompts), arms.main_arm(run, found)
    read = {arm: [outputs.read(outputs.open_output(p.output), limit=limit) for p in s] for arm, s in plans.items()}
    result = compare.compare(read, main)
    folders = {arm: [p.output.uri.removeprefix(f"{output.uri}/") for p in seeds] for arm, seeds in plans.items()}
    busy = filling.busy() or cost.measured(output)  # of an earlier command, where this one drew nothing
    document = result.json() | {"outputs": folders, "limit": limit, "busy": busy}
    output.write("comparison.json", json.dumps(document, indent=2).encode())
    print(compare.text(result) + "\n\nsettings:")
    for arm, columns in read.items():
        print(f"{arm}: {columns[0].output.method_name}")
    if not filling.counts.samples:
        return
    if everything.value is None:
        print("\nthe input is still being counted; run again for the cost of the whole")
        return
    pilot = plans[main][0].output
    size = sum(sum(pilot.sizes(table).values()) for table in ("data", "candidates"))
    rows = outputs.count(pilot, "data")
    each = next(arm.samples for arm in result.arms if arm.name == main)
    print("\n" + cost.text(run, everything.value, filling.counts, filling.seconds, filling.actors, size, rows, each))


def prepare_all(
    run: Run, base_dir: Path, output: Place, found: Mapping[str, Method], prompts: int, seeds: int
) -> dict[str, list[Prepared]]:
    """An output for every arm and seed, in folders of `output`, checked. Traces are kept: the comparison reads them."""

    def prepared(arm: str, method: Method, seed: int) -> Prepared:
        changed = {
            "method": method,
            "output": str(output / _output(arm, seed)),
            "seed": run.seed + seed,
            "prompts": run.prompts.model_copy(update={"limit": _limit(run, prompts)}),
            "save": run.save.model_copy(update={"trace": True}),
        }
        return prepare.prepare(run.model_copy(update=changed), base_dir)

    return {arm: [prepared(arm, method, seed) for seed in range(seeds)] for arm, method in found.items()}


def _limit(run: Run, prompts: int) -> int:
    return prompts if run.prompts.limit is None else min(prompts, run.prompts.limit)


def _output(arm: str, seed: int) -> str:
    return folder(arm) + (f"-seed{seed}" if seed else "")


class Filling:
    """Fills outputs one after the other on one session, since all have the same models. The session starts when it is
    first needed; a method that brings something of its own into the generators needs another one. counts, seconds,
    actors: of what this object drew."""

    def __init__(self) -> None:
        self.counts, self.seconds, self.actors = Counts(), 0.0, 1
        self.stack = ExitStack()
        self.session: session.Session | None = None
        self.brought: str | None = None

    def __enter__(self) -> Filling:
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    def fill(self, title: str, prepared: Prepared) -> None:
        """Fill one output; one that is whole already costs nothing. Raises Exit, ConfigError."""
        if manifest.read_run(prepared.output) is not None and prepared.table().whole():
            return
        brings = prepared.located.method.brings
        engine = prepared.choice.engine
        other = self.session is None or engine != self.session.prepared.choice.engine
        if self.session is None or other or (brings and brings != self.brought):
            self.stack.close()
            self.session, self.brought = self.stack.enter_context(session.Session(prepared, say)), brings
        with Progress(prepared.output, prepared.located, title=f"{title}: ") as progress:
            self.session.relabel(prepared, prepared.table(), progress)
        if progress.now is not None:
            self.counts += progress.now
            self.actors = int(progress.now.alive.get("generator", 1))
        self.seconds += progress.seconds

    def busy(self) -> dict[str, float]:
        """Seconds that one replica of each role worked for a sample; empty where nothing was drawn."""
        samples = self.counts.samples
        return {role: seconds / samples for role, seconds in self.counts.busy.items()} if samples else {}


def folder(name: str) -> str:
    return re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-") or "arm"


if __name__ == "__main__":
    cli.run("compare")
