"""A shard's counts for Prometheus, through Ray's metrics: the only file that knows ray.util.metrics.

Ray exports `aisp_x` as `ray_aisp_x` (counters as `ray_aisp_x_total`) at each node's metrics port. What its layer does:
- a gauge is exported once for each set and forgotten after two report intervals (10 s each): set it every few seconds;
- a histogram keeps counts by bucket and nothing else: its quantiles are good, its _sum is made of bucket centres;
- a negative observation and a gauge that is not finite are dropped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Concatenate, ParamSpec

from ray.util.metrics import Counter, Gauge, Histogram

from aisp_dist.records import Done, Result

log = logging.getLogger("aisp")
P = ParamSpec("P")

GAUGES = {  # key: (name, description)
    "in_flight": ("aisp_prompts_in_flight", "Prompts being searched now."),
    "queued_rounds": ("aisp_rounds_queued", "Rounds that wait for a generator."),
    "queued_scores": ("aisp_scores_queued", "Requests that wait for a scorer."),
    "generators_alive": ("aisp_generators_alive", "Generators that answer."),
    "scorers_alive": ("aisp_scorers_alive", "Scorers that answer, of all rewards."),
    "slot_utilisation": ("aisp_slot_utilisation_ratio", "Rows of the generators that decode, of those they have."),
    "generator_idle": ("aisp_generator_idle_ratio", "Share of time in which generators had nothing to decode."),
    "scorer_idle": ("aisp_scorer_idle_ratio", "Share of time in which the busiest reward had nothing to score."),
    "iterations_per_second": ("aisp_iterations_per_second", "Rounds decoded per second."),
    "tokens_per_second": ("aisp_tokens_per_second", "Tokens decoded per second."),
    "reward_gain": ("aisp_reward_gain", "Mean so far of the reward selected minus that of the base answer."),
    "eta_seconds": ("aisp_eta_seconds", "Time left at the speed so far."),
    "total_prompts": ("aisp_prompts_expected", "Prompts of the input."),
    "committed": ("aisp_prompts_committed", "Prompts whose row is in a committed part."),
    "staged": ("aisp_prompts_staged", "Prompts finished and not committed yet."),
}
COUNTERS = {  # name: (description, tags beside run and shard)
    "aisp_prompts_finished": ("Prompts that ended, by outcome: done or failed.", ("outcome",)),
    "aisp_samples_spent": ("Candidates of the prompts that are done.", ()),
    "aisp_candidates_quarantined": ("Candidates without a finite reward.", ()),
    "aisp_iterations": ("Rounds decoded; the base answer is one.", ()),
    "aisp_samples": ("Trajectories decoded, those of repeated rounds too.", ()),
    "aisp_tokens": ("Tokens decoded.", ()),
    "aisp_responses_scored": ("Responses scored, by reward.", ("reward",)),
    "aisp_events": ("Faults by kind (retry, restart, stall, gave_up) and replica.", ("kind", "replica")),
}
_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)  # to the default timeouts
HISTOGRAMS = {  # name: (description, boundaries, tags beside run and shard)
    "aisp_reward_gain_by_prompt": (
        "Reward selected minus reward of the base answer; what is not above 0 counts in the first bucket.",
        # the first is "no gain"; then both probabilities and logits have buckets
        (1e-6, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 1.5, 2, 3, 4, 5, 7, 10, 20, 50),
        (),
    ),
    "aisp_final_ess_ratio": (
        "Effective sample size of a prompt's last iteration, as a fraction of n.",
        # 1/n of the usual n below, and none at a usual target (0.05, 0.1, 0.2), which would split its prompts in two
        (0.015, 0.035, 0.045, 0.055, 0.07, 0.09, 0.11, 0.14, 0.18, 0.22, 0.3, 0.45, 0.55, 0.75, 0.95, 1),
        (),
    ),
    "aisp_final_kl_nats": (
        "KL of the controlled from the uncontrolled noise in a prompt's last iteration.",
        # about tokens x hidden size x (iterations - 1) / (2 ESS): 2e4 was seen for the demo's 80 x 160 x 11 / 6.4
        (10, 100, *(digit * 10.0**power for power in range(2, 7) for digit in (2, 5, 10))),
        (),
    ),
    "aisp_samples_by_prompt": (
        "Candidates of one prompt; fewer than n x iterations where the search stopped early.",
        tuple(2.0**k for k in range(3, 14)),
        (),
    ),
    "aisp_round_seconds": ("From asking a generator for a round to its answer.", _SECONDS, ()),
    "aisp_score_seconds": ("From asking a scorer for one prompt's responses to its answer.", _SECONDS, ("reward",)),
}


def _harmless(
    method: Callable[Concatenate[Exporter, P], None],
) -> Callable[Concatenate[Exporter, P], None]:
    """Log the first error of the metrics, and let the run go on without them."""

    @wraps(method)
    def guarded(self: Exporter, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            if not self.broken:
                log.warning("metrics: %s failed (%r); the run goes on without them", method.__name__, error)
            self.broken = True

    return guarded


class Exporter:
    """Exports the counts of the actor that makes it. run, shard: tags of each, since Ray adds none for the
    job."""

    def __init__(self, run: str, shard: str) -> None:
        self.broken = False
        self.tags = {"run": str(run), "shard": str(shard)}
        self.metrics: dict[str, Any] = {}
        self._register()

    @_harmless
    def _register(self) -> None:
        for name, text in GAUGES.values():
            self.metrics[name] = Gauge(name, text, tuple(self.tags))
        for name, (text, tags) in COUNTERS.items():
            self.metrics[name] = Counter(name, text, (*self.tags, *tags))
        for name, (text, boundaries, tags) in HISTOGRAMS.items():
            self.metrics[name] = Histogram(name, text, list(boundaries), (*self.tags, *tags))

    @_harmless
    def finished(self, result: Result) -> None:
        """A prompt that ended."""
        if not isinstance(result, Done):
            self._count("aisp_prompts_finished", 1, outcome="failed")
            return
        self._count("aisp_prompts_finished", 1, outcome="done")
        self._count("aisp_samples_spent", result.samples_spent)
        self._count("aisp_candidates_quarantined", result.quarantined)
        self._observe("aisp_samples_by_prompt", result.samples_spent)
        if result.best.reward is not None and result.base.reward is not None:
            self._observe("aisp_reward_gain_by_prompt", max(result.best.reward - result.base.reward, 0.0))
        if result.trace and result.trace[-1].weights:  # best-of-n weighs nothing
            last = result.trace[-1]
            self._observe("aisp_final_ess_ratio", last.ess / len(last.weights))
            self._observe("aisp_final_kl_nats", max(last.kl, 0.0))

    @_harmless
    def round(self, seconds: float, samples: int, tokens: int) -> None:
        """A generator's round that came back."""
        self._count("aisp_iterations", 1)
        self._count("aisp_samples", samples)
        self._count("aisp_tokens", tokens)
        self._observe("aisp_round_seconds", seconds)

    @_harmless
    def scored(self, reward: str, seconds: float, responses: int) -> None:
        """A scorer's answer that came back."""
        self._count("aisp_responses_scored", responses, reward=reward)
        self._observe("aisp_score_seconds", seconds, reward=reward)

    @_harmless
    def gauges(self, now: Mapping[str, float | None]) -> None:
        """The state now, keys as in GAUGES. None is not known yet. Call it at least every 10 s."""
        for key, value in now.items():
            if value is not None and math.isfinite(value):
                self.metrics[GAUGES[key][0]].set(float(value), self.tags)

    @_harmless
    def event(self, kind: str, replica: str) -> None:
        """A fault: kind is retry, restart, stall or gave_up."""
        self._count("aisp_events", 1, kind=kind, replica=replica)

    def _count(self, name: str, by: int, **tags: str) -> None:
        if by > 0:  # Ray refuses 0
            self.metrics[name].inc(by, self.tags | tags)

    def _observe(self, name: str, value: float, **tags: str) -> None:
        self.metrics[name].observe(float(value), self.tags | tags)
