"""What a large cluster does, simulated on one core: the real coordinator, pools and writer on a virtual clock, with
generators and scorers that only say how long they would take.

    python -m tests.bench.simulation --gpus 16,64 --ratio 1:1

    clock     an event loop whose time jumps to the next timer when nothing is ready; threads run inline
    service   Llama-3-8B and an 8B reward model at the roofline: the time of a step follows from the rows in it, a
              prompt is prefilled once per replica, a finished row makes room at once
    cost      each round occupies its coordinator for `coordinator` CPU seconds, one round after the other
    faults    replicas die at random and are restarted in `startup` seconds, or hang until a timeout finds them

Rows are simulated `bundle` at a time: one trajectory of the records stands for that many of equal length, the base
answer too. All randomness is keyed by the seed: the same plan gives the same figures.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from actors.coordinator import Coordinator
from actors.pool import Pool
from actors.sizing import suggest
from actors.table import Table
from aisp_dist.align import window
from aisp_dist.config import ConfigError, Run
from aisp_dist.data import prompts
from aisp_dist.output import manifest
from aisp_dist.output.filesystem import Place
from aisp_dist.output.lease import Lease
from aisp_dist.output.verify import verify
from jobs.bench import positive, several
from tests.bench import command
from tests.bench.roofline import Plan
from tests.bench.virtual import Dead, Generator, Processor, Scorer, VirtualLoop, pooled

FINGERPRINT = "0" * 32
LOAD = 0.7  # share of a coordinator's core beyond which prompts wait for it
TARGET = 10_000_000  # prompts of the run whose cost is estimated


@dataclass(frozen=True)
class _Figures:
    """One shard. integrals: samples of (time, prompts in flight, busy seconds in the order of PARTS). counts: in the
    order of COUNTS."""

    plan: Plan
    integrals: list[tuple[float, int, tuple[float, ...]]]
    counts: tuple[int, ...]

    def steady(self) -> tuple[int, int]:
        """The first and the last sample with a full window."""
        most = max(in_flight for _, in_flight, _ in self.integrals)
        full = [i for i, (_, in_flight, _) in enumerate(self.integrals) if in_flight >= 0.98 * most]
        return full[0], full[-1]


PARTS = ("generators", "rows", "scorers", "coordinator")
COUNTS = ("done", "failed", "violations", "restarts", "repeats")


def simulate(plan: Plan, shards: int = 1) -> dict[str, Any]:
    """Simulate a run by `shards` coordinators that share nothing: each has its part of the replicas and prompts.
    utilisation: the busy share of each kind's time; rows: the filled share of the generators' rows. Raises
    ConfigError."""
    for name in ("samples", "batch_rows"):
        if getattr(plan, name) % plan.bundle:
            raise ConfigError(
                f"--{name}: {getattr(plan, name)} is not a multiple of --bundle {plan.bundle}; change one of them"
            )
    if min(plan.generators, plan.scorers, plan.prompts) < shards:
        raise ConfigError(
            f"--shards: {shards} with {plan.generators} generators, {plan.scorers} scorers and {plan.prompts} prompts; "
            "a shard needs one of each, so lower it or raise --gpus or --prompts"
        )
    found = []
    for k in range(shards):
        sizes = {name: (getattr(plan, name) + k) // shards for name in ("generators", "scorers", "prompts")}
        found.append(_simulate(replace(plan, **sizes, seed=plan.seed * 100_003 + k)))
    makespan = max(one.integrals[-1][0] for one in found)
    seconds = [one.integrals[hi][0] - one.integrals[lo][0] for one in found for lo, hi in [one.steady()]]
    return {
        "shards": shards,
        "makespan_seconds": makespan,
        "prompts_per_second": plan.prompts / makespan,
        "rounds_per_second": plan.prompts * (plan.iterations + 1) / makespan,
        "utilisation": _shares(found, [(0, -1)] * shards, [makespan] * shards),
        "steady_seconds": min(seconds),
        "steady_utilisation": _shares(found, [one.steady() for one in found], seconds) if min(seconds) else None,
        "gpu_seconds_per_round": {
            name: sum(one.integrals[-1][2][PARTS.index(name)] for one in found) / plan.prompts / (plan.iterations + 1)
            for name in ("generators", "scorers")
        },
        **dict(zip(COUNTS, map(sum, zip(*(one.counts for one in found), strict=True)), strict=True)),
    }


def _shares(
    found: Sequence[_Figures], between: Sequence[tuple[int, int]], seconds: Sequence[float]
) -> dict[str, float]:
    busy, there = [0.0] * len(PARTS), [0.0] * len(PARTS)
    for one, (lo, hi), passed in zip(found, between, seconds, strict=True):
        sizes = (one.plan.generators, one.plan.generators, one.plan.scorers, 1)
        for i, size in enumerate(sizes):
            busy[i] += one.integrals[hi][2][i] - one.integrals[lo][2][i]
            there[i] += size * passed
    return {name: b / t for name, b, t in zip(PARTS, busy, there, strict=True)}


def _simulate(plan: Plan) -> _Figures:
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=VirtualLoop) as runner:
        root = Path(folder)
        (root / "prompts.txt").write_text("".join(f"{i}\n" for i in range(plan.prompts)))
        run = _run(plan, root)
        return runner.run(_fill(plan, run))


def _run(plan: Plan, root: Path) -> Run:
    """The configuration. lambda is fixed: the cost of the update is part of the coordinator's seconds already."""
    return Run.model_validate(
        {
            "output": str(root / "output"),
            "prompts": {"source": str(root / "prompts.txt"), "format": "raw"},
            "generator": {
                "model": "demo",
                "batch_rows": plan.batch_rows // plan.bundle,
                "max_new_tokens": plan.new_tokens,
            },
            "rewards": {"reward": {"kind": "model", "model": "demo"}},
            "method": {
                "kind": "aisp",
                "num_samples": plan.samples // plan.bundle,
                "num_iterations": plan.iterations,
                "lambda": 1.0,
            },
            "save": {"candidates": "none", "trace": False},
            "runtime": {
                "generators": {"replicas": plan.generators},
                "rewards": {"reward": {"replicas": plan.scorers}},
                "retries": plan.retries,
            },
        }
    )


