"""A reward's server that is down: asked again by the same process, and named when it stays down. On a real scorer and a
real server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from judge_server import chat, serving
from replicas import Fake, pool

from actors import pool as pools
from actors.fleet import Fault
from actors.scorer import Scorer
from aisp_dist.config import HttpReward
from aisp_dist.placement import Group
from aisp_dist.records import Late, Prompt, Score
from aisp_dist.rewards.client import Unavailable

PROMPT = Prompt("p", 0, (("user", "Hi"),))


class Process:
    """A scorer in a thread, as Ray would run it in a process."""

    def __init__(self, url: str, limit: float) -> None:
        settings = HttpReward(url=url, model="m", rubric="{prompt} {response}", retries=0)
        self.name, self.restarts = "scorer-http-0", []
        self.scorer = Scorer("http", settings, Path(), (), self.name, Group("http", 1, 1, 0.5, 0.0, None), limit)
        self.scorer.load()

    async def call(self, method, *args):
        return await asyncio.to_thread(getattr(self.scorer, method), *args)

    async def restart(self, why):
        self.restarts.append(why)

    async def health(self):
        return self.scorer.health()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(pools, "_PAUSE", 0.01)


@pytest.mark.parametrize("fault", ["close", (503, {}), (404, {})])
def test_a_server_that_comes_back_costs_no_process(fault):
    async def main(told):
        process = Process(told.url, 30.0)
        p = pool(process, timeout=30.0, max_calls=1)
        told.answer = lambda path, body: chat(body["messages"][0]["content"].split()[-1])
        told.faults = [fault] * 5
        calls = (p.call(str(n), "score", PROMPT, [str(n)]) for n in range(1, 5))
        assert await asyncio.gather(*calls) == [[Score(float(n))] for n in range(1, 5)]
        assert not process.restarts and p.fleet.restarts == 0 and p.repeats == 5

    with serving() as told:
        asyncio.run(main(told))


def test_a_server_that_goes_down_while_a_call_is_tried_alone_is_no_failure_of_it():
    """However often it is asked: the fresh process stays, and its answer counts."""

    async def main():
        a = Fake("a", [Late("slow"), *[Unavailable("down")] * 9, "fine"])
        assert await pool(a, retries=2).call("x", "m") == "fine"
        assert a.restarts == ["a fresh process is wanted"] and len(a.calls) == 11

    asyncio.run(main())


def test_one_that_stays_down_ends_the_run_with_its_address():
    async def main(told):
        process = Process(told.url, 0.5)
        p = pool(process, timeout=0.5, max_calls=1, key="runtime.timeouts.reward")
        assert await p.call("x", "score", PROMPT, ["a"]) == [Score(5.0)]
        told.faults = ["close"] * 10_000
        said = rf"^{told.url}/chat/completions: no answer \(\w+\), 1 time; .* for 0.5 s \(runtime.timeouts.reward\)"
        with pytest.raises(Fault, match=said):
            await p.call("y", "score", PROMPT, ["b"])
        assert not process.restarts and p.fleet.restarts == 0

    with serving() as told:
        asyncio.run(main(told))


def test_one_that_hangs_is_told_from_a_process_that_hangs():
    async def main(told):
        process = Process(told.url, 1.0)
        told.delay = lambda body: 1.2
        with pytest.raises(Fault, match=rf"^{told.url}/chat/completions: no answer \(ReadTimeout\)"):
            await pool(process, timeout=1.0, max_calls=1).call("x", "score", PROMPT, ["a"])
        assert not process.restarts

    with serving() as told:
        asyncio.run(main(told))
