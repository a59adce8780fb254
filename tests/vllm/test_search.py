"""An engine of two ranks after an error of both; and a search that goes on there, after the engine that began it was
killed."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import slow_path
import tiny
from engines import SHAPE, STEPS, settings
from test_exact import PROMPT, rounds

from actors.backend import RayBackend
from actors.fleet import Fault
from actors.pool import Pool
from aisp_dist.align import align
from aisp_dist.config import Run
from aisp_dist.engine import model
from aisp_dist.engine.decode import Engine
from aisp_dist.records import Done, Prompt, Result, Rollout, Round, Score, Weights
from aisp_dist.vllm import requests
from aisp_dist.vllm.service import Dead


@pytest.fixture(scope="module")
def lm() -> Any:
    return model.adapt(tiny.causal("llama", **SHAPE), tiny.tokenizer())


def test_an_error_of_the_ranks_leaves_nothing_to_the_next_call(service: Any, on: Any) -> None:
    round = rounds()["u != 0"]
    asked = "nobody", 3, "p", 5, requests.plain(round), (0.1, None)
    right = on(service.rollout(round))
    with pytest.raises(RuntimeError, match="0 of the base answer's 5 states"):
        on(service._rpc("aisp_calibrate", *asked))
    assert on(service.rollout(round)) == right


class Replica:
    """A service as a pool sees one. core: killed when a third iteration is asked for."""

    def __init__(self, name: str, service: Any, core: psutil.Process | None = None) -> None:
        self.name, self.service, self.core = name, service, core
        self.served: list[tuple[Round, Rollout]] = []

    async def call(self, method: str, *args: Any) -> Any:
        if self.core and isinstance(args[0], Round) and args[0].iteration == 2:
            with suppress(psutil.NoSuchProcess):
                self.core.kill()
        answer = await getattr(self.service, method)(*args)
        if method == "rollout":
            self.served.append((args[0], answer))
        return answer

    async def restart(self, why: str) -> None:
        raise Fault(f"{self.name} is gone: {why}")

    async def health(self) -> dict[str, float]:
        return {"progress": self.service.work, "busy": float(self.service.busy)}


class Letters:
    """A reward: how many different letters an answer has."""

    name = "letters"

    async def call(self, method: str, prompt: Prompt, responses: list[str]) -> list[Score]:
        return [Score(float(len(set(response)))) for response in responses]


def test_a_search_goes_on_elsewhere_with_the_control_of_its_trace(service: Any, on: Any, lm: Any, llama: Path) -> None:
    """Every round after the kill is the one that the trace gives, and what the local engine decodes for it."""
    from aisp_dist.vllm.start import start

    method = {"kind": "aisp", "num_samples": 4, "num_iterations": 4, "lambda": {"ess": 0.5}, "sigma2": 0.3}
    rewards = {"letters": {"kind": "function", "function": "letters.py:letters"}}
    generator = {"model": str(llama), "max_new_tokens": STEPS}
    run = Run.model_validate({"output": "none", "generator": generator, "rewards": rewards, "method": method})
    there = set(psutil.Process().children(recursive=True))
    first = on(start(settings(llama), 100))
    (core,) = [p for p in psutil.Process().children(recursive=True) if p not in there and "EngineCor" in p.name()]
    dying, other = Replica("dying", first, core), Replica("other", service)

    async def search() -> list[Result]:
        how = {"timeout": None, "retries": 2, "is_fault": lambda error: isinstance(error, Dead)}
        pools = {
            "generator": Pool([dying, other], max_calls=9, **how),
            "letters": Pool([Letters()], max_calls=9, **how),
        }
        prompts = [Prompt(f"p{i}", i, "") for i in range(4)]
        backend = RayBackend(pools)
        found = await asyncio.gather(*(align(run, p, PROMPT[p.source_index :], backend) for p in prompts))
        if recovery := pools["generator"].fleet.slots[0].recovery:
            recovery.cancel()
        first.close()
        return found

    results = {result.prompt.id: result for result in on(search())}
    begun = {round.prompt_id for round, _ in dying.served if round.iteration == 1}
    moved = [(r, rollout) for r, rollout in other.served if r.prompt_id in begun and r.iteration >= 2]
    assert begun and len(moved) == 2 * len(begun) < 2 * len(results)
    for round, rollout in dying.served + other.served:
        result = results[round.prompt_id]
        assert isinstance(result, Done)
        trace = result.trace[: max(round.iteration, 0)]
        assert round.trace == tuple(Weights(one.weights, one.lengths) for one in trace)
        (right,) = Engine(lm, 32, STEPS).run([round])
        assert slow_path.tokens(rollout) == slow_path.tokens(right)
        assert rollout.u_sq == pytest.approx(right.u_sq, rel=1e-9)
