"""`python -m tests.bench.rounds` on Ray: it measures whole rounds. No speed is asserted."""

from __future__ import annotations

import asyncio
import json
import pickle

import pytest

from aisp_dist.records import Prompt, Round, Sampling
from tests.bench import rounds
from tests.bench.rounds import Instant

pytestmark = pytest.mark.ray


def test_every_round_is_run_and_its_cpu_time_known(capsys):
    code = rounds.main(["--rounds", "20", "--iterations", "4", "--replicas", "1", "--samples", "4"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["agrees"], "every prompt has its row"
    assert found["rounds"] == 20 and found["coordinator_cpu_seconds_per_round"] > 0
    assert found["rounds_per_cpu_second"] * found["coordinator_cpu_seconds_per_round"] == pytest.approx(1)
    seconds, gpu = found["coordinator_cpu_seconds_per_round"], found["gpu_seconds_per_round"]
    assert found["share_of_a_round"] == pytest.approx(seconds / gpu)


def test_answers_have_the_size_of_real_ones():
    fake = Instant(32, 128)
    rollout = asyncio.run(fake.rollout(Round(0, "p", (1,), 0, 0, 32, Sampling())))
    assert [t.sample for t in rollout.trajectories] == list(range(32))
    assert {len(t.token_ids) for t in rollout.trajectories} == {128}
    assert len({t.token_ids for t in rollout.trajectories}) == len({t.text for t in rollout.trajectories}) == 32
    assert len(pickle.dumps(rollout)) > 32 * (3 * 128 + 3 * 128), "tokens of 3 bytes and their text"
    scores = asyncio.run(fake.score(Prompt("p", 0, "p"), [t.text for t in rollout.trajectories]))
    assert len({s.value for s in scores}) == 32, "rewards that differ, or the update has nothing to search"
