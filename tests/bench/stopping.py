"""What a stopping rule of `spend` saves, on rewards with known distributions and independent answers:

    python -m tests.bench.stopping [--prompts 1000] [--samples 8] [--iterations 16]

For each rule: the mean number of samples of a prompt, and the share saved beside the fixed number of samples whose mean
best reward is the same. The rewards of a prompt are in units of their own deviation where that is known.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from aisp_dist.config import BestOfN, Spend
from aisp_dist.methods.round import over
from aisp_dist.records import Candidate, Iteration

Shape = tuple[int, int]  # prompts, samples
Rng = np.random.Generator
REWARDS: dict[str, Callable[[Rng, Shape], np.ndarray]] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "exponential": lambda rng, shape: rng.exponential(size=shape),
    "uniform": lambda rng, shape: rng.random(shape) * 12**0.5,
    "of four steps": lambda rng, shape: rng.binomial(3, rng.beta(1, 2, (shape[0], 1)), shape) / 3,
    "of four steps + .05 z": lambda rng, shape: (
        rng.binomial(3, rng.beta(1, 2, (shape[0], 1)), shape) / 3 + 0.05 * rng.normal(size=shape)
    ),
    "all or nothing": lambda rng, shape: (rng.random(shape) < rng.beta(0.5, 2, (shape[0], 1))).astype(float),
}
RULES: list[dict[str, Any]] = [
    *({"expected_gain": g} for g in (0.05, 0.1, 0.2)),
    *({"plateau": n} for n in (1, 2, 3)),
]


def measure(
    prompts: int = 1000, samples: int = 8, iterations: int = 16, rules: Sequence[dict[str, Any]] = RULES
) -> Iterator[dict[str, Any]]:
    for name, draw in REWARDS.items():
        rewards = draw(np.random.default_rng(0), (prompts, samples * iterations))
        best = np.maximum.accumulate(rewards, axis=1)
        for rule in rules:
            method = BestOfN(num_samples=samples, num_iterations=iterations, spend=Spend(**rule))
            spent = np.array([samples * rounds(method, row) for row in rewards.tolist()])
            reached = float(best[np.arange(prompts), spent - 1].mean())
            fixed = float(np.interp(reached, best.mean(0), np.arange(1, best.shape[1] + 1)))
            yield {
                "rewards": name,
                "rule": " ".join(f"{key} {value}" for key, value in rule.items()),
                "samples": round(float(spent.mean()), 1),
                "best": round(reached, 3),
                "saved": round(1 - float(spent.mean()) / fixed, 3),
            }


def rounds(method: BestOfN, rewards: list[float]) -> int:
    """The iterations that a prompt with these rewards has by the method's own rule."""
    state: tuple[Iteration, ...] = ()
    seen: list[Candidate] = []
    while not over(method, state, seen):
        k = len(state)
        new = rewards[k * method.num_samples : (k + 1) * method.num_samples]
        seen += [Candidate(k, i, "", (), "stop", reward, ()) for i, reward in enumerate(new)]
        state = (*state, Iteration((), (), 0.0, 0.0, None, max(new)))
    return len(state)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.stopping", description=__doc__.splitlines()[0])
    for name, default in (("prompts", 1000), ("samples", 8), ("iterations", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for row in measure(**vars(parser.parse_args())):
        print(json.dumps(row))
