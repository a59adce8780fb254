"""Counts of a run: those of shards add up, and idle shares are those of an interval."""

from __future__ import annotations

import pytest

from actors.counts import Counts, gauges, share

A = Counts(
    done=3, failed=1, fresh=4, samples=64, gain=2.0, gains=2, busy={"g": 6.0, "r": 1.0}, up={"g": 10.0, "r": 4.0}
)
B = Counts(done=2, fresh=2, samples=32, gain=-1.0, gains=1, busy={"g": 9.0}, up={"g": 10.0}, row_steps=3, row_slots=4)


def test_shards_add_up_and_an_interval_is_a_difference():
    both = A + B
    assert both == B + A and both - B == A + Counts(busy={"g": 0}, up={"g": 0})
    assert (both.finished, both.samples, both.reward_gain) == (6, 96, pytest.approx(1 / 3))
    assert both.idle() == {"g": pytest.approx(0.25), "r": pytest.approx(0.75)}
    assert (both - A).idle()["g"] == pytest.approx(0.1)
    assert Counts().reward_gain is None and Counts().slot_utilisation is None and not Counts().idle()


def test_gauges_know_what_is_not_known_yet():
    empty = gauges(Counts(), Counts(), 5.0, None, 16)
    assert empty["eta_seconds"] is None and empty["reward_gain"] is None and empty["generator_idle"] is None
    now = gauges(A + B, B, 4.0, 16, 20)
    assert now["eta_seconds"] == pytest.approx(((16 - 6 + 6) * 20 - 96) / (32 / 4)) and now["slot_utilisation"] == 0.75


@pytest.mark.parametrize("total", [0, 1, 6, 7, 20, 21, 22])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_shards_of_an_input_are_its_parts_dealt_out(total, count):
    shares = [share(total, 7, (i, count)) for i in range(count)]
    assert shares == [sum(n // 7 % count == i for n in range(total)) for i in range(count)]
    assert share(None, 7, (0, count)) is None
