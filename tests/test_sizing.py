"""The suggested ratio of replicas: laws with random costs, then examples."""

from __future__ import annotations

import random

import pytest

from actors.sizing import LARGEST, suggest


def test_the_ratio_follows_from_the_costs_and_from_nothing_else():
    draw = random.Random(0)
    for _ in range(200):
        rewards = {name: 10 ** draw.uniform(-3, 1) for name in ("a", "b")}
        generator = 10 ** draw.uniform(-2, 1)
        found = suggest(generator, rewards, 1000, 10.0, 7)
        counts = {"generator": found.generators, **found.rewards}
        seconds = {"generator": generator, **rewards}
        assert min(counts.values()) >= 1 and sum(counts.values()) <= LARGEST
        pace = min(counts[name] / seconds[name] for name in counts)
        assert found.utilisation == pytest.approx(pace * sum(seconds.values()) / sum(counts.values()))
        assert found.utilisation <= 1 + 1e-9
        assert found.gpu_hours == pytest.approx(1000 / pace * sum(counts.values()) / 3600), "idle time is paid for too"
        assert found.bytes == 70
        scaled = suggest(3 * generator, {name: 3 * s for name, s in rewards.items()}, 1000, 10.0, 7)
        assert (scaled.generators, scaled.rewards) == (found.generators, found.rewards)
        assert scaled.gpu_hours == pytest.approx(3 * found.gpu_hours)


@pytest.mark.parametrize(
    ("generator", "rewards", "ratio"),
    [
        (1.0, {"r": 1.0}, (1, 1)),
        (3.0, {"r": 1.0}, (3, 1)),
        (1.0, {"r": 2.0}, (1, 2)),
        (0.074, {"r": 0.059}, (4, 3)),
        (2.0, {"a": 1.0, "b": 1.0}, (2, 1, 1)),
        (1.0, {"function": 0.0}, (19, 1)),
        (1.0, {"function": 0.001}, (19, 1)),
        (1.0, {}, (1,)),
    ],
)
def test_the_smallest_ratio_that_keeps_replicas_busy(generator, rewards, ratio):
    found = suggest(generator, rewards, 100, 1.0, 1)
    assert (found.generators, *found.rewards.values()) == ratio


def test_it_reads_well():
    line = suggest(0.5, {"helpful": 0.25}, 1_440_000, 1234.0, 1_000_000).line()
    assert line == (
        "replicas 2 generator : 1 helpful (busy 100%); 1,440,000 samples: 300 replica-hours "
        "(GPU-hours where each has one), 1.23 GB"
    )


@pytest.mark.parametrize("bad", [(0.0, {"r": 1.0}), (1.0, {"r": float("nan")}), (1.0, {"r": -1.0})])
def test_what_was_not_measured_is_refused(bad):
    with pytest.raises(ValueError, match="busy seconds a sample are"):
        suggest(*bad, 1, 1.0, 1)
