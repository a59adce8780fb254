"""The CPU time that a round costs the coordinator: the real Coordinator, pools and writer on Ray, with generators and
scorers that answer at once with messages of real size. No model is loaded.

    python -m tests.bench.rounds
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from actors import cluster, coordinator
from actors.table import Table
from aisp_dist import placement
from aisp_dist.align import window
from aisp_dist.config import Run
from aisp_dist.output.filesystem import Place
from aisp_dist.output.lease import Lease
from aisp_dist.records import Prompt, Rollout, Round, Score, Trajectory
from jobs.bench import positive
from tests.bench import command
from tests.bench.roofline import Plan
from tests.bench.simulation import FINGERPRINT
from tests.bench.virtual import pooled

VOCABULARY = 128_256  # Llama 3's; a token id of a larger one pickles as long


class Instant:
    """A generator and a scorer. Its answers have the size of real ones: token ids, text, rewards that differ."""

    def __init__(self, samples: int, tokens: int) -> None:
        draw = random.Random(0)
        self.rewards = [Score(draw.gauss(0, 1)) for _ in range(samples)]
        ids = [tuple(draw.randrange(VOCABULARY) for _ in range(tokens)) for _ in range(samples)]
        texts = [" ".join(f"{draw.randrange(1000):03}" for _ in range(tokens)) for _ in range(samples)]  # 4 characters
        self.drawn = [
            Trajectory(i, token_ids, text, "stop", draw.gauss(0, 1), draw.random())
            for i, (token_ids, text) in enumerate(zip(ids, texts, strict=True))
        ]

    async def load(self) -> None:
        pass

    async def health(self) -> dict[str, float]:
        return {"busy": 0, "progress": 0}

    async def rollout(self, round: Round) -> Rollout:
        return Rollout(tuple(self.drawn[round.start : round.stop]), u_sq=1.0)

    async def nll(self, prompt_tokens: Sequence[int], responses: Sequence[Sequence[int]]) -> list[float]:
        return [1.0] * len(responses)

    async def score(self, prompt: Prompt, responses: Sequence[str]) -> list[Score]:
        return self.rewards[: len(responses)]


class Measured(coordinator.Coordinator):
    async def cpu(self) -> float:
        """CPU seconds that this process has used."""
        return time.process_time()


async def _start(run: Run, groups: Sequence[placement.Group], samples: int, tokens: int) -> coordinator.Started:
    pools = {}
    for group in groups:
        replicas = [
            cluster.RayReplica(f"{group.role}-{i}", Instant, (samples, tokens), group, 60.0, False)
            for i in range(group.replicas)
        ]
        max_calls = 2 * window(run) if group.role == "generator" else Plan().queue
        pools[group.role] = await pooled(replicas, max_calls, None, retries=0, is_fault=cluster.is_fault)
    return pools, None


def main(args: Sequence[str] | None = None) -> int:
    return command.run(parser(), measure, args)


def parser() -> argparse.ArgumentParser:
    parse = command.parser("rounds", __doc__)

    def add(flag: str, default: int, about: str) -> None:
        parse.add_argument(flag, type=positive, default=default, metavar="N", help=about)

    add("--rounds", 2000, "rounds in all")
    add("--replicas", 2, "generators, and as many scorers")
    add("--samples", 32, "trajectories of a round")
    add("--iterations", 32, "rounds of a prompt")
    add("--prompt-tokens", 500, "tokens of a prompt")
    add("--new-tokens", 128, "tokens of a response")
    return parse


def measure(options: Namespace) -> dict[str, Any]:
    """A round is a rollout, its scores and the update; the base answer counts as a round."""
    import ray

    with tempfile.TemporaryDirectory() as folder:
        num = max(1, round(options.rounds / (options.iterations + 1)))
        lines = (json.dumps({"prompt": f"{i}" + " word" * options.prompt_tokens}) + "\n" for i in range(num))
        Path(folder, "prompts.jsonl").write_text("".join(lines))
        run = _run(options, Path(folder))
        lease = Lease.take(Place.at(run.output))
        ray.init(address="local", num_cpus=2 * options.replicas, include_dashboard=False, log_to_driver=False)
        try:
            actor = ray.remote(Measured).options(num_cpus=0, max_concurrency=100)
            groups = placement.plan(run, [ray.cluster_resources()]).groups
            shard = actor.remote(run, partial(_start, run, groups, options.samples, options.new_tokens))
            ray.get(shard.load.remote(), timeout=300)
            table = Table(run, Place.at(run.output), {}, FINGERPRINT, "demo", lease)
            cpu, start = ray.get(shard.cpu.remote()), time.perf_counter()
            ray.get(shard.relabel.remote(table))
            seconds, cpu = time.perf_counter() - start, ray.get(shard.cpu.remote()) - cpu
        finally:
            ray.shutdown()
        whole = table.whole()
    rounds = num * (options.iterations + 1)
    plan = Plan(samples=options.samples, new_tokens=options.new_tokens, spread=0.0)
    real = plan.step(plan.batch_rows) * plan.new_tokens * plan.samples / plan.batch_rows
    return {
        "rounds": rounds,
        "seconds": seconds,
        "rounds_per_second": rounds / seconds,  # the fakes use CPU time too
        "coordinator_cpu_seconds_per_round": cpu / rounds,
        "rounds_per_cpu_second": rounds / cpu,
        "gpu_seconds_per_round": real,  # calculated: Llama-3-8B at the roofline of an H200
        "share_of_a_round": cpu / rounds / real,
        "agrees": whole,
    }


def _run(options: Namespace, root: Path) -> Run:
    replicas = {"replicas": options.replicas}
    return Run.model_validate(
        {
            "output": str(root / "output"),
            "prompts": {"source": str(root / "prompts.jsonl"), "max_tokens": 1 << 20},
            "generator": {"model": "demo", "batch_rows": 256, "max_new_tokens": options.new_tokens},
            "rewards": {"reward": {"kind": "model", "model": "demo"}},
            "method": {
                "kind": "aisp",
                "num_samples": options.samples,
                "num_iterations": options.iterations,
                "lambda": {"ess": 0.1},
            },
            "runtime": {"generators": replicas, "rewards": {"reward": replicas}},
        }
    )


if __name__ == "__main__":
    sys.exit(main())
