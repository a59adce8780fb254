"""Combination: a pure function of scores; nothing missing or broken ever counts as a number."""

import math
import subprocess
import sys

import pytest

from aisp_dist.config import FunctionReward
from aisp_dist.records import Score
from aisp_dist.rewards.combine import combine


def reward(weight=1.0, use="select"):
    return FunctionReward(kind="function", function="m:f", weight=weight, use=use)


def scores(*values):
    return [Score(value) for value in values]


def values(combined):
    return [score.value for score in combined]


A = scores(1.0, 2.0, 6.0)
B = scores(-3.0, 0.5, 0.0)
BOTH = {"a": reward(2.0), "b": reward(-1.0)}


def test_the_weighted_sum():
    combined, frozen = combine(BOTH, "weighted_sum", {"a": A, "b": B})
    assert values(combined) == [5.0, 3.5, 12.0] and frozen is None


def test_report_rewards_never_count():
    with_report = BOTH | {"held_out": reward(use="report")}
    assert combine(with_report, "weighted_sum", {"a": A, "b": B}) == combine(BOTH, "weighted_sum", {"a": A, "b": B})


@pytest.mark.parametrize("mode", ["weighted_sum", "standardized"])
def test_permuted_scores_combine_to_permuted_rewards(mode):
    combined, _ = combine(BOTH, mode, {"a": A, "b": B})
    order = [2, 0, 1]
    permuted, _ = combine(BOTH, mode, {"a": [A[i] for i in order], "b": [B[i] for i in order]})
    assert permuted == [combined[i] for i in order]


def test_standardized_rewards_ignore_scale_and_shift():
    one, _ = combine(BOTH, "standardized", {"a": A, "b": B})
    two, _ = combine(BOTH, "standardized", {"a": scores(*(3 * s.value - 7 for s in A)), "b": B})
    assert values(one) == pytest.approx(values(two))
    alone, _ = combine({"a": reward()}, "standardized", {"a": A})
    assert sum(values(alone)) == pytest.approx(0) and sum(v**2 for v in values(alone)) == pytest.approx(3)


def test_statistics_stay_those_of_the_first_iteration():
    _, frozen = combine(BOTH, "standardized", {"a": A, "b": B})
    again, kept = combine(BOTH, "standardized", {"a": scores(100.0), "b": scores(0.0)}, frozen)
    assert kept == frozen and frozen["a"] == (3.0, pytest.approx(math.sqrt(14 / 3)))
    assert again[0].value == pytest.approx(2 * (100 - 3) / math.sqrt(14 / 3) + frozen["b"][0] / -frozen["b"][1] * -1)
    before = dict(frozen)
    combine(BOTH | {"c": reward()}, "standardized", {"a": A, "b": B, "c": A}, frozen)
    assert frozen == before


def test_statistics_wait_for_values():
    settings = {"a": reward(), "b": reward()}
    _, frozen = combine(settings, "standardized", {"a": A, "b": [Score(None), Score(None, "nan"), Score(None)]})
    assert set(frozen) == {"a"}
    _, later = combine(settings, "standardized", {"a": A, "b": B}, frozen)
    assert later["a"] == frozen["a"] and set(later) == {"a", "b"}


@pytest.mark.parametrize("equal", [0.1, 1e300, 0.0])
def test_no_deviation_counts_as_one(equal):
    combined, frozen = combine({"a": reward()}, "standardized", {"a": scores(*[equal] * 3)})
    assert values(combined) == [0.0] * 3 and frozen == {"a": (equal, 1.0)}


def test_a_reward_that_does_not_apply_is_left_out():
    combined, _ = combine(BOTH, "weighted_sum", {"a": A, "b": scores(None, 1.0, None)})
    assert values(combined) == [2.0, 3.0, 12.0]


def test_what_is_quarantined_has_a_reason():
    broken = [Score(None, "nan"), Score(None), Score(1e308)]
    combined, _ = combine(
        {"a": reward(), "b": reward()}, "weighted_sum", {"a": [Score(None), Score(None), Score(1e308)], "b": broken}
    )
    assert values(combined) == [None] * 3
    assert [c.reason for c in combined] == [
        "b: nan",
        "no reward applies (a, b gave None); return a number from one of them",
        "the combined reward is inf",
    ]


def test_unequal_lengths_are_an_error():
    with pytest.raises(ValueError):
        combine(BOTH, "weighted_sum", {"a": A, "b": B[:2]})


def test_it_needs_no_torch():
    code = (
        "import sys; from aisp_dist.rewards import function, load, combine;"
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
