"""Processes that start late, fail to start, freeze or stall, on fakes: when they are replaced, when the run ends."""

from __future__ import annotations

import asyncio

import pytest
from ray.exceptions import RayTaskError
from replicas import Dead, Fake, forever, pool

from actors.cluster import RayReplica
from actors.fleet import Fault
from aisp_dist.config import ConfigError
from aisp_dist.placement import Group


def test_a_replica_that_cannot_come_back_ends_the_run_only_when_no_other_is_left(monkeypatch):
    monkeypatch.setattr("actors.fleet._BACKOFF", (0.001, 0.002))

    async def broken():
        raise Fault("did not start")

    async def main():
        with pytest.raises(Fault, match="did not start"):
            await pool(Fake("a", [Dead("gone")], broken)).call("x", "m")
        lost, other = Fake("a", [Dead("gone")], broken), Fake("b")
        p = pool(lost, other)
        assert [await p.call(str(i), "m") for i in range(20)] == ["ok"] * 20
        await asyncio.sleep(0.05)
        assert len(lost.restarts) > 3 and not p.fleet.broken, "tried for again while the other works"
        lost.on_restart = None
        await asyncio.sleep(0.01)
        assert all(slot.up for slot in p.fleet.slots)

    asyncio.run(main())


def test_frozen_and_idle_replicas_are_found_and_replaced_and_their_calls_go_on():
    async def main():
        events = []
        frozen, hung, fine = Fake("frozen", [forever]), Fake("hung", [forever]), Fake("fine")
        frozen.health = forever
        hung.health = lambda: asyncio.sleep(0, {"progress": 7, "busy": 1.0})
        for slow in (frozen, hung):
            p = pool(slow, timeout=3600, stall=0.05)
            p.fleet.event = lambda *event: events.append(event)
            watch = asyncio.ensure_future(p.fleet.watch())

            async def mended(slow=slow):
                slow.health = fine.health

            slow.on_restart = mended
            assert await asyncio.wait_for(p.call("x", "m"), 5) == "ok" and len(slow.restarts) == 1
            watch.cancel()
        assert "no sign of life for 0.05 s" in frozen.restarts[0] and "busy, and no progress" in hung.restarts[0]
        assert events.count(("stall", "frozen")) == events.count(("restart", "frozen")) == 1

    asyncio.run(main())


def test_a_pool_begins_with_as_many_as_are_needed_and_takes_in_the_others_later(monkeypatch):
    monkeypatch.setattr("actors.fleet._BACKOFF", (0.001, 0.002))

    async def main():
        machine = asyncio.Event()
        late = Fake("late", restart=machine.wait)
        p = pool(Fake("a"), late)
        await asyncio.wait_for(p.fleet.ready(1), 5)
        assert await p.call("x", "m") == "ok" and not late.calls
        machine.set()
        await asyncio.sleep(0.01)
        await asyncio.gather(*(p.call(str(i), "m") for i in range(8)))
        assert late.calls

        async def broken():
            raise Fault("no such machine")

        with pytest.raises(Fault, match="no such machine"):
            await asyncio.wait_for(pool(Fake("a"), Fake("b", restart=broken)).fleet.ready(2), 5)

        async def refused():
            raise ConfigError("no such model")

        with pytest.raises(ConfigError, match="no such model"):
            await asyncio.wait_for(pool(Fake("a"), Fake("b", restart=refused)).fleet.ready(2), 5)

    asyncio.run(main())


def test_counts_add_up_over_the_processes_of_a_replica():
    async def main():
        p = pool(Fake("a", ["ok", Dead("gone")]), Fake("b"))
        await p.fleet.refresh()
        assert p.fleet.counts() == {"busy_seconds": 2.0}
        p.home["x", 0] = p.fleet.slots[0]
        await p.call("x", "m")
        await p.call("x", "m")
        await p.fleet.refresh()
        assert p.fleet.counts() == {"busy_seconds": 3.0}, "a's first process is counted still"

    asyncio.run(main())


def test_nothing_is_sent_to_a_process_that_is_still_loading():
    async def main():
        loading = []

        async def load():
            loading.append(1)
            await asyncio.sleep(0.01)
            loading.clear()

        async def work():
            assert not loading, "sent while it loads"
            return "ok"

        p = pool(Fake("a", [Dead("gone"), *[work] * 9], load), max_calls=1)
        assert await asyncio.gather(*(p.call(str(i), "m") for i in range(5))) == ["ok"] * 5

    asyncio.run(main())


def test_a_start_that_fails_does_not_end_what_another_is_still_starting(monkeypatch):
    monkeypatch.setattr("actors.fleet._BACKOFF", (0.0, 0.001))

    async def broken():
        raise Fault("no room")

    async def main():
        p = pool(Fake("a", restart=broken), Fake("b", restart=lambda: asyncio.sleep(0.1)))
        await asyncio.wait_for(p.fleet.ready(1), 5)
        assert await p.call("x", "m") == "ok"

    asyncio.run(main())


def test_a_configuration_that_was_good_for_a_first_process_is_no_reason_against_another():
    """Memory that a dead engine has not given back looks like one that is too small."""
    group = Group("generator", 1, 1, 1.0, 0.0, None)
    replica = RayReplica("generator-0", object, (), group, 60.0, False)

    async def load(method):
        raise RayTaskError("load", "", ConfigError("too little memory"))

    replica.call = load
    for why, kind in (("", ConfigError), ("its engine has died", Fault)):
        replica.waits = True  # so that no actor is made
        with pytest.raises(kind, match="too little memory"):
            asyncio.run(replica.restart(why))