async def _fill(plan: Plan, run: Run) -> _Figures:
    core, loop = Processor(), asyncio.get_running_loop()
    generators = [Generator(f"generator-{i}", plan, core) for i in range(plan.generators)]
    scorers = [Scorer(f"scorer-{i}", plan, core) for i in range(plan.scorers)]

    async def start() -> tuple[Mapping[str, Pool], int | None]:
        known: dict[str, Any] = {"retries": run.runtime.retries, "is_fault": lambda error: isinstance(error, Dead)}
        times = run.runtime.timeouts
        return {
            "generator": await pooled(generators, 2 * window(run), None, **known),
            "reward": await pooled(scorers, plan.queue, times.reward, **known),
        }, None

    shard, output = Coordinator(run, start), Place.at(run.output)
    integrals: list[tuple[float, int, tuple[float, ...]]] = []

    def sample() -> None:
        busy = (sum(g.busy() for g in generators), sum(g.rows for g in generators), sum(s.busy() for s in scorers))
        in_flight = len(shard.backend.pools["generator"].home)
        integrals.append((loop.time(), in_flight, (*busy, core.busy - max(0.0, core.free - loop.time()))))

    async def watch() -> None:
        while True:
            sample()
            await asyncio.sleep(plan.step(plan.batch_rows) * plan.new_tokens)

    components = {"config": {}, "components": {}, "rows_per_file": run.save.rows_per_file}
    manifest.write_run(output, {"fingerprint": FINGERPRINT, "run_id": FINGERPRINT[:12], **components})
    lease = Lease.take(output)
    await shard.load()
    watching = asyncio.ensure_future(watch())
    await shard.relabel(Table(run, output, {}, FINGERPRINT, "simulated", lease))
    watching.cancel()
    sample()
    verdict = verify(output, prompts.read(run.prompts))
    repeats = sum(pool.repeats for pool in shard.backend.pools.values())
    restarts = sum(replica.starts - 1 for replica in (*generators, *scorers))
    return _Figures(plan, integrals, (verdict.done, verdict.failed, len(verdict.violations), restarts, repeats))


