"""Calls to replicas that die, hang or err, on fakes: what is repeated, what becomes a row, what ends the run."""

from __future__ import annotations

import asyncio

import pytest

from actors.pool import Fault, Pool
from aisp_dist.align import RowError


class Dead(Exception):
    """Stands for a process that went away."""


class Fake:
    """A replica that follows a script: one entry a call; callables are awaited, exceptions raised, values answered."""

    def __init__(self, name, script=(), restart=None):
        self.name, self.script, self.restarts, self.calls, self.on_restart = name, list(script), [], [], restart

    async def call(self, method, *args):
        self.calls.append(args)
        await asyncio.sleep(0)
        step = self.script.pop(0) if self.script else "ok"
        if isinstance(step, BaseException):
            raise step
        return await step() if callable(step) else step

    async def restart(self, reason):
        self.restarts.append(reason)
        if self.on_restart:
            await self.on_restart()


def pool(*replicas, **options):
    defaults = {"limit": 4, "timeout": 5.0, "retries": 2, "is_fault": lambda e: isinstance(e, Dead)}
    return Pool(replicas, **defaults | options)


def test_a_dead_replica_is_restarted_and_the_call_goes_elsewhere():
    async def main():
        a, b = Fake("a", [Dead("gone")]), Fake("b")
        p = pool(a, b)
        p.home["x"] = p.slots[0]
        assert await p.call("x", "m") == "ok"
        assert len(a.restarts) == 1 and not b.restarts and len(b.calls) == 1
        assert (p.restarts, p.repeats) == (1, 1)

    asyncio.run(main())


def test_too_many_faults_end_the_run_with_a_message():
    async def main():
        with pytest.raises(Fault, match=r"failed 3 times, more than runtime.retries = 2.*Dead: gone"):
            await pool(Fake("a", [Dead("gone")] * 9)).call("x", "m")

    asyncio.run(main())


def test_an_error_counts_as_content_only_if_a_fresh_process_repeats_it():
    async def main():
        a = Fake("a", [ValueError("odd"), "fine"])
        assert await pool(a).call("x", "m") == "fine" and len(a.restarts) == 1
        b = Fake("b", [ValueError("odd"), ValueError("odd")])
        with pytest.raises(RowError, match="again in a fresh process: ValueError: odd"):
            await pool(b).call("x", "m")
        assert len(b.restarts) == 1

    asyncio.run(main())


def test_only_a_process_started_after_the_error_may_judge_it():
    """Another replica that is as old as the first has not shown that a fresh process errs too."""

    async def main():
        stale = Fake("b", [ValueError("odd")] * 9)
        a = Fake("a", [ValueError("odd"), "fine"])
        p = pool(a, stale)
        p.home["x"] = p.slots[0]
        assert await p.call("x", "m") == "fine"
        assert not stale.calls

    asyncio.run(main())


def test_a_stalled_replica_is_replaced_and_a_hanging_reward_is_a_row():
    async def forever():
        await asyncio.sleep(3600)

    async def main():
        a = Fake("a", [forever])
        assert await pool(a, timeout=0.05).call("x", "m") == "ok" and "no answer within 0.05 s" in a.restarts[0]
        with pytest.raises(RowError, match="no answer within"):
            hanging = Fake("b", [forever, forever])
            await pool(hanging, timeout=0.05, timeout_is_content=True).call("x", "m")
        await asyncio.sleep(0)
        assert len(hanging.restarts) == 2, "the process that hangs on it must not serve the next"
        with pytest.raises(Fault, match="no answer within"):
            await pool(Fake("c", [forever] * 9), timeout=0.02).call("x", "m")

    asyncio.run(main())


def test_one_crash_seen_by_many_calls_restarts_once():
    async def main():
        gate = asyncio.Event()

        async def die():
            await gate.wait()
            raise Dead("gone")

        a = Fake("a", [die] * 4)
        p = pool(a)
        calls = [asyncio.ensure_future(p.call(f"p{i}", "m")) for i in range(4)]
        await asyncio.sleep(0.01)
        gate.set()
        assert await asyncio.gather(*calls) == ["ok"] * 4
        assert len(a.restarts) == 1

    asyncio.run(main())


def test_calls_beside_one_that_errs_do_not_use_up_their_retries():
    """A replica restarted because of another call's own error is not the fault of the calls that it took along."""

    async def main():
        kill = asyncio.Event()

        async def dragged():
            await kill.wait()
            raise Dead("restarted under it")

        async def restart():
            kill.set()
            await asyncio.sleep(0.01)

        a = Fake("a", [ValueError("odd"), dragged], restart)
        p = pool(a, retries=0)
        bad, good = asyncio.ensure_future(p.call("bad", "m")), asyncio.ensure_future(p.call("good", "m"))
        assert await asyncio.gather(bad, good) == ["ok", "ok"]

    asyncio.run(main())


def test_a_replica_is_never_given_more_than_its_limit_and_none_starves():
    async def main():
        running = most = 0

        async def work():
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= 1
            return "ok"

        p = pool(Fake("a", [work] * 50), limit=3)
        assert await asyncio.gather(*(p.call(str(i), "m") for i in range(50))) == ["ok"] * 50
        assert most == 3

    asyncio.run(main())


def test_a_prompt_stays_where_it_is_warm_while_there_is_room():
    async def main():
        a, b = Fake("a"), Fake("b")
        p = pool(a, b)
        for _ in range(6):
            await p.call("x", "m")
        assert sorted([len(a.calls), len(b.calls)]) == [0, 6]
        p.forget("x")
        assert not p.home

    asyncio.run(main())


def test_a_replica_that_cannot_come_back_ends_the_run():
    async def broken():
        raise Fault("did not start")

    async def main():
        with pytest.raises(Fault, match="did not start"):
            await pool(Fake("a", [Dead("gone")], broken)).call("x", "m")

    asyncio.run(main())
