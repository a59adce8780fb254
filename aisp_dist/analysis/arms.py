"""The arms of a comparison: the methods that run beside the configuration's own, at the same number of samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aisp_dist.config import Aisp, BestOfN, ConfigError, Ess, Gaussian, Method, Population, Run

BASE, RANDOM = "base", "random pick"
TOP_P, GAUSSIAN, AISP, POPULATION = "best-of-n top-p", "best-of-n gaussian", "aisp", "population"


def arms(run: Run) -> dict[str, Method]:
    """The methods that compare runs: the usual ones with the configuration's own in its place, one with shuffled
    rewards, a random pick, and those of compare.arms, which replace an arm of the same name. What a server behind
    generator.endpoint cannot decode is no usual one. Raises ConfigError where two arms would spend another number of
    samples; a method that gives one answer a prompt may."""
    given = run.compare.arms
    possible = {name: method for name, method in _usual(run).items() if not run.generator.refuses(method)}
    usual = {name: given.get(name, method) for name, method in possible.items()}
    named = {**usual, **_shuffled(run, usual), **_random_pick(usual), **given}
    found = {name: method for name, method in named.items() if method is not None}
    if not found:
        raise ConfigError("compare.arms: every arm is null; leave one")
    if BASE in found:
        raise ConfigError(f"compare.arms: {BASE!r} is the name of the greedy answers; give another name")
    rules = {m.spend for m in found.values() if m.num_samples * m.num_iterations > 1}
    if len(rules) > 1:
        raise ConfigError("compare.arms: methods are compared under one stopping rule, but `spend` differs; give one")
    sizes = {name: m.num_samples * m.num_iterations for name, m in found.items()}
    other = {name: n for name, n in sizes.items() if n not in (1, max(sizes.values()))}
    if other:
        told = ", ".join(f"{name} has {n}" for name, n in other.items())
        raise ConfigError(
            f"compare.arms: methods are compared at equal samples, here {max(sizes.values())} a prompt, but {told}; "
            "change num_samples or num_iterations"
        )
    return found


def main_arm(run: Run, found: Mapping[str, Method]) -> str:
    """The arm that all others are compared with: the configuration's own method; the first arm where that is null."""
    name = run.method.shuffled(False).name
    return name if name in found else next(iter(found))


def one_answer(method: Method) -> Method:
    """The method with one sample. Of best-of-n that is a random pick: candidate (0, 0), by its key."""
    return method.model_copy(update={"num_samples": 1, "num_iterations": 1, "spend": None, "limit": None})


def _usual(run: Run) -> dict[str, Method]:
    """What the configuration does not say is the default of the method's section; lambda, which has none for AISP, is
    {ess: 0.1}."""
    own = run.method.shuffled(False)
    size: dict[str, Any] = {"num_samples": own.num_samples, "num_iterations": own.num_iterations, "spend": own.spend}
    known = (run.compare.arms.get(AISP), own, Aisp(**size, lambda_=Ess(ess=0.1)))
    aisp = next(method for method in known if isinstance(method, Aisp))
    sigma2 = aisp.sigma2 if isinstance(aisp.sigma2, float) else 0.5
    gaussian = BestOfN(**size, sampling=Gaussian(gaussian=sigma2))
    usual: list[Method] = [BestOfN(**size), gaussian, aisp, Population(**size), own]
    return {method.name: method for method in usual}


def _shuffled(run: Run, usual: Mapping[str, Method | None]) -> dict[str, Method]:
    """The main arm with shuffled rewards; where that learns nothing from rewards, AISP's."""
    for name in (run.method.shuffled(False).name, AISP):
        method = usual.get(name)
        if method is not None and (shuffled := method.shuffled(True)).is_shuffled:
            return {shuffled.name: shuffled}
    return {}


def _random_pick(usual: Mapping[str, Method | None]) -> dict[str, Method]:
    top_p = usual[TOP_P]
    return {} if top_p is None else {RANDOM: one_answer(top_p)}
