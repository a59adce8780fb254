"""What a search asks for, and who answers: rounds that several generators decode."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from actors.backend import RayBackend, split
from aisp_dist.records import Rollout, Round, Sampling
from tests.replicas import pool
from tests.test_coordinator import FakeGenerator

STARTS = tuple((i,) for i in range(32))
ROUND = Round(0, "p", (1, 2), 1, 0, 32, Sampling(), starts=STARTS)


@pytest.mark.parametrize("samples", [1, 8, 15, 16, 29, 32])
@pytest.mark.parametrize("parts", [0, 1, 2, 3, 64])
def test_parts_of_a_round_are_the_round(samples: int, parts: int) -> None:
    round = replace(ROUND, start=5, stop=5 + samples, starts=STARTS[:samples])
    found = split(round, parts)
    assert 1 <= len(found) <= max(1, parts)
    assert [i for one in found for i in range(one.start, one.stop)] == [*range(5, 5 + samples)]
    assert tuple(start for one in found for start in one.starts) == round.starts
    assert all(one.stop - one.start >= min(8, samples) for one in found)
    assert {replace(one, start=0, stop=0, starts=()) for one in found} == {replace(ROUND, stop=0, starts=())}


@pytest.mark.parametrize(("prompts", "expected"), [(1, [16, 16]), (2, [16, 16, 32]), (3, [16, 16, 32, 32])])
def test_generators_share_a_round_where_fewer_prompts_are_in_flight(prompts: int, expected: list[int]) -> None:
    generators = [FakeGenerator(name, delay=0.01) for name in "ab"]
    backend = RayBackend({"generator": pool(*generators)})
    rounds = [replace(ROUND, prompt_id=f"p{i}", starts=()) for i in range(prompts)]  # the first begins alone

    async def decode() -> list[Rollout]:
        return await asyncio.gather(*map(backend.rollout, rounds))

    drawn = asyncio.run(decode())
    assert [t.sample for rollout in drawn for t in rollout.trajectories] == [*range(32)] * prompts
    assert sorted(one.stop - one.start for generator in generators for one in generator.rounds) == expected
    assert {one.prompt_id for one in generators[0].rounds} & {one.prompt_id for one in generators[1].rounds} == {"p0"}
    assert not backend.drawing
    backend.forget("p0")
    assert not any(home == "p0" for home, _ in backend.pools["generator"].home)
