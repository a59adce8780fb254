"""spend.expected_gain: its estimates against what is known of order statistics, and where a search stops by it."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import norm
from toy import World

from aisp_dist import config
from aisp_dist.methods.gain import normal, recurrence, settled
from tests.bench import stopping

DRAWN = [list(np.random.default_rng(seed).normal(size=24)) for seed in range(40)]


def test_recurrence_is_the_mean_over_all_subsets():
    rewards = [0.3, -1.0, 2.5, 2.5, 0.9, -0.2, 1.1]
    for n in range(1, 7):
        kept = [max(some) for some in combinations(rewards, 7 - n)]
        assert recurrence(rewards, n) == pytest.approx(2.5 - sum(kept) / len(kept))
    assert recurrence([0.0] * 4 + [1.0] * 4, 4) == pytest.approx(1 / math.comb(8, 4))


def test_recurrence_has_no_bias_on_a_known_distribution():
    """The maximum of m uniform numbers is m / (m + 1) on average."""
    found = [recurrence(list(x), 4) for x in np.random.default_rng(0).random((4000, 12))]
    assert np.mean(found) == pytest.approx(12 / 13 - 8 / 9, abs=4 * np.std(found) / math.sqrt(4000))


@pytest.mark.parametrize("n", [1, 2.5, 8, 64])
def test_the_normal_fit_is_the_expected_gain_over_the_best(n):
    for rewards in DRAWN[:5]:
        mean, sd, best = np.mean(rewards), np.std(rewards), max(rewards)
        x = np.linspace(best, best + 12 * sd, 40_001)
        known = np.trapezoid(1 - norm.cdf(x, mean, sd) ** n, x)
        assert normal(rewards, n) == pytest.approx(known, rel=1e-4)
        z = (best - mean) / sd
        if n == 1:
            assert normal(rewards, 1) == pytest.approx(sd * (norm.pdf(z) - z * norm.sf(z)), rel=1e-4)


def test_a_larger_least_gain_stops_whatever_a_smaller_one_stops_and_none_never():
    for rewards in DRAWN:
        stops = [settled(least, rewards, 3) for least in (0.0, 0.02, 0.1, 0.3, 1.0, 9.0)]
        assert stops == sorted(stops) and not stops[0] and stops[-1]


def test_the_rewards_unit_and_zero_and_order_do_not_matter():
    for rewards in DRAWN:
        of = settled(0.1, rewards, 3)
        assert of == settled(0.1, [64 * r - 7 for r in rewards], 3) == settled(0.1, rewards[::-1], 3)
    assert {settled(0.1, rewards, 3) for rewards in DRAWN} == {True, False}


def test_a_best_that_came_often_or_far_above_stops_and_equal_rewards_do_not():
    assert not settled(0.2, [0.0] * 15 + [0.5], 1), "one round says nothing of a round"
    assert settled(0.2, [0.0] * 8 + [1.0] * 8, 2)
    assert settled(0.2, [*DRAWN[0], 9.0], 3)
    for reward in (0.0, 1.0):
        assert not any(settled(99.0, [reward] * n, 8) for n in (0, 1, 2, 64, 512))


def test_what_a_learning_method_gained_last_keeps_it_going():
    rewards = [0.0] * 8 + [1.0] * 8
    assert settled(0.2, rewards, 2, last=0.05) and not settled(0.2, rewards, 2, last=1.0)


def run(spend, kind="best_of_n", **method):
    values = {"kind": kind, "num_samples": 8, "num_iterations": 16, "spend": spend} | method
    rewards = {"r": {"kind": "function", "function": "toy:r"}}
    return config.Run.model_validate(
        {"output": "o", "generator": {"model": "toy"}, "rewards": rewards, "method": values}
    )


def test_a_search_stops_after_the_first_round_that_settles_it():
    c = np.array([[0.3, -0.2], [0.1, 0.4]])
    lengths = set()
    for seed in range(12):
        whole, early = (
            World(c).align(run(s, sampling={"gaussian": 0.5}).model_copy(update={"seed": seed}))
            for s in (None, {"expected_gain": 0.05})
        )
        rewards = [candidate.reward for candidate in whole.candidates]
        first = next((k for k in range(1, 17) if settled(0.05, rewards[: 8 * k], k)), 16)
        assert len(early.trace) == first and early.candidates == whole.candidates[: 8 * first]
        lengths.add(first)
    assert len(lengths) > 1
    aisp = {"kind": "aisp", "lambda": 0.5, "sigma2": 0.5}
    done = World(c).align(run({"expected_gain": 0.05, "max_iterations": 40}, **aisp))
    assert 2 <= len(done.trace) <= 40


@pytest.mark.parametrize("method", [{"num_iterations": 1}, {"kind": "population", "num_iterations": 1}])
def test_one_iteration_has_nothing_to_stop(method):
    with pytest.raises(ValueError, match="spend.expected_gain with one iteration"):
        run({"expected_gain": 0.1}, **method)
    assert run({"expected_gain": 0.1, "max_iterations": 8}, **method).method.num_iterations == 1


def test_on_simulated_rewards_it_saves_samples_where_the_best_is_soon_known():
    rows = {(row["rewards"], row["rule"]): row for row in stopping.measure(prompts=150, rules=[{"expected_gain": 0.1}])}
    assert rows["all or nothing", "expected_gain 0.1"]["saved"] > 0.4
    assert rows["normal", "expected_gain 0.1"]["saved"] > -0.1
    assert 16 <= rows["normal", "expected_gain 0.1"]["samples"] < 64
