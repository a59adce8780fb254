"""Calls to replicas that die, hang, are slow or raise, on fakes: what is repeated, what becomes a row, what ends the
run."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from replicas import Dead, Fake, forever, pool

from actors.fleet import Fault
from aisp_dist.align import RowError
from aisp_dist.records import Late


def test_a_dead_replica_is_restarted_and_the_call_goes_elsewhere():
    async def main():
        a, b = Fake("a", [Dead("gone")]), Fake("b")
        p = pool(a, b)
        p.home["x", 0] = p.fleet.slots[0]
        assert await p.call("x", "m") == "ok"
        assert len(a.restarts) == 1 and not b.restarts and len(b.calls) == 1
        assert (p.fleet.restarts, p.repeats) == (1, 1)

    asyncio.run(main())


def test_too_many_faults_end_the_run_with_a_message():
    async def main():
        with pytest.raises(
            Fault, match=r"m of x on a failed more than runtime.retries = 2 times, and nothing else.*Dead: gone"
        ):
            await pool(Fake("a", [Dead("gone")] * 9)).call("x", "m")

    asyncio.run(main())


def test_an_error_is_confirmed_once_and_no_healthy_process_is_replaced():
    """Whatever runs beside it: a call that raises is asked twice, its neighbours once and again only as witnesses."""

    class Picky(Fake):
        async def call(self, method, *args):
            self.calls.append(args)
            await asyncio.sleep(0.001)
            if args[0].startswith("bad"):
                raise ValueError(args[0])
            return args[0]

    async def main():
        for count, max_calls in ((1, 1), (1, 4), (3, 1), (3, 4)):
            replicas = [Picky(str(i)) for i in range(count)]
            p = pool(*replicas, max_calls=max_calls)
            names = ["bad" + str(i) if i in (7, 8, 21) else f"good {i}" for i in range(30)]
            found = await asyncio.gather(*(p.call(name, "m", name) for name in names), return_exceptions=True)
            for name, answer in zip(names, found, strict=True):
                if name.startswith("bad"):
                    assert isinstance(answer, RowError) and str(answer) == f"ValueError: {name}"
                    assert sum(calls.count((name,)) for calls in (r.calls for r in replicas)) == 2
                    assert count == 1 or max(r.calls.count((name,)) for r in replicas) == 1, "on another replica"
                else:
                    assert answer == name
            assert p.fleet.restarts == 0 and not any(replica.restarts for replica in replicas)

    asyncio.run(main())


def test_an_error_that_does_not_come_again_is_no_row():
    async def main():
        a = Fake("a", [ValueError("odd"), "fine"])
        assert await pool(a).call("x", "m") == "fine" and not a.restarts

    asyncio.run(main())


def test_where_no_other_prompt_was_answered_a_fresh_process_decides():
    async def main():
        a = Fake("a", [ValueError("odd")] * 3)
        with pytest.raises(RowError, match="ValueError: odd"):
            await pool(a).call("x", "m")
        assert len(a.restarts) == 1
        b = Fake("b", [ValueError("odd")] * 2)
        assert await pool(b).call("x", "m") == "ok" and len(b.restarts) == 1

    asyncio.run(main())


def test_a_process_that_stalls_is_replaced_and_a_call_that_hangs_alone_twice_is_a_row():
    """For a reward the process is replaced each time, since it still runs the user's code."""

    async def hang(self, method, *args):
        self.calls.append(args)
        await asyncio.sleep(3600 if args == ("bad",) else 0)
        return "ok"

    async def main():
        a = Fake("a", [forever])
        assert await pool(a, timeout=0.05).call("x", "m") == "ok" and "no answer within 0.05 s" in a.restarts[0]
        slow = type("Slow", (Fake,), {"call": hang})("b")
        p = pool(slow, timeout=0.05, max_calls=1, key="runtime.timeouts.reward")
        names = ["bad", *map(str, range(6))]
        found = await asyncio.gather(*(p.call(name, "m", name) for name in names), return_exceptions=True)
        assert found[1:] == ["ok"] * 6 and isinstance(found[0], RowError)
        assert "runtime.timeouts.reward: no answer within 0.05 s, twice, alone in a fresh process" in str(found[0])
        assert slow.calls.count(("bad",)) == 3
        for hanging in ("alone", "x"):  # nobody else was answered, or only by another kind of call
            c = Fake("c", ["ok", *[forever] * 9])
            p = pool(c, timeout=0.02)
            await p.call("y", "other kind")
            with pytest.raises(Fault, match="no answer within"):
                await p.call(hanging, "m")

    asyncio.run(main())


