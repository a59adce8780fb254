"""What a search asks for, answered by pools of replicas: align.Backend for a Ray cluster, with the counts of what was
asked. Plain asyncio; knows Ray only through the pools it is given."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from actors.counts import Counts
from actors.pool import Pool
from aisp_dist.align import Tokens
from aisp_dist.records import Calibration, Prompt, Rollout, Round, Sampling, Score
from aisp_dist.together import together

if TYPE_CHECKING:
    from actors.metrics import Exporter


_LEAST = 8  # samples of a part of a round: fewer rows take a step of nearly the same time


def split(round: Round, parts: int) -> list[Round]:
    """The round as at most so many rounds of consecutive samples. Where fewer prompts than generators are in flight,
    several decode one round; of the local engine a row has the same bits on any of them."""
    samples = round.stop - round.start
    count = max(1, min(parts, samples // _LEAST))
    cuts = [samples * i // count for i in range(count + 1)]
    return [
        replace(round, start=round.start + low, stop=round.start + high, starts=round.starts[low:high])
        for low, high in pairwise(cuts)
    ]


class RayBackend:
    """pools: `generator`, and one by the name of each reward. Implements align.Backend."""

    def __init__(self, pools: Mapping[str, Pool]) -> None:
        self.pools = pools
        self.sums: Counter[str] = Counter()  # iterations, samples, tokens and given, as in Counts
        self.drawing: Counter[str] = Counter()  # rounds in flight, by prompt
        self.exporter: Exporter | None = None
        for pool in pools.values():
            pool.fleet.event = self._event

    async def rollout(self, round: Round) -> Rollout:
        began, pool = time.monotonic(), self.pools["generator"]
        self.drawing[round.prompt_id] += 1
        try:
            up = sum(slot.up for slot in pool.fleet.slots)
            parts = split(round, up // len(self.drawing))
            calls = (pool.call(round.prompt_id, "rollout", one, part=i) for i, one in enumerate(parts))
            found: list[Rollout] = await together(*calls)
        finally:
            self.drawing -= Counter((round.prompt_id,))  # keeps no zero
        rollout = Rollout(tuple(t for one in found for t in one.trajectories), found[0].u_sq)
        samples, given = round.stop - round.start, sum(map(len, round.starts))
        tokens = sum(len(t.token_ids) for t in rollout.trajectories) - given
        self.sums.update(iterations=round.iteration >= 0, samples=samples, tokens=tokens, given=given)
        if self.exporter:
            self.exporter.round(time.monotonic() - began, samples, tokens)
        return rollout

    async def score(self, reward: str, prompt: Prompt, responses: Sequence[str]) -> list[Score]:
        began = time.monotonic()
        scores: dict[int, Score] = {}
        while left := [i for i in range(len(responses)) if i not in scores]:  # every call brings some
            found = await self.pools[reward].call(prompt.id, "score", prompt, [responses[i] for i in left])
            scores |= {i: score for i, score in zip(left, found, strict=True) if score is not None}
        if self.exporter:
            self.exporter.scored(reward, time.monotonic() - began, len(responses))
        return [scores[i] for i in range(len(responses))]

    async def score_once(self, reward: str, prompt: Prompt, responses: Sequence[str]) -> list[Score] | None:
        """As `score`, but raises RowError at the first error of the reward. None where a fault left no answer."""
        scores: list[Score] | None = await self.pools[reward].once(prompt.id, "score", prompt, responses)
        return scores

    async def nll(self, prompt_id: str, prompt_tokens: Tokens, responses: Sequence[Tokens]) -> list[float]:
        losses: list[float] = await self.pools["generator"].call(prompt_id, "nll", prompt_tokens, responses)
        return losses

    async def calibrate(self, request: Calibration) -> Sampling:
        sampling: Sampling = await self.pools["generator"].call(request.prompt_id, "calibrate", request)
        return sampling

    def forget(self, prompt_id: str) -> None:
        """The prompt is finished: no replica needs to keep its prefix for it."""
        for pool in self.pools.values():
            pool.forget(prompt_id)

    def queued(self) -> dict[str, float]:
        """Calls that wait for a replica, by role."""
        return {role: len(pool.waiting) for role, pool in self.pools.items()}

    def alive(self) -> dict[str, float]:
        """Replicas that answer, by role."""
        return {role: sum(slot.up for slot in pool.fleet.slots) for role, pool in self.pools.items()}

    def totals(self) -> Counts:
        """What the replicas have counted since they were started, for this output and earlier ones."""
        counted = {role: pool.fleet.counts() for role, pool in self.pools.items()}
        decoded = counted.get("generator", {})
        return Counts(
            repeats=sum(pool.repeats for pool in self.pools.values()),
            restarts=sum(pool.fleet.restarts for pool in self.pools.values()),
            busy={role: found.get("busy_seconds", 0.0) for role, found in counted.items()},
            up={role: found.get("up_seconds", 0.0) for role, found in counted.items()},
            row_steps=decoded.get("row_steps", 0.0),
            row_slots=decoded.get("row_slots", 0.0),
            parts={
                name.removeprefix("part_"): seconds for name, seconds in decoded.items() if name.startswith("part_")
            },
        )

    def _event(self, kind: str, replica: str) -> None:
        if self.exporter:
            self.exporter.event(kind, replica)
