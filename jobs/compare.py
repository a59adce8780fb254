"""`aisp compare CONFIG --prompts 64`: the pilot before spending. Every arm is an ordinary output under compare/, so an
interrupted comparison resumes, and each arm's table can be read like any other."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from actors.figures import Figures
from aisp_dist import comparison
from aisp_dist.config import ConfigError, Run
from aisp_dist.place import Place
from jobs import cli, cost, prepare, session, settings
from jobs.progress import Progress, Total, say


def main(args: Sequence[str]) -> int:
    parse = settings.parser("compare", cli.VERBS["compare"])
    parse.add_argument("--prompts", type=int, default=64, help="compare on the first so many prompts (64)")
    parse.add_argument("--seeds", type=int, default=1, help="repeat every arm with so many seeds (1)")
    options, run, base_dir = settings.read(parse, args)
    for name in ("prompts", "seeds"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    output = Place.at(run.output, run.runtime.storage_options) / "compare"
    plans = {
        arm: [
            prepare.prepare(_arm(run, output, arm, method, seed, options.prompts), base_dir)
            for seed in range(options.seeds)
        ]
        for arm, method in comparison.arms(run).items()
    }
    everything = Total(prepare.check(run, base_dir))
    figures, seconds, actors = Figures(), 0.0, 1
    first = next(iter(plans.values()))[0]
    with session.Session(first, say) as cluster:
        for arm, prepared in ((arm, p) for arm, seeds in plans.items() for p in seeds):
            with Progress(prepared.output, prepared.located, title=f"{arm}: ") as progress:
                cluster.relabel(prepared, prepared.table(), progress)
            if progress.now is not None:
                figures, actors = figures + progress.now, int(progress.now.alive.get("generator", 1))
            seconds += progress.seconds
    held_out = [name for name, reward in run.rewards.items() if reward.use == "report"]
    result = comparison.compare({arm: [p.output for p in seeds] for arm, seeds in plans.items()}, held_out)
    output.write("comparison.json", json.dumps(result.json(), indent=2).encode())
    print(comparison.text(result))
    if everything.value is None:
        print("\nthe input is still being counted; run again for the cost of the whole")
        return 0
    pilot = output / _folder(comparison.AISP, 0)
    size = sum(sum(pilot.sizes(table).values()) for table in ("data", "candidates"))
    print("\n" + cost.text(run, everything.value, figures, seconds, actors, size, pilot.dataset("data").count_rows()))
    return 0


def _arm(run: Run, output: Place, arm: str, method: object, seed: int, prompts: int) -> Run:
    limit = prompts if run.prompts.limit is None else min(prompts, run.prompts.limit)
    return run.model_copy(
        update={
            "method": method,
            "output": str(output / _folder(arm, seed)),
            "seed": run.seed + seed,
            "prompts": run.prompts.model_copy(update={"limit": limit}),
        }
    )


def _folder(arm: str, seed: int) -> str:
    return re.sub("[^a-z]+", "-", arm) + (f"-seed{seed}" if seed else "")


if __name__ == "__main__":
    cli.run("compare")
