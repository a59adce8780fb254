"""The generator actor's class in one process: many callers, one engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import tiny
import torch

from actors.generator import Generator
from aisp_dist.config import Run, Runtime
from aisp_dist.placement import Group
from aisp_dist.records import Late, Round, Sampling


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny.save("llama", folder)
    return Run.model_validate(
        {
            "output": "o",
            "generator": {"model": str(folder), "max_new_tokens": 12, "batch_rows": 32},
            "rewards": {"r": {"kind": "function", "function": "r.py:f"}},
            "method": {"kind": "best_of_n"},
        }
    )


def round_of(prompt: str, samples: int = 4) -> Round:
    return Round(0, prompt, (1, 5, 9, len(prompt)), 0, 0, samples, Sampling(sigma2=1.0))


async def loaded(settings) -> Generator:
    generator = Generator(settings, Path(), "generator-0", Group("generator", 1, 1, 1.0, 0.0, None))
    assert await generator.load() == generator.service.engine.lm.context_length
    return generator


def test_callers_get_their_own_answers_whoever_else_calls(settings):
    async def main():
        together, alone = await loaded(settings), await loaded(settings)
        rounds = [round_of("p" * i, 1 + i % 5) for i in range(12)]
        answers = await asyncio.gather(*map(together.rollout, rounds))
        assert answers == [await alone.rollout(r) for r in rounds]
        assert repr(together) == "generator-0"

    asyncio.run(main())


def test_a_round_asked_twice_is_answered_twice(settings):
    async def main():
        generator = await loaded(settings)
        first, second = await asyncio.gather(generator.rollout(round_of("p")), generator.rollout(round_of("p")))
        assert first == second and not generator.service.busy

    asyncio.run(main())


def test_a_bad_round_is_its_callers_error_alone(settings):
    async def main():
        generator = await loaded(settings)
        bad = Round(0, "bad", (1,) * 5000, 0, 0, 2, Sampling())
        errors = await asyncio.gather(generator.rollout(bad), generator.rollout(round_of("p")), return_exceptions=True)
        assert isinstance(errors[0], ValueError) and len(errors[1].trajectories) == 4

    asyncio.run(main())


def test_a_caller_that_gives_up_frees_its_rows(settings):
    async def main():
        generator = await loaded(settings)
        gone = asyncio.ensure_future(generator.rollout(round_of("p", 64)))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert len((await generator.rollout(round_of("q"))).trajectories) == 4
        assert not generator.service.busy and not generator.service.engine.busy

    asyncio.run(main())


def test_nll_beside_rollouts(settings):
    async def main():
        generator = await loaded(settings)
        drawn, losses = await asyncio.gather(generator.rollout(round_of("p")), generator.nll((1, 5), [(7, 8), (9,)]))
        again = await generator.nll((1, 5), [(7, 8), (9,)])
        assert losses == again and all(torch.isfinite(torch.tensor(losses))) and len(drawn.trajectories) == 4

    asyncio.run(main())


class Steps:
    """A clock that a service reads in place of time: one second a decoding step."""

    def __init__(self, monkeypatch):
        self.engine = None
        monkeypatch.setattr("aisp_dist.engine.service.time", self)

    def monotonic(self):
        return float(self.engine.steps) if self.engine else 0.0


@pytest.mark.parametrize(("limit", "late"), [(14, False), (8, True)])
def test_waiting_for_rows_is_not_decoding(settings, monkeypatch, limit, late):
    """Four rounds of four times the rows take 192 steps of 12 tokens each; no answer takes more than 12 of its own."""

    async def main():
        clock = Steps(monkeypatch)
        run = settings.model_copy(update={"runtime": Runtime(timeouts={"round": limit})})
        generator = await loaded(run)
        clock.engine = generator.service.engine
        rounds = [round_of("p" * i, 128) for i in range(1, 5)]
        answers = await asyncio.gather(*map(generator.rollout, rounds), return_exceptions=True)
        longest = [max(len(t.token_ids) for t in answer.trajectories) for answer in answers if not late]
        assert clock.engine.steps > 4 * limit
        assert all(isinstance(answer, Late) for answer in answers) if late else max(longest) == 12
        assert len(await generator.nll((1, 5), [(7, 8)])) == 1, "the process goes on"

    asyncio.run(main())


def test_progress_grows_while_prompts_pass_through_the_model_before_one_step(settings, monkeypatch):
    """Else a healthy process with many new prompts would look like one that hangs."""

    async def main():
        generator = await loaded(settings)
        engine, seen = generator.service.engine, []
        dense = engine.lm.dense

        def looked(tokens, keep=False):
            seen.append((engine.steps, generator.service.work))
            return dense(tokens, keep)

        object.__setattr__(engine.lm, "dense", looked)
        await asyncio.gather(*(generator.rollout(round_of("p" * i, 1)) for i in range(1, 20)))
        first = [work for step, work in seen if step == seen[0][0]]
        assert len(first) > 5 and first == list(range(first[0], first[0] + len(first)))

    asyncio.run(main())