def test_a_call_over_its_callees_own_limit_costs_nobody_else_anything():
    """A generator keeps the limit itself, so it is well and its other rounds go on; a call that is fast alone is no
    row."""

    class Busy(Fake):
        crowd = 0

        async def call(self, method, *args):
            self.crowd += 1
            self.calls.append(args)
            crowded = False
            for _ in range(20):
                await asyncio.sleep(0)
                crowded |= self.crowd > 1
            self.crowd -= 1
            if args == ("bad",) or (args == ("slow",) and crowded):
                raise Late("an answer was not finished")
            return "ok"

    async def main():
        replica = Busy("g")
        p = pool(replica, timeout=None, key="runtime.timeouts.round")
        names = [*map(str, range(4)), "bad", "slow", *map(str, range(4, 20))]
        found = await asyncio.gather(*(p.call(name, "m", name) for name in names), return_exceptions=True)
        assert isinstance(found[4], RowError) and "runtime.timeouts.round: an answer was not fin" in str(found[4])
        assert [answer for i, answer in enumerate(found) if i != 4] == ["ok"] * 21
        good = [name for name in replica.calls if name not in (("bad",), ("slow",))]
        assert len(good) - len(set(good)) <= 1, "asked again at most as a witness"
        assert all("a fresh process is wanted" in why for why in replica.restarts)

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


def test_a_replica_is_never_given_more_than_max_calls_and_none_starves():
    async def main():
        running = most = 0

        async def work():
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= 1
            return "ok"

        p = pool(Fake("a", [work] * 50), max_calls=3)
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


class Poisoned(Fake):
    """Its process dies of one prompt, and takes along whatever else is in it."""

    def __init__(self, name):
        super().__init__(name)
        self.death = asyncio.Event()

    async def call(self, method, *args):
        self.calls.append(args)
        if args == ("poison",):
            await asyncio.sleep(0.002)
            death, self.death = self.death, asyncio.Event()
            death.set()
            raise Dead("segmentation fault")
        death = self.death
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(death.wait(), 0.004)
            raise Dead("segmentation fault")
        return "ok"


def test_a_prompt_that_kills_its_process_every_time_becomes_a_row_and_no_other_does():
    async def main():
        for count in (1, 3):
            p = pool(*(Poisoned(str(i)) for i in range(count)), max_calls=4)
            names = ["poison" if i in (5, 11) else f"good {i}" for i in range(30)]
            found = await asyncio.gather(*(p.call(name, "m", name) for name in names), return_exceptions=True)
            for name, answer in zip(names, found, strict=True):
                if name == "poison":
                    assert isinstance(
                        answer, RowError
                    ) and "alone in a fresh process that answers other prompts: Dead" in str(answer)
                else:
                    assert answer == "ok", (name, answer)

    asyncio.run(main())


def test_processes_that_all_die_end_the_run_and_make_no_rows(monkeypatch):
    monkeypatch.setattr("actors.fleet._BACKOFF", (0.001, 0.002))

    async def main():
        p = pool(Fake("a", [Dead("gone")] * 99), Fake("b", [Dead("gone")] * 99))
        found = await asyncio.gather(*(p.call(str(i), "m") for i in range(8)), return_exceptions=True)
        assert all(isinstance(answer, Fault) for answer in found), found

    asyncio.run(main())


class Tainted(Fake):
    """A process in which everything errs once one prompt has been in it."""

    tainted = False

    async def call(self, method, *args):
        self.tainted |= args == ("bad",)
        await asyncio.sleep(0)
        if self.tainted:
            raise ValueError(f"{args} in a tainted process")
        return "ok"

    async def restart(self, reason):
        await super().restart(reason)
        self.tainted = False


@pytest.mark.parametrize("max_calls", [1, 4])
@pytest.mark.parametrize("count", [1, 3])
def test_an_error_is_judged_alone_in_a_process_that_nobody_else_has_been_in(count, max_calls):
    async def main():
        p = pool(*(Tainted(str(i)) for i in range(count)), max_calls=max_calls)
        names = ["bad" if i in (3, 4, 17) else f"good {i}" for i in range(24)]
        found = await asyncio.gather(*(p.call(str(i), "m", n) for i, n in enumerate(names)), return_exceptions=True)
        for name, answer in zip(names, found, strict=True):
            assert isinstance(answer, RowError) if name == "bad" else answer == "ok", (name, answer)
        assert all(slot.held == 0 and not slot.calls and not slot.alone for slot in p.fleet.slots)

    asyncio.run(main())


def test_two_broken_processes_are_no_witnesses_against_a_call():
    """Both have raised on it, and both are replaced before it is judged."""

    async def main():
        broken = [Tainted(str(i)) for i in range(2)]
        p = pool(*broken, max_calls=1)
        for replica in broken:
            replica.tainted = True
        assert await p.call("x", "m", "good") == "ok"

    asyncio.run(main())


def test_calls_that_are_given_up_leave_nothing_behind():
    async def main():
        gate = asyncio.Event()
        p = pool(Fake("a", [gate.wait] * 40), max_calls=2)
        for _ in range(3):
            calls = [asyncio.ensure_future(p.call(str(i), "m")) for i in range(6)]
            await asyncio.sleep(0)
            for call in calls[::2]:
                call.cancel()
            await asyncio.sleep(0)
            gate.set()
            await asyncio.gather(*calls, return_exceptions=True)
            gate.clear()
        assert p.fleet.slots[0].held == 0 and not p.waiting and not p.fleet.slots[0].calls

    asyncio.run(main())