def main(args: Sequence[str] | None = None) -> int:
    return command.run(parser(), measure, args)


def parser() -> argparse.ArgumentParser:
    parse = command.parser("simulation", __doc__)
    plan = Plan()

    def add(flag: str, kind: Callable[[str], Any], about: str, default: Any = None) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        parse.add_argument(flag, type=kind, default=default or getattr(plan, name), metavar="X", help=about)

    add("--gpus", several(positive), "generators and scorers together", [16])
    add("--ratio", several(_ratio), "generators : scorers, as 1:1", [0.5])
    add("--shards", several(positive), "coordinators", [1])
    add("--prompts", positive, "prompts with the most GPUs; in proportion with fewer")
    add(
        "--coordinator", command.not_negative, "CPU seconds of the coordinator per round, see tests.bench.rounds", 0.005
    )
    add("--batch-rows", positive, "rows of a generator")
    add("--spread", command.not_negative, "lengths are uniform between (1 - spread) x new tokens and new tokens")
    add("--deaths", command.not_negative, "deaths of a replica per hour")
    add("--stalls", command.not_negative, "share of the deaths that only hang")
    add("--queue", positive, "requests that a scorer has at a time")
    add("--startup", command.not_negative, "seconds that a replica takes to start")
    add("--retries", positive, "runtime.retries")
    add("--bundle", positive, "rows that are simulated as one")
    add("--bandwidth", float, "bytes/s of a GPU, an H200's")
    add("--flops", float, "FLOP/s of a GPU, an H200's in bf16")
    add("--seed", int, "seed of lengths and faults")
    add("--samples", positive, "trajectories of a round")
    add("--iterations", positive, "rounds of a prompt")
    add("--prompt-tokens", positive, "tokens of a prompt")
    add("--new-tokens", positive, "tokens of a response, at most")
    return parse


def _ratio(text: str) -> float:
    """The generators' share of the GPUs."""
    generators, _, scorers = text.partition(":")
    return positive(generators) / (positive(generators) + positive(scorers))


def measure(options: Namespace) -> dict[str, Any]:
    """Simulate every combination of GPUs, ratios and shards. Raises ConfigError."""
    given = vars(options)
    settings = {f.name: given[f.name] for f in fields(Plan) if f.name in given}
    found = []
    for gpus in options.gpus:
        for ratio, shards in itertools.product(options.ratio, options.shards):
            generators = max(1, min(round(gpus * ratio), gpus - 1))
            num = max(1, options.prompts * gpus // max(options.gpus))
            plan = Plan(**settings | {"generators": generators, "scorers": gpus - generators, "prompts": num})
            print(f"{gpus} GPUs, {generators} generate, {shards} shards, {num} prompts", file=sys.stderr, flush=True)
            figures = {"gpus": gpus, "generators": generators, "scorers": plan.scorers, "prompts": num}
            found.append(figures | simulate(plan, shards))
    best = max((one for one in found if one["gpus"] == max(options.gpus)), key=lambda one: one["prompts_per_second"])
    per_round = best["gpu_seconds_per_round"]
    per_sample = {name: seconds / options.samples for name, seconds in per_round.items()}
    whole = suggest(
        per_sample["generators"],
        {"scorers": per_sample["scorers"]},
        TARGET * options.samples * (options.iterations + 1),
        0,
        TARGET,
    )
    carried = sum(per_round.values()) / options.coordinator if options.coordinator else None
    return {
        "plan": settings,
        "configurations": found,
        "best": {name: best[name] for name in ("gpus", "generators", "scorers", "shards", "prompts_per_second")},
        "suggested": whole.line(),
        "gpus_that_fill_a_coordinator": carried,
        "shards_wanted": carried and {str(gpus): math.ceil(gpus / (LOAD * carried)) for gpus in options.gpus},
        "agrees": not any(one["violations"] for one in found),
    }


if __name__ == "__main__":
    sys.exit(main())
