"""A reward's server that is down: asked again by the same process, and named when it stays down. On a real scorer and a
real server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from judge_server import chat, serving
from replicas import Fake, pool

from actors import pool as pools
from actors.backend import RayBackend
from actors.fleet import Fault
from actors.scorer import Scorer
from aisp_dist.align import RowError
from aisp_dist.config import HttpReward
from aisp_dist.placement import Group
from aisp_dist.records import Late, Prompt, Score
from aisp_dist.rewards import http
from aisp_dist.rewards.client import Limited, Rejected, Unavailable

PROMPT = Prompt("p", 0, (("user", "Hi"),))


class Process:
    """A scorer in a thread, as Ray would run it in a process."""

    def __init__(self, url: str, limit: float, **more) -> None:
        settings = HttpReward(url=url, model="m", rubric="{prompt} {response}", retries=0, **more)
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
        told.faults = [fault] * 10  # each call asks once for its response and once for a probe
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
        limit = http.LIMITS * 1.0
        with pytest.raises(Fault, match=rf"^{told.url}/chat/completions: no answer \(ReadTimeout\)"):
            await pool(process, timeout=limit, outage=1.0, max_calls=1).call("x", "score", PROMPT, ["a"])
        assert not process.restarts

    with serving() as told:
        asyncio.run(main(told))


@pytest.mark.parametrize("fault", [(500, {}), (403, {}), (404, {}), (451, {}), "close", "slow"], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_every_prompt_has_one_answer_whatever_its_texts_make_the_server_do(fault, count):
    """A score or a row of its own with the reason; and the run goes on, also where no other prompt is left."""

    def poisoned(body):
        return "poison" in body["messages"][0]["content"]

    async def main(told):
        processes = [Process(told.url, 30.0, timeout=0.2) for _ in range(count)]
        if fault == "slow":
            told.delay = lambda body: 1.0 if poisoned(body) else 0.0
        else:
            told.fault = lambda body: fault if poisoned(body) else None
        backend = RayBackend({"http": pool(*processes, timeout=120.0, outage=0.5, max_calls=1)})
        texts = {f"p{i}": ["poison" if i in (3, 7) else "good", f"text {i}"] for i in range(10)}
        calls = (backend.score("http", Prompt(key, 0, "Hi"), texts[key]) for key in texts)
        found = dict(zip(texts, await asyncio.gather(*calls, return_exceptions=True), strict=True))
        bad = {key for key, answer in found.items() if isinstance(answer, RowError)}
        assert bad == {"p3", "p7"} and all("not this prompt's" in str(found[key]) for key in bad)
        assert all(answer == [Score(5.0)] * 2 for key, answer in found.items() if key not in bad)
        assert not any(process.restarts for process in processes)
        left = RayBackend({"http": pool(processes[0], timeout=120.0, outage=0.5, max_calls=1)})
        with pytest.raises(RowError, match="not this prompt's"):
            await left.score("http", Prompt("p3", 0, "Hi"), ["poison"])

    with serving() as told:
        asyncio.run(main(told))


def test_answers_are_kept_while_a_slow_server_is_asked_again():
    """More responses than fit the limit of one call: each is answered once, and none is asked for after its answer."""

    async def main(told):
        process = Process(told.url, 1.0, requests_per_minute=300.0)
        told.seen.clear()
        told.answer = lambda path, body: chat(str(int(body["messages"][0]["content"].split()[-1]) % 10 + 1))
        backend = RayBackend({"http": pool(process, timeout=4.0, outage=1.0, max_calls=1)})
        texts = [str(i) for i in range(20)]  # 5 a second, and a call has 0.9 s
        async with asyncio.timeout(60):
            scores = await backend.score("http", PROMPT, [*texts, "3"])
        assert scores == [Score(float(int(text) % 10 + 1)) for text in [*texts, "3"]]
        assert len(told.seen) <= 20 + 6 and not process.restarts, "at most one request a call is cut"

    with serving() as told:
        asyncio.run(main(told))


@pytest.mark.parametrize("kind", [Unavailable, Rejected, Limited])
def test_a_call_that_alone_goes_without_an_answer_is_a_row_and_where_nothing_answers_the_run_ends(kind):
    """Judged by the calls of other prompts, after the time that a server may be down."""

    class Behind(Fake):
        down = False

        async def call(self, method, *args):
            self.calls.append(args)
            await asyncio.sleep(0.001)
            if self.down or args == ("poison",):
                raise kind("http://host: it is silent", "it is silent")
            return "ok"

    async def main():
        a = Behind("a")
        p = pool(a, outage=0.05, max_calls=2, key="runtime.timeouts.round")
        names = ["poison" if i in (2, 3) else f"good {i}" for i in range(12)]
        found = await asyncio.gather(*(p.call(str(i), "m", n) for i, n in enumerate(names)), return_exceptions=True)
        for name, answer in zip(names, found, strict=True):
            row = isinstance(answer, RowError) and str(answer).startswith("it is silent, twice, alone")
            assert row if name == "poison" else answer == "ok", (name, answer)
        assert a.calls.count(("poison",)) >= 6 and not a.restarts
        a.down = True
        found = await asyncio.gather(*(p.call(n, "m", n) for n in (*names, "new")), return_exceptions=True)
        assert all(isinstance(answer, Fault) and "http://host" in str(answer) for answer in found), found
        assert not a.restarts and not p.fleet.slots[0].held

    asyncio.run(main())
