"""The arms of a comparison: which methods run beside the configuration's own, at the same number of samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aisp_dist.config import Aisp, BatchedAisp, BestOfN, ConfigError, Gaussian, Method, Nucleus, Run

AISP, TOP_P, GAUSSIAN, SHUFFLED, RANDOM, BASE = (
    "aisp",
    "best-of-n top-p",
    "best-of-n gaussian",
    "aisp, rewards shuffled",
    "random pick",
    "base",
)


def arms(run: Run) -> dict[str, Method]:
    """The methods that compare runs: the usual ones, the configuration's own among them, and those of compare.arms
    beside or in place of them. What the configuration does not say (the nucleus of an AISP one, say) is the method's
    default. Raises ConfigError for arms that spend another number of samples; one answer a prompt is what some methods
    are, and is let be."""
    named = _usual(run) | run.compare.arms
    found = {name: method for name, method in named.items() if method is not None}
    if not found:
        raise ConfigError("compare.arms: every arm is null; leave one")
    if BASE in found:
        raise ConfigError(f"compare.arms: {BASE!r} is what the greedy answers are called; give another name")
    rules = {m.spend for m in found.values() if m.num_samples * m.num_iterations > 1}
    if len(rules) > 1:
        raise ConfigError(
            "compare.arms: methods are compared under one rule of spending, but `spend` differs; give all the same"
        )
    sizes = {name: m.num_samples * m.num_iterations for name, m in found.items()}
    other = {name: n for name, n in sizes.items() if n not in (1, max(sizes.values()))}
    if other:
        told = ", ".join(f"{name} has {n}" for name, n in other.items())
        raise ConfigError(
            f"compare.arms: methods are compared at equal samples, here {max(sizes.values())} a prompt, but {told}; "
            "change num_samples or num_iterations"
        )
    return found


def _usual(run: Run) -> dict[str, Method]:
    own = run.method
    size: dict[str, Any] = {"num_samples": own.num_samples, "num_iterations": own.num_iterations, "spend": own.spend}
    aisp = own if isinstance(own, Aisp) else Aisp(**size)
    sigma2 = aisp.sigma2 if isinstance(aisp.sigma2, float) and aisp.sigma2 else Aisp().sigma2
    nucleus, gaussian = Nucleus(top_p=0.95), Gaussian(gaussian=sigma2)
    if isinstance(own, BestOfN) and isinstance(own.sampling_, Nucleus):
        nucleus = own.sampling_
    if isinstance(own, BestOfN) and isinstance(own.sampling_, Gaussian):
        gaussian = own.sampling_
    usual: dict[str, Method] = {
        TOP_P: BestOfN(**size, sampling_=nucleus),
        GAUSSIAN: BestOfN(**size, sampling_=gaussian),
        AISP: aisp.model_copy(update={"shuffle_rewards": False}),
        SHUFFLED: aisp.model_copy(update={"shuffle_rewards": True}),
        RANDOM: BestOfN(num_samples=1, num_iterations=1, sampling_=nucleus),  # best-of-n's candidate (0, 0), by its key
    }
    return usual if own in usual.values() else {str(own.kind): own} | usual


def main_arm(run: Run, found: Mapping[str, Method]) -> str:
    """The arm that all are compared with: the configuration's own method where it is a search, else the first search
    with true rewards, else the first arm."""
    searches = [n for n, m in found.items() if isinstance(m, Aisp | BatchedAisp) and not m.shuffle_rewards]
    own = [name for name in searches if found[name] == run.method]
    return (own or searches or list(found))[0]
