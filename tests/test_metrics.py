"""Measures and intervals."""

from __future__ import annotations

import numpy as np
import pytest

from aisp_dist.analysis.metrics import diversity, interval, repetition


@pytest.mark.parametrize("size", [3, 5, 10, 24, 64])
def test_the_interval_covers_the_true_mean_about_as_often_as_it_says(size):
    rng = np.random.default_rng(size)
    hits = sum(low <= 0 <= high for _, low, high in (interval(rng.normal(size=size), seed) for seed in range(400)))
    assert 366 <= hits <= 394  # of 400; 380 are 95 %


def test_an_interval_of_many_values_is_of_plain_percentiles():
    x = np.random.default_rng(3).exponential(size=5000)
    drawn = np.random.default_rng(0).integers(0, x.size, size=(2000, x.size), dtype=np.int32)
    low, high = np.quantile(x[drawn].mean(axis=1), [0.025, 0.975])
    assert interval(x) == pytest.approx((x.mean(), low, high), rel=1e-4)


def test_an_interval_moves_and_scales_with_its_values():
    x = np.random.default_rng(1).normal(size=30)
    a, b = interval(x), interval(3 * x + 7)
    assert b == pytest.approx([3 * v + 7 for v in a])
    assert interval([2.0] * 5) == (2, 2, 2)


def test_the_large_sample_form_continues_the_bootstrap():
    x = np.random.default_rng(2).exponential(size=20_001)
    small, large = interval(x[:20_000]), interval(x)
    assert large.low == pytest.approx(small.low, abs=2e-3) and large.high == pytest.approx(small.high, abs=2e-3)


def test_no_values_have_no_mean():
    with pytest.raises(ValueError, match="no values"):
        interval([])


def test_diversity():
    assert diversity("one two three four five") == 1
    assert diversity("") == diversity("one") == 1
    a_b = "a b " * 4  # 8 words: 2 of 7 bigrams, 2 of 6 trigrams, 2 of 5 4-grams are unique
    assert diversity(a_b) == pytest.approx(2 / 7 * 2 / 6 * 2 / 5)


def test_repetition_counts_what_has_come_before():
    assert repetition("a b c d e f") == repetition("a b c") == repetition("") == 0
    assert repetition("a b c d a b c d") == 1 / 5  # abcd bcda cdab dabc abcd
    assert repetition("x " * 10) == 6 / 7
