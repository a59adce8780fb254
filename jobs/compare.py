"""`aisp compare CONFIG --prompts 64`: the pilot before spending. Every arm is an ordinary output under compare/, so an
interrupted comparison resumes, and each arm's table can be read like any other."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow.dataset as ds

from aisp_dist import comparison, durable
from aisp_dist.config import ConfigError, Run
from jobs import cli, prepare, session, settings
from jobs.progress import Progress, Total, say


def main(args: Sequence[str]) -> int:
    parse = settings.parser("compare", cli.VERBS["compare"])
    parse.add_argument("--prompts", type=int, default=64, help="compare on the first so many prompts (64)")
    parse.add_argument("--seeds", type=int, default=1, help="repeat every arm with so many seeds (1)")
    options, run, base_dir = settings.read(parse, args)
    for name in ("prompts", "seeds"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    output = Path(run.output).absolute()
    plans = {
        arm: [
            prepare.prepare(_arm(run, output, arm, method, seed, options.prompts), base_dir)
            for seed in range(options.seeds)
        ]
        for arm, method in comparison.arms(run).items()
    }
    everything = Total(prepare.check(run, base_dir))
    samples, seconds = 0, 0.0
    first = next(iter(plans.values()))[0]
    with session.Session(first, say) as cluster:
        for arm, prepared in ((arm, p) for arm, seeds in plans.items() for p in seeds):
            with Progress(prepared.output, prepared.located, title=f"{arm}: ") as progress:
                cluster.relabel(prepared, prepared.table(), progress)
            samples += progress.samples
            seconds += progress.seconds
    held_out = [name for name, reward in run.rewards.items() if reward.use == "report"]
    result = comparison.compare({arm: [p.output for p in seeds] for arm, seeds in plans.items()}, held_out)
    durable.write(output / "compare" / "comparison.json", json.dumps(result.json(), indent=2).encode())
    print(comparison.text(result))
    print(_cost(run, everything.value, samples, seconds, output / "compare" / _folder(comparison.AISP, 0)))
    return 0


def _arm(run: Run, output: Path, arm: str, method: object, seed: int, prompts: int) -> Run:
    limit = prompts if run.prompts.limit is None else min(prompts, run.prompts.limit)
    return run.model_copy(
        update={
            "method": method,
            "output": str(output / "compare" / _folder(arm, seed)),
            "seed": run.seed + seed,
            "prompts": run.prompts.model_copy(update={"limit": limit}),
        }
    )


def _folder(arm: str, seed: int) -> str:
    return re.sub("[^a-z]+", "-", arm) + (f"-seed{seed}" if seed else "")


def _cost(run: Run, total: int | None, samples: int, seconds: float, arm: Path) -> str:
    """What the full run will take at the speed and size just measured."""
    if total is None:
        return "the input is still being counted; run again for the cost of the whole"
    size = sum(file.stat().st_size for table in ("data", "candidates") for file in (arm / table).glob("*.parquet"))
    rows = ds.dataset(arm / "data").count_rows()
    wanted = total * run.method.num_samples * run.method.num_iterations
    line = f"full run: {total} prompts, {wanted} samples, about {total * size / rows / 1e6:.1f} MB"
    if samples:
        actors = run.runtime.generators.replicas
        hours = wanted * seconds / samples / 3600
        line += (
            f", {hours:.2g} hours at the {samples / seconds:.0f} samples/s measured here with {actors} generator"
            f"{'s' * (actors > 1)}, {hours * actors:.2g} generator-hours (GPU-hours where each has one GPU)"
        )
    return "\n" + line


if __name__ == "__main__":
    cli.run("compare")
