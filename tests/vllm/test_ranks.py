"""What comes back from several ranks of workers, without an engine: vLLM's executor is a fake that leaves the same
answers behind."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import slow_path
import tiny
import torch
from engines import STEPS
from test_exact import NOISY, PROMPT

from aisp_dist.engine import control
from aisp_dist.engine.served import Served
from aisp_dist.records import Calibration, Rates, Round, Sampling
from aisp_dist.vllm import worker
from aisp_dist.vllm.rows import Rows
from aisp_dist.vllm.service import Dead, Meter, Service

DIM = 8


class Ranks:
    """Two ranks of a first pipeline stage and two of the last one. As in vLLM, a method that raises at one rank leaves
    the answers of later ranks to the next call."""

    def __init__(self) -> None:
        def runner(last: bool) -> SimpleNamespace:
            rows = Rows(lambda z_ND: z_ND, DIM, torch.device("cpu"), 8)
            hook = {"aisp": SimpleNamespace(rows=rows, plain=rows.head)} if last else {}
            return SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32), **hook)

        self.workers = [worker.Worker() for _ in range(4)]
        for rank, one in enumerate(self.workers):
            one.model_runner = runner(rank >= 2)
        self.answers: list[deque[Any]] = [deque() for _ in self.workers]
        self.errored, self.asked, self.failure = False, 0, None

    async def generate(self, prompt: Any, params: Any, name: str, **_: Any) -> AsyncIterator[Any]:
        self.asked += 1
        answer = SimpleNamespace(token_ids=[5] * params.max_tokens, finish_reason="length", logprobs=None)
        yield SimpleNamespace(outputs=[answer])

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        if self.failure:
            raise self.failure
        for one, answers in zip(self.workers, self.answers, strict=True):
            try:
                answers.append(getattr(one, method)(*args))
            except Exception as error:
                answers.append(error)
        told = []
        for answers in self.answers:
            told.append(answers.popleft())
            if isinstance(told[-1], Exception):
                raise RuntimeError(f"Worker failed with error '{told[-1]}'")
        return told


def rounds() -> list[Round]:
    told = ((name, slow_path.trace(2, 4, STEPS, seed)) for seed, name in enumerate("ab"))
    return [Round(3, name, PROMPT, 2, 0, 4, NOISY, trace) for name, trace in told]


def served() -> Served:
    return Served(tiny.tokenizer(), frozenset({tiny.EOS_ID}), (), STEPS, 256, 260, 4)


def test_an_error_of_the_workers_leaves_nothing_to_the_next_call() -> None:
    """A calibration fails, since no states were kept; the costs of the next rounds are their own."""

    async def main() -> None:
        service = Service(Ranks(), served(), Meter())  # type: ignore[arg-type]
        asked = Calibration(3, "a", PROMPT, (5, 5), Sampling(), Rates(noise=0.1))
        with pytest.raises(RuntimeError, match="0 of the base answer's 2 states were kept"):
            await service.calibrate(asked)
        for round in rounds():
            made = control.rebuild(round, STEPS, DIM, torch.device("cpu"))
            found = await service.rollout(round)
            assert found.u_sq == made.u_sq
            costs = [(t.control_cost, t.control_sq) for t in found.trajectories]
            assert costs == control.costs(made, round, [STEPS] * 4)

    asyncio.run(main())


def test_after_a_call_that_fails_nothing_more_is_asked() -> None:
    async def main() -> None:
        ranks, told = Ranks(), []
        service = Service(ranks, served(), Meter(), broken=told.append)  # type: ignore[arg-type]
        before = ranks.asked
        ranks.failure = TimeoutError("RPC call timed out")
        with pytest.raises(Dead, match="did not answer aisp_finish: RPC call timed out"):
            await service.rollout(rounds()[0])
        ranks.failure, asked = None, ranks.asked
        for call in (service.rollout(rounds()[1]), service.nll(PROMPT, [(5,)])):
            with pytest.raises(Dead, match="timed out"):
                await call
        assert ranks.asked == asked > before and len(told) == 1

    asyncio.run(main())
